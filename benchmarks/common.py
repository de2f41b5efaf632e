"""Paired timing, the record of the machine, and the files of results."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
ENOUGH = 5.0  # seconds a work


def environment() -> dict[str, Any]:
    """What the numbers depend on, and nothing that identifies the machine."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def synchronize() -> None:
    """Waits for the GPU, if one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes, until a GPU in use is done with it."""
    synchronize()
    begin = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - begin


def alternate(works: dict[str, Callable[[], object]], *, repeats: int = 3, warm: bool = True) -> dict[str, list[float]]:
    """Seconds of every work, called in turn, round after round, in this process.

    Args:
        works: what to call, by name.
        repeats: rounds; no further one after a round that took more than four times ``ENOUGH``.
        warm: whether to call each once before the first round.
    """
    if warm:
        for work in works.values():
            work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(work))
        if sum(spent[-1] for spent in times.values()) > 4 * ENOUGH:
            break
    return times


def compare(times: dict[str, list[float]], ours: str, peer: str, *, wanted: float) -> dict[str, Any]:
    """How many times faster ``ours`` is than ``peer``, round by round: median and worst."""
    ratios = [b / a for a, b in zip(times[ours], times[peer], strict=True)]
    return {
        "ours": ours,
        "against": peer,
        "wanted_at_least": wanted,
        "median": round(statistics.median(ratios), 3),
        "worst": round(min(ratios), 3),
        "rounds": len(ratios),
        "seconds_ours": round(statistics.median(times[ours]), 5),
        "seconds_peer": round(statistics.median(times[peer]), 5),
    }


def cost(numerator: list[float], denominator: list[float], *, wanted: float) -> dict[str, Any]:
    """Ratio of two times, round by round, that is to stay below ``wanted``: median and worst."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return {
        "wanted_at_most": wanted,
        "median": round(statistics.median(ratios), 3),
        "worst": round(max(ratios), 3),
        "rounds": len(ratios),
        "seconds_ours": round(statistics.median(numerator), 6),
        "seconds_peer": round(statistics.median(denominator), 6),
    }


def check_equal(ours: torch.Tensor, peer: torch.Tensor, tolerance: float) -> float:
    """The largest difference relative to the largest number of ``peer``.

    Raises:
        AssertionError: it is above ``tolerance``: there is nothing to time.
    """
    difference = float((ours - peer).abs().max() / peer.abs().max())
    if not difference <= tolerance:
        raise AssertionError(f"Results differ by {difference:.1e}, more than {tolerance:.0e}.")
    return difference


def save(name: str, results: dict[str, Any]) -> None:
    """Writes ``results/NAME.json``, with the environment."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"environment": environment(), **results}, indent=1, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(text + "\n")
