"""What every operator refuses before its kernel: a gradient that it would lose, mixed devices."""

import re
from typing import Any

import pytest
import torch

from resq_kernels import ops
from resq_kernels.testing.quantized_models import random_quantized

FILL = {"int": 1, "SymInt": 1, "float": 1.0, "ScalarType": torch.half}
FILL |= {"List[int]": [1], "List[float]": [1.0]}


def arguments(op: str, special: str, tensor: torch.Tensor) -> dict[str, Any]:
    """Any arguments of the right types, and `tensor` as the one named `special`."""
    filled: dict[str, Any] = {}
    for argument in getattr(torch.ops.resq, op).default._schema.arguments:
        kind = str(argument.real_type)
        if "Tensor" in kind:
            value = tensor if argument.name == special else torch.zeros(1)
            filled[argument.name] = [value] if kind.startswith("List") else value
        elif argument.has_default_value():
            filled[argument.name] = argument.default_value
        else:
            filled[argument.name] = FILL[kind]
    return filled


def tensor_arguments() -> list[tuple[str, str]]:
    schemas = {op: getattr(torch.ops.resq, op).default._schema for op in ops.__all__}
    return [
        (op, argument.name)
        for op, schema in schemas.items()
        for argument in schema.arguments
        if "Tensor" in str(argument.type)
    ]


CASES = tensor_arguments()


def place(op: str, argument: str) -> str:
    """How an error names the tensor of an argument, which may be in a list."""
    schema = getattr(torch.ops.resq, op).default._schema.arguments
    (found,) = (other for other in schema if other.name == argument)
    return f"{argument}[0]" if str(found.real_type).startswith("List") else argument


@pytest.mark.parametrize(("op", "argument"), CASES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_gradient_is_refused(op: str, argument: str, device: str) -> None:
    needy = torch.zeros(1, device=device, requires_grad=True)
    words = f"{op}: {place(op, argument)}: expected a tensor that needs no gradient, got one that "
    words = "^" + re.escape(words) + "requires it"
    given = arguments(op, argument, needy)
    with pytest.raises(RuntimeError, match=words):
        getattr(torch.ops.resq, op)(**given)
    with pytest.raises(RuntimeError, match=words):
        getattr(torch.ops.resq, op)(*given.values())


@pytest.mark.parametrize(("op", "argument"), CASES)
def test_one_tensor_on_another_device_is_refused(op: str, argument: str) -> None:
    names = [name for case, name in CASES if case == op]
    if len(names) == 1:
        pytest.skip("one tensor is on one device")
    given = arguments(op, argument, torch.zeros(1, device="meta"))
    odd = names[1] if argument == names[0] else argument
    devices = ("meta", "cpu") if argument == names[0] else ("cpu", "meta")
    words = f"{op}: {place(op, odd)}: expected a tensor on {devices[0]} as {names[0]}, got one on "
    words += devices[1]
    with torch.no_grad(), pytest.raises(RuntimeError, match="^" + re.escape(words)):
        getattr(torch.ops.resq, op)(**given)


WAYS = {
    "wrapper": ops.hadamard,
    "operator": torch.ops.resq.hadamard,
    "overload": torch.ops.resq.hadamard.default,
    "functorch": lambda x: torch.func.grad(lambda y: ops.hadamard(y).sum())(x.detach()),
    "forward": lambda x: torch.func.jvp(ops.hadamard, (x.detach(),), (x.detach(),)),
    "compiled": torch.compile(ops.hadamard, backend="aot_eager"),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_lose_a_gradient_is_refused(way: str) -> None:
    x = torch.randn(2, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="hadamard: x: expected a tensor that needs no gradient"):
        WAYS[way](x)
    if way not in ("functorch", "forward"):  # these two make a gradient themselves
        assert torch.equal(WAYS[way](x.detach()), ops.hadamard(x.detach()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd_nothing_is_refused_and_its_state_stays(mode: Any) -> None:
    x = torch.randn(2, 64, requires_grad=True)
    excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
    with mode():
        before = excluded(torch._C.DispatchKey.AutogradCPU)
        y = ops.hadamard(x)
        with pytest.raises(RuntimeError, match="hadamard: x: expected"):
            ops.hadamard(x.double())
        assert excluded(torch._C.DispatchKey.AutogradCPU) == before
    assert not y.requires_grad and torch.equal(y, ops.hadamard(x.detach()))
    assert (x * 1).requires_grad  # autograd goes on as before


def test_a_model_runs_where_gradients_are_recorded() -> None:
    """Its parameters need none, so nothing is lost: the same bits as without autograd."""
    model, ids = random_quantized("llama"), torch.arange(5, 30)[None]
    with torch.no_grad():
        expected = model(ids).logits
    assert torch.is_grad_enabled()
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_traced_operator_gives_the_same_bits(mode: Any) -> None:
    """torch checks a trace by a second one without gradients, places of calls included."""
    with mode():
        traced = torch.jit.trace(ops.hadamard, torch.randn(2, 64))
        x = torch.randn(5, 64)
        assert torch.equal(traced(x), ops.hadamard(x))
