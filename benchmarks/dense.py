"""Whole Hessians against ``vmap(torch.func.hessian)``, with the allocator's default settings and with pages kept."""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import hessian, vmap

from benchmarks.common import ENOUGH, check_equal, save
from benchmarks.models import Attention, Recurrent, ViT, cnn, frozen, mlp, mnist_cnn, problems_of
from lightning_hessian import input_hessian
from lightning_hessian.curvature.cost_model import ForwardPass, ModelCosts
from lightning_hessian.curvature.memory import MALLOC_SETTINGS, AllocatedBytes, available_memory
from lightning_hessian.curvature.methods.dense import whole_hessians
from lightning_hessian.curvature.methods.interface import MethodInput
from lightning_hessian.curvature.options import Options

IMAGE = (1, 28, 28)
# Which C library settings the work runs under: freed pages go back to the kernel, or stay with the process.
ALLOCATORS = {
    "default": {},
    "pages kept": {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"},
}
METHOD, END_TO_END, UNCHECKED = "whole_hessians", "input_hessian", "input_hessian, check=False"
PEER = "vmap(torch.func.hessian)"
WANTED = {METHOD: 0.95, END_TO_END: 0.8, UNCHECKED: 0.95}  # times the speed of the peer
LARGE = ("CNN", "forum CNN", "ViT")  # N·K up to 10
MOST_ROUNDS = 15
MOST_FOR_THE_PEER = 1000  # columns times classes of all samples at once: beyond, the peer takes sample by sample


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Those of the other benchmarks, and four small ones on which nothing was tuned."""
    tanh = [nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)]
    conv = [nn.Conv1d(1, 8, 5), nn.GELU(), nn.Conv1d(8, 16, 5), nn.GELU(), nn.Flatten(), nn.Linear(16 * 92, 10)]
    return {
        "MLP": (mlp(), IMAGE),
        "tanh MLP, D = 20": (frozen(nn.Sequential(*tanh)), (20,)),
        "1-d convolutions, D = 100": (frozen(nn.Sequential(*conv)), (1, 100)),
        "GRU, D = 64": (frozen(Recurrent()), (16, 4)),
        "attention, D = 96": (frozen(Attention()), (12, 8)),
        "ViT": (frozen(ViT(1, 28, 4)), IMAGE),
        "CNN": (cnn(), IMAGE),
        "forum CNN": (mnist_cnn(), IMAGE),
    }


def method_alone(model: nn.Module, x: Tensor, classes: list[int]) -> Callable[[], Tensor]:
    """The numerics alone: no isolation, no analysis, no certificate; what a forward pass takes is known."""
    batch, memory = problems_of(model, x, classes), available_memory(x.device)
    with torch.no_grad(), AllocatedBytes() as allocated:
        outputs = batch.outputs(batch.x)
    costs = ModelCosts(batch, memory, ForwardPass(outputs.shape[1], allocated.total // len(x), allocated.count))
    given = MethodInput(batch, costs, torch.zeros(batch.shape), False, Options(), memory)
    return lambda: whole_hessians(given).matrices


def peer_hessians(model: nn.Module, x: Tensor, classes: list[int], chunk: int | None) -> Tensor:
    """``vmap(torch.func.hessian)`` of all classes in one call, ``chunk`` samples at a time."""

    def one(sample: Tensor) -> Tensor:
        return model(sample.unsqueeze(0))[0, classes]

    size = x[0].numel()
    return vmap(hessian(one), chunk_size=chunk)(x).reshape(len(x), len(classes), size, size)


def measured(work: Callable[[], Tensor]) -> tuple[dict[str, float], Tensor]:
    """Seconds by the wall clock, in user and in system mode, and page faults of one call; and its result."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    result = work()
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    spent = {
        "wall": wall,
        "user": after.ru_utime - before.ru_utime,
        "system": after.ru_stime - before.ru_stime,
        "faults": after.ru_minflt - before.ru_minflt,
    }
    return spent, result


def compare(
    name: str, model: nn.Module, shape: tuple[int, ...], num_samples: int, num_classes: int, enough: float
) -> dict[str, Any]:
    """One network, number of samples and of classes: all competitors in turn, round after round for ``enough`` seconds.

    Three rounds at least, if they do not take four times as long. The first one is not counted, unless it took that
    long by itself; before it, one call touches the memory that all of them use.
    """
    x, classes = torch.randn(num_samples, *shape), list(range(num_classes))
    together = name not in LARGE or x[0].numel() * num_samples * num_classes <= MOST_FOR_THE_PEER
    chunk = None if together else 1
    works: dict[str, Callable[[], Tensor]] = {
        PEER: lambda: peer_hessians(model, x, classes, chunk),
        METHOD: method_alone(model, x, classes),
        END_TO_END: lambda: input_hessian(model, x, classes),
        UNCHECKED: lambda: input_hessian(model, x, classes, check=False),
    }
    works[END_TO_END]()
    begin = time.perf_counter()
    spent, expected = measured(works[PEER])
    first, difference = {PEER: spent}, 0.0
    for work in WANTED:
        first[work], found = measured(works[work])
        difference = max(difference, check_equal(found, expected, 1e-3))
    del expected, found
    rounds = [first] if time.perf_counter() - begin > enough else []
    while len(rounds) < 3 or (time.perf_counter() - begin < enough and len(rounds) < MOST_ROUNDS):
        if time.perf_counter() - begin > 4 * enough:
            break
        rounds.append({work: measured(call)[0] for work, call in works.items()})
    row: dict[str, Any] = {"network": name, "N": num_samples, "K": num_classes, "difference": difference}
    for work in works:
        row[work] = {key: round(statistics.median(r[work][key] for r in rounds), 5) for key in rounds[0][work]}
    for work in WANTED:
        ratios = [r[PEER]["wall"] / r[work]["wall"] for r in rounds]
        row[work] |= {"ratio": round(statistics.median(ratios), 3), "worst": round(min(ratios), 3)}
    row["rounds"] = len(rounds)
    ours = {work: row[work]["ratio"] for work in WANTED}
    print("dense:", name, num_samples, num_classes, row[PEER]["wall"], ours, file=sys.stderr, flush=True)
    return row


def many_points(enough: float) -> dict[str, Any]:
    """20,000 points of a physics-informed network, D = 2."""
    torch.manual_seed(0)
    layers = [nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)]
    return compare("tanh MLP, D = 2", frozen(nn.Sequential(*layers)), (2,), 20_000, 1, enough)


