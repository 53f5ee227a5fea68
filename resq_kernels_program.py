"""The script `resq`.

`import resq_kernels` registers operators and so imports torch, but not in a program that has
imported this module first: `resq --help` then takes a tenth of the time. The modules of the
commands import torch, and what needs it, inside of functions.
"""

from __future__ import annotations


def main() -> int:
    """Runs the program; returns its exit code."""
    from resq_kernels import cli

    return cli.main()
