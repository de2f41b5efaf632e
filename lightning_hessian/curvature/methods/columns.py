"""Whole Hessians column by column, in few blocks, each as large as memory allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import out_of_memory
from lightning_hessian.curvature.memory import FRAGMENTATION, AllocatedBytes, keeps_pages
from lightning_hessian.curvature.meter import Progress, silent
from lightning_hessian.curvature.operators.autodiff import (
    AUTODIFF_MODES,
    AutodiffMode,
    ReverseOverReverse,
    random_vectors,
    relative_difference,
)
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.errors import MeasurementError, TimeLimitError

# By the generous estimate: all columns are one block, or else the first block.
ONE_BLOCK_BYTES, FIRST_BLOCK_BYTES = 1024 * 2**20, 128 * 2**20
SHARE_OF_FIRST_BLOCK = 8  # the block whose memory is counted is an eighth of the work at most
# Where freed pages go back to the kernel, the fixed cost of one more block (some 4 ms of calls) equals that of touching
# this many bytes for the first time (0.55 s per GB, both on two cores). Below the second figure neither counts.
BLOCK_IN_BYTES, SMALL_BLOCK_BYTES = 7 * 2**20, 128 * 2**20

# Relative asymmetry, or difference from reverse_over_reverse, above which forward_over_reverse is wrong.
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}
SCRATCH_BYTES = 6 * 2**20  # of matrices that are made symmetric at once, for each thread


@dataclass(frozen=True)
class WholeHessians:
    """Whole Hessians of a batch, and what came out beside them.

    Attributes:
        matrices: ``[N, K, D, D]``, symmetric.
        asymmetry: ``[N, K]``, relative, before they were made symmetric.
        num_columns: computed by each autodiff mode; none where they are JᵀAJ, whose gradients are reverse mode's.
        first_derivatives: values ``[N, K]`` and gradients ``[N, K, D]`` that the columns were computed with.
    """

    matrices: Tensor
    asymmetry: Tensor
    num_columns: Counter[AutodiffMode]
    first_derivatives: tuple[Tensor, Tensor] | None = None

    @property
    def mode(self) -> AutodiffMode:
        """That of most columns."""
        return most_common(self.num_columns)


def most_common(num_columns: Counter[AutodiffMode]) -> AutodiffMode:
    """The mode of most columns; reverse mode where there are none."""
    return num_columns.most_common(1)[0][0] if num_columns else "reverse_over_reverse"


class BlockSize:
    """How many columns are computed at once: as many as fit, since every block has a fixed cost.

    Work that surely is small is one block. Otherwise the memory of the first block is counted while it works, and that
    of later ones as long as they more than double; the next are as large as that allows.

    Args:
        num_columns: D.
        memory: bytes that a block may use.
        estimate: bytes that a column of every problem takes at most (``ModelCosts.column_estimate``).
        pages_kept: whether memory costs nothing to use again (``keeps_pages``).
        fixed: columns per block, if given; nothing is counted then.
        in_parts: an eighth of the columns at most, so that a forecast can be made after the first block.
    """

    def __init__(
        self,
        num_columns: int,
        memory: int,
        estimate: int,
        *,
        pages_kept: bool = False,
        fixed: int | None = None,
        in_parts: bool = False,
    ) -> None:
        self._num_columns, self._memory, self._pages_kept = num_columns, memory, pages_kept
        self._largest = num_columns if fixed is None else min(fixed, num_columns)
        if in_parts:
            self._largest = min(self._largest, ceil(num_columns / SHARE_OF_FIRST_BLOCK))
        self._size = self._known = self._largest
        if fixed is None and num_columns * estimate > min(memory, ONE_BLOCK_BYTES):
            few = min(memory, FIRST_BLOCK_BYTES) // estimate
            self._size = max(1, min(few, ceil(num_columns / SHARE_OF_FIRST_BLOCK)))
            self._known = 0

    def next(self, num_left: int) -> int:
        """Columns of the next block, when so many are left: blocks of almost equal size."""
        return ceil(num_left / ceil(num_left / self._size))

    def is_to_be_counted(self, num_columns: int) -> bool:
        """Whether a block of that size is half as large again as those whose memory is known, or more."""
        return num_columns >= 1.5 * self._known

    def report(self, num_columns: int, num_bytes: int) -> None:
        """Takes note of the most memory that a block used at once."""
        self._known = max(self._known, num_columns)
        per_column = num_bytes / num_columns
        limit = self._memory / (1 if self._pages_kept else FRAGMENTATION)
        if not self._pages_kept:
            total = per_column * self._num_columns
            limit = min(limit, max(SMALL_BLOCK_BYTES, (total * BLOCK_IN_BYTES) ** 0.5))
        self._size = min(self._largest, max(1, int(limit / per_column)))

    def halve(self, num_columns: int) -> None:
        """Out of memory with so many: from now on at most half of them."""
        self._largest = self._size = self._known = max(1, num_columns // 2)


def hessians(
    batch: TargetBatch,
    modes: Sequence[AutodiffMode],
    *,
    memory: int,
    column_estimate: int,
    generator: torch.Generator,
    chunk_size: int | None = None,
    in_parts: bool = False,
    split_classes: bool = False,
    progress: Progress = silent,
) -> WholeHessians:
    """Symmetric whole Hessians ``[N, K, D, D]``.

    By the first of ``modes``; by the next where that raises, or where a matrix is asymmetric or zero (what forward mode
    gives where an operation has no rule for it and says nothing) and disagrees with an HVP by reverse_over_reverse
    along a random direction. Where the last one raises, it is tried without copies of samples. A wrong mode whose
    matrices are symmetric is found by comparison with values (``checks.certificate``).

    ``memory``, ``column_estimate`` and ``in_parts`` are as for ``BlockSize``; ``split_classes``: reverse_over_reverse
    takes every class of a sample as a sample of its own, which makes fewer and larger calls. ``progress`` is called
    after every block: a column of n samples counts as n, of N·D. Cost: D columns, each (1 + K) or 2K passes.
    """

    def computed(mode: AutodiffMode, *, copies: bool = True) -> WholeHessians:
        pages_kept, num_inputs = keeps_pages(batch.x.device), batch.num_inputs
        fixed = chunk_size if copies else 1
        block = BlockSize(num_inputs, memory, column_estimate, pages_kept=pages_kept, fixed=fixed, in_parts=in_parts)
        split = split_classes and copies and mode == "reverse_over_reverse"
        matrices, first = _columns(batch, mode, block, progress, split)
        return WholeHessians(matrices, symmetrize_(matrices), Counter({mode: num_inputs}), first)

    for mode in modes[:-1]:
        try:
            found = computed(mode)
        except Exception as error:  # a kernel without a rule for this mode
            # A class as a sample of its own takes more than the batch itself at the least.
            if (out_of_memory(error) and not split_classes) or isinstance(error, TimeLimitError):
                raise
        else:
            if not _looks_wrong(found.matrices, found.asymmetry) or _confirmed(batch, found.matrices, generator):
                return found
            del found  # two such tensors may not fit
    try:
        return computed(modes[-1])
    except Exception as error:
        if out_of_memory(error) or isinstance(error, MeasurementError):
            raise
    return computed(modes[-1], copies=False)  # a forward that refuses equal samples, or other numbers of them


def _columns(
    batch: TargetBatch, mode: AutodiffMode, block: BlockSize, progress: Progress, split: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """All D columns of every problem, as the rows of ``[N, K, D, D]``; and ``first_derivatives``.

    ``split``: see ``split_classes`` of ``hessians``.
    """
    num_samples, num_inputs, shape = batch.num_samples, batch.num_inputs, batch.shape
    batch = batch.split_classes() if split else batch
    matrices = None
    identity = torch.eye(num_inputs, dtype=batch.x.dtype, device=batch.x.device)
    autodiff = AUTODIFF_MODES[mode](batch)
    done = 0
    while done < num_inputs:
        count = block.next(num_inputs - done)
        basis = identity[done : done + count]
        try:
            if block.is_to_be_counted(count):
                with AllocatedBytes() as allocated:
                    columns = autodiff.columns(basis)
                block.report(count, allocated.peak)
            else:
                columns = autodiff.columns(basis)
        except RuntimeError as error:
            if not out_of_memory(error) or count == 1:
                raise
            block.halve(count)
            continue
        # By symmetry, a column is a row; written as rows, which are contiguous in memory.
        if count == num_inputs:
            matrices = columns.mT.contiguous()
        else:
            matrices = batch.x.new_empty(*batch.shape, num_inputs) if matrices is None else matrices
            matrices[:, :, done : done + count] = columns.mT
        del columns
        done += count
        progress("columns", done * num_samples, num_inputs * num_samples)
    assert matrices is not None
    values, gradient = autodiff.first_derivatives()
    return matrices.view(*shape, num_inputs), (values.view(shape[:2]), gradient.view(shape))


def symmetrize_(matrices: Tensor) -> Tensor:
    """Makes contiguous ``[n, K, D, D]`` symmetric in place, H ← (H + Hᵀ)/2, some matrices at a time.

    Returns:
        The relative asymmetry ‖H − Hᵀ‖/‖H‖ there was (Frobenius, ``[n, K]``; 0 for a zero matrix).
    """
    each = matrices.view(-1, *matrices.shape[-2:])  # raises where it would be a copy, which nobody would see
    at_once = SCRATCH_BYTES * torch.get_num_threads() // (2 * each[0].numel() * each.element_size())
    # One matrix as a matrix: torch transposes those by tiles, batches of them entry by entry.
    groups = torch.split(each, at_once) if at_once > 1 else each.unbind()
    transposed, difference = groups[0].new_empty(groups[0].shape), groups[0].new_empty(groups[0].shape)
    asymmetry = []
    for some in groups:
        some_transposed, some_difference = transposed[: len(some)], difference[: len(some)]
        some_transposed.copy_(some.mT)
        norm = torch.linalg.vector_norm(some, dim=(-2, -1))
        torch.sub(some, some_transposed, out=some_difference)
        asymmetry.append(torch.linalg.vector_norm(some_difference, dim=(-2, -1)) / norm.where(norm > 0, 1))
        some.add_(some_transposed).mul_(0.5)
    return torch.cat([a.view(-1) for a in asymmetry]).view(matrices.shape[:2])


def _looks_wrong(matrices: Tensor, asymmetry: Tensor) -> bool:
    """Whether a matrix was asymmetric by more than rounding, is not finite, or is zero (its first rows are)."""
    zero = ~matrices[..., :1, :].any(-1).any(-1)
    if zero.any():
        zero = ~matrices.flatten(2).any(-1)
    return bool((zero | ~(asymmetry <= TOLERANCE[matrices.dtype])).any())


def _confirmed(batch: TargetBatch, matrices: Tensor, generator: torch.Generator) -> bool:
    """Whether H v is what reverse_over_reverse gives for one random v per sample, where one of them is finite."""
    v = random_vectors(batch, generator)[:, :1]
    expected = ReverseOverReverse(batch).hvp(v.expand(batch.shape))
    found = (matrices @ v.unsqueeze(-1)).squeeze(-1)
    finite = (expected.isfinite().all(-1) | found.isfinite().all(-1)).unsqueeze(-1)
    difference = relative_difference(found.where(finite, 0), expected.where(finite, 0))
    return bool(difference <= TOLERANCE[matrices.dtype])
