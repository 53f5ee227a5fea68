"""Builds the shared libraries with ninja against torch's stable ABI.

_C_cpu.so always; _C_cuda.so where a CUDA toolkit is found. Each is one file for every torch >= 2.11
and every Python >= 3.10: it exports no Python symbol and is opened by torch.ops.load_library, so
the wheel is tagged py3-none. torch's headers are found without importing torch, and no GPU is asked
for. tools/build_backend.py finds torch, CUTLASS and nvcc.

Knobs: CXX, MAX_JOBS, RESQ_SANITIZE=address,undefined (CPU test builds); RESQ_CUDA=auto|0|1,
CUDA_HOME, CUTLASS_PATH, RESQ_CUDA_ARCHS (default "80;86;89;90a;ptx"); RESQ_CUDA_BENCHMARKS=1 with
--inplace also builds what `resq bench` compares with (benchmarks/cuda/*.so); RESQ_NAMESPACE=name
registers torch.ops.<name>.* in the place of torch.ops.resq.* (tools/hub_kernel.py).
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

NO_TOOLS = """resq_kernels: --no-build-isolation needs setuptools 77 or newer and ninja; either of
  pip install .                                    # without it: pip brings its own
  pip install "setuptools>=77" ninja && pip install --no-build-isolation ."""
if int(setuptools.__version__.split(".")[0]) < 77 or not importlib.util.find_spec("ninja"):
    sys.exit(NO_TOOLS)

from setuptools import Extension, setup  # noqa: E402  an old setuptools stops above
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "tools"))
from build_backend import cuda_archs, find_cutlass, find_nvcc, find_torch  # noqa: E402

TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11, our floor
BENCHMARKS = ("benchmarks/cuda/cutlass_s4s8.cu", "benchmarks/cuda/int8_ceiling.cu")
NO_COMPILER = """resq_kernels: expected a C++20 compiler named {}, found none; either of
  apt-get install g++           # or dnf install gcc-c++
  CXX=/path/to/g++ pip install ."""
NO_TORCH = """resq_kernels: expected torch >= 2.11, found none; either of
  pip install .                                    # pip finds or fetches it
  pip install torch && pip install --no-build-isolation ."""
NO_CUTLASS = """resq_kernels: the CUDA library needs the CUTLASS 4.2 headers; either of
  git submodule update --init --checkout third_party/cutlass
  pip install --no-deps nvidia-cutlass==4.2.0.0
or set CUTLASS_PATH to a CUTLASS folder, or RESQ_CUDA=0 to leave the CUDA library out"""


def cutlass_include() -> Path:
    """CUTLASS's headers."""
    return find_cutlass() or sys.exit(NO_CUTLASS)


