"""Spectra on a signed logarithmic axis: where its bins are, and how many eigenvalues are in each. Numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lightning_hessian.records.matrices import Array, rounding

if TYPE_CHECKING:
    from lightning_hessian.records.record import Record

SMALLEST_DECADE = -12  # |λ| at or below 1e-12 is drawn at 0
NUM_BINS = 64
BIN_EDGES = np.linspace(-20, 20, NUM_BINS + 1)  # |λ| up to 1e8


@dataclass(frozen=True)
class Histogram:
    """The arguments of ``SummaryWriter.add_histogram_raw``, on the signed logarithmic axis."""

    min: float
    max: float
    num: float
    sum: float
    sum_squares: float
    bucket_limits: list[float]
    bucket_counts: list[float]


def signed_log10(eigenvalues: Array) -> Array:
    """sign(λ) · max(0, log10 |λ| + 12): ±9 means λ = ±1e-3, ±12 means ±1, and 0 means |λ| ≤ 1e-12."""
    with np.errstate(divide="ignore"):
        decades = np.log10(np.abs(eigenvalues)) - SMALLEST_DECADE
    return np.sign(eigenvalues) * np.maximum(decades, 0)


def axis_position(eigenvalues: Array) -> Array:
    """Where on the axis eigenvalues are drawn."""
    return np.clip(signed_log10(eigenvalues), BIN_EDGES[0], BIN_EDGES[-1])


def bin_counts(eigenvalues: Array, counts: Array) -> Array:
    """How many eigenvalues are in each bin."""
    return np.histogram(axis_position(eigenvalues), BIN_EDGES, weights=counts)[0]


def has_spectra(record: Record) -> bool:
    """Whether more than the ends of a spectrum is known, at least for some samples, valid or not."""
    return record.density_nodes is not None or record.hessian is not None


def histogram_accuracy(record: Record) -> str | None:
    """How exact the counts of ``histogram_counts`` are, in words; None where there are none."""
    if not has_spectra(record):
        return None
    num_starts = 1 if record.density_nodes is None else record.density_nodes.shape[2]
    return "exact" if num_starts == 1 else f"estimated from {num_starts} random starting vectors"


def whole_spectra(record: Record, class_index: int) -> tuple[Array, Array, Array]:
    """Samples ``[n]``; nodes, and how many of the D eigenvalues of a sample each stands for, ``[n, S, m]``; one class.

    The n samples are those of which more than the ends is known: all where there is a density, else the first ones,
    whose matrices the record holds; without those that are not valid. One row for each of S starting vectors of an
    estimated density; a single row of exact ones.
    """
    num_inputs = record.gradient.shape[-1]
    valid = np.flatnonzero(record.valid[:, class_index])
    if record.density_nodes is not None and record.density_weights is not None:
        density = record.density_nodes, record.density_weights
        nodes, shares = (a[valid, class_index].astype(np.float64) for a in density)
        return valid, nodes, shares * num_inputs
    assert record.hessian is not None
    valid = valid[valid < len(record.hessian)]
    values = np.linalg.eigvalsh(record.hessian[valid, class_index])
    magnitudes = np.abs(values)
    nodes = np.where(magnitudes > rounding(magnitudes, num_inputs), values, 0.0)[:, None]
    return valid, nodes, np.ones(nodes.shape)


def histogram_counts(record: Record) -> Array | None:
    """The expected number of eigenvalues per bin ``[N, K, 64]``; None where only the ends are known for all.

    NaN for a sample and class of which only the ends are known, or whose Hessian is not valid.
    """
    if not has_spectra(record):
        return None
    num_samples, num_classes = record.classes.shape
    counts = np.full((num_samples, num_classes, NUM_BINS), np.nan)
    for k in range(num_classes):
        for sample, nodes, numbers in zip(*whole_spectra(record, k), strict=True):
            counts[sample, k] = bin_counts(nodes, numbers / len(nodes))
    return counts


def mean_spectrum(record: Record, class_index: int) -> tuple[Array, Array]:
    """Eigenvalues of one class, and how many of the D of an average sample each stands for.

    Both ``[S, n]``, one row for each starting vector of an estimated density; a single row of exact ones. Without a
    density, they are those of the samples whose whole matrices the record holds. Hessians that are not valid are left
    out; n = 0 where none is.
    """
    _, nodes, counts = whole_spectra(record, class_index)
    num_samples, num_vectors, _ = nodes.shape
    shares = counts / max(num_samples, 1)
    by_vector = [a.swapaxes(0, 1).reshape(num_vectors, -1) for a in (nodes, shares)]
    return by_vector[0], by_vector[1]


def mean_histogram(record: Record, class_index: int) -> Histogram | None:
    """The histogram of ``mean_spectrum``; None where only the ends are known, or no Hessian of the class is valid."""
    if not has_spectra(record):
        return None
    nodes, counts = mean_spectrum(record, class_index)
    if not nodes.size:
        return None
    eigenvalues, counts = nodes.ravel(), counts.ravel() / len(nodes)
    values, numbers = axis_position(eigenvalues[counts > 0]), counts[counts > 0]
    return Histogram(
        min=float(values.min()),
        max=float(values.max()),
        num=float(counts.sum()),
        sum=float((values * numbers).sum()),
        sum_squares=float((np.square(values) * numbers).sum()),
        bucket_limits=BIN_EDGES[1:].tolist(),
        bucket_counts=bin_counts(eigenvalues, counts).tolist(),
    )


def largest_bin_error(record: Record, class_index: int) -> float | None:
    """The largest standard error of a bar of ``mean_histogram``; None where it is exact, or there is none."""
    if record.complete or record.density_nodes is None or not record.valid[:, class_index].any():
        return None
    by_vector = np.stack([bin_counts(*row) for row in zip(*mean_spectrum(record, class_index), strict=True)])
    return float(by_vector.std(axis=0, ddof=1).max() / len(by_vector) ** 0.5)
