"""How far the most curved directions have turned since the measurement before. Numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lightning_hessian.records.record import Record

Array = np.ndarray[Any, np.dtype[Any]]

# A gap in |λ|, relative to the largest, that separates eigenvectors. A heuristic from sin θ ≤ ‖change of H‖ / gap
# (Davis and Kahan, 1970): below it a change of H by 5 % may turn them into each other altogether.
CLEAR_GAP = 0.05


@dataclass(frozen=True)
class TopVectors:
    """What one measurement leaves for the next to be compared with. Cost: N·K·V·D numbers.

    Attributes:
        target: name of the target.
        classes: ``[N, K]``.
        vectors: ``[N, K, V, D]``, eigenvectors, largest |λ| first.
        gaps: ``[N, K, V]``, (|λ_v| − r_v − |λ_v+1| − r_v+1) / |λ_1| with residuals r: how clearly the first v
            eigenvectors are separated from all others of D; at most 0 where they are not, or have not converged.
    """

    target: str
    classes: Array
    vectors: Array
    gaps: Array


@dataclass(frozen=True)
class Drift:
    """How much of the top directions two measurements share, ``[N, K]`` each, from 0 to 1.

    NaN where that is not defined: there is no measurement before, the target or the class of the problem is
    another one, a Hessian is zero, the numbers of eigenvectors differ, one of them has not converged, or no gap
    of more than 5 % of the largest |λ| separates top eigenvectors from the rest.

    Attributes:
        cosine: |cos| between the eigenvectors of largest |λ|. Where others follow without such a gap, any mixture
            of them is as good as the first, and this is √(‖V₁ᵀV₂‖²_F / min(k₁, k₂)) for the k₁ and k₂ vectors
            down to the first gap: the root mean square cosine of the principal angles. Turning within a
            degenerate pair, or two that change places, is no drift.
        overlap: ‖V₁ᵀV₂‖²_F / V′ of the top V′ eigenvectors, V′ where the smaller of both measurements' gaps is
            largest. It does not hang on signs, order or the basis of the space. Random spaces give V′/D.
    """

    cosine: Array
    overlap: Array


def top_vectors(record: Record) -> TopVectors:
    """The top eigenvectors of a record, and how clearly they are separated."""
    if record.eigenvectors is None or record.vector_index is None:
        raise ValueError(f"The record of step {record.step} holds no eigenvectors to compare.")
    sizes, residuals = np.abs(record.eigenvalues), record.residuals
    listed = np.take_along_axis(sizes, record.vector_index, axis=-1)
    blurred = np.take_along_axis(residuals, record.vector_index, axis=-1)
    behind = np.concatenate([(listed + blurred)[..., 1:], _largest_without_vector(record)], axis=-1)
    if not record.complete:  # between the two ends, eigenvalues are not known
        middle = (sizes.shape[-1] + 1) // 2
        unknown = (sizes + residuals)[..., middle - 1 : middle + 1].max(axis=-1, keepdims=True)
        behind = np.maximum(behind, unknown)
    largest = listed[..., :1]
    gaps = np.divide(listed - blurred - behind, largest, out=np.zeros_like(listed), where=largest > 0)
    converged = np.take_along_axis(record.converged, record.vector_index, axis=-1)
    gaps[~np.logical_and.accumulate(converged, axis=-1)] = 0  # what has not converged is not compared
    if gaps.shape[-1] == record.eigenvectors.shape[-1]:
        gaps[..., -1] = 0  # all D vectors span the same space in any case
    return TopVectors(record.target, record.classes, record.eigenvectors, gaps)


def drift(before: TopVectors | None, after: TopVectors) -> Drift:
    """How far top eigenvectors have turned from ``before`` to ``after``.

    Args:
        before: of the same samples, from ``top_vectors``, or None where there is none.
        after: of the later measurement.

    Example:
        >>> import torch
        >>> from lightning_hessian.curvature.methods.execute import Options
        >>> from lightning_hessian.training.measurement import Monitor
        >>> from lightning_hessian.training.samples import Samples
        >>> def bent(a): return lambda x: (x @ torch.tensor([[a, 1 - a]]).T)[:, 0] ** 2
        >>> monitor = Monitor(0, "logit", "float64", Options())
        >>> when = {"step": 0, "logged_step": 0, "epoch": 0}
        >>> old, new = (monitor.measure(bent(a), Samples(torch.ones(1, 2), None), **when) for a in (1.0, 0.5))
        >>> drift(top_vectors(old), top_vectors(new)).overlap.round(6)  # cos² 45°
        array([[0.5]])
    """
    nothing = np.full(after.classes.shape, np.nan)
    if before is None or before.target != after.target or before.vectors.shape != after.vectors.shape:
        return Drift(nothing, nothing.copy())
    same = before.classes == after.classes
    # ‖V₁ᵀV₂‖² of the first i vectors before and the first j after, at [..., i − 1, j − 1].
    shared = np.square(before.vectors @ after.vectors.swapaxes(-1, -2), dtype=np.float64).cumsum(-2).cumsum(-1)
    i, j = (_first_clear(measured.gaps) for measured in (before, after))
    common = np.minimum(before.gaps, after.gaps)
    cut = common.argmax(axis=-1)
    cosine = np.sqrt(_at(shared, i, j) / (np.minimum(i, j) + 1))
    overlap = _at(shared, cut, cut) / (cut + 1)
    separated = _any_clear(before.gaps) & _any_clear(after.gaps)
    return Drift(
        np.where(same & separated, np.minimum(cosine, 1), np.nan),
        np.where(same & _any_clear(common), np.minimum(overlap, 1), np.nan),
    )


def _largest_without_vector(record: Record) -> Array:
    """The largest |λ| that is listed without its eigenvector, with its residual: ``[N, K, 1]``, 0 if there is none."""
    assert record.vector_index is not None
    rest = np.abs(record.eigenvalues) + record.residuals
    np.put_along_axis(rest, record.vector_index, 0, axis=-1)
    return rest.max(axis=-1, keepdims=True)


def _first_clear(gaps: Array) -> Array:
    return (gaps > CLEAR_GAP).argmax(axis=-1)


def _any_clear(gaps: Array) -> Array:
    return gaps.max(axis=-1) > CLEAR_GAP


def _at(table: Array, i: Array, j: Array) -> Array:
    """Entries ``[N, K]`` at ``[..., i, j]`` of ``[N, K, V, V]``."""
    row = np.take_along_axis(table, i[..., None, None], axis=-2)[..., 0, :]
    return np.take_along_axis(row, j[..., None], axis=-1)[..., 0]
