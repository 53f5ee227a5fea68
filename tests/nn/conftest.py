"""The tests of the modules share the cases and bounds of the operators' tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "ops"))  # kv_cases, kv_bounds
