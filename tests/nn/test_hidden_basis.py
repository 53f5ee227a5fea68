"""What a caller gives and gets is in the float model's basis; the kernels' is x U_A."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from resq_kernels.config import ResQConfig
from resq_kernels.nn.hidden_basis import HiddenBasis
from resq_kernels.testing.quantized_models import random_quantized

IDS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(1))
ALL = [{}, {"embedding_bits": 16}, {"method": "quarot"}, {"method": "quik"}, {"kv_bits": 16}]


@torch.no_grad()
def run(model: Any, **inputs: Any) -> Any:
    return model(use_cache=False, **inputs)


def inside(model: Any) -> list[torch.Tensor]:
    """The rotated states that the layers and the last norm pass on."""
    found: list[torch.Tensor] = []
    modules = [*model.model.layers, model.model.norm]
    hooks = [model.model.layers[0].register_forward_pre_hook(lambda _, args: found.append(args[0]))]
    hooks += [m.register_forward_hook(lambda _, args, y: found.append(y)) for m in modules]
    run(model, input_ids=IDS)
    for hook in hooks:
        hook.remove()
    del found[-2]  # transformers leaves out the last layer's output, too
    return found


def in_float_basis(basis: HiddenBasis, x: torch.Tensor, normed: bool) -> torch.Tensor:
    restored = x.double() @ basis.rotation.double().T
    return restored * basis.gain.double() if normed else restored


@pytest.mark.parametrize("options", ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_hidden_states(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = random_quantized("llama", ResQConfig(**options)).to(dtype)
    states = run(model, input_ids=IDS, output_hidden_states=True).hidden_states
    expected = inside(model)
    assert len(states) == len(expected) == 3
    for index, (state, rotated) in enumerate(zip(states, expected, strict=True)):
        assert state.dtype == dtype
        exact = in_float_basis(model.model.hidden_basis, rotated, normed=index == 2)
        # One rounding to the dtype, and 128 terms and the gain in float32.
        bound = torch.finfo(dtype).eps * exact.abs() / 2 + 2.0**-22 * 128 * rotated.abs().max()
        assert ((state.double() - exact).abs() <= bound).all()
        assert ((rotated.double() - exact).abs() > bound).any()


def test_hidden_states_in_a_plain_tuple_and_by_index() -> None:
    model = random_quantized("qwen2")
    expected = run(model, input_ids=IDS, output_hidden_states=True).hidden_states
    states = run(model, input_ids=IDS, output_hidden_states=True, return_dict=False)[-1]
    assert all(map(torch.equal, states, expected))
    first, *others = run(model, input_ids=IDS, output_hidden_states=[0]).hidden_states
    assert torch.equal(first, expected[0]) and not any(torch.is_tensor(other) for other in others)
    decoder = model.model
    plain, named = run(decoder, input_ids=IDS, return_dict=False), run(decoder, input_ids=IDS)
    assert torch.equal(plain[0], named.last_hidden_state)


@pytest.mark.parametrize("options", ALL, ids=str)
def test_embeddings_are_those_of_the_float_model(options: dict[str, Any]) -> None:
    model = random_quantized("llama", ResQConfig(**options), num_hidden_layers=1)
    basis, embed = model.model.hidden_basis, model.get_input_embeddings()
    rotated, restored = embed(IDS, rotated=True), embed(IDS)
    assert torch.allclose(restored.double(), in_float_basis(basis, rotated, False), atol=1e-4)
    expected = run(model, input_ids=IDS).logits

    def error(embeddings: torch.Tensor) -> float:
        logits = run(model, inputs_embeds=embeddings).logits
        return float((logits - expected).norm() / expected.norm())

    assert error(restored) == 0
    # U_A has 11 bits, so U_A U_A^T is not exactly 1, and some of the random model's 4-bit codes
    # flip (0.05 to 0.16); a rotation too few or too many gives unrelated logits (1.4).
    assert error(restored.clone()) < 0.3
    assert error(rotated) > 1.0
    assert error(basis.restore(restored)) > 1.0
    changed = restored.clone().mul_(-1)
    assert torch.equal(
        run(model, inputs_embeds=restored.mul_(-1)).logits,
        run(model, inputs_embeds=changed).logits,
    )


@pytest.mark.parametrize("positions", [1, 5])
def test_arguments_without_names(positions: int) -> None:
    decoder = random_quantized("llama").model
    expected = run(decoder, input_ids=IDS).last_hidden_state
    with torch.no_grad():
        given = (IDS, None, None, None, None)[:positions]
        assert torch.equal(decoder(*given).last_hidden_state, expected)
        by_name = run(decoder, inputs_embeds=decoder.embed_tokens(IDS)).last_hidden_state
        embeddings = (None, None, None, None, decoder.embed_tokens(IDS))
        assert torch.equal(decoder(*embeddings).last_hidden_state, by_name)
    for wrong in ({}, {"input_ids": IDS, "inputs_embeds": decoder.embed_tokens(IDS)}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            run(decoder, **wrong)


@pytest.mark.parametrize("options", [{}, {"embedding_bits": 16}], ids=str)
def test_a_hook_on_the_embedding_is_called_and_a_copy_is_whole(options: dict[str, Any]) -> None:
    model = random_quantized("llama", ResQConfig(**options))
    other, calls = copy.deepcopy(model), []
    other.model.embed_tokens.register_forward_hook(lambda *args: calls.append(1))
    other.model.hidden_basis.rotation.data.zero_()
    assert torch.equal(run(other, input_ids=IDS).logits, run(model, input_ids=IDS).logits)
    assert len(calls) == 1
    assert not other.model.embed_tokens(IDS).any() and model.model.embed_tokens(IDS).any()


class Around(torch.nn.Module):
    """An embedding with a learned offset, as soft prompts and adapters put them around another."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.offset = inner, torch.nn.Parameter(torch.randn(128))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids) + self.offset


