"""Whole Hessians, in column blocks that fit memory, and their complete spectra."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_hessian.curvature.cost_model import Facts
from lightning_hessian.curvature.memory import out_of_memory
from lightning_hessian.curvature.methods.low_rank import low_rank_bytes
from lightning_hessian.curvature.operators.autodiff import (
    AUTODIFF_MODES,
    AutodiffMode,
    Engine,
    random_vectors,
    relative_difference,
)
from lightning_hessian.curvature.operators.target_batch import TargetBatch
from lightning_hessian.curvature.operators.terms import head_bytes
from lightning_hessian.curvature.progress import Progress, silent
from lightning_hessian.errors import MeasurementError

ChunkSize = int | Literal["auto"]

# Bytes of intermediate results per block at which the search begins: enough work for the fixed cost of an
# operation not to count, and near what caches hold (measured on MLPs, CNNs and transformers, two cores).
FIRST_BLOCK_BYTES = 64 * 2**20
LARGEST_FIRST_BLOCK = 256  # columns
LARGEST_LAST_BLOCK = 1.25  # times the others: a small rest would cost more alone


class BlockSearch:
    """Finds the fastest engine and number of columns per block while working: no column is computed twice for it.

    The engines race: each computes a block, then each one of twice the size, as long as its columns per second
    grow and are not below half of another's; in the end the fastest pair is kept (the same work has been seen to
    take 0.94 s or 7.8 s by block size alone, and either engine to be twice as fast as the other).

    Args:
        engines: those that may be used.
        first: columns of each engine's first block.
        limit: columns of the largest block.
    """

    def __init__(self, engines: Sequence[AutodiffMode], first: int, limit: int) -> None:
        self.limit = limit
        self.size = min(first, limit)
        self.engine = engines[0]
        self.settled = False
        self._waiting = list(engines[1:])  # to run at this size
        self._here: dict[AutodiffMode, float] = {}  # columns per second at this size
        self._before: dict[AutodiffMode, float] = {}  # at half of it
        self._best: tuple[float, AutodiffMode, int] = (0.0, self.engine, self.size)

    def report(self, num_columns: int, seconds: float) -> None:
        """Take note of how long a block of ``num_columns`` took."""
        if self.settled or num_columns < self.size:
            return
        speed = num_columns / max(seconds, 1e-9)
        self._here[self.engine] = speed
        self._best = max(self._best, (speed, self.engine, self.size))
        if not self._waiting:
            self._go_on()
        if self._waiting:
            self.engine = self._waiting.pop(0)

    def halve(self) -> None:
        """Out of memory: from now on at most half of this, by the fastest engine so far."""
        self.limit = max(1, self.size // 2)
        speed, fastest, size = self._best
        self.engine, self.size = (fastest, min(size, self.limit)) if speed else (self.engine, self.limit)
        self.settled = True

    def _go_on(self) -> None:
        """To twice the size with the engines that may gain by it; with none left, to the fastest there was."""
        fastest = max(self._here.values())
        gaining = [e for e, speed in self._here.items() if speed > self._before.get(e, 0.0) and 2 * speed >= fastest]
        if gaining and self.size < self.limit:
            self.size = min(2 * self.size, self.limit)
            self._waiting, self._before, self._here = gaining, self._here, {}
        else:
            self.settled = True
            _, self.engine, self.size = self._best


def hessians(
    batch: TargetBatch,
    engines: Sequence[AutodiffMode],
    *,
    chunk_size: ChunkSize,
    max_memory: int,
    generator: torch.Generator,
    per_column: int,
    progress: Progress = silent,
) -> tuple[Tensor, Counter[AutodiffMode]]:
    """Whole Hessians ``[N, K, D, D]``, not yet made symmetric, and how many columns each engine made.

    Columns are computed in blocks of ``chunk_size`` (``"auto"``: found while working) by whichever of ``engines``
    is faster here; for one sample one takes ``per_column`` bytes, and the matrices with what decomposing them takes
    are to fit ``max_memory`` too. What ``forward_over_reverse`` made is checked against one HVP by
    ``reverse_over_reverse`` along a random direction, and all is made again by that engine if it disagrees.
    ``progress`` is told after every block: a column done for n samples counts as n, of N·D.
    Cost: D columns, each (1 + K) or 2K passes.
    """
    limit = max(1, (max_memory - matrix_bytes(batch)) // (per_column * batch.num_samples))
    first = first_block(batch.num_samples, per_column)
    if chunk_size != "auto":
        first = limit = chunk_size
    found = _columns_if_true(batch, BlockSearch(engines, first, limit), generator, progress)
    return found or _columns_in_blocks(batch, BlockSearch(("reverse_over_reverse",), first, limit), progress)


def first_block(num_samples: int, per_column: int) -> int:
    """The columns of the block at which the search begins."""
    return min(LARGEST_FIRST_BLOCK, max(1, FIRST_BLOCK_BYTES // (per_column * num_samples)))


def dense_bytes(facts: Facts) -> int:
    """The memory that whole Hessians take per sample: one column at a time, their decomposition, their two parts."""
    return max(facts.product_bytes + 6 * facts.matrix_bytes, 4 * facts.matrix_bytes + head_bytes(facts))


def whole_bytes(facts: Facts, flat: bool) -> int:
    """The memory that the whole Hessians of one sample take: as JᵀAJ where the network is flat, or by columns."""
    by_columns = facts.product_bytes + 6 * facts.matrix_bytes
    return min(by_columns, low_rank_bytes(facts) + 6 * facts.matrix_bytes) if flat else by_columns


def matrix_bytes(batch: TargetBatch) -> int:
    """Memory for the matrices of all problems, and for what decomposing them makes beside (five more of the same)."""
    num_samples, num_classes, num_inputs = batch.shape
    return 6 * num_samples * num_classes * num_inputs**2 * batch.x.element_size()


def _columns_in_blocks(
    batch: TargetBatch, block: BlockSearch, progress: Progress
) -> tuple[Tensor, Counter[AutodiffMode]]:
    """All D columns of every problem, as the rows of ``[N, K, D, D]``, and how many each engine made."""
    num_samples, num_classes, num_inputs = batch.shape
    matrices = batch.x.new_empty(num_samples, num_classes, num_inputs, num_inputs)
    engine: Engine | None = None
    made: Counter[AutodiffMode] = Counter()
    done = 0
    while done < num_inputs:
        left = num_inputs - done
        count = left if left <= min(LARGEST_LAST_BLOCK * block.size, block.limit) else block.size
        columns = torch.arange(done, done + count, device=matrices.device)
        basis = torch.nn.functional.one_hot(columns, num_inputs).to(matrices.dtype)
        try:
            if engine is None or engine.name != block.engine:
                engine = None  # frees the graph of the other engine's block: there is room for one
                engine = AUTODIFF_MODES[block.engine](batch)
            engine.prepare(count)
            wait_for(matrices)
            begin = time.perf_counter()
            # A column is a row by symmetry; written as rows, which lie in one piece in memory.
            matrices[:, :, done : done + len(columns)] = engine.columns(basis).mT
        except RuntimeError as error:
            if not out_of_memory(error) or block.size == 1:
                raise
            block.halve()
            continue
        wait_for(matrices)
        block.report(len(columns), time.perf_counter() - begin)
        made[engine.name] += len(columns)
        done += len(columns)
        progress("columns", done * num_samples, num_inputs * num_samples)
    return matrices, made


def _columns_if_true(
    batch: TargetBatch, block: BlockSearch, generator: torch.Generator, progress: Progress
) -> tuple[Tensor, Counter[AutodiffMode]] | None:
    """The columns, or None where the fast engine fails or is contradicted by the other one."""
    if block.engine == "reverse_over_reverse":
        return _columns_in_blocks(batch, block, progress)
    try:
        matrices, made = _columns_in_blocks(batch, block, progress)
    except Exception as error:  # a kernel without a forward-mode rule that the check in float64 did not meet
        if out_of_memory(error):
            raise
        return None
    return (matrices, made) if _confirmed(batch, matrices, generator) else None


def wait_for(tensor: Tensor) -> None:
    """Until the device has computed all that was asked of it, so that the clock tells of the work."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _confirmed(batch: TargetBatch, matrices: Tensor, generator: torch.Generator) -> bool:
    """Whether H v is what reverse_over_reverse gives for one random v per sample (tolerance 1e-2 in float32)."""
    v = random_vectors(batch, generator)[:, :1]
    expected = AUTODIFF_MODES["reverse_over_reverse"](batch).hvp(v.expand(batch.shape))
    difference = relative_difference((v.unsqueeze(2) @ matrices).squeeze(2), expected)  # columns lie as rows
    return bool(difference <= (1e-6 if matrices.dtype == torch.float64 else 1e-2))


