"""Whole Hessians column by column, in blocks whose size and autodiff mode are chosen by their speed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import out_of_memory
from lightning_hessian.curvature.meter import Progress, silent, synchronize
from lightning_hessian.curvature.operators.autodiff import (
    AUTODIFF_MODES,
    Autodiff,
    AutodiffMode,
    random_vectors,
    relative_difference,
)
from lightning_hessian.curvature.target_batch import TargetBatch

LARGEST_LAST_BLOCK = 1.25  # times the others: a small remainder is cheaper together with the block before it


class BlockSearch:
    """Finds the fastest autodiff mode and number of columns per block while working: no column is computed twice.

    Every mode computes a block, then one of twice the size, as long as its columns per second grow and are not below
    half of another's; from then on the fastest mode and size are used (the same work has been seen to take 0.94 s or
    7.8 s depending on the size alone, and either mode to be twice as fast as the other).

    Args:
        modes: those that may be used.
        first: columns of each mode's first block.
        limit: columns of the largest block.
    """

    def __init__(self, modes: Sequence[AutodiffMode], first: int, limit: int) -> None:
        self.limit = limit
        self.size = min(first, limit)
        self.mode = modes[0]
        self.settled = False
        self._waiting = list(modes[1:])  # to run at this size
        self._here: dict[AutodiffMode, float] = {}  # columns per second at this size
        self._before: dict[AutodiffMode, float] = {}  # at half of it
        self._best: tuple[float, AutodiffMode, int] = (0.0, self.mode, self.size)

    def report(self, num_columns: int, seconds: float) -> None:
        """Takes note of how long a block of ``num_columns`` took."""
        if self.settled or num_columns < self.size:
            return
        speed = num_columns / max(seconds, 1e-9)
        self._here[self.mode] = speed
        self._best = max(self._best, (speed, self.mode, self.size))
        if not self._waiting:
            self._go_on()
        if self._waiting:
            self.mode = self._waiting.pop(0)

    def halve(self) -> None:
        """Out of memory: from now on at most half of this size, by the fastest mode so far."""
        self.limit = max(1, self.size // 2)
        speed, fastest, size = self._best
        self.mode, self.size = (fastest, min(size, self.limit)) if speed else (self.mode, self.limit)
        self.settled = True

    def _go_on(self) -> None:
        """To twice the size with the modes that may gain by it; with none left, to the fastest there was."""
        fastest = max(self._here.values())
        gaining = [m for m, speed in self._here.items() if speed > self._before.get(m, 0.0) and 2 * speed >= fastest]
        if gaining and self.size < self.limit:
            self.size = min(2 * self.size, self.limit)
            self._waiting, self._before, self._here = gaining, self._here, {}
        else:
            self.settled = True
            _, self.mode, self.size = self._best


def hessians(
    batch: TargetBatch,
    modes: Sequence[AutodiffMode],
    *,
    first_block: int,
    largest_block: int,
    generator: torch.Generator,
    progress: Progress = silent,
) -> tuple[Tensor, Counter[AutodiffMode]]:
    """Whole Hessians ``[N, K, D, D]``, not yet made symmetric, and how many columns each autodiff mode computed.

    Columns are computed in blocks of ``first_block`` to ``largest_block`` by whichever of ``modes`` is faster here.
    What ``forward_over_reverse`` computed is checked against one HVP by ``reverse_over_reverse`` along a random
    direction, and everything is computed again by that mode if they disagree. ``progress`` is called after every
    block: a column of n samples counts as n, of N·D. Cost: D columns, each (1 + K) or 2K passes.
    """
    if tuple(modes) != ("reverse_over_reverse",):
        try:
            matrices, num_columns = _columns(batch, BlockSearch(modes, first_block, largest_block), progress)
        except Exception as error:  # a kernel without a forward-mode rule that the check in float64 did not meet
            if out_of_memory(error):
                raise
        else:
            if _confirmed(batch, matrices, generator):
                return matrices, num_columns
            del matrices  # two such tensors may not fit
    return _columns(batch, BlockSearch(("reverse_over_reverse",), first_block, largest_block), progress)


def _columns(batch: TargetBatch, block: BlockSearch, progress: Progress) -> tuple[Tensor, Counter[AutodiffMode]]:
    """All D columns of every problem, as the rows of ``[N, K, D, D]``, and how many each mode computed."""
    num_samples, num_classes, num_inputs = batch.shape
    matrices = batch.x.new_empty(num_samples, num_classes, num_inputs, num_inputs)
    autodiff: Autodiff | None = None
    num_columns: Counter[AutodiffMode] = Counter()
    done = 0
    while done < num_inputs:
        left = num_inputs - done
        count = left if left <= min(LARGEST_LAST_BLOCK * block.size, block.limit) else block.size
        columns = torch.arange(done, done + count, device=matrices.device)
        basis = torch.nn.functional.one_hot(columns, num_inputs).to(matrices.dtype)
        try:
            if autodiff is None or autodiff.mode != block.mode:
                autodiff = None  # frees the graph of the other mode's block: only one fits
                autodiff = AUTODIFF_MODES[block.mode](batch)
            autodiff.prepare(count)
            synchronize(matrices.device)
            begin = time.perf_counter()
            # By symmetry, a column is a row; written as rows, which are contiguous in memory.
            matrices[:, :, done : done + count] = autodiff.columns(basis).mT
        except RuntimeError as error:
            if not out_of_memory(error) or block.size == 1:
                raise
            block.halve()
            continue
        synchronize(matrices.device)
        block.report(count, time.perf_counter() - begin)
        num_columns[autodiff.mode] += count
        done += count
        progress("columns", done * num_samples, num_inputs * num_samples)
    return matrices, num_columns


def _confirmed(batch: TargetBatch, matrices: Tensor, generator: torch.Generator) -> bool:
    """Whether H v is what reverse_over_reverse gives for one random v per sample (tolerance 1e-2 in float32)."""
    v = random_vectors(batch, generator)[:, :1]
    expected = AUTODIFF_MODES["reverse_over_reverse"](batch).hvp(v.expand(batch.shape))
    difference = relative_difference((v.unsqueeze(2) @ matrices).squeeze(2), expected)  # columns are stored as rows
    return bool(difference <= (1e-6 if matrices.dtype == torch.float64 else 1e-2))
