"""Spectra on a signed logarithmic axis: where its bins are, and how many eigenvalues are in each. Numpy only."""

from __future__ import annotations

import numpy as np

from lightning_hessian.record import Array, Record

SMALLEST_DECADE = -12  # |λ| at or below 1e-12 is drawn at 0
NUM_BINS = 64
BIN_EDGES = np.linspace(-20, 20, NUM_BINS + 1)  # |λ| up to 1e8


def problem_histograms(record: Record) -> Array | None:
    """The expected number of eigenvalues per bin ``[N, K, 64]``, or None where only the ends of spectra are known."""
    if record.density_nodes is None or record.density_weights is None:
        return None
    nodes, weights = record.density_nodes, record.density_weights
    with np.errstate(divide="ignore"):
        decades = np.maximum(np.log10(np.abs(nodes)) - SMALLEST_DECADE, 0)
    places = np.clip(np.sign(nodes) * decades, BIN_EDGES[0], BIN_EDGES[-1])
    shares = weights * (record.gradient.shape[-1] / nodes.shape[2])
    flat = (len(nodes) * nodes.shape[1], -1)
    counts = [
        np.histogram(p, BIN_EDGES, weights=w)[0]
        for p, w in zip(places.reshape(flat), shares.reshape(flat), strict=True)
    ]
    return np.reshape(counts, (*nodes.shape[:2], NUM_BINS))
