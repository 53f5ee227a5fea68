"""The training after GPTQ: forward pass, gradients, loss, resumption, and what it gains."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from ptq_models import LLAMA_3_70B
from reference_model import ReferenceModel
from torch.nn import functional

from resq_kernels.architecture import (
    FINAL_NORM,
    LINEARS,
    layer_prefix,
)
from resq_kernels.config import DISTILL_LR, ResQConfig
from resq_kernels.formats import QuantizedWeight, unpack_int4
from resq_kernels.ptq import check, distill, student, training
from resq_kernels.ptq.amplitudes import measure_amplitudes, permutations
from resq_kernels.ptq.basis import find_basis
from resq_kernels.ptq.calibrate import calibrate
from resq_kernels.ptq.decoder import DecoderLayer, rope_tables
from resq_kernels.ptq.fuse import fuse_layer
from resq_kernels.ptq.pipeline import quantize_folder
from resq_kernels.ptq.rotate import Rotation, rotate
from resq_kernels.ptq.rounded import GROUPS, RoundedLayer
from resq_kernels.ptq.source import SourceModel
from resq_kernels.ptq.student import BETAS, GAIN_RATE, StudentLayer
from resq_kernels.ptq.workspace import Workspace
from resq_kernels.safetensors_io import CheckpointReader, read_json
from resq_kernels.weights import quantize_weight

CONFIGS = {
    "resq": {},
    "resq-8-bit-rows": {"lo_bits": 8, "kv_bits": 16},
    "resq-symmetric": {"symmetric": True, "high_fraction": 0.25},
    "quarot": {"method": "quarot"},
    "quik": {"method": "quik"},
    "rtn": {"method": "rtn"},
}


def rotation_of(
    model: SourceModel, config: ResQConfig, tokens: torch.Tensor, folder: Path
) -> Rotation | None:
    basis = None
    rope = rope_tables(model.reader.config, model.reader.folder, tokens.shape[1])
    work = Workspace(folder)
    folder.mkdir()
    if config.method == "quik":
        return permutations(
            measure_amplitudes(model, tokens, rope, work, progress=False), model.shape
        )
    if config.method == "resq":
        basis = find_basis(model, calibrate(model, tokens, rope, work, progress=False))
    return rotate(basis, model.shape, config) if config.rotates else None


@pytest.fixture(params=CONFIGS)
def setting(
    request: pytest.FixtureRequest, any_model: Path, tokens: torch.Tensor, tmp_path: Path
) -> tuple[SourceModel, ResQConfig, Rotation | None]:
    model, config = SourceModel(any_model), ResQConfig(**CONFIGS[request.param])
    return model, config, rotation_of(model, config, tokens, tmp_path / "work")


class Pair:
    """A layer that is trained, and everything that it was made of.

    Its INT8 columns are rounded from values between codes, so that gradients are not those of
    codes.
    """

    def __init__(
        self, model: SourceModel, index: int, rotation: Rotation | None, config: ResQConfig
    ) -> None:
        self.shape, self.config = model.shape, config
        self.rope = rope_tables(model.reader.config, model.reader.folder, 48)
        self.layer = fuse_layer(model, index, rotation, config)
        self.weights, self.targets = {}, {}
        for name, weight in self.layer.weights.items():
            k_hi = model.shape.k_hi(name, config)
            self.weights[name] = rounded = quantize_weight(weight, k_hi)
            self.targets[name] = weight[:, rounded.k_lo :] / rounded.weight_scale[:, 1:]

    def student(self) -> StudentLayer:
        return StudentLayer(
            self.shape, self.layer, self.rope, self.config, self.weights, self.targets
        )


def test_a_student_layer_computes_as_the_quantized_one(
    setting: tuple[SourceModel, ResQConfig, Rotation | None],
) -> None:
    """To the bit as the layer that the quantizer rounds and runs."""
    model, config, rotation = setting
    pair = Pair(model, 1, rotation, config)
    quantized = RoundedLayer(model.shape, pair.layer, pair.rope, config)
    for names in GROUPS:
        quantized.round(names, QuantizedWeight.cat([pair.weights[name] for name in names]))
    x = torch.randn(2, 48, model.shape.hidden)
    hidden = quantized.after_attention(x, quantized.o_input(quantized.qkv_input(x)))
    products = quantized.down_input(quantized.gate_up_input(hidden))
    student = pair.student()
    assert torch.equal(student.forward(x), quantized.output(hidden, products))
    for name, weight in student.weights().items():
        assert all(map(torch.equal, weight, pair.weights[name]))


def straight(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """`rounded`, with the gradient of x."""
    return x + (rounded - x).detach()


class GraphLayer(DecoderLayer):
    """The student by autograd alone; `high` and `gains` are trained.

    Every rounding gives what it gives in the student on the input x, so that both compute with the
    same codes where sums in another order would round a value to the other side of a tie.
    """

    def __init__(self, pair: Pair, x: torch.Tensor) -> None:
        super().__init__(pair.shape, pair.layer, pair.rope)
        self.weights = pair.weights
        self.high = {n: t.clone().requires_grad_() for n, t in pair.targets.items()}
        self.gains = {n: torch.zeros(len(t)).requires_grad_() for n, t in pair.targets.items()}
        mine = pair.student()
        codes = [mine.qkv_input(x)]
        self.cached = mine.rounded_heads(*mine.split_heads(mine.qkv(codes[0])))
        codes.append(mine.o_input(codes[0]))
        hidden = mine.after_attention(x, codes[1])
        codes.append(mine.gate_up_input(hidden))
        codes.append(mine.down_input(codes[2]))
        self.inputs = [each.dequantize() for each in codes]

    def qkv_input(self, x: torch.Tensor) -> torch.Tensor:
        return straight(super().qkv_input(x), self.inputs[0])

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        exact = (*self.rotate(queries, keys), values)
        attended = self.mix(*map(straight, exact, self.cached)).flatten(2)
        if self.layer.o_order is not None:
            attended = attended[..., self.layer.o_order]
        return straight(attended, self.inputs[1])

    def gate_up_input(self, hidden: torch.Tensor) -> torch.Tensor:
        return straight(super().gate_up_input(hidden), self.inputs[2])

    def down_input(self, gate_up_input: torch.Tensor) -> torch.Tensor:
        return straight(super().down_input(gate_up_input), self.inputs[3])

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        lo, hi = self.weights[name].weight_scale.split(1, dim=1)
        high = straight(self.high[name], self.high[name].round().clamp(-128, 127))
        weight = torch.cat([lo * unpack_int4(self.weights[name].weight_lo), hi * high], dim=1)
        weight = self.gains[name].exp()[:, None] * weight
        return functional.linear(x, weight, self.layer.biases.get(name))


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm()) if want.numel() else 0.0


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_gradients_pass_every_rounding(
    setting: tuple[SourceModel, ResQConfig, Rotation | None],
    monkeypatch: pytest.MonkeyPatch,
    products: torch.dtype,
) -> None:
    """Those of one graph through the layer."""
    monkeypatch.setattr(student, "product_dtype", lambda *_: products)
    model, config, rotation = setting
    pair = Pair(model, 1, rotation, config)
    x = torch.randn(2, 48, model.shape.hidden, requires_grad=True)
    graph, mine = GraphLayer(pair, x.detach()), pair.student()
    gradient = torch.randn(2, 48, model.shape.hidden)
    (graph.forward(x) - x).backward(gradient)
    by_x = mine.backward(x.detach(), gradient) - gradient
    # In bfloat16 a gradient is rounded to 2^-9 of itself before and after every product.
    limit = 1e-4 if products == torch.float32 else 0.02
    assert x.grad is not None and distance(by_x, x.grad) < limit
    for names in GROUPS:
        rows = [model.shape.linear(name)[0] for name in names]
        for parameters, wanted in ((mine._high, graph.high), (mine._gains, graph.gains)):
            found = parameters[names].grad
            assert found is not None
            for name, got in zip(names, found.split(rows), strict=True):
                want = wanted[name].grad
                assert want is not None
                assert distance(got, want) < limit
                assert not want.numel() or distance(got * (1 + 2 * limit), want) > limit


def test_a_step_is_adams_on_the_divergence_of_the_whole_model(
    any_model: Path, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer by layer as by one graph through all of them."""
    monkeypatch.setattr(student, "product_dtype", lambda *_: torch.float32)
    model, config = SourceModel(any_model), ResQConfig(distill_epochs=1)
    rotation = rotation_of(model, config, tokens, tmp_path / "work")
    head = distill._Head(model, rotation, torch.float32, "cpu")
    x, target = (torch.randn(48, model.shape.hidden) for _ in range(2))
    pairs = [Pair(model, index, rotation, config) for index in range(2)]
    trained = [pair.student() for pair in pairs]
    graph = [GraphLayer(pairs[0], x[None]), GraphLayer(pairs[1], trained[0].forward(x[None]))]
    states = graph[1].forward(graph[0].forward(x[None]))[0]
    loss, gradient = head.divergence(states, target)
    states.backward(gradient)
    with torch.no_grad():
        assert distill._step(trained, head, x, target, 0.25) == pytest.approx(loss, rel=1e-5)
    for other, pair, mine in zip(graph, pairs, trained, strict=True):
        for values, rate in ((other.high, 0.25), (other.gains, 0.25 * GAIN_RATE)):
            torch.optim.Adam([v for v in values.values() if v.numel()], rate, BETAS).step()
        for name, weight in mine.weights().items():
            before = pair.weights[name]
            assert torch.equal(weight.weight_lo, before.weight_lo)
            # Adam's first step is the sign of the gradient, which sums decide where it is 0.
            codes = other.high[name].detach().round().clamp(-128, 127)
            if codes.numel():
                assert (weight.weight_hi == codes).float().mean() > 0.998
                assert (weight.weight_hi != before.weight_hi).float().mean() > 0.1
            scale = before.weight_scale * other.gains[name].detach().exp()[:, None]
            assert torch.isclose(weight.weight_scale, scale).float().mean() > 0.98
            assert not torch.isclose(weight.weight_scale, before.weight_scale)[:, 0].any()


