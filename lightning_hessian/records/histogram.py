"""Spectra on a signed logarithmic axis: where its bins are, and how many eigenvalues are in each. Numpy only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lightning_hessian.records.record import Record

Array = np.ndarray[Any, np.dtype[Any]]

SMALLEST_DECADE = -12  # |λ| at or below 1e-12 is drawn at 0
NUM_BINS = 64
BIN_EDGES = np.linspace(-20, 20, NUM_BINS + 1)  # |λ| up to 1e8


def signed_log10(eigenvalues: Array) -> Array:
    """sign(λ) · max(0, log10 |λ| + 12): ±9 means λ = ±1e-3, ±12 means ±1, and 0 means |λ| ≤ 1e-12."""
    with np.errstate(divide="ignore"):
        decades = np.log10(np.abs(eigenvalues)) - SMALLEST_DECADE
    return np.sign(eigenvalues) * np.maximum(decades, 0)


def placed(eigenvalues: Array) -> Array:
    """Where on the axis eigenvalues are drawn."""
    return np.clip(signed_log10(eigenvalues), BIN_EDGES[0], BIN_EDGES[-1])


def binned(eigenvalues: Array, counts: Array) -> Array:
    """How many eigenvalues are in each bin."""
    return np.histogram(placed(eigenvalues), BIN_EDGES, weights=counts)[0]


def has_spectra(record: Record) -> bool:
    """Whether more than the ends of a spectrum is known, of some samples at least."""
    return record.density_nodes is not None or record.hessian is not None


def histograms_are(record: Record) -> str | None:
    """How exact the counts of ``problem_histograms`` are, in words; None where there are none."""
    if not has_spectra(record):
        return None
    num_starts = 1 if record.density_nodes is None else record.density_nodes.shape[2]
    return "exact" if num_starts == 1 else f"estimated from {num_starts} random starting vectors"


def whole_spectra(record: Record, column: int) -> tuple[Array, Array]:
    """Nodes and how many of the D eigenvalues of a sample each stands for, of one class column: both ``[n, S, m]``.

    Of the n samples of which more than the ends is known: all where there is a density, else the first ones, whose
    matrix was kept. One row for each of S starting vectors of an estimated density; a single row of exact ones.
    """
    num_inputs = record.gradient.shape[-1]
    if record.density_nodes is not None and record.density_weights is not None:
        nodes, shares = (a[:, column].astype(np.float64) for a in (record.density_nodes, record.density_weights))
        return nodes, shares * num_inputs
    assert record.hessian is not None
    values = np.linalg.eigvalsh(record.hessian[:, column])
    rounding = 10 * np.finfo(values.dtype).eps * num_inputs**0.5 * np.abs(values).max(axis=-1, keepdims=True)
    nodes = np.where(np.abs(values) > rounding, values, 0.0)[:, None]
    return nodes, np.ones(nodes.shape)


def problem_histograms(record: Record) -> Array | None:
    """The expected number of eigenvalues per bin ``[N, K, 64]``; NaN where only the ends are known, None if for all."""
    if not has_spectra(record):
        return None
    num_samples, num_columns = record.classes.shape
    counts = np.full((num_samples, num_columns, NUM_BINS), np.nan)
    for column in range(num_columns):
        nodes, numbers = whole_spectra(record, column)
        for sample in range(len(nodes)):
            counts[sample, column] = binned(nodes[sample], numbers[sample] / nodes.shape[1])
    return counts
