"""`python -m resq_kernels` is the `resq` program."""

import sys

from resq_kernels.cli import main

sys.exit(main())