@pytest.mark.parametrize("rotated", [True, False])
def test_the_divergence_and_its_gradient(
    any_model: Path, tokens: torch.Tensor, tmp_path: Path, rotated: bool
) -> None:
    """Against float64; 300 tokens are two blocks of logits."""
    model, config = SourceModel(any_model), ResQConfig()
    rotation = rotation_of(model, config, tokens, tmp_path / "work") if rotated else None
    states, targets = (torch.randn(300, model.shape.hidden) for _ in range(2))
    gain, matrix = model.load(FINAL_NORM).double(), model.load(model.head).double()

    def log_probabilities(x: torch.Tensor) -> torch.Tensor:
        normed = x / (x.square().mean(-1, keepdim=True) + model.shape.norm_eps).sqrt()
        return (normed * gain @ matrix.T).log_softmax(-1)

    exact = states.double().requires_grad_()
    turned = exact if rotation is None else exact @ rotation.hidden.T
    p, q = log_probabilities(targets.double()), log_probabilities(turned)
    want = functional.kl_div(q, p, log_target=True, reduction="batchmean")
    want.backward()
    with torch.no_grad():
        head = distill._Head(model, rotation, torch.float32, "cpu")
        got, gradient = head.divergence(states, targets)
    assert got == pytest.approx(want.item(), rel=1e-5)
    assert exact.grad is not None
    torch.testing.assert_close(
        gradient.double(), exact.grad, rtol=0, atol=1e-5 * exact.grad.abs().max().item()
    )


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [distill.learning_rate(step, 40, 2.0) for step in range(40)]
    assert rates[0] == pytest.approx(0.4) and max(rates) < 2.0
    assert rates.index(max(rates)) == 4 and rates[20] == pytest.approx(1.0)
    assert 0 < rates[-1] < 0.01 and rates[4:] == sorted(rates[4:], reverse=True)


