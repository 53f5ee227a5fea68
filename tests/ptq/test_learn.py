"""Learned rotations: steps, gradients, what is computed without rounding, what learning gains."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from ptq_models import LLAMA_3_70B
from test_fuse import fused_transformers_model, reference_logits, relative, rotation_of
from torch.nn import functional

from resq_kernels import from_pretrained
from resq_kernels.config import PRESETS, ROTATION_LR, ROTATION_STEPS, ResQConfig
from resq_kernels.formats import RowFormat
from resq_kernels.ptq import check, learn, pipeline, straight, training
from resq_kernels.ptq.cayley import block_mask, cayley, direction, step_size
from resq_kernels.ptq.decoder import rope_tables
from resq_kernels.ptq.pipeline import quantize_folder
from resq_kernels.ptq.rotate import Rotation, block_masks, random_orthogonal
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.turned import TurnedLayer, Turns
from resq_kernels.ptq.workspace import LEARNED, Workspace
from resq_kernels.safetensors_io import read_json

EPS = torch.finfo(torch.float64).eps


def off_orthogonal(matrix: torch.Tensor) -> float:
    eye = torch.eye(matrix.shape[-1], dtype=torch.float64)
    return float((matrix.mT @ matrix - eye).abs().amax())


def random_matrix(size: int, seed: int) -> torch.Tensor:
    return random_orthogonal(size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rate", [1e-3, 1.0, 100.0])
def test_a_step_is_orthogonal_to_rounding(rate: float) -> None:
    """Backward error of a solve with partial pivoting is a few n eps of the matrix's norm, and the
    inverse of I + t/2 A has norm 1 at most: ||C^T C - I|| <= c n eps, c of order 10."""
    size = 96
    ascent = direction(torch.randn(size, size, dtype=torch.float64), block_mask(size, {60}))
    step = cayley(ascent, torch.tensor([[rate]], dtype=torch.float64))
    assert off_orthogonal(step) < 10 * size * EPS
    assert not step[60:, :60].any() and not step[:60, 60:].any()
    assert not torch.equal(step, torch.eye(size, dtype=torch.float64))
    matrix = random_matrix(size, 1)
    for _ in range(100):  # errors of products add up
        matrix = matrix @ step
    assert off_orthogonal(matrix) < 100 * 10 * size * EPS


def test_directions_and_sizes() -> None:
    gradient = torch.randn(3, 8, 8, dtype=torch.float64)
    ascent = direction(gradient, block_mask(8, {4, 6}))
    assert torch.equal(ascent, -ascent.mT)
    assert not ascent[:, 4:, :4].any() and not ascent[:, 6:, 4:6].any() and ascent[:, 0, 1].all()
    norms = ascent.abs().sum(-2).amax(-1)
    sizes = step_size(ascent, 0.5 / float(norms.median())).flatten()
    assert torch.equal(sizes, (1 / norms).clamp_max(0.5 / float(norms.median())))
    nothing = torch.zeros(2, 4, 4, dtype=torch.float64)
    assert torch.equal(
        cayley(nothing, step_size(nothing, 1.5)), torch.eye(4).double().repeat(2, 1, 1)
    )


def test_steps_find_a_rotation_that_is_known() -> None:
    """||U - V||^2 has the minimum 0 at V where det U = det V; in blocks, at the blocks of V."""
    size, mask = 12, block_mask(12, {8})
    wanted = torch.block_diag(random_matrix(8, 2), random_matrix(4, 3))
    matrix = torch.eye(size, dtype=torch.float64)
    for block in (slice(0, 8), slice(8, 12)):
        if torch.linalg.det(wanted[block, block]) < 0:
            wanted[block.start] *= -1
    distances = []
    for _ in range(300):
        # By D of U (I + D): U^T times the gradient 2 (U - V) by U.
        ascent = direction(2 * matrix.T @ (matrix - wanted), mask)
        matrix = matrix @ cayley(ascent, step_size(ascent, 0.2))
        distances.append(float((matrix - wanted).square().sum()))
    assert distances == sorted(distances, reverse=True) or distances[-1] < 1e-20
    assert distances[-1] < 1e-12 and off_orthogonal(matrix) < 1e-12


CONFIGS = {
    "resq": {},
    "resq-quarter": {"high_fraction": 0.25, "symmetric": True},
    "paper": {"bases": "principal", "hadamard_block": 0, "activation_clip": 1.0},
    "quarot": {"method": "quarot", "kv_bits": 16},
}


@pytest.fixture(params=CONFIGS)
def setting(
    request: pytest.FixtureRequest, any_model: Path, tokens: torch.Tensor, tmp_path: Path
) -> tuple[SourceModel, ResQConfig, Rotation]:
    model, config = SourceModel(any_model), ResQConfig(**CONFIGS[request.param])
    return model, config, rotation_of(model, tokens, config, tmp_path)


def random_turn(size: int, mask: torch.Tensor) -> torch.Tensor:
    ascent = direction(torch.randn(size, size, dtype=torch.float64), mask)
    return cayley(ascent, torch.tensor([[0.7]], dtype=torch.float64))


def turned_logits(
    model: SourceModel, rotation: Rotation, config: ResQConfig, tokens: torch.Tensor
) -> torch.Tensor:
    """Of the model that is learned on, with bases that were turned."""
    rope = rope_tables(model.reader.config, model.reader.folder, tokens.shape[1])
    turns = Turns.begin(rotation, torch.float32, "cpu")
    hidden, values = block_masks(model.shape, config)
    size, head = model.shape.hidden, model.shape.head_dim
    turns.multiply(random_turn(size, hidden), random_turn(head, values).expand_as(turns.values))
    x = model.embed(tokens)
    with torch.no_grad():
        for index in range(model.shape.layers):
            x = TurnedLayer(model, index, rotation, turns, rope, config, "cpu").forward(x)
        head_of = learn._Head(model, torch.float32, "cpu")._float
        return head_of.logits(head_of.norm(x))


def test_without_rounding_it_is_the_source(
    setting: tuple[SourceModel, ResQConfig, Rotation],
    tokens: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the bases; float32 sums and a key rotation in float16 differ by less than 1e-3."""
    model, config, rotation = setting

    def exact(x: torch.Tensor, *_: object) -> torch.Tensor:
        return x

    with monkeypatch.context() as patch:
        patch.setattr(straight.RoundRows, "apply", exact)
        patch.setattr(straight.RoundCache, "apply", exact)
        patch.setattr(straight.RoundInBasis, "apply", lambda x, turn, u, *_: (x @ u) @ u.mT)
        found = turned_logits(model, rotation, config, tokens)
    wanted = reference_logits(model.reader.folder, tokens)
    assert relative(found.double(), wanted) < 2e-3
    rounded = turned_logits(model, rotation, config, tokens)
    assert relative(rounded.double(), wanted) > 0.02


