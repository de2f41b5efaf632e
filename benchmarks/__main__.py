"""Runs all benchmarks, or those named, for example ``python -m benchmarks low_rank lanczos``."""

from __future__ import annotations

import importlib
import sys

NAMES = ("price", "low_rank", "lanczos", "dense", "statistics", "distribution", "tab")

for name in sys.argv[1:] or NAMES:
    if name not in NAMES:
        sys.exit(f"{name!r} is not one of {', '.join(NAMES)}.")
    importlib.import_module(f"benchmarks.{name}").main()
