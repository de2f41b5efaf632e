"""One measurement by one process against the same by two, with one thread each.

Wall time, and the processor time of rank 0, which does the most: it decides, measures its share, joins and makes the
record. The latter tells what two free cores would give where others use them too.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from benchmarks.common import check_equal, compare, save, seconds
from benchmarks.models import ViT, cnn, frozen, mlp
from lightning_hessian.curvature.options import Options
from lightning_hessian.training.distributed import SINGLE_PROCESS, ProcessGroup
from lightning_hessian.training.measurement import measure
from lightning_hessian.training.samples import Samples
from lightning_hessian.training.settings import MeasurementSettings

NUM_RANKS = 2
NUM_SAMPLES = 8
ROUNDS = 3
WANTED = 1.6
WORKS = {
    "dense, MLP, D = 784, K = 3": (mlp, (784,), "dense"),
    "lanczos, MLP, D = 784, K = 3": (mlp, (784,), "lanczos"),
    "lanczos, CNN, D = 784, K = 3": (cnn, (1, 28, 28), "lanczos"),
    "lanczos, small ViT, D = 3072, K = 3": (lambda: frozen(ViT(3, 32, 4)), (3, 32, 32), "lanczos"),
}


def main() -> None:
    """The whole of ``measure``, diagnosis and gathering included: by rank 0 alone and by both, in turn."""
    with TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (_free_port(), folder), nprocs=NUM_RANKS)
        rows = torch.load(Path(folder) / "rows.pt")
    for row in rows:
        print("distribution:", row, flush=True)
    save("distribution", {"ranks": NUM_RANKS, "threads_per_rank": 1, "samples": NUM_SAMPLES, "rows": rows})


def _rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=NUM_RANKS)
    rows = [_row(name, ProcessGroup(rank, NUM_RANKS, NUM_RANKS)) for name in WORKS]
    if rank == 0:
        torch.save(rows, Path(folder) / "rows.pt")
    dist.destroy_process_group()


def _row(name: str, together: ProcessGroup) -> dict[str, Any]:
    build, shape, method = WORKS[name]
    torch.manual_seed(0)
    model, samples = build(), Samples(torch.randn(NUM_SAMPLES, *shape), None)
    found: dict[str, Tensor] = {}

    def work(which: str, group: ProcessGroup) -> None:
        settings = MeasurementSettings([0, 3, 7], "prob", "float32", Options(method=method), heatmap_samples=0)
        record = measure(model, samples, settings, group=group)
        if record is not None:
            found[which] = torch.from_numpy(record.eigenvalues)

    times: dict[str, list[float]] = {f"{which}{clock}": [] for clock in ("", ", processor") for which in ("one", "two")}
    for warm in (True, *[False] * ROUNDS):
        for which, group in (("one", SINGLE_PROCESS), ("two", together)):
            dist.barrier()  # in which the other rank sleeps while rank 0 works alone
            if group is SINGLE_PROCESS and together.rank != 0:
                continue
            begin = time.process_time()
            wall = seconds(lambda which=which, group=group: work(which, group))
            if not warm:
                times[which].append(wall)
                times[f"{which}, processor"].append(time.process_time() - begin)
    if together.rank != 0:
        return {}
    difference = check_equal(found["two"], found["one"], 1e-3)
    wall = compare(times, "two", "one", wanted=WANTED)
    return {
        "work": name,
        "difference": difference,
        "processor": compare(times, "two, processor", "one, processor", wanted=WANTED),
        **wall,
    }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    main()