def sources(cuda: bool) -> list[str]:
    """The .cpp of one library; csrc/cuda, *_cuda.cpp and all .cu are the CUDA library's."""
    paths = [path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.c*")]
    cpp = {path for path in paths if path.endswith(".cpp")}
    ours = {path for path in cpp if path.endswith("_cuda.cpp") or path.startswith("csrc/cuda/")}
    if cuda:
        return sorted(ours) + sorted(path for path in paths if path.endswith(".cu"))
    return sorted(cpp - ours)


def gencode(source: str) -> str:
    """nvcc's architectures for a file: those its name ends with, or all and PTX for newer ones."""
    archs = cuda_archs()
    real = [arch for arch in archs if arch != "ptx"]
    if source.endswith("_sm80.cu"):
        flags = [f"arch=compute_{a},code=sm_{a}" for a in real if a.startswith("8")]
        flags = flags or ["arch=compute_80,code=compute_80"]  # the launcher must link
    elif source.endswith("_sm90.cu") or source in BENCHMARKS:
        flags = ["arch=compute_90a,code=sm_90a"]
    else:
        flags = [f"arch=compute_{a},code=sm_{a}" for a in (arch.rstrip("a") for arch in real)]
        flags += ["arch=compute_80,code=compute_80"] if "ptx" in archs else []
    return " ".join(f"-gencode {flag}" for flag in flags)


def ninja_file(extensions: list[tuple[list[str], Path]], build: Path, nvcc: str | None) -> str:
    """The text of build.ninja: one object per source, one shared library per extension."""
    torch = find_torch() or sys.exit(NO_TORCH)
    sanitize = os.environ.get("RESQ_SANITIZE", "")
    # -O1 builds faster and keeps the lines of a report (120 s of processor time in all).
    recover = "-fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1"
    extra = f"-fsanitize={sanitize} {recover}" if sanitize else ""
    # -ffp-contract=off: the numerics contract rounds every product and sum on its own, so that all
    # instruction sets agree bit for bit. libtorch must be a NEEDED entry (--no-as-needed): CUDA
    # builds of torch open it RTLD_LOCAL, and its symbols are not found otherwise.
    lines = [
        f"cxx = {CXX}",
        "cxxflags = -O3 -std=c++20 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra "
        f"-Werror=return-type -ffile-prefix-map={ROOT}/= -ffile-prefix-map={torch.parent}/= "
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET} -DRESQ_NAMESPACE={NAMESPACE} "
        f"-isystem {torch}/include -I{ROOT}/csrc {extra}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $cxxflags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared $in -o $out -L{torch}/lib -Wl,--no-as-needed -ltorch {extra}",
    ]
    if nvcc:
        # Without -DNDEBUG CUTLASS's asserts are calls, and ptxas serializes every wgmma near one.
        # The static runtime serves torch builds of any CUDA version. -nodlink: no code is linked on
        # the device, and that step would write this machine's paths into the library.
        lines += [
            f"nvcc = {nvcc}",
            "nvccflags = -std=c++20 -O3 -DNDEBUG --expt-relaxed-constexpr -Xptxas -v "
            "-Xfatbin -compress-all -Xcompiler -fPIC,-fvisibility=hidden "
            f"-I{ROOT}/csrc -isystem {cutlass_include()}",
            "rule compile_cuda",
            # Whatever pip or a user calls it: another command would compile all kernels again.
            f"  command = {Path(sys.executable).resolve()} {ROOT}/tools/compile_cuda.py $out "
            "$nvcc -MD -MF $out.d $nvccflags $gencode -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link_cuda",
            "  command = $nvcc -shared -nodlink -cudart static $in -o $out "
            f"-L{torch}/lib -Xlinker --no-as-needed -ltorch",
        ]
    for files, output in extensions:
        objects = []
        for source in files:
            # nvcc's objects, which take minutes, know nothing of torch and serve every namespace.
            place = build if source.endswith(".cu") else build / NAMESPACE
            objects.append(f"{place}/{source.replace('/', '_')}.o")
            if source.endswith(".cu"):
                lines.append(f"build {objects[-1]}: compile_cuda {ROOT / source}")
                lines.append(f"  gencode = {gencode(source)}")
            else:
                lines.append(f"build {objects[-1]}: compile {ROOT / source}")
                if source in CUDA_SOURCES:
                    lines.append("  cxxflags = $cxxflags -DUSE_CUDA")
        link = "link_cuda" if any(source.endswith(".cu") for source in files) else "link"
        lines.append(f"build {output}: {link} {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """build_ext that writes build.ninja and runs ninja."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extensions(self) -> None:
        import ninja

        here = f"{platform.system()} {platform.machine()}"
        if here != "Linux x86_64":
            sys.exit(f"resq_kernels: expected Linux on x86-64, got {here}")
        if not shutil.which(CXX):
            sys.exit(NO_COMPILER.format(CXX))
        # Not build_temp: pip gives every editable install a new one, and ninja would start over.
        build = ROOT / "build" / ("ninja" + os.environ.get("RESQ_SANITIZE", ""))
        build.mkdir(parents=True, exist_ok=True)
        extensions = []
        for extension in self.extensions:
            output = Path(self.get_ext_fullpath(extension.name)).resolve()
            output.parent.mkdir(parents=True, exist_ok=True)
            extensions.append((extension.sources, output))
        (build / "build.ninja").write_text(ninja_file(extensions, build, NVCC))
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.check_call([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build), *jobs])
        print(f"resq_kernels: built {', '.join(output.name for _, output in extensions)}")


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 on this platform, of what there is now."""

    def run(self) -> None:
        # setuptools would pack what an earlier build left there: a module that is gone, or the CUDA
        # library in spite of RESQ_CUDA=0. The objects are elsewhere.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


CXX = os.environ.get("CXX", "g++")
NAMESPACE = os.environ.get("RESQ_NAMESPACE", "resq")
if not NAMESPACE.isidentifier():
    sys.exit(f"resq_kernels: RESQ_NAMESPACE: expected a name of C++ and Python, got {NAMESPACE!r}")
NVCC = find_nvcc()
CUDA_SOURCES = sources(cuda=True)
EXTENSIONS = [Extension("resq_kernels._C_cpu", sources(cuda=False))]
if NVCC:
    EXTENSIONS.append(Extension("resq_kernels._C_cuda", CUDA_SOURCES))
if os.environ.get("RESQ_CUDA_BENCHMARKS", "0") != "0":
    if not NVCC:
        sys.exit("resq_kernels: RESQ_CUDA_BENCHMARKS: expected nvcc, found none")
    EXTENSIONS += [Extension(f"benchmarks.cuda.{Path(s).stem}", [s]) for s in BENCHMARKS]

setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": PlatformWheel},
)
