"""Every operator of csrc/schema.cpp exists in every layer under the same name."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from resq_kernels import ops, reference

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = (ROOT / "csrc/schema.cpp").read_text()
QUERIES = {
    "cpu_isa",
    "cpu_isa_missing",
    "cuda_family",
    "cuda_pdl",
    "cuda_device",
    "mixed_gemm_kernel",
    "mixed_gemm_choices",
    "force_kernel",
}  # facts about the library and which kernel it runs; no tensors
# Makes what another operator takes, beside it.
MAKERS = {"prepare_decode_step"}
OPS = sorted(set(re.findall(r'm\.def\(\s*"(\w+)\(', SCHEMA)) - QUERIES - MAKERS)
# The reference works on canonical codes, so packing has no counterpart there.
LAYOUT_ONLY = {"pack_weight", "unpack_weight"}
# Made of the others, which its test compares it with.
COMPOSED = {"decode_step", "decoder_layers"}


def test_schema_lists_the_contract() -> None:
    assert len(OPS) == 16


@pytest.mark.parametrize("op", [*OPS, *sorted(MAKERS)])
def test_op_has_kernel_and_fake(op: str) -> None:
    name = f"resq::{op}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None


@pytest.mark.parametrize("op", OPS)
def test_op_has_wrapper_reference_folder_tests_and_docs(op: str) -> None:
    wrapper = getattr(ops, op)
    assert inspect.getmodule(wrapper).__name__ == f"resq_kernels.ops.{op}"
    assert inspect.getdoc(wrapper), f"{op}: the wrapper has no docstring"
    if op not in LAYOUT_ONLY | COMPOSED:
        assert callable(getattr(reference, op))
    assert (ROOT / f"csrc/ops/{op}/{op}.h").exists()
    assert (ROOT / f"tests/ops/test_{op}.py").exists()
    assert f"## `{op}`" in (ROOT / "docs/ops.md").read_text()


@pytest.mark.parametrize("op", [*OPS, *sorted(MAKERS)])
def test_wrapper_and_docs_have_the_arguments_of_the_schema(op: str) -> None:
    schema = getattr(torch.ops.resq, op).default._schema
    expected = [
        (argument.name, argument.default_value if argument.has_default_value() else inspect._empty)
        for argument in schema.arguments
    ]
    wrapper = inspect.signature(getattr(ops, op)).parameters.values()
    assert [(parameter.name, parameter.default) for parameter in wrapper] == expected
    text = (ROOT / "docs/ops.md").read_text()
    found = re.search(rf"^## `{op}`\n`\((.*)\) -> (.*)`$", text, re.M)
    assert found, f"docs/ops.md: {op}: expected `(arguments) -> results` under the title"
    scope: dict[str, object] = {}
    exec(f"def documented({found[1]}): ...", scope)
    documented = inspect.signature(scope["documented"]).parameters.values()
    assert [(parameter.name, parameter.default) for parameter in documented] == expected
    assert found[2].count(",") + 1 == len(schema.returns)


@pytest.mark.parametrize(
    "op", sorted(set(OPS) - LAYOUT_ONLY - COMPOSED - {"mixed_gemm", "embedding"})
)
def test_wrapper_takes_the_arguments_of_the_reference(op: str) -> None:
    wrapper = list(inspect.signature(getattr(ops, op)).parameters)
    assert wrapper == list(inspect.signature(getattr(reference, op)).parameters)