def ste(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    return x + (rounded - x).detach()


def test_the_gradient_of_a_turn() -> None:
    """That of one graph through the turned rounding, but for its symmetric part."""
    x = torch.randn(5, 7, 16, requires_grad=True)
    matrix, row_format = random_matrix(16, 4).float(), RowFormat(4, packed=False)
    turn, other = (torch.zeros(16, 16, requires_grad=True) for _ in range(2))
    weight = torch.randn(16)
    straight.RoundInBasis.apply(x, turn, matrix, row_format).tanh().matmul(weight).sum().backward()
    by_x, x.grad = x.grad, None
    turned_x = x @ matrix @ (torch.eye(16) + other)
    rounded = straight.ops.mixed_quantize(turned_x.detach(), *row_format).dequantize()
    back = ste(turned_x, rounded) @ (torch.eye(16) + other).mT @ matrix.mT
    back.tanh().matmul(weight).sum().backward()
    assert turn.grad is not None and other.grad is not None
    found, wanted = (t.grad - t.grad.mT for t in (turn, other))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    torch.testing.assert_close(by_x, x.grad, rtol=1e-4, atol=1e-5)


def test_the_loss_and_its_gradient(any_model: Path) -> None:
    """Against float64; 300 tokens are two blocks of logits."""
    model = SourceModel(any_model)
    head = learn._Head(model, torch.float32, "cpu")
    states, tokens = torch.randn(300, model.shape.hidden), torch.randint(0, 256, (300,))
    exact = states.double().requires_grad_()
    normed = exact / (exact.square().mean(-1, keepdim=True) + model.shape.norm_eps).sqrt()
    gain, matrix = model.load("model.norm.weight").double(), model.load(model.head).double()
    logits = normed[:-1] * gain @ matrix.T
    wanted = functional.cross_entropy(logits, tokens[1:])
    wanted.backward()
    with torch.no_grad():
        loss, gradient = head.loss(states, tokens)
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    assert exact.grad is not None
    atol = 1e-5 * exact.grad.abs().max().item()
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=0, atol=atol)
    assert torch.equal(head.embed(tokens), model.embed(tokens))


