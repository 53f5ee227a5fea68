"""The compiled kernels: instructions they are made for, registers within the committed table."""

from __future__ import annotations

import emulation
import pytest

tool = emulation.load_file("tools/kernel_table.py")

# kernel's first word -> architecture -> key instructions that it must hold.
REQUIRED = {
    "mixed_gemm_sm80": {"sm_80": ["IMMA.16832.S8.S8", "LDGSTS.128", "LDSM"]},
    "mixed_gemm_sm90": {"sm_90a": ["IGMMA", "UTMALDG.2D", "UBLKCP", "LDS.128"]},
    "mixed_gemm_small_m": {"sm_80": ["IMMA.16832.S8.S8", "LDG.128"]},
    "mixed_quantize": {"sm_80": ["LDG.128"]},
    "rms_norm_quantize": {"sm_80": ["LDG.128"]},
    "rms_norm_kernel": {"sm_80": ["LDG.128", "STG.128"]},
    "kv_append_kernel": {"sm_80": ["LDS.128"]},
    "kv_dequantize_kernel": {"sm_80": ["LDGSTS.128", "STG.128"]},
    "kv_attention_kernel": {
        arch: ["HMMA.16816.F32", "LDGSTS.128", "LDS.128"] for arch in ("sm_80", "sm_90")
    },
    "kv_attention_sm90_kernel": {
        "sm_90a": ["HMMA.16816.F32", "UBLKCP", "LDS.128", "ACQBULK", "PREEXIT"]
    },
    "kv_attention_merge_kernel": {"sm_90": ["ACQBULK"]},
}


# What launch_pdl (csrc/cuda/pdl.cuh) launches.
DEPENDENT = (
    "mixed_quantize_kernel",
    "rms_norm_quantize_kernel",
    "rms_norm_kernel",
    "silu_mul_",
    "hadamard_kernel",
    "mixed_gemm_",
    "kv_append_kernel",
    "kv_attention_sm90_kernel",
    "kv_attention_merge_kernel",
)


@pytest.fixture(scope="module")
def built() -> dict[str, dict[str, tool.Kernel]]:
    if not tool.LIBRARY.exists():
        pytest.skip("the CUDA library is not built (no nvcc)")
    if tool.find_cuobjdump() is None:
        pytest.skip("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return tool.kernels()


def test_table_lists_every_kernel_and_no_other(built: dict) -> None:
    listed = {name: sorted(per_arch) for name, per_arch in tool.committed().items()}
    assert {name: sorted(per_arch) for name, per_arch in built.items()} == listed, (
        "run `python tools/kernel_table.py --write` and look at the difference"
    )


def test_registers_are_within_the_table_and_no_kernel_uses_local_memory(built: dict) -> None:
    for name, per_arch in tool.committed().items():
        for arch, allowed in per_arch.items():
            kernel = built[name][arch]
            assert kernel["registers"] <= allowed["registers"], (name, arch)
            assert kernel["shared"] <= allowed["shared"], (name, arch)
            assert kernel["stack"] == kernel["local"] == 0, (name, arch)
            assert not kernel["key"].keys() & {"LDL", "STL"}, (name, arch)


def test_hopper_code_does_not_emulate_int4(built: dict) -> None:
    """mma.s4 compiles for sm_90, to a slow call: no kernel may hold one."""
    for name, per_arch in built.items():
        for arch, kernel in per_arch.items():
            if arch.startswith("sm_90"):
                assert not [key for key in kernel["key"] if ".S4" in key or ".U4" in key], name
                if name.startswith("mixed_gemm"):
                    assert "CALL" not in kernel["key"], (name, arch)


def test_every_pdl_launch_waits_for_the_previous_kernel(built: dict) -> None:
    for name, per_arch in built.items():
        for arch, kernel in per_arch.items():
            dependent = arch.startswith("sm_90") and name.startswith(DEPENDENT)
            assert ("ACQBULK" in kernel["key"]) == dependent, (name, arch)
            assert dependent or "PREEXIT" not in kernel["key"], (name, arch)


def test_what_is_read_before_the_wait_does_not_come_from_the_first_level_cache(built: dict) -> None:
    """It may still hold the lines of an earlier step there."""
    for name, per_arch in built.items():
        for arch, kernel in per_arch.items():
            assert tool.EARLY_LOAD not in kernel["key"], (name, arch)


def test_products_ask_for_their_weights_before_the_wait(built: dict) -> None:
    """In sm_90's layout of the weights (1), whose family has dependent launches.

    A block of sm90 asks for two blocks of rows, but for one where its neighbour has the other.
    """
    for name, per_arch in built.items():
        for arch, kernel in per_arch.items():
            small_m = arch == "sm_90" and name.startswith("mixed_gemm_small_m_kernel<1,")
            shares = name.startswith("mixed_gemm_sm90_kernel") and ", 2, 2, " in name
            sm90 = name.startswith("mixed_gemm_sm90_kernel") * (1 if shares else 2)
            assert kernel["key"].get("UBLKPF", 0) == small_m + sm90, (name, arch)
            assert kernel["key"].get(tool.EARLY_PREFETCH, 0) == small_m + sm90, (name, arch)


@pytest.mark.parametrize("word", sorted(REQUIRED))
def test_kernels_hold_the_instructions_they_are_made_for(word: str, built: dict) -> None:
    ours = {name: k for name, k in built.items() if name.split("<")[0].startswith(word)}
    assert ours, f"no kernel is called {word}..."
    for arch, instructions in REQUIRED[word].items():
        for instruction in instructions:
            holders = [
                name
                for name, per_arch in ours.items()
                if any(
                    key.startswith(instruction) for key in per_arch.get(arch, {"key": ()})["key"]
                )
            ]
            assert holders, f"{word} for {arch}: no {instruction}"


def test_int4_tensor_cores_multiply_packed_activations(built: dict) -> None:
    names = [name for name in built if name.startswith("mixed_gemm_sm80")]
    counts = [built[name]["sm_80"]["key"].get("IMMA.16864.S4.S4", 0) for name in names]
    assert max(counts) > 0


def test_key_instructions_are_recognised() -> None:
    assert tool.key_instruction("LDG.E.128.CONSTANT R4, [R2.64]") == "LDG.128"
    assert tool.key_instruction("IMMA.16864.S4.S4 R8, R4.ROW, R2.COL, R8") == "IMMA.16864.S4.S4"
    assert tool.key_instruction("IGMMA.64x128x32.S8.S8 R24, R4") == "IGMMA.64x128x32.S8.S8"
    assert tool.key_instruction("LDL R4, [R1]") == "LDL"
    assert tool.key_instruction("LDG.E R4, [R2.64]") is None