def rows_here(full: bool, enough: float) -> list[dict[str, Any]]:
    """All cases, in this process."""
    rows = [many_points(enough)]
    for name, (model, shape) in networks().items():
        torch.manual_seed(0)
        for num_samples in (1, 4, 8) if full else (1, 8):
            for num_classes in (1, 5, 10) if full else (1, 10):
                if name not in LARGE or num_samples * num_classes <= 10:
                    rows.append(compare(name, model, shape, num_samples, num_classes, enough))
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric mean of the cases' medians, the case with the lowest median, and the worst round of all."""
    result = {}
    for work, wanted in WANTED.items():
        medians = [row[work]["ratio"] for row in rows if work in row]
        if medians:
            result[work] = {
                "cases": len(medians),
                "geometric_mean": round(math.exp(sum(map(math.log, medians)) / len(medians)), 3),
                "lowest_median": min(medians),
                "worst_round": min(row[work]["worst"] for row in rows if work in row),
                "wanted_at_least": wanted,
            }
    return result


def main(arguments: list[str] | None = None) -> None:
    """Both allocators, each in a process of its own: about five minutes on two cores, ten with ``--full``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="N = 4 and K = 5 too")
    parser.add_argument("--seconds", type=float, default=ENOUGH / 2, help="for each case, at least")
    parser.add_argument("--here", action="store_true", help="print the rows measured in this process")
    options = parser.parse_args(arguments or [])
    if options.here:
        print(json.dumps(rows_here(options.full, options.seconds)))
        return
    report = {}
    for name, settings in ALLOCATORS.items():
        environment = {key: value for key, value in os.environ.items() if key not in MALLOC_SETTINGS} | settings
        command = [sys.executable, "-m", "benchmarks.dense", "--here", "--seconds", str(options.seconds)]
        command += ["--full"] * options.full
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment, text=True).stdout
        rows = json.loads(output.splitlines()[-1])
        report[name] = {"settings": settings, "summary": summary(rows), "rows": rows}
        print("dense:", name, report[name]["summary"], flush=True)
        save("dense", report)  # what is there so far


if __name__ == "__main__":
    main(sys.argv[1:])
