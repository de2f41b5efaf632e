"""How long HVPs and Hessian columns take here and now, by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import in_groups
from lightning_hessian.curvature.cost_model import ModelCosts, first_block, fitting_samples, hessian_bytes
from lightning_hessian.curvature.meter import synchronize
from lightning_hessian.curvature.operators.autodiff import (
    AUTODIFF_MODES,
    Autodiff,
    ReverseOverReverse,
    random_vectors,
)
from lightning_hessian.curvature.options import ChunkSize
from lightning_hessian.curvature.target_batch import TargetBatch


def seconds_per_matvec(batch: TargetBatch, costs: ModelCosts, memory: int, generator: torch.Generator) -> float:
    """Median time of three HVPs of all problems on their retained graph, from as many samples as fit ``memory``."""

    def times(samples: slice) -> list[float]:
        few = batch.select(samples)
        autodiff, v = ReverseOverReverse(few), random_vectors(few, generator)
        autodiff.hvp(v)  # warm-up
        return [_seconds(lambda: autodiff.hvp(v)) for _ in range(3)]

    size = fitting_samples(memory, costs.matvec_bytes)
    samples, measured = next(in_groups(batch.num_samples, size, times))
    return sorted(measured)[1] * batch.num_samples / (samples.stop - samples.start)


def seconds_per_column(batch: TargetBatch, costs: ModelCosts, memory: int, chunk_size: ChunkSize) -> float:
    """Time of one column of all problems in the faster autodiff mode, from a block as large as the first of ``dense``.

    What a column in a block costs depends on block size and mode: it can only be measured.
    """

    def time_of(samples: slice) -> float:
        few = batch.select(samples)
        wanted = first_block(costs, few.num_samples) if chunk_size == "auto" else chunk_size
        num_columns = min(wanted, fitting_samples(memory, few.num_samples * costs.matvec_bytes))
        basis = torch.eye(batch.num_inputs)[:num_columns].to(few.x)
        return min(_seconds_of_block(AUTODIFF_MODES[mode](few), basis) for mode in costs.modes) / len(basis)

    size = fitting_samples(memory, hessian_bytes(costs))  # as many as the work takes at a time
    samples, measured = next(in_groups(batch.num_samples, size, time_of))
    return measured * batch.num_samples / (samples.stop - samples.start)


def _seconds_of_block(autodiff: Autodiff, basis: Tensor) -> float:
    autodiff.prepare(len(basis))
    return _seconds(lambda: autodiff.columns(basis))


def _seconds(work: Callable[[], Tensor]) -> float:
    begin = time.perf_counter()
    synchronize(work().device)
    return time.perf_counter() - begin
