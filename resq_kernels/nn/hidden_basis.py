"""The float model's basis at the borders of a rotated model: embeddings in, hidden states out."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from resq_kernels.nn.linear import keep_dtype

if TYPE_CHECKING:
    from resq_kernels.nn.linear_basis import LinearBases

# The attribute of a restored tensor that holds what it was restored from.
_ROTATED = "resq_rotated"


class HiddenBasis(nn.Module):
    """x U_A and its inverse: from the float model's hidden states to the quantized model's.

    Inside, a hidden state is x U_A, and after the final norm, whose gain g lives in the head, it is
    (y / g) U_A where the float model has y. What a caller gives and gets is in the float model's
    basis (`attach`).

    Args:
        hidden_size: K.
        stored: whether the checkpoint holds the basis; formats before 3 do not.
        dtype: of the gain.
        device: where the parameters are made.

    Attributes:
        rotation: U_A, float16 [K, K], or None if it is not stored; no `.to(dtype)` casts it.
        gain: g [K], or None.
        linears: what the bases of the linears take besides, or None; formats before 6 do not hold
            it.

    Source: arXiv 2412.14363, section 4.2 (U_A).
    """

    rotation: nn.Parameter | None
    gain: nn.Parameter | None
    linears: LinearBases | None

    def __init__(
        self,
        hidden_size: int,
        *,
        stored: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.register_parameter("rotation", None)
        self.register_parameter("gain", None)
        self.register_module("linears", None)
        if stored:
            eye = torch.eye(hidden_size, dtype=torch.float16, device=device)
            self.rotation = nn.Parameter(eye, requires_grad=False)
            ones = torch.ones(hidden_size, dtype=dtype, device=device)
            self.gain = nn.Parameter(ones, requires_grad=False)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x U_A of hidden states or embeddings [..., K], rounded to x's dtype.

        Raises:
            ValueError: the checkpoint does not hold the basis.
        """
        if (rows := _remembered(x, self.restore)) is not None:
            return rows
        return (x.float() @ self._stored(self.rotation, x)).to(x.dtype)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """x U_A^T: the float model's hidden states or embeddings [..., K], rounded to x's dtype.

        Raises:
            ValueError: the checkpoint does not hold the basis.
        """
        return (x.float() @ self._stored(self.rotation, x).mT).to(x.dtype)

    def rotate_normed(self, x: torch.Tensor) -> torch.Tensor:
        """(x / g) U_A, what the head reads, of the float model's states [..., K] after its final
        norm, in x's dtype; 0 / 0 is 0.

        Raises:
            ValueError: the checkpoint does not hold the basis.
        """
        if (rows := _remembered(x, self.restore_normed)) is not None:
            return rows
        gain = self._stored(self.gain, x)
        normed = torch.where((gain == 0) & (x == 0), 0.0, x.float() / gain)
        return (normed @ self._stored(self.rotation, x)).to(x.dtype)

    def restore_normed(self, x: torch.Tensor) -> torch.Tensor:
        """g x U_A^T: the float model's states [..., K] after its final norm, in x's dtype.

        Raises:
            ValueError: the checkpoint does not hold the basis.
        """
        restored = x.float() @ self._stored(self.rotation, x).mT
        return (restored * self._stored(self.gain, x)).to(x.dtype)

    @staticmethod
    def _stored(tensor: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        """The tensor in float32 on x's device, which may be another one than the embedding's."""
        if tensor is None:
            raise ValueError(
                "hidden_basis: expected the rotation of the hidden states, got a checkpoint of a "
                "format before 3, which holds none: embeddings and hidden states have no meaning "
                "outside of this model; quantize the model again"
            )
        return tensor.to(x.device, torch.float32)

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> HiddenBasis:
        kept = () if self.rotation is None else (self.rotation,)
        apply: Callable[..., nn.Module] = super()._apply  # torch leaves it without types
        apply(keep_dtype(fn, *kept), recurse)
        return self


def remember(restored: torch.Tensor, rotated: torch.Tensor) -> torch.Tensor:
    """`restored`, which `rotate` or `rotate_normed` turns into exactly what it was made from."""
    setattr(restored, _ROTATED, rotated)
    return restored


def _remembered(
    x: torch.Tensor, restore: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor | None:
    rotated: torch.Tensor | None = getattr(x, _ROTATED, None)
    # It may have been changed in place since. A compiled graph cannot look.
    if rotated is None or torch.compiler.is_compiling() or not torch.equal(restore(rotated), x):
        return None
    return rotated


class RotatedEmbedding(nn.Embedding):
    """An embedding E U_A in the source's dtype that returns rows of E to whoever calls it."""

    takes_rotated = True

    def __init__(self, embedding: nn.Embedding, basis: HiddenBasis) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(embedding.__dict__)  # keeps all that it holds
        self.basis = basis

    def forward(self, ids: torch.Tensor, rotated: bool = False) -> torch.Tensor:
        """Rows of E, or of E U_A if `rotated`, in the dtype of the weight [..., K]."""
        rows = super().forward(ids)
        return rows if rotated else remember(self.basis.restore(rows), rows)


def attach(model: nn.Module, decoder: nn.Module) -> None:
    """Makes all that a caller gives or gets be in the float model's basis.

    That is `inputs_embeds` and what the embedding returns, `hidden_states`, `last_hidden_state`
    of a decoder and the input of a head. A pass from ids to logits turns nothing: there the model
    tells its decoder, by an argument, and its head, by a context variable, that they hear from it.

    Args:
        model: a model with a head, or the decoder itself.
        decoder: with `hidden_basis`, and an `embed_tokens` that takes `rotated`; one that is put in
            its place later, say around it, returns the float model's embeddings.
    """
    decoder.register_forward_pre_hook(_rotate_inputs, with_kwargs=True)
    decoder.register_forward_hook(_restore_outputs, with_kwargs=True)
    head: Any = getattr(model, "lm_head", None)
    if head is not None:
        head.takes_rotated = True
        head.register_forward_pre_hook(partial(_rotate_head_input, decoder))
        model.register_forward_pre_hook(_enter, with_kwargs=True)
        model.register_forward_hook(_leave, always_call=True)


# The head of the model whose `forward` this thread is in.
_HEAD: ContextVar[nn.Module | None] = ContextVar("head", default=None)
# The argument by which a model asks its decoder for the rotated last hidden state.
_FOR_HEAD = "for_rotated_head"


def _enter(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not getattr(model.lm_head, "takes_rotated", False):  # another one in the place of ours
        return args, kwargs
    if not torch.compiler.is_compiling():
        _HEAD.set(model.lm_head)
    return args, {**kwargs, _FOR_HEAD: True}


def _leave(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not torch.compiler.is_compiling():
        _HEAD.set(None)


def _rotate_head_input(
    decoder: Any, head: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """Rotates what a caller gives the head. A compiled graph cannot read the variable: in it the
    caller is taken for the model."""
    if torch.compiler.is_compiling() or _HEAD.get() is head:
        return None
    return (decoder.hidden_basis.rotate_normed(args[0]), *args[1:])


POSITIONAL = ("input_ids", "attention_mask", "position_ids", "cache", "inputs_embeds")
"""Arguments that a decoder of transformers takes without their names."""


def _rotate_inputs(
    decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replaces ids, or embeddings of the float model, by embeddings of this one."""
    given = {**dict(zip(POSITIONAL, args, strict=False)), **kwargs}
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        return args, kwargs  # the decoder refuses it
    embeds = embedded(decoder, ids, embeds)
    inputs = {"input_ids": None, "inputs_embeds": embeds}
    placed = [inputs.get(*pair) for pair in zip(POSITIONAL, args, strict=False)]
    named = {name: x for name, x in inputs.items() if name not in POSITIONAL[: len(args)]}
    return (*placed, *args[len(placed) :]), {**kwargs, **named}


def embedded(decoder: Any, ids: torch.Tensor | None, embeds: torch.Tensor | None) -> torch.Tensor:
    """The first hidden states, in the basis of the weights.

    Args:
        decoder: a decoder that `nn.convert` has converted, rotated or not.
        ids: of the tokens; not used with `embeds`.
        embeds: the float model's embeddings [..., hidden], or None.
    """
    if embeds is None and getattr(decoder.embed_tokens, "takes_rotated", False):
        rotated: torch.Tensor = decoder.embed_tokens(ids, rotated=True)
        return rotated
    states: torch.Tensor = decoder.embed_tokens(ids) if embeds is None else embeds
    basis = decoder.hidden_basis
    return states if basis is None else basis.rotate(states)


def _restore_outputs(
    decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Restores `last_hidden_state`, but for the head, and what `output_hidden_states` collected."""
    states, for_head = _hidden_states(output), kwargs.get(_FOR_HEAD, False)
    if for_head and states is None:
        return output
    basis, last = decoder.hidden_basis, output[0]
    restored = remember(basis.restore_normed(last), last)
    if states is not None:
        # transformers puts the normed state in the place of the last; others may be left out.
        states = tuple(
            restored if state is last else state if state is None else basis.restore(state)
            for state in states
        )
    if isinstance(output, tuple):
        rest = (states if isinstance(item, tuple) else item for item in output[1:])
        return (last if for_head else restored, *rest)
    output.hidden_states = states
    if not for_head:
        output.last_hidden_state = restored
    return output


def _hidden_states(output: Any) -> Any:
    """The collected states of a model's output; in a plain tuple they are the only tuple."""
    if not isinstance(output, tuple):
        return output.hidden_states
    return next((item for item in output if isinstance(item, tuple)), None)
