"""The options of a quantization: one frozen dataclass, validated on construction."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any, ClassVar, cast

METHODS = ("resq", "quarot", "quik", "rtn")
WEIGHT_METHODS = ("gptq", "rtn")
BASES = ("balanced", "principal")
TOKEN_WEIGHTS = ("attention", "uniform")
HESSIAN_INPUTS = ("rounded", "exact")
ROTATIONS = ("random", "learned")
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "bases": "principal",
        "token_weights": "uniform",
        "hessian_inputs": "exact",
        "hadamard_block": 0,
        "activation_clip": 1.0,
        "embedding_bits": 16,
        "dialogues": 0,
    },
    "spinquant": {
        "method": "quarot",
        "rotations": "learned",
        "token_weights": "uniform",
        "hessian_inputs": "exact",
        "activation_clip": 1.0,
        "embedding_bits": 16,
        "dialogues": 0,
    },
    "quik": {
        "method": "quik",
        "token_weights": "uniform",
        "hessian_inputs": "exact",
        "activation_clip": 1.0,
        "embedding_bits": 16,
        "dialogues": 0,
    },
}
"""What differs from the defaults, by name: the choices of arXiv 2412.14363 (ResQ), of arXiv
2405.16406 (SpinQuant) and of arXiv 2310.09259 (QUIK) as their authors' code makes them
(docs/notes/0051-preset-paper.md, docs/notes/0054-learned-rotations.md, docs/notes/0058-quik.md)."""
HIGH_FRACTION = 0.125
"""The share of the methods "resq" and "quik", unless another is given."""
HADAMARD_BLOCK = 256
"""Columns of a block of the Hadamard transform where some of down_proj's input is in INT8."""
HADAMARD_BLOCKS = (0, 8, 16, 32, 64, 128, 256)
"""What `hadamard_block` may be."""
ROTATION_STEPS = 100
"""As in SpinQuant."""
ROTATION_LR = 1.5
"""As in SpinQuant."""
DISTILL_LR = 0.02
"""In steps of the INT8 weights (docs/notes/0033-distillation.md)."""
HELD_OUT = 4
"""Windows of the calibration text on which a quantized model is measured, unless others are asked
for."""
CLIPPED_RANGE = 5.5
"""The range in standard deviations that 4-bit rows keep: 16 codes round Gaussian values best over
5.1, and real rows, which are not quite Gaussian, over a little more (docs/notes/0030)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResQConfig:
    """The options of `quantize`.

    Args:
        method: "resq" (PCA bases, random rotation inside each subspace, INT8 + INT4), "quarot"
            (random rotation only, uniform INT4), "quik" (no rotation, the channels of the largest
            amplitude in INT8, the others in INT4) or "rtn" (no rotation, uniform INT4).
        weights: "gptq" or "rtn" (round to nearest); both search the clipping range by MSE.
        high_fraction: share of every input dimension kept in INT8. By default (None) 0.125 with
            methods "resq" and "quik", and 0 with the uniform methods, which take no other.
        bases: those of keys and values. "balanced": against what reads them, queries and o_proj,
            with a factor for every rotary pair of the keys and for every channel between up_proj
            and down_proj. "principal": by their own variance alone, without factors, as in the
            paper; refused with the other methods, which have no bases.
        rotations: those inside the INT4 part and the INT8 part. "random", or "learned": U_A and U_B
            start as these and are then trained on the calibration windows (`ptq.learn`). Methods
            "quik" and "rtn" have none.
        rotation_steps: windows on which they are learned, one after the other, in passes over the
            calibration windows; by default (None) 100 where they are learned, and no other value
            than None where they are not.
        rotation_lr: first learning rate of these steps, likewise; by default 1.5.
        token_weights: how tokens count in the basis of the hidden states and in the Hessian of q, k
            and v: "attention" (by what they receive of it, `ptq.token_weights`) or "uniform".
        hessian_inputs: on which inputs GPTQ rounds, and errors are reported: "rounded" (activations
            and cache as at run time) or "exact" (no activation is rounded, weights of earlier
            linears are).
        hadamard_block: largest block of the Hadamard transform of down_proj's input, a power of two
            from 8 to 256 (`ModelShape.hadamard_block` is the one that a model has): the channels
            that matter most stay in INT8 as they are, `high_fraction` of them and what is left of
            whole blocks; the others are transformed in blocks and go to INT4. 0: the whole row is
            transformed and goes to INT4. None, the default: 256, or 0 without INT8 columns. The
            uniform methods take neither blocks nor INT8 columns; method "quik" takes no blocks, and
            keeps `high_fraction` in INT8 as everywhere.
        lo_bits: bits of the low part of the activations, 4 or 8 (weights stay INT4); a finished
            model can be loaded with either (`from_pretrained`).
        symmetric: symmetric instead of asymmetric activations.
        activation_clip: factor on the range of the low part of the activations, in (0, 1], or None
            (the default): what fits each width (`clip`).
        kv_bits: 4 (mixed 4/8 with methods "resq" and "quik", uniform 4 otherwise) or 16 (cache not
            quantized).
        embedding_bits: 8 (embedding and head in INT8, one scale a row) or 16 (not quantized).
        samples, seqlen: calibration windows and their length in tokens.
        dialogues: how many of those windows the 16-bit model writes itself, in its chat template
            (`ptq.dialogues`), fewer than `samples`. None, the default: a quarter where there is
            a template, the whole model fits the memory, and anything depends on the windows.
        damping: GPTQ's diagonal damping as a share of the mean diagonal.
        distill_epochs: passes over the calibration windows that train the INT8 columns and the
            rows' gains of the rounded weights to give the 16-bit model's predictions
            (`ptq.distill`); 0, the default, trains nothing.
        distill_lr: largest learning rate of that training, in steps of the INT8 weights; by default
            (None) 0.02 where there is one, and no other value than None where there is none.
        seed: seed of the rotations, of the choice of calibration windows, and of their order in
            both trainings.

    Raises:
        TypeError: a value is of another type; the message names the field.
        ValueError: a value is outside its range; the message names the field.
    """

    # transformers reads this attribute of a `quantization_config`; our quantizer then says what to
    # do.
    quant_method: ClassVar[str] = "resq"

    method: str = "resq"
    weights: str = "gptq"
    bases: str = "balanced"
    rotations: str = "random"
    rotation_steps: int | None = None
    rotation_lr: float | None = None
    token_weights: str = "attention"
    hessian_inputs: str = "rounded"
    high_fraction: float = cast(float, None)  # a number as soon as the object exists
    hadamard_block: int | None = None
    lo_bits: int = 4
    symmetric: bool = False
    activation_clip: float | None = None
    kv_bits: int = 4
    embedding_bits: int = 8
    samples: int = 128
    seqlen: int = 2048
    dialogues: int | None = None
    damping: float = 0.01
    distill_epochs: int = 0
    distill_lr: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.high_fraction is None:
            share = HIGH_FRACTION if self.mixed else 0.0
            object.__setattr__(self, "high_fraction", share)
        names = ("method", "weights", "bases", "rotations", "token_weights", "hessian_inputs")
        for name in names:
            self._is_a(name, str, "a name")
        if self.distill_lr is None and self.distill_epochs:
            object.__setattr__(self, "distill_lr", DISTILL_LR)
        if self.rotations == "learned":
            if self.rotation_steps is None:
                object.__setattr__(self, "rotation_steps", ROTATION_STEPS)
            if self.rotation_lr is None:
                object.__setattr__(self, "rotation_lr", ROTATION_LR)
        integers = ("lo_bits", "kv_bits", "embedding_bits", "samples", "seqlen", "distill_epochs")
        maybe = ("hadamard_block", "rotation_steps", "dialogues")
        counted = [n for n in maybe if getattr(self, n) is not None]
        for name in (*integers, *counted, "seed"):
            self._is_a(name, int, "an integer")
        maybe = ("activation_clip", "rotation_lr", "distill_lr")
        optional = [n for n in maybe if getattr(self, n) is not None]
        for name in ("high_fraction", *optional, "damping"):
            self._is_a(name, (int, float), "a number")
            object.__setattr__(self, name, float(getattr(self, name)))
        if not isinstance(self.symmetric, bool):
            raise TypeError(f"symmetric: expected True or False, got {self.symmetric!r}")

        _one_of("method", self.method, METHODS)
        _one_of("weights", self.weights, WEIGHT_METHODS)
        _one_of("bases", self.bases, BASES)
        if self.method != "resq" and self.bases != BASES[0]:
            raise ValueError(
                f"bases: method {self.method!r} has none, expected {BASES[0]!r} (the default), got "
                f"{self.bases!r}"
            )
        _one_of("rotations", self.rotations, ROTATIONS)
        self._check_learning()
        _one_of("token_weights", self.token_weights, TOKEN_WEIGHTS)
        _one_of("hessian_inputs", self.hessian_inputs, HESSIAN_INPUTS)
        _one_of("lo_bits", self.lo_bits, (4, 8))
        _one_of("kv_bits", self.kv_bits, (4, 16))
        _one_of("embedding_bits", self.embedding_bits, (8, 16))
        if not 0.0 <= self.high_fraction < 1.0:
            raise ValueError(f"high_fraction: expected a share in [0, 1), got {self.high_fraction}")
        if not self.mixed and self.high_fraction != 0.0:
            raise ValueError(
                f"high_fraction: method {self.method!r} is uniform 4-bit, expected 0, "
                f"got {self.high_fraction}"
            )
        _one_of("hadamard_block", self.hadamard_block, (None, *HADAMARD_BLOCKS))
        if self.method != "resq" and self.hadamard_block:
            why = "transforms nothing" if self.mixed else "is uniform 4-bit"
            raise ValueError(
                f"hadamard_block: method {self.method!r} {why}, expected 0, got "
                f"{self.hadamard_block}"
            )
        if self.activation_clip is not None and not 0.0 < self.activation_clip <= 1.0:
            raise ValueError(f"activation_clip: expected (0, 1], got {self.activation_clip}")
        for name in ("samples", "seqlen"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.dialogues is not None and not 0 <= self.dialogues < self.samples:
            raise ValueError(
                f"dialogues: expected fewer than the {self.samples} samples, got {self.dialogues}"
            )
        if not 0.0 < self.damping < math.inf:
            raise ValueError(f"damping: expected a positive share, got {self.damping}")
        if self.distill_epochs < 0:
            raise ValueError(f"distill_epochs: expected at least 0, got {self.distill_epochs}")
        if self.distill_lr is not None:
            if not self.distill_epochs:
                raise ValueError(
                    "distill_lr: expected None without distill_epochs, which trains nothing, got "
                    f"{self.distill_lr}"
                )
            if not 0.0 < self.distill_lr < math.inf:
                raise ValueError(f"distill_lr: expected a positive rate, got {self.distill_lr}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed: expected an integer of 64 bits, got {self.seed}")

    def _check_learning(self) -> None:
        if self.rotations != "learned":
            for name in ("rotation_steps", "rotation_lr"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}: expected None with rotations {self.rotations!r}, which are not "
                        f"learned, got {getattr(self, name)}"
                    )
            return
        if not self.rotates:
            raise ValueError(
                f"rotations: method {self.method!r} has none to learn, expected {ROTATIONS[0]!r} "
                f"(the default), got {self.rotations!r}"
            )
        if self.seqlen < 2:
            raise ValueError(
                "seqlen: expected at least 2 with learned rotations, which predict the next token, "
                f"got {self.seqlen}"
            )
        if cast(int, self.rotation_steps) < 1:
            raise ValueError(f"rotation_steps: expected at least 1, got {self.rotation_steps}")
        if not 0.0 < cast(float, self.rotation_lr) < math.inf:
            raise ValueError(f"rotation_lr: expected a positive rate, got {self.rotation_lr}")

    @classmethod
    def from_preset(cls, name: str, **options: Any) -> ResQConfig:
        """The options of a preset; those that are given override it.

        Args:
            name: a key of `PRESETS`.
            options: fields.

        Raises:
            TypeError, ValueError: there is no such preset or field, or the values are impossible.
        """
        _one_of("preset", name, tuple(PRESETS))
        return cls(**{**PRESETS[name], **options})

    @property
    def preset(self) -> str | None:
        """The preset all of whose choices are made here."""
        mine = self.to_dict().items()
        return next((name for name, choices in PRESETS.items() if choices.items() <= mine), None)

    def _is_a(self, name: str, kind: type | tuple[type, ...], word: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name}: expected {word}, got {value!r}")

    @property
    def text_samples(self) -> int:
        """Calibration windows that come from the text."""
        return self.samples - (self.dialogues or 0)

    @property
    def rotates(self) -> bool:
        """Whether the model is rotated offline and down_proj's input goes through a Hadamard."""
        return self.method in ("resq", "quarot")

    @property
    def has_basis(self) -> bool:
        """Whether hidden states, keys and values are in a basis that is not the source's: rotated,
        or with method "quik" permuted."""
        return self.method != "rtn"

    @property
    def mixed(self) -> bool:
        """Whether the method keeps a part of inputs, keys and values in INT8."""
        return self.method in ("resq", "quik")

    def with_lo_bits(self, lo_bits: int) -> ResQConfig:
        """The options of the same weights with activations in other bits.

        No weight depends on them but through GPTQ, and weights rounded for 4-bit activations serve
        8-bit ones as well as their own (docs/notes/0044-activation-bits-at-run-time.md). A clip
        that was chosen for 4 bits is dropped: 8 bits need none.

        Raises:
            TypeError, ValueError: as for the field.
        """
        drops = lo_bits == 8 and self.lo_bits == 4 and self.activation_clip is not None
        clip = 1.0 if drops else self.activation_clip
        return dataclasses.replace(self, lo_bits=lo_bits, activation_clip=clip)

    def clip(self, k_lo: int) -> float:
        """The factor on the range of rows of `k_lo` low columns.

        Formula: `activation_clip` if it is given. Otherwise, where rotated rows have 4 bits,
        min(1, 5.5 / r) in steps of 0.01, r = 2 quantile((k_lo - 0.375) / (k_lo + 0.25)) the
        expected range of k_lo normal values (Blom), in standard deviations: 0.91 for 504, 0.7 for
        14336. 1 where rows are not rotated or have 8 bits.

        Source: a random rotation makes rows Gaussian, whose range grows with their width while the
        range that 16 codes round best does not; measured in docs/notes/0030-clip-by-width.md.
        """
        if self.activation_clip is not None:
            return self.activation_clip
        if not self.rotates or self.lo_bits != 4 or k_lo < 2:
            return 1.0
        expected = 2 * statistics.NormalDist().inv_cdf((k_lo - 0.375) / (k_lo + 0.25))
        return round(min(1.0, CLIPPED_RANGE / expected), 2)

    def to_dict(self) -> dict[str, object]:
        """The fields as plain values, in declaration order."""
        return dataclasses.asdict(self)


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {value!r}")