def symmetrize_(matrices: Tensor) -> Tensor:
    """Makes contiguous ``[n, K, D, D]`` symmetric in place, H ← (H + Hᵀ)/2, one matrix at a time.

    Returns:
        The relative asymmetry ‖H − Hᵀ‖/‖H‖ there was (Frobenius, ``[n, K]``; 0 for a zero matrix).
    """
    scratch = matrices.new_empty(matrices.shape[-2:])
    asymmetry = matrices.new_zeros(matrices.shape[:2])
    each = matrices.view(-1, *matrices.shape[-2:])  # raises where it would be a copy, which nobody would see
    for matrix, place in zip(each, asymmetry.view(-1), strict=True):
        norm = matrix.norm()
        torch.sub(matrix, matrix.mT, out=scratch)
        place.copy_(scratch.norm() / norm.where(norm > 0, 1))
        torch.add(matrix, matrix.mT, out=scratch)
        torch.mul(scratch, 0.5, out=matrix)
    return asymmetry


def decompose(matrices: Tensor, gradient: Tensor, num_vectors: int) -> dict[str, Tensor]:
    """Complete eigendecomposition of symmetric ``[n, K, D, D]``, as the parts of a ``Spectrum`` by name.

    Residuals are measured, for every pair. Cost: one ``eigh`` per problem, D³.

    Raises:
        MeasurementError: a matrix is not finite.
    """
    if not matrices.isfinite().all():
        raise MeasurementError("A Hessian has entries that are not finite (overflow in the second derivative).")
    if not matrices.any():
        return zero_parts(gradient, matrices.shape[-1], num_vectors)
    eigenvalues, vectors = torch.linalg.eigh(matrices)
    residuals = (matrices @ vectors - vectors * eigenvalues.unsqueeze(-2)).norm(dim=-2)
    eigenvalues, residuals, vectors = eigenvalues.flip(-1), residuals.flip(-1), vectors.flip(-1).mT
    index = eigenvalues.abs().topk(min(num_vectors, eigenvalues.shape[-1]), dim=-1).indices
    rounding = torch.finfo(matrices.dtype).eps * (10 + matrices.shape[-1]) * eigenvalues.abs().amax(-1, keepdim=True)
    return {
        "eigenvalues": eigenvalues,
        "eigenvectors": vectors.gather(-2, index.unsqueeze(-1).expand(*index.shape, matrices.shape[-1])),
        "vector_index": index,
        "residuals": residuals,
        "converged": residuals <= rounding,
        "trace": matrices.diagonal(dim1=-2, dim2=-1).sum(-1),
        "frobenius_norm": torch.linalg.matrix_norm(matrices),
        "diagonal": matrices.diagonal(dim1=-2, dim2=-1).clone(),  # a view would keep the matrices
        "gradient_curvature": _curvature_along(gradient, matrices),
    }