def test_the_rate_falls_in_a_line() -> None:
    assert [learn.learning_rate(step, 4, 1.5) for step in range(4)] == [1.5, 1.125, 0.75, 0.375]


def work_folder(folder: Path) -> Workspace:
    folder.mkdir(exist_ok=True)
    return Workspace(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_learned_model_computes_the_source(
    any_model: Path, tokens: torch.Tensor, tmp_path: Path, name: str
) -> None:
    """In float64 with the learned matrices in its weights; blocks stay, and turned."""
    model = SourceModel(any_model)
    config = ResQConfig(rotations="learned", rotation_steps=3, **CONFIGS[name])
    first = rotation_of(model, tokens, config, tmp_path)
    rope = rope_tables(model.reader.config, model.reader.folder, tokens.shape[1])
    work = work_folder(tmp_path / "learn")
    found = learn.learn(model, first, tokens, rope, config, work, progress=False)
    assert [piece.name for piece in work.root.iterdir()] == ["learned.safetensors"]
    size = model.shape.hidden
    assert off_orthogonal(found.hidden) < 4 * 10 * size * EPS + off_orthogonal(first.hidden)
    eye = torch.eye(model.shape.head_dim, dtype=torch.float64)
    assert (found.values @ found.values_inverse - eye).abs().max() < 1e-11
    masks = block_masks(model.shape, config)
    for before, after, mask in (
        (first.hidden.mT, found.hidden, masks[0]),
        (first.values_inverse, found.values, masks[1]),
    ):
        turn = before @ after
        assert (turn * ~mask).abs().max() < 1e-11
        assert (turn - torch.eye(turn.shape[-1])).abs().max() > 1e-5
    for name in ("keys", "key_factors", "intermediate_factors", "intermediate_order"):
        assert torch.equal(getattr(found, name), getattr(first, name))
    fused = fused_transformers_model(any_model, model, found, config)
    with torch.no_grad():
        logits = fused(tokens).logits
    assert relative(logits, reference_logits(any_model, tokens)) < 8 * 2.0**-24


@pytest.mark.parametrize("options", [{}, {"method": "quarot"}], ids=["resq", "quarot"])
def test_a_folder_with_learned_rotations_loads(
    llama: Path, tokens: torch.Tensor, tmp_path: Path, options: dict
) -> None:
    logits = {}
    for kind in ("random", "learned"):
        steps = 5 if kind == "learned" else None
        config = ResQConfig(rotations=kind, rotation_steps=steps, **options)
        report = quantize_folder(llama, tmp_path / kind, tokens, config, progress=False)
        assert len(report.get("learning", [])) == (steps or 0)
        with torch.no_grad():
            logits[kind] = from_pretrained(tmp_path / kind)(tokens).logits.double()
    wanted = reference_logits(llama, tokens)
    errors = {kind: relative(found, wanted) for kind, found in logits.items()}
    assert errors["learned"] < 1.2 * errors["random"] < 0.6
    assert not torch.equal(logits["random"], logits["learned"])


class Interruption(Exception):
    pass


@pytest.mark.parametrize("saves", [True, False])
def test_interrupted_learning_continues_to_the_same_bits(
    qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: bool
) -> None:
    """From its last state, or from the beginning if it has none; what is learned stays learned."""
    windows = torch.randint(0, 256, (3, 32))
    config = ResQConfig(rotations="learned", rotation_steps=7)
    quantize_folder(qwen2, tmp_path / "whole", windows, config, progress=False)
    original, calls = learn._gradients, []

    def gradients(*args: object) -> float:
        calls.append(1)
        if len(calls) == 5:
            raise Interruption
        return original(*args)

    monkeypatch.setattr(learn, "_gradients", gradients)
    if saves:
        monkeypatch.setattr(training, "STATE_SECONDS", -1.0)
    out = tmp_path / "out"
    with pytest.raises(Interruption):
        quantize_folder(qwen2, out, windows, config, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "quantize", lambda *_: (_ for _ in ()).throw(Interruption))
        with pytest.raises(Interruption):
            quantize_folder(qwen2, out, windows, config, resume=True, progress=False)
    assert len(calls) == 5 + (3 if saves else 7)
    left = {path.name for path in (tmp_path / "out.partial").iterdir()}
    assert f"{LEARNED}.safetensors" in left and f"{learn.STATE}.safetensors" not in left
    quantize_folder(qwen2, out, windows, config, resume=True, progress=False)
    assert len(calls) == 5 + (3 if saves else 7)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes()
    reports = [read_json(tmp_path / f / "quantization_report.json") for f in ("whole", "out")]
    assert reports[0]["learning"] == reports[1]["learning"] and len(reports[0]["learning"]) == 7


def test_every_window_is_learned_on() -> None:
    config = ResQConfig(rotations="learned", rotation_steps=11)
    order = learn._order(4, config)
    assert [sorted(order[i : i + 4]) for i in (0, 4)] == [[0, 1, 2, 3]] * 2
    assert len(order) == 11 and len(set(order[8:])) == 3
    assert order != learn._order(4, dataclasses.replace(config, seed=1))


def test_a_loss_that_is_not_finite_is_named(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learn, "_gradients", lambda *_: math.nan)
    words = "rotations: expected a finite loss, got nan in step 0; the model overflows on these"
    with pytest.raises(ValueError, match=words):
        quantize_folder(
            *(llama, tmp_path / "out", torch.randint(0, 256, (1, 48))),
            ResQConfig(rotations="learned"),
            progress=False,
        )


def test_options_of_learning() -> None:
    learned = ResQConfig(rotations="learned")
    assert (learned.rotation_steps, learned.rotation_lr) == (ROTATION_STEPS, ROTATION_LR)
    assert (ResQConfig().rotation_steps, ResQConfig().rotation_lr) == (None, None)
    assert ResQConfig(**learned.to_dict()) == learned
    words = r"^rotations: method 'rtn' has none to learn, expected 'random' .*, got 'learned'$"
    with pytest.raises(ValueError, match=words):
        ResQConfig(method="rtn", rotations="learned")
    for field, value in (("rotation_steps", 8), ("rotation_lr", 0.5)):
        words = f"^{field}: expected None with rotations 'random', which are not learned, got"
        for method in ("resq", "rtn"):
            with pytest.raises(ValueError, match=words):
                ResQConfig(method=method, **{field: value})
    with pytest.raises(ValueError, match="^seqlen: expected at least 2 with learned rotations"):
        ResQConfig(rotations="learned", seqlen=1)
    for value in (0, -1, 2.0, True, "3"):
        with pytest.raises((TypeError, ValueError), match="^rotation_steps: expected"):
            ResQConfig(rotations="learned", rotation_steps=value)
    for value in (0.0, -1.0, math.inf, math.nan, "1"):
        with pytest.raises((TypeError, ValueError), match="^rotation_lr: expected"):
            ResQConfig(rotations="learned", rotation_lr=value)


def test_the_preset_of_spinquant() -> None:
    config = ResQConfig.from_preset("spinquant", samples=8)
    assert config.preset == "spinquant" and config.method == "quarot"
    assert config.rotations == "learned" and config.high_fraction == 0.0
    assert PRESETS["spinquant"] == {
        "method": "quarot",
        "rotations": "learned",
        "token_weights": "uniform",
        "hessian_inputs": "exact",
        "activation_clip": 1.0,
        "embedding_bits": 16,
        "dialogues": 0,
    }
    other = ResQConfig.from_preset("spinquant", rotations="random")
    assert other.preset is None and other.rotation_steps is None
    with pytest.raises(ValueError, match="^rotations: method 'rtn' has none to learn"):
        ResQConfig.from_preset("spinquant", method="rtn")


def test_a_model_that_cannot_be_learned_in_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Llama-3-70B, products in float32."""
    shape = LLAMA_3_70B
    layer = 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672)
    memory = 4 * (80 * layer + 128256 * 8192) + 2 * 128256 * 8192 + 12 * layer
    memory += 4 * 2048 * (81 * 8192 + 40 * 28672)
    monkeypatch.setattr(check, "product_dtype", lambda *_: torch.float32)

    def check_with(memory: int, **options: str) -> None:
        monkeypatch.setattr(check, "device_memory", lambda _: memory)
        check.check_memory(shape, ResQConfig(**options), "cpu", torch.bfloat16, 2048)

    check_with(memory, rotations="learned")
    check_with(memory - 1)
    words = f"rotations: expected at least {memory / 1e9:.1f} GB of memory on cpu for 'learned', "
    with pytest.raises(ValueError, match=f"{words}got .* GB; 'random' learns nothing"):
        check_with(memory - 1, rotations="learned")
