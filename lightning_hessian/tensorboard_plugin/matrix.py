"""Whole matrices out of a record's file: by rows, and small enough to be drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lightning_hessian.records.matrices import HALF, from_half, spans
from lightning_hessian.records.record import Array
from lightning_hessian.tensorboard_plugin.refusal import DamagedFile
from lightning_hessian.tensorboard_plugin.safe_file import SafeFile

ENTRIES_AT_ONCE = 1 << 22
LARGEST_DRAWN = 1 << 15  # inputs; above, the entries of one matrix take minutes
ROWS_FOR_LIMIT = 1 << 12
PERCENTILE = 99


@dataclass(frozen=True)
class Matrix:
    """A symmetric matrix of which any rows can be had.

    Attributes:
        num_inputs: D.
        source: where it comes from.
        rows: ``(first, end) -> [end − first, D]``.
        precision: how exact it is, in words, where that is less than what was measured.
    """

    num_inputs: int
    source: Literal["kept", "from eigenvectors"]
    rows: Callable[[int, int], Array]
    precision: str | None = None


def find_matrix(file: SafeFile, sample: int, column: int, kept: dict[str, Any]) -> Matrix | str:
    """The matrix of one problem, or why there is none.

    Args:
        file: of the measurement.
        sample: of N.
        column: of K.
        kept: which samples' matrices the file holds, as the event says.

    Raises:
        DamagedFile: the arrays of the file do not fit each other.
    """
    _, num_columns, num_inputs = _shape(file, "gradient", 3)
    others: list[int] = []
    for name, shape in (("hessian", (num_inputs, num_inputs)), ("hessian_triangle", (_triangle(num_inputs),))):
        if name in file:
            if file.shape(name)[1:] != (num_columns, *shape):
                raise DamagedFile(f"{name} does not fit the gradient")
            others = _kept_samples(file.shape(name)[0], kept)
            if sample in others:
                reader = _full_rows if name == "hessian" else _triangle_rows
                rows = reader(file, others.index(sample), column, num_inputs)
                return Matrix(num_inputs, "kept", rows, HALF if file.dtype(name) == np.float16 else None)
    made = _eigenvector_rows(file, sample, column, num_inputs)
    if made is not None:
        return Matrix(num_inputs, "from eigenvectors", made)
    return _why_none(others, kept.get("why_not"))


def draw(matrix: Matrix, size: int) -> dict[str, Array]:
    """A matrix made small enough to be drawn.

    Returns:
        ``matrix [n, n]`` with n ≤ size, float32: of each block of entries the one of largest magnitude, so that nothing
        vanishes; ``limit``, the 99th percentile of |H| (of every n-th row, where there are more than 4096), or the
        largest where that is zero; ``largest``, of |H|; ``size``, D; ``block``, the side of a block.
    """
    num_inputs = matrix.num_inputs
    block = max(1, math.ceil(num_inputs / size))
    num_cells = math.ceil(num_inputs / block)
    stride = math.ceil(num_inputs / ROWS_FOR_LIMIT)
    step = block * max(1, ENTRIES_AT_ONCE // (block * num_inputs))
    drawn, magnitudes, largest = [], [], 0.0
    for first in range(0, num_inputs, step):
        rows = matrix.rows(first, min(first + step, num_inputs)).astype(np.float32, copy=False)
        magnitude = np.abs(rows)
        largest = max(largest, float(np.max(magnitude, where=np.isfinite(magnitude), initial=0.0)))
        magnitudes.append(magnitude[-first % stride :: stride])
        drawn.append(rows if block == 1 else _largest_of_blocks(rows, block, num_cells))
    every = np.concatenate(magnitudes, axis=None)
    finite = every if np.isfinite(every).all() else every[np.isfinite(every)]
    limit = float(np.percentile(finite, PERCENTILE)) if len(finite) else 0.0
    return {
        "matrix": np.concatenate(drawn),
        "limit": np.array(limit or largest, np.float32),
        "largest": np.array(largest, np.float32),
        "size": np.array(num_inputs, np.int32),
        "block": np.array(block, np.int32),
    }


def _largest_of_blocks(rows: Array, block: int, num_cells: int) -> Array:
    """Of each block of entries the one of largest magnitude."""
    num_rows = math.ceil(len(rows) / block)
    padded = np.zeros((num_rows * block, num_cells * block), rows.dtype)
    padded[: len(rows), : rows.shape[1]] = rows
    by_row = padded.reshape(num_rows, block, -1)
    high = by_row.max(axis=1).reshape(num_rows, num_cells, block).max(axis=2)
    low = by_row.min(axis=1).reshape(num_rows, num_cells, block).min(axis=2)
    return np.where(high >= -low, high, low)


def _shape(file: SafeFile, name: str, num_dimensions: int) -> tuple[int, ...]:
    shape = file.shape(name)
    if len(shape) != num_dimensions:
        raise DamagedFile(f"{name} has the shape {list(shape)}")
    return shape


def _triangle(num_inputs: int) -> int:
    return num_inputs * (num_inputs + 1) // 2


def _kept_samples(num_kept: int, kept: dict[str, Any]) -> list[int]:
    """Whose matrices were kept: the event tells, or they are those of the first samples."""
    samples = kept.get("matrices")
    if isinstance(samples, list) and len(samples) == num_kept and all(type(i) is int for i in samples):
        return samples
    return list(range(num_kept))


def _why_none(others: list[int], told: object) -> str:
    if isinstance(told, str) and told:
        return told
    kept = f"only of sample {', '.join(map(str, others))}" if others else "of no sample"
    return f"The whole matrix was kept {kept} at this step, and the eigenvectors that were kept do not make it up."


def _full_rows(file: SafeFile, place: int, column: int, num_inputs: int) -> Callable[[int, int], Array]:
    return lambda first, end: file.read("hessian", place, column, rows=(first, end))


def _triangle_rows(file: SafeFile, place: int, column: int, num_inputs: int) -> Callable[[int, int], Array]:
    """Rows of a matrix of which the upper triangle was kept, row after row."""
    triangle = file.read("hessian_triangle", place, column)
    if triangle.dtype == np.float16:
        if file.shape("hessian_scale") != file.shape("hessian_triangle")[:2]:
            raise DamagedFile("hessian_scale does not fit hessian_triangle")
        triangle = from_half(triangle, file.read("hessian_scale", place, column))
    index = np.arange(num_inputs)
    diagonal = index * num_inputs - index * (index - 1) // 2  # where H[i, i] lies

    def rows(first: int, end: int) -> Array:
        found = np.empty((end - first, num_inputs), triangle.dtype)
        for row, i in zip(found, range(first, end), strict=True):
            row[i:] = triangle[diagonal[i] : diagonal[i] + num_inputs - i]
            row[:i] = triangle[diagonal[:i] + i - index[:i]]
        return found

    return rows


def _eigenvector_rows(file: SafeFile, sample: int, column: int, num_inputs: int) -> Callable[[int, int], Array] | None:
    """Rows of V diag(λ) Vᵀ, where the vectors of all eigenvalues that are not zero to rounding are there."""
    meta = file.meta or {}
    if meta.get("complete") is not True or "eigenvectors" not in file or "vector_index" not in file:
        return None
    eigenvalues = file.read("eigenvalues", sample, column)
    index = file.read("vector_index", sample, column)
    vectors = file.read("eigenvectors", sample, column)
    if vectors.shape != (len(index), num_inputs) or ((index < 0) | (index >= len(eigenvalues))).any():
        raise DamagedFile("eigenvectors do not fit eigenvalues and gradient")
    if not spans(eigenvalues, index, num_inputs):
        return None
    wide = vectors.astype(np.float64)
    scaled = wide * eigenvalues.astype(np.float64)[index, None]
    return lambda first, end: (scaled[:, first:end].T @ wide).astype(vectors.dtype)