def zero_parts(gradient: Tensor, num_eigenvalues: int, num_vectors: int) -> dict[str, Tensor]:
    """What ``decompose`` gives for zero matrices, without forming them: the unit vectors, as good as any others."""
    zeros = gradient.new_zeros(gradient.shape[:2])
    num_vectors = min(num_vectors, num_eigenvalues)
    listed = zeros.unsqueeze(-1).repeat(1, 1, num_eigenvalues)
    basis = torch.eye(num_vectors, gradient.shape[-1], dtype=gradient.dtype, device=gradient.device)
    index = torch.arange(num_vectors, device=gradient.device)
    return {
        "eigenvalues": listed,
        "eigenvectors": basis.expand(*zeros.shape, -1, -1).clone(),
        "vector_index": index.expand(*zeros.shape, -1).clone(),
        "residuals": listed.clone(),
        "converged": torch.ones_like(listed, dtype=torch.bool),
        "trace": zeros,
        "frobenius_norm": zeros.clone(),
        "diagonal": torch.zeros_like(gradient),
        "gradient_curvature": zeros.where(gradient.norm(dim=-1) > 0, torch.nan),
        "asymmetry": zeros.clone(),
    }


def _curvature_along(gradient: Tensor, matrices: Tensor) -> Tensor:
    products = (matrices @ gradient.unsqueeze(-1)).squeeze(-1)
    return (gradient * products).sum(-1) / gradient.square().sum(-1)
