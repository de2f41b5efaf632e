"""Symmetric matrices as they are stored: upper triangles, or eigenvectors. Numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def to_triangle(matrices: Array) -> Array:
    """The upper triangles of symmetric ``[..., D, D]``, row after row, ``[..., D(D+1)/2]``; nothing is lost."""
    size = matrices.shape[-1]
    packed = np.empty((*matrices.shape[:-2], size * (size + 1) // 2), matrices.dtype)
    begin = 0
    for i in range(size):
        packed[..., begin : begin + size - i] = matrices[..., i, i:]
        begin += size - i
    return packed


def from_triangle(packed: Array, size: int, rows: slice = slice(None)) -> Array:
    """The symmetric matrices ``[..., D, D]`` that ``to_triangle`` packed, or some of their rows."""
    index = np.arange(size)
    diagonal = index * size - index * (index - 1) // 2  # the position of H[i, i]
    wanted = range(size)[rows]
    matrices = np.empty((*packed.shape[:-1], len(wanted), size), packed.dtype)
    for row, i in enumerate(wanted):
        matrices[..., row, i:] = packed[..., diagonal[i] : diagonal[i] + size - i]
        matrices[..., row, :i] = packed[..., diagonal[:i] + i - index[:i]]
    return matrices


def from_eigenvectors(eigenvalues: Array, vectors: Array, index: Array, *, rows: slice = slice(None)) -> Array | None:
    """V diag(λ) Vᵀ ``[D, D]`` of a complete spectrum, or None where a vector of a nonzero eigenvalue is missing.

    Args:
        eigenvalues: ``[M]``, all that are not zero.
        vectors: ``[V, D]``.
        index: ``[V]``, their positions among the eigenvalues. Eigenvalues that may be ``rounding`` need no vector.
        rows: which of the D rows.
    """
    if not spans(eigenvalues, index, vectors.shape[-1]):
        return None
    wide = vectors.astype(np.float64)
    scaled = wide * eigenvalues[index].astype(np.float64)[:, None]
    found: Array = (scaled[:, rows].T @ wide + wide[:, rows].T @ scaled) / 2  # symmetric to the last bit
    return found.astype(vectors.dtype)


def spans(eigenvalues: Array, index: Array, num_inputs: int) -> bool:
    """Whether every eigenvalue that is not zero to rounding has its eigenvector, for all of ``[..., M]``."""
    rest = np.abs(eigenvalues)
    limit = rounding(rest, num_inputs)
    np.put_along_axis(rest, index, 0, axis=-1)
    return bool((rest <= limit).all())


def rounding(magnitudes: Array, num_inputs: int) -> Array:
    """The |λ| ``[..., 1]`` up to which rounding alone may have made an eigenvalue of ``[..., M]``: a heuristic."""
    limit: Array = 10 * np.finfo(magnitudes.dtype).eps * num_inputs**0.5 * magnitudes.max(axis=-1, keepdims=True)
    return limit
