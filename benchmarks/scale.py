"""Networks of the usual size on 3×224×224, one sample: seconds, peak memory, and what was chosen."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import save, seconds
from benchmarks.models import frozen, resnet50
from lightning_hessian import input_gradient, input_spectrum

GIB = 2**30
WANTED = 6.0  # GiB, of the whole process


def vit_b16() -> nn.Module:
    """ViT-B/16 with 1,000 classes, from transformers' configuration, with random weights."""
    import transformers

    labels = {i: str(i) for i in range(1000)}
    return transformers.ViTForImageClassification(transformers.ViTConfig(id2label=labels))


CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "ResNet-50, C = 1000": (lambda: resnet50(1000), "prob"),
    "ViT-B/16, C = 1000": (vit_b16, "logit"),
}


def peak() -> float:
    """GiB that were resident in this process at most, on Linux; ``ru_maxrss`` may be that of the parent."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) * 1024 / GIB, 2)


def measured(name: str) -> dict[str, Any]:
    """One case, in this process."""
    make, target = CASES[name]
    torch.manual_seed(0)
    network, x = frozen(make()), torch.randn(1, 3, 224, 224)
    input_gradient(network, x, 3, target, check=False)
    before = peak()
    gradient = min(seconds(lambda: input_gradient(network, x, 3, target, check=False)) for _ in range(2))
    found: list[Any] = []
    took = seconds(lambda: found.append(input_spectrum(network, x, 3, target)))
    spectrum = found[0]
    return {
        "case": f"{name}, N = 1, `{target}`",
        "method": spectrum.method,
        "num_matvecs": spectrum.cost.num_matvecs,
        "seconds": round(took, 1),
        "gradients": round(took / gradient, 1),
        "peak_gib": peak(),
        "peak_gib_of_a_gradient": before,
        "wanted_gib": WANTED,
        "converged": bool(spectrum.converged.all()),
        "finite_difference_error": float(spectrum.finite_difference_error.max()),
        "message": spectrum.diagnosis.message,
    }


def main(arguments: list[str] | None = None) -> None:
    """About two minutes on two cores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--here", choices=CASES, help="measure this one in this process, and print the row")
    options = parser.parse_args(arguments or [])
    if options.here:
        print(json.dumps(measured(options.here)))
        return
    rows = []
    for name in CASES:
        command = [sys.executable, "-m", "benchmarks.scale", "--here", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        print("scale:", rows[-1], flush=True)
        save("scale", {"rows": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