def divergence(folder: Path, model: SourceModel, tokens: torch.Tensor) -> float:
    """Mean KL of a quantized folder from the model it was made from."""
    from transformers import AutoModelForCausalLM

    source = AutoModelForCausalLM.from_pretrained(model.reader.folder, dtype=torch.float32)
    with torch.no_grad():
        p, q = source(tokens).logits, ReferenceModel(folder, tokens.shape[1]).logits(tokens)
    p, q = (x.flatten(0, 1).double().log_softmax(-1) for x in (p, q))
    return float(functional.kl_div(q, p, log_target=True, reduction="batchmean"))


@pytest.mark.parametrize(
    ("method", "weights"),
    [("resq", "gptq"), ("resq", "rtn"), ("quarot", "gptq"), ("quik", "gptq"), ("rtn", "gptq")],
)
def test_training_brings_the_quantized_model_closer(
    llama: Path, tmp_path: Path, method: str, weights: str
) -> None:
    """As it is written; 4-bit codes are those of the model without a training."""
    windows, found, folders = torch.randint(0, 256, (24, 64)), [], []
    model = SourceModel(llama)
    for epochs in (0, 6):
        config = ResQConfig(method=method, weights=weights, distill_epochs=epochs)
        folders.append(tmp_path / f"{epochs}")
        report = quantize_folder(llama, folders[-1], windows, config, progress=False)
        assert ("distillation" in report) == (epochs > 0)
        found.append(divergence(folders[-1], model, windows))
    losses = report["distillation"]
    assert isinstance(losses, list) and len(losses) == 6 * 24
    assert found[1] < (0.95 if method == "resq" else 0.98) * found[0]  # measured: 0.91, 0.95, 0.93
    before, after = map(CheckpointReader, folders)
    for index in range(model.shape.layers):
        for name in LINEARS:
            prefix = f"{layer_prefix(index)}{name}"
            codes, high, scale = (
                [folder.load(f"{prefix}.{field}") for folder in (before, after)]
                for field in QuantizedWeight._fields
            )
            assert torch.equal(*codes)
            assert not high[0].numel() or not torch.equal(*high)
            assert not torch.equal(*scale)


