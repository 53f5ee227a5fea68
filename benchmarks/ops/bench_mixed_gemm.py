"""mixed_gemm beside what a user would run instead: the same as `resq bench gemm`."""

import sys

from resq_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "gemm", *sys.argv[1:]]))
