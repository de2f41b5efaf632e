"""Whole Hessians, in column blocks that fit memory, and their complete spectra."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from lightning_hessian.curvature.derivatives import (
    ENGINES,
    EngineName,
    random_vectors,
    relative_difference,
)
from lightning_hessian.curvature.memory import group_size, out_of_memory, product_bytes
from lightning_hessian.curvature.problems import Problems
from lightning_hessian.errors import MeasurementError

ChunkSize = int | Literal["auto"]

FIRST_BLOCK = 8  # columns; small enough that a slow first block costs little of the whole


class BlockSize:
    """Finds the fastest number of columns per block while working: no column is computed twice for it.

    Doubles while columns per second grow and steps back when they fall (the same work has
    been seen to take 0.94 s or 7.8 s by block size alone). ``limit`` bounds it; ``halve`` lowers the limit.
    """

    def __init__(self, limit: int, *, search: bool = True) -> None:
        self.limit = limit
        self.value = min(FIRST_BLOCK, limit) if search else limit
        self._searching = search
        self._best = (0.0, self.value)

    def report(self, num_columns: int, seconds: float) -> None:
        """Take note of how long a block of ``num_columns`` took."""
        if not self._searching or num_columns < self.value:
            return
        speed = num_columns / max(seconds, 1e-9)
        if speed > self._best[0]:
            self._best = speed, self.value
            self.value = min(2 * self.value, self.limit)
        else:
            self.value, self._searching = self._best[1], False

    def halve(self) -> None:
        """Out of memory: from now on at most half of this."""
        self.limit = self.value = max(1, self.value // 2)
        self._searching = False


def hessians(
    problems: Problems,
    engine: EngineName,
    *,
    chunk_size: ChunkSize,
    max_memory: int,
    generator: torch.Generator,
    per_column: int | None = None,
) -> Iterator[tuple[slice, Tensor, EngineName]]:
    """Whole Hessians, a group of samples at a time: (samples, ``[n, K, D, D]``, engine that made them).

    A group is as large as fits ``max_memory`` bytes; within it, columns are computed in blocks of
    ``chunk_size`` (``"auto"``: found while working). What ``forward_over_reverse`` made is checked against one HVP
    by ``reverse_over_reverse`` along a random direction, and made again by that engine if it disagrees.
    What one column of one sample takes is counted where ``per_column`` does not give it.
    Cost: D columns, each (1 + K) or 2K passes over the group.

    Raises:
        MeasurementError: the matrices of a single sample do not fit ``max_memory``.
    """
    per_column = per_column or product_bytes(problems)
    per_sample = per_column + matrix_bytes(problems.select(slice(0, 1)))
    what = f"The whole Hessians ({problems.num_classes} classes, D = {problems.num_inputs})"
    size = group_size(problems.num_samples, per_sample, max_memory, what)
    for start in range(0, problems.num_samples, size):
        samples = slice(start, min(start + size, problems.num_samples))
        group = problems.select(samples)
        free = max_memory - matrix_bytes(group)
        fitting = max(1, free // (per_column * group.num_samples))
        block = BlockSize(fitting) if chunk_size == "auto" else BlockSize(chunk_size, search=False)
        matrices = _columns_if_true(group, engine, block, generator)
        if matrices is None:
            engine = "reverse_over_reverse"
            matrices = _columns_in_blocks(group, engine, block)
        yield samples, matrices, engine


def dense_bytes(problems: Problems) -> int:
    """The memory that whole Hessians take per sample: one column at a time, and their decomposition."""
    return product_bytes(problems) + matrix_bytes(problems.select(slice(0, 1)))


def matrix_bytes(problems: Problems) -> int:
    """Memory for the matrices of all problems, and for what decomposing them makes beside (five more of the same)."""
    num_samples, num_classes, num_inputs = problems.shape
    return 6 * num_samples * num_classes * num_inputs**2 * problems.x.element_size()


def _columns_in_blocks(problems: Problems, engine_name: EngineName, block: BlockSize) -> Tensor:
    """All D columns of every problem, ``[N, K, D, D]``."""
    num_samples, num_classes, num_inputs = problems.shape
    # Laid out as the engines give them, column by column: writing into [N, K, D, D] would stride over memory.
    matrices = problems.x.new_empty(num_inputs, num_classes, num_samples, num_inputs)
    engine = ENGINES[engine_name](problems)
    done = 0
    while done < num_inputs:
        columns = torch.arange(done, min(done + block.value, num_inputs), device=matrices.device)
        basis = torch.nn.functional.one_hot(columns, num_inputs).to(matrices.dtype)
        begin = time.perf_counter()
        try:
            matrices[done : done + len(columns)] = engine.columns(basis).permute(3, 1, 0, 2)
        except RuntimeError as error:
            if not out_of_memory(error) or block.value == 1:
                raise
            block.halve()
            continue
        _wait_for(matrices)
        block.report(len(columns), time.perf_counter() - begin)
        done += len(columns)
    return matrices.permute(2, 1, 3, 0)


def _columns_if_true(
    problems: Problems, engine: EngineName, block: BlockSize, generator: torch.Generator
) -> Tensor | None:
    """The columns, or None where the fast engine fails or is contradicted by the other one."""
    if engine == "reverse_over_reverse":
        return _columns_in_blocks(problems, engine, block)
    try:
        matrices = _columns_in_blocks(problems, engine, block)
    except Exception as error:  # a kernel without a forward-mode rule that the check in float64 did not meet
        if out_of_memory(error):
            raise
        return None
    return matrices if _confirmed(problems, matrices, generator) else None


def _wait_for(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _confirmed(problems: Problems, matrices: Tensor, generator: torch.Generator) -> bool:
    """Whether H v is what the other engine gives for one random v per problem (tolerance 1e-2 in float32)."""
    v = random_vectors(problems, generator)
    expected = ENGINES["reverse_over_reverse"](problems).hvp(v)
    difference = relative_difference((matrices @ v.unsqueeze(-1)).squeeze(-1), expected)
    return bool(difference <= (1e-6 if matrices.dtype == torch.float64 else 1e-2))


def symmetric_part(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """(H + Hᵀ)/2 and the relative asymmetry ‖H − Hᵀ‖/‖H‖ (Frobenius, ``[N, K]``; 0 for a zero matrix)."""
    transposed = matrices.mT
    norm = torch.linalg.matrix_norm(matrices)
    asymmetry = torch.linalg.matrix_norm(matrices - transposed) / norm.where(norm > 0, 1)
    return (matrices + transposed) / 2, asymmetry


def decompose(matrices: Tensor, gradient: Tensor, num_vectors: int) -> dict[str, Tensor]:
    """Complete eigendecomposition of ``[n, K, D, D]``, as the parts of a ``Spectrum`` by name.

    Residuals are measured on the symmetrised matrix, for every pair. Cost: one ``eigh`` per problem, D³.

    Raises:
        MeasurementError: a matrix is not finite.
    """
    matrices, asymmetry = symmetric_part(matrices)
    if not matrices.isfinite().all():
        raise MeasurementError("A Hessian has entries that are not finite (overflow in the second derivative).")
    if not matrices.any():
        return {**zero_parts(gradient, matrices.shape[-1], num_vectors), "asymmetry": asymmetry}
    eigenvalues, vectors = torch.linalg.eigh(matrices)
    residuals = (matrices @ vectors - vectors * eigenvalues.unsqueeze(-2)).norm(dim=-2)
    eigenvalues, residuals, vectors = eigenvalues.flip(-1), residuals.flip(-1), vectors.flip(-1).mT
    index = eigenvalues.abs().topk(min(num_vectors, eigenvalues.shape[-1]), dim=-1).indices
    rounding = torch.finfo(matrices.dtype).eps * matrices.shape[-1] * eigenvalues.abs().amax(-1, keepdim=True)
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
        "asymmetry": asymmetry,
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
