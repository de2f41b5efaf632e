"""Runs the checks and timings within a limit of time, and writes what is known after each."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment

LIMIT = 450.0  # seconds; what does not fit is left out, and the results say so


@dataclass(frozen=True)
class Sizes:
    """How large the work is: on a GPU, and shortened for trying everything on a CPU.

    Attributes:
        num_samples: N of whole Hessians.
        classes: of whole Hessians, each number of them.
        images: edge of large images.
        depth: of ViT-S.
        num_outputs: C of ``low_rank``.
        eigh: D of eigendecompositions.
        fit_images: images of an epoch of the fit whose overhead is measured.
        rounds: of every timing.
    """

    num_samples: int
    classes: tuple[int, ...]
    images: int
    depth: int
    num_outputs: tuple[int, ...]
    eigh: tuple[int, ...]
    fit_images: int
    rounds: int


SIZES = {
    "cuda": Sizes(4, (1, 10), 224, 12, (10, 1000), (32, 64, 128, 256, 512, 784, 1024, 2048, 3072), 20_480, 5),
    "cpu": Sizes(1, (1,), 32, 2, (10, 20), (32, 64, 128), 16, 2),
}


@dataclass
class Suite:
    """One run of everything.

    Attributes:
        device: where everything runs.
        sizes: of the work.
        path: of the results.
        results: so far, by group and name.
    """

    device: torch.device
    sizes: Sizes
    path: Path
    results: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._begin = time.monotonic()

    def run(self, group: str, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Does one thing, and writes everything that is known so far; a failure is a result, too."""
        begin = time.monotonic()
        if begin - self._begin > LIMIT:
            row: dict[str, Any] = {"left_out": f"{LIMIT:.0f} s had passed"}
        else:
            try:
                with warnings.catch_warnings(record=True) as heard:
                    warnings.simplefilter("always")
                    row = work()
                said = sorted({str(w.message)[:300] for w in heard if "lightning_hessian" in w.filename})
                if said:
                    row["warnings"] = said
            except Exception as error:
                last = traceback.format_exc(limit=-4)
                row = {"failed": f"{type(error).__name__}: {error}"[:1000], "where": last[-1500:]}
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        row["took"] = round(time.monotonic() - begin, 2)
        self.results.setdefault(group, {})[name] = row
        print(f"gpu: {group}: {name}: {row}", flush=True)
        self.write()

    def write(self) -> None:
        """The file, complete after each thing done."""
        text = json.dumps({"environment": self._environment(), **self.results}, indent=1, ensure_ascii=False)
        self.path.write_text(text + "\n")

    def _environment(self) -> dict[str, Any]:
        found = {**environment(), "python": platform.python_version(), "device": self.device.type}
        if self.device.type == "cuda":
            found |= {
                "gpu": torch.cuda.get_device_name(),
                "gpu_bytes": torch.cuda.get_device_properties(0).total_memory,
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
            }
        return found


def main(arguments: list[str]) -> None:
    """At most eight minutes on a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu")
    parser.add_argument("folder", type=Path, help="where gpu.json is written")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try everything with small sizes")
    parser.add_argument("--only", nargs="*", default=(), help="names, or parts of them")
    chosen = parser.parse_args(arguments)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(chosen.device)
    suite = Suite(device, SIZES[device.type], chosen.folder / "gpu.json")
    for group in ("truth", "training", "speed"):
        for name, work in importlib.import_module(f"benchmarks.gpu.{group}").works(suite).items():
            if not chosen.only or any(part in f"{group}.{name}" for part in chosen.only):
                suite.run(group, name, work)
