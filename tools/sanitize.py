"""Runs the operators' tests on a CPU library built with AddressSanitizer and UBSan.

The build goes to build/sanitize and is first shown to stop at a fault of each kind; then the tests
run on every instruction set that the machine has. The tests below are those that reach every
kernel's edges in about a minute; name others to run them instead.

Usage: python tools/sanitize.py [pytest arguments]
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SANITIZE = "address,undefined"
BUILD = ROOT / "build" / "sanitize"

# kv_attention's long contexts take minutes under the sanitizers and reach no other line.
TESTS = [
    "tests/ops/test_mixed_gemm.py",
    "tests/ops/test_mixed_quantize.py",
    "tests/ops/test_rms_norm.py",
    "tests/ops/test_rms_norm_quantize.py",
    "tests/ops/test_silu_mul_hadamard_quantize.py",
    "tests/ops/test_hadamard.py",
    "tests/ops/test_search_scale.py",
    "tests/ops/test_gptq_block.py",
    "tests/ops/test_pack_weight.py",
    "tests/ops/test_unpack_weight.py",
    "tests/ops/test_instruction_sets.py",
    "tests/ops/test_kv_isa.py",
    "tests/ops/test_kv_dequantize.py::test_values_are_the_reference_s",
    "tests/ops/test_kv_dequantize.py::test_empty",
    "tests/ops/test_kv_append.py::test_kv_append_rotates_queries",
    "tests/ops/test_kv_append.py::test_kv_append_skips_negative_slots",
    "tests/ops/test_kv_append.py::test_kv_append_of_nothing",
    "tests/ops/test_kv_attention.py::test_kv_attention_of_every_group_size",
    "tests/ops/test_kv_attention.py::test_kv_attention_has_the_same_bits_chunked_batched_and_alone",
    "tests/ops/test_kv_attention.py::test_kv_attention_ignores_the_tails_of_pages",
    "tests/ops/test_kv_attention.py::test_kv_attention_of_shared_pages",
    "tests/ops/test_decoder_layers.py::test_every_option_reaches_its_operator",
    "tests/ops/test_decoder_layers.py::test_what_is_wrong_is_named_before_anything_is_written",
    "tests/ops/test_decoder_layers.py::test_no_token_writes_nothing",
    "tests/ops/test_decode_step.py",
]

# A fault, and what must be said of it.
FAULTS = {
    "read beyond the end": (
        "int main(int n, char**) { int* x = new int[n](); return x[n]; }",
        "heap-buffer-overflow",
    ),
    "signed overflow": (
        "int main(int n, char**) { int x = 2147483647; return (x + n) & 1; }",
        "signed integer overflow",
    ),
}


def build() -> str:
    """Builds the library; returns the compiler and the flags that it was built with."""
    environment = {**os.environ, "RESQ_SANITIZE": SANITIZE, "RESQ_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(BUILD)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    ninja = (ROOT / f"build/ninja{SANITIZE}/build.ninja").read_text()
    return " ".join(re.search(rf"^{name} = (.*)$", ninja, re.M)[1] for name in ("cxx", "cxxflags"))


def check_faults(compile_command: str) -> None:
    """Ends the run if a fault, compiled as the library is, goes through."""
    with tempfile.TemporaryDirectory() as folder:
        for name, (source, message) in FAULTS.items():
            binary, code = Path(folder) / "fault", Path(folder) / "fault.cpp"
            code.write_text(source)
            command = [*compile_command.split(), str(code), "-o", str(binary)]
            subprocess.run(command, check=True)
            run = subprocess.run([binary], capture_output=True, text=True)
            if run.returncode == 0 or message not in run.stderr:
                sys.exit(f"sanitize: {name}: expected {message!r} and an error, got\n{run.stderr}")
    print(f"sanitize: stops at: {', '.join(FAULTS)}")


def runtime(name: str) -> str:
    """The path of a sanitizer's runtime library, which has to be loaded before Python is."""
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: list[str]) -> int:
    """Builds, checks that faults are found, runs the tests; returns pytest's exit code."""
    check_faults(build())
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch leave much behind at exit
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(BUILD),
    }
    where = "import resq_kernels as r; print(r.__file__, r._library._CPU_LIBRARY)"
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=BUILD, env=environment, capture_output=True, text=True
    )
    paths = found.stdout.split()
    if not paths or not all(Path(path).is_relative_to(BUILD) for path in paths):
        sys.exit(f"sanitize: expected the library of {BUILD}, got {paths}\n{found.stderr}")
    if b"__asan_" not in Path(paths[-1]).read_bytes():
        sys.exit(f"sanitize: {paths[-1]} was built without AddressSanitizer")
    # Not `python -m pytest`, which would find the folder of the sources before the built package.
    # -s: a fault is written to the stream that pytest would keep and lose when the process ends.
    pytest = [Path(sys.executable).with_name("pytest"), "-q", "-s", "-p", "no:cacheprovider"]
    return subprocess.run([*pytest, *(arguments or TESTS)], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
