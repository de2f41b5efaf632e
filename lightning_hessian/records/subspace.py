"""How far the most curved directions have turned since the previous measurement. Numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lightning_hessian.records.matrices import Array

if TYPE_CHECKING:
    from lightning_hessian.records.record import Record

# A gap in |λ|, relative to the largest, that separates eigenvectors. A heuristic from sin θ ≤ ‖change of H‖ / gap
# (Davis and Kahan, 1970): below it a change of H by 5 % may rotate them into each other completely.
CLEAR_GAP = 0.05


@dataclass(frozen=True)
class SubspaceOverlap:
    """How much of the top directions two measurements share, ``[N, K]`` each, from 0 to 1.

    NaN where that is not defined: there is no previous measurement, its target or class was another one, a Hessian is
    zero, the numbers of eigenvectors differ, one of them has not converged, or no gap of more than 5 % of the largest
    |λ| separates top eigenvectors from the rest.

    Attributes:
        cosine: |cos| between the eigenvectors of largest |λ|. Where others follow without such a gap, any unit vector
            in their span is as good as the first, and this is √(‖V₁ᵀV₂‖²_F / min(k₁, k₂)) for the k₁ and k₂ vectors
            down to the first gap: the root mean square cosine of the principal angles. It stays 1 when vectors turn
            within a degenerate pair, or when two close eigenvalues swap.
        overlap: ‖V₁ᵀV₂‖²_F / V′ of the top V′ eigenvectors, V′ where the smaller of both measurements' gaps is
            largest. It does not depend on signs, order or the basis of the subspace. Random subspaces give V′/D.
    """

    cosine: Array
    overlap: Array


def subspace_overlap(previous: Record | None, record: Record) -> SubspaceOverlap:
    """How far the top eigenvectors have turned from ``previous`` to ``record``.

    Args:
        previous: the previous measurement of the same samples, whole matrices not needed, or None where there is none.
        record: the later measurement.

    Raises:
        ValueError: a record holds no eigenvectors.

    Example:
        >>> from dataclasses import replace
        >>> turned = replace(record, eigenvectors=record.eigenvectors[..., [1, 0, 2]])  # x₀ and x₁ swapped
        >>> subspace_overlap(record, record).cosine, subspace_overlap(record, turned).cosine
        (array([[1.]]), array([[0.]]))
    """
    vectors, gaps = _top_vectors(record)
    undefined = np.full(record.classes.shape, np.nan)
    if previous is None:
        return SubspaceOverlap(undefined, undefined.copy())
    old_vectors, old_gaps = _top_vectors(previous)
    if previous.target != record.target or old_vectors.shape != vectors.shape:
        return SubspaceOverlap(undefined, undefined.copy())
    same_class = previous.classes == record.classes
    # ‖V₁ᵀV₂‖² of the first i vectors of the one and the first j of the other, at [..., i − 1, j − 1].
    shared = np.square(old_vectors @ vectors.swapaxes(-1, -2), dtype=np.float64).cumsum(-2).cumsum(-1)
    i, j = ((g > CLEAR_GAP).argmax(axis=-1) for g in (old_gaps, gaps))
    common = np.minimum(old_gaps, gaps)
    cut = common.argmax(axis=-1)
    cosine = np.sqrt(_at(shared, i, j) / (np.minimum(i, j) + 1))
    overlap = _at(shared, cut, cut) / (cut + 1)
    separated = _has_clear(old_gaps) & _has_clear(gaps)
    return SubspaceOverlap(
        np.where(same_class & separated, np.minimum(cosine, 1), np.nan),
        np.where(same_class & _has_clear(common), np.minimum(overlap, 1), np.nan),
    )


def _top_vectors(record: Record) -> tuple[Array, Array]:
    """Eigenvectors ``[N, K, V, D]``, largest |λ| first, and the gaps ``[N, K, V]`` behind each of them.

    A gap is (|λ_v| − r_v − |λ_v+1| − r_v+1) / |λ_1| with residuals r: how clearly the first v eigenvectors are
    separated from all others of D; at most 0 where they are not, or have not converged.
    """
    if record.eigenvectors is None or record.vector_index is None:
        raise ValueError(f"The record of step {record.step} holds no eigenvectors to compare.")
    sizes, residuals = np.abs(record.eigenvalues), record.residuals
    top_sizes, top_residuals, converged = (
        np.take_along_axis(values, record.vector_index, axis=-1) for values in (sizes, residuals, record.converged)
    )
    others = sizes + residuals
    np.put_along_axis(others, record.vector_index, 0, axis=-1)
    next_sizes = np.concatenate(
        [(top_sizes + top_residuals)[..., 1:], others.max(axis=-1, keepdims=True)],
        axis=-1,
    )
    if not record.complete:  # between the two ends, eigenvalues are not known
        middle = (sizes.shape[-1] + 1) // 2
        unknown = (sizes + residuals)[..., middle - 1 : middle + 1].max(axis=-1, keepdims=True)
        next_sizes = np.maximum(next_sizes, unknown)
    largest = top_sizes[..., :1]
    gaps = np.divide(top_sizes - top_residuals - next_sizes, largest, out=np.zeros_like(top_sizes), where=largest > 0)
    gaps[~np.logical_and.accumulate(converged, axis=-1)] = 0  # what has not converged is not compared
    if gaps.shape[-1] == record.eigenvectors.shape[-1]:
        gaps[..., -1] = 0  # all D vectors span the same space in any case
    return record.eigenvectors, gaps


def _has_clear(gaps: Array) -> Array:
    return gaps.max(axis=-1) > CLEAR_GAP


def _at(table: Array, i: Array, j: Array) -> Array:
    """Entries ``[N, K]`` at ``[..., i, j]`` of ``[N, K, V, V]``."""
    row = np.take_along_axis(table, i[..., None, None], axis=-2)[..., 0, :]
    return np.take_along_axis(row, j[..., None], axis=-1)[..., 0]
