"""Runs all benchmarks, or those named, for example ``python -m benchmarks low_rank lanczos``.

``python -m benchmarks gpu FOLDER [--device cpu]`` runs those of a GPU; see ``benchmarks/gpu/suite.py``.
"""

from __future__ import annotations

import importlib
import sys

NAMES = (
    "price",
    "scale",
    "demo",
    "low_rank",
    "lanczos",
    "dense",
    "statistics",
    "warm_start",
    "distribution",
    "tab",
    "performance",
)

if sys.argv[1:2] == ["gpu"]:
    importlib.import_module("benchmarks.gpu.suite").main(sys.argv[2:])
    sys.exit()
for name in sys.argv[1:] or NAMES:
    if name not in NAMES:
        sys.exit(f"{name!r} is not one of {', '.join((*NAMES, 'gpu'))}.")
    importlib.import_module(f"benchmarks.{name}").main()