class Interruption(Exception):
    pass


@pytest.mark.parametrize("saves", [True, False])
def test_an_interrupted_training_continues_to_the_same_bits(
    qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: bool
) -> None:
    """From its last state, or from the beginning if it has none."""
    windows, config = torch.randint(0, 256, (3, 32)), ResQConfig(distill_epochs=2)
    quantize_folder(qwen2, tmp_path / "whole", windows, config, progress=False)
    original, calls = distill._step, []

    def step(*args: object) -> float:
        calls.append(1)
        if len(calls) == 4:
            raise Interruption
        return original(*args)

    monkeypatch.setattr(distill, "_step", step)
    if saves:
        monkeypatch.setattr(training, "STATE_SECONDS", -1.0)
    with pytest.raises(Interruption):
        quantize_folder(qwen2, tmp_path / "out", windows, config, progress=False)
    quantize_folder(qwen2, tmp_path / "out", windows, config, resume=True, progress=False)
    assert len(calls) == 4 + (3 if saves else 6)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    reports = [read_json(tmp_path / f / "quantization_report.json") for f in ("whole", "out")]
    assert reports[0]["distillation"] == reports[1]["distillation"]


def test_a_finished_training_is_not_repeated(
    qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resq_kernels.ptq import pipeline

    windows, config = torch.randint(0, 256, (3, 32)), ResQConfig(method="rtn", distill_epochs=1)

    def interrupted(*args: object) -> None:
        raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "save", interrupted)
        with pytest.raises(Interruption):
            quantize_folder(qwen2, tmp_path / "out", windows, config, progress=False)
    left = {path.name for path in (tmp_path / "out.partial").iterdir()}
    assert "distilled.safetensors" in left and "distill-state.safetensors" not in left
    monkeypatch.setattr(distill, "_step", interrupted)
    monkeypatch.setattr(pipeline, "calibrate", interrupted)
    quantize_folder(qwen2, tmp_path / "out", windows, config, resume=True, progress=False)


def test_a_rate_that_diverges_is_named(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill._Head, "divergence", lambda *_: (math.nan, torch.zeros(48, 128)))
    words = r"distill: expected a finite divergence, got nan in step 0; distill_lr 0.01 is too la"
    config = ResQConfig(distill_epochs=1, distill_lr=0.01)
    with pytest.raises(ValueError, match=words):
        quantize_folder(
            llama, tmp_path / "out", torch.randint(0, 256, (1, 48)), config, progress=False
        )


def test_the_learning_rate_belongs_to_a_training() -> None:
    assert ResQConfig(distill_epochs=1).distill_lr == DISTILL_LR
    assert ResQConfig().distill_lr is None
    with pytest.raises(ValueError, match="distill_lr: expected None without distill_epochs"):
        ResQConfig(distill_lr=1e-5)
    for epochs in (-1, 1.0, True):
        with pytest.raises((TypeError, ValueError), match="distill_epochs: expected"):
            ResQConfig(distill_epochs=epochs)
    for rate in (0.0, -1.0, math.inf, math.nan, "1e-4"):
        with pytest.raises((TypeError, ValueError), match="distill_lr: expected"):
            ResQConfig(distill_epochs=1, distill_lr=rate)


def test_a_model_that_cannot_be_trained_in_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Llama-3-70B, eighths of all inputs in INT8."""
    shape = LLAMA_3_70B
    rows = 2 * 8192 + 2 * 1024 + 2 * 28672
    weights = 80 * 8192 * (rows + 28672)
    high = 80 * (rows * 1024 + 8192 * 3584)
    trained = high + 80 * (rows + 8192)
    memory = (weights + trained) // 2 + 12 * trained + weights // 10 + 2 * 128256 * 8192
    words = f"distill_epochs: expected at least {memory / 1e9:.1f} GB of memory on cpu, got"
    monkeypatch.setattr(check.os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else memory)
    check.check_memory(shape, ResQConfig(distill_epochs=1), "cpu", torch.bfloat16, 2048)
    less = memory - 1
    monkeypatch.setattr(check.os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else less)
    with pytest.raises(ValueError, match=words):
        check.check_memory(shape, ResQConfig(distill_epochs=1), "cpu", torch.bfloat16, 2048)
    check.check_memory(shape, ResQConfig(), "cpu", torch.bfloat16, 2048)