@pytest.mark.parametrize("options", [*ALL, {"method": "rtn"}], ids=str)
def test_an_embedding_in_the_place_of_ours_gives_embeddings_of_the_float_model(
    options: dict[str, Any],
) -> None:
    model = random_quantized("llama", ResQConfig(**options))
    embed, before = model.get_input_embeddings(), run(model, input_ids=IDS).logits
    for other in (Around(embed), torch.nn.Embedding(320, 128)):
        model.set_input_embeddings(other)
        got = run(model, input_ids=IDS).logits
        assert not torch.allclose(got, before, atol=0.1)
        with torch.no_grad():
            rows = other(IDS)
        assert torch.equal(got, run(model, inputs_embeds=rows).logits)
    model.set_input_embeddings(embed)
    assert torch.equal(run(model, input_ids=IDS).logits, before)


def test_a_model_that_is_not_rotated_has_no_basis() -> None:
    model = random_quantized("llama", ResQConfig(method="rtn"))
    assert model.model.hidden_basis is None
    states = run(model, input_ids=IDS, output_hidden_states=True).hidden_states
    assert all(map(torch.equal, states, inside(model)))


def test_without_a_stored_basis_nothing_rotated_leaves_the_model() -> None:
    """Formats before 3."""
    model = random_quantized("llama")
    expected = run(model, input_ids=IDS).logits
    model.model.hidden_basis.rotation = model.model.hidden_basis.gain = None
    assert torch.equal(run(model, input_ids=IDS).logits, expected)
    for inputs in (
        {"input_ids": IDS, "output_hidden_states": True},
        {"inputs_embeds": torch.zeros(1, 2, 128)},
    ):
        with pytest.raises(ValueError, match="expected the rotation of .* format before"):
            run(model, **inputs)
    with pytest.raises(ValueError, match="quantize the model again"):
        model.get_input_embeddings()(IDS)


@pytest.mark.parametrize("options", [*ALL, {"method": "rtn"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_head_takes_the_last_state(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = random_quantized("llama", ResQConfig(**options)).to(dtype)
    decoder, expected = model.model, run(model, input_ids=IDS).logits
    last = run(decoder, input_ids=IDS).last_hidden_state
    states = run(model, input_ids=IDS, output_hidden_states=True).hidden_states
    assert torch.equal(last, states[-1])
    with torch.no_grad():
        assert torch.equal(model.lm_head(last), expected)
        assert torch.equal(model.lm_head(states[-1]), expected)
        sliced = model.lm_head(last[:, -1:])
        assert torch.equal(model.forward(IDS, use_cache=False).logits, run_forward(model))
    error = (sliced - expected[:, -1:]).float().norm() / expected[:, -1:].float().norm()
    assert error < (0.01 if dtype == torch.float32 else 0.03)  # two roundings to the dtype more


def run_forward(model: Any) -> torch.Tensor:
    """Logits by the parts of a model, each called by itself."""
    last = run(model.model, input_ids=IDS).last_hidden_state
    return model.lm_head(last[:, slice(0, None), :])


def test_a_head_in_the_place_of_ours_gets_the_float_models_state() -> None:
    model = random_quantized("llama")
    last = run(model.model, input_ids=IDS).last_hidden_state
    other = torch.nn.Linear(128, 7, bias=False)
    model.set_output_embeddings(other)
    assert torch.equal(run(model, input_ids=IDS).logits, other(last))


def test_a_pass_that_fails_does_not_change_what_the_head_expects() -> None:
    model = random_quantized("llama")
    last = run(model.model, input_ids=IDS).last_hidden_state
    expected = run(model, input_ids=IDS).logits
    with pytest.raises(ValueError, match="output_attentions"):
        run(model, input_ids=IDS, output_attentions=True)
    with torch.no_grad():
        assert torch.equal(model.lm_head(last), expected)


def test_a_gain_of_zero_leaves_no_nan() -> None:
    basis = random_quantized("llama").model.hidden_basis
    basis.gain.data[3] = 0
    normed = torch.randn(5, 128)
    restored = basis.restore_normed(normed)
    assert not restored[:, 3].any() and basis.rotate_normed(restored).isfinite().all()
    kept = basis.restore(normed)
    kept[:, 3] = 0  # what the head loses by its gain
    found, exact = basis.rotate_normed(restored).double(), basis.rotate(kept).double()
    assert (found - exact).abs().max() < 2.0**-9
