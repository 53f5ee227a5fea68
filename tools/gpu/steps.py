"""The steps of the GPU run, in order of value: what runs, for how long at most, what it decides.

Each is a Python program, in some steps under a tool of CUDA. "{out}" is the prefix of its result
files. Limits are about twice the expected time.
"""

from __future__ import annotations

import dataclasses

ORDINARY = {"RESQ_DEPENDENT_LAUNCHES": "0"}
CARVEOUT = {"RESQ_CUDA_CARVEOUT": "100"}
NO_PREFETCH = {"RESQ_CUDA_PREFETCH": "0"}
# The caching allocator would hide overruns inside its blocks.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
SANITIZER = ("compute-sanitizer", "--error-exitcode", "99", "--target-processes", "all")
NCU = ("ncu", "--clock-control", "none", "--target-processes", "all")
NCU_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats")
OPERATORS = (
    "pack_weight",
    "mixed_quantize",
    "rms_norm_quantize",
    "hadamard",
    "silu_mul_hadamard_quantize",
    "mixed_gemm",
    "embedding",
    "kv_append",
    "kv_attention",
    "kv_dequantize",
    "prefill",
    "search_scale",
    "gptq_block",
    "rms_norm",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One step.

    Attributes:
        name: unique; what --only and --from take.
        arguments: of Python.
        limit_s: seconds after which it is killed.
        decides: what its result is for.
        environment: variables.
        wrapper: the tool that Python runs under, empty for none.
        summary: a pattern whose last match the output must have; its group goes to the report.
    """

    name: str
    arguments: tuple[str, ...]
    limit_s: int
    decides: str
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    wrapper: tuple[str, ...] = ()
    summary: str = ""


def tests(name: str, limit_s: int, decides: str, *options: str, **rest: object) -> Step:
    """Tests of tests/gpu. One failure does not stop the others."""
    command = ("-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-rfE", *options)
    return Step(name=name, arguments=command, limit_s=limit_s, decides=decides, **rest)


def bench(name: str, limit_s: int, decides: str, options: str, **rest: object) -> Step:
    """A `resq bench`, which checks every result that it times."""
    command = ("-m", "resq_kernels", "bench", *options.split(), "--device", "cuda")
    command += ("--out", "{out}")
    return Step(name=name, arguments=command, limit_s=limit_s, decides=decides, **rest)


def first_values() -> list[Step]:
    """(a) Whether each operator is right at all: tiny inputs, a process each."""
    info = Step(
        name="info",
        arguments=("-m", "resq_kernels", "info", "--json", "{out}.json"),
        limit_s=150,  # the first process reads torch from a cold disk
        decides="whether CUDA's kernels run here at all; if not, nothing else is tried",
    )
    decides = "whether the kernel is right on tiny inputs"
    file = "tests/gpu/test_gpu_first.py"
    return [info] + [tests(f"first-{op}", 40, decides, f"{file}::test_{op}") for op in OPERATORS]


def layer_values() -> list[Step]:
    """(b) Every dtype and form, and the layer sizes of two models."""
    decides = "whether its values are the CPU's in every form and at layer sizes"
    file, chosen = "tests/gpu/test_gpu_values.py", ("-m", "not every_model")
    steps = []
    for op in OPERATORS:
        name = "unpack_weight" if op == "pack_weight" else op
        steps.append(tests(f"values-{op}", 60, decides, file, "-k", f"test_{name}", *chosen))
    return steps


def figures() -> list[Step]:
    """(c) to (g) What the constants of the kernels are made from."""
    small = "latency --shapes llama-3-8b,qwen2.5-7b --batch 1,16"
    of_8b = "--shapes llama-3-8b"
    return [
        bench("latency", 60, "what each small kernel costs in a chain of launches", small),
        bench(
            "latency-ordinary",
            40,
            "what dependent launches hide (note 0023)",
            small,
            environment=ORDINARY,
        ),
        bench(
            "latency-carveout",
            40,
            "whether changes of the shared-memory carveout keep launches from overlapping",
            small,
            environment=CARVEOUT,
        ),
        bench("peaks", 60, "the bounds of every other figure", "peaks"),
        bench(
            "gemm-choices",
            150,
            "the table that mixed_gemm chooses from (tools/fit_mixed_gemm.py)",
            f"gemm {of_8b} --batch 1,4,16,32,64,96,128,256,2048 --choices all",
        ),
        bench(
            "gemm",
            90,
            "mixed_gemm against BF16, FP8, INT8 and CUTLASS's s4 x s8",
            f"gemm {of_8b} --batch 1,16,64,128,256,2048",
        ),
        bench(
            "attention",
            90,
            "splits of 256 to 1024 tokens, steps in the ring (note 0055)",
            f"attention {of_8b} --batch 1,8,64 --context 1024,8192,32768",
        ),
        bench(
            "attention-tables",
            60,
            "what a block table costs that is wider than the lengths",
            f"attention {of_8b} --batch 1,32 --context 8192 --table-width 1,2,16",
        ),
        bench(
            "quantize",
            50,
            "whether one block a row is enough (notes 0010, 0011)",
            f"quantize {of_8b},qwen2.5-7b --batch 1,16,256,2048",
        ),
        bench("hadamard", 40, "the same", "hadamard --shapes llama-3-8b,qwen2.5-7b --batch 1,256"),
    ]


def chains() -> list[Step]:
    """(h) Captures, streams, threads, replays under delay."""
    file, integration = "tests/gpu/test_gpu_overlap.py", "tests/gpu/test_gpu_integration.py"
    return [
        tests(
            "capture",
            60,
            "whether operators can be captured in graphs and used on two streams",
            integration,
            "-k",
            "captured or streams or errors or moves or mlp",
        ),
        tests("replays", 120, "whether dependent launches keep every bit under delay", file),
        tests("model-values", 120, "whether a whole model is right", "tests/gpu/test_gpu_model.py"),
    ]


def models() -> list[Step]:
    """(i) Layers and models."""
    layer = "layer --shapes llama-3-8b --batch 1,8 --context 2048"
    return [
        bench("layer", 90, "one layer against BF16 and torch.compile", layer),
        bench(
            "layer-ordinary",
            60,
            "what dependent launches are worth in a layer",
            layer,
            environment=ORDINARY,
        ),
        bench(
            "layer-prefetch",
            60,
            "what weights are worth that wait in L2 (note 0042)",
            layer,
            environment=NO_PREFETCH,
        ),
        bench(
            "model-1b",
            150,
            "tokens a second and GB against BF16: the README's figures (note 0020)",
            "model --shapes llama-3.2-1b --batch 1,8 --context 1024",
        ),
        bench(
            "model-8b",
            120,
            "the same for four layers of an 8B model",
            "model --shapes llama-3-8b --batch 1,8 --context 1024 --layers 4",
        ),
        bench(
            "prefill",
            60,
            "from how many new tokens prefill goes through float16 (note 0016)",
            "prefill --shapes llama-3-8b --batch 1 --context 2048,16384",
        ),
    ]


def tools() -> list[Step]:
    """(j) to (l) compute-sanitizer, ncu, torch.compile; then what is left."""
    first = "tests/gpu/test_gpu_first.py"
    two = (f"{first}::test_mixed_gemm", f"{first}::test_kv_attention")
    sections = tuple(part for name in NCU_SECTIONS for part in ("--section", name))
    return [
        tests(
            "memcheck",
            120,
            "whether a kernel reads or writes outside its memory",
            *two,
            environment=UNCACHED,
            wrapper=(*SANITIZER, "--tool", "memcheck"),
            summary=r"ERROR SUMMARY: (.*)",
        ),
        tests(
            "racecheck",
            120,
            "races in shared memory (it sees neither bulk copies nor wgmma)",
            two[1],
            environment=UNCACHED,
            wrapper=(*SANITIZER, "--tool", "racecheck"),
            summary=r"RACECHECK SUMMARY: (.*)",
        ),
        Step(
            name="profile",
            arguments=("tools/gpu/profile_gemm.py",),
            limit_s=120,
            decides="what binds mixed_gemm at M = 1, 64, 128, 2048",
            wrapper=(*NCU, *sections, "--kernel-name", "regex:mixed_gemm", "--launch-count", "8"),
            summary=r"==PROF== Profiling \"(\w+)\"",  # the last of the kernels
        ),
        tests(
            "compile",
            150,
            "whether operators go through torch.compile and opcheck",
            "tests/gpu/test_gpu_integration.py",
            "-k",
            "compiles or opcheck",
        ),
        bench(
            "gemm-models",
            200,
            "choices at other widths",
            "gemm --shapes llama-3.2-1b,qwen2.5-7b,llama-3-70b,qwen2.5-72b --batch 1,16,128,2048",
        ),
        tests(
            "values-every-model",
            300,
            "layer sizes of every model",
            "tests/gpu/test_gpu_values.py",
            "-m",
            "every_model",
        ),
    ]


STEPS = (*first_values(), *layer_values(), *figures(), *chains(), *models(), *tools())
