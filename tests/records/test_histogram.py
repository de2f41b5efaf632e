"""Histograms of spectra on a signed logarithmic axis."""

import numpy as np
import pytest
import torch
from support.measuring import Measurer
from support.networks import mlp

from lightning_hessian.curvature.options import Options
from lightning_hessian.records.histogram import (
    BIN_EDGES,
    bin_counts,
    largest_bin_error,
    mean_histogram,
    mean_spectrum,
    signed_log10,
)
from lightning_hessian.training.samples import Samples


def test_signed_log10():
    values = np.array([1.0, -1e-3, 1e2, 0.0, 1e-13, -1e-20])
    np.testing.assert_allclose(signed_log10(values), [12, -9, 14, 0, 0, 0], atol=1e-12)


def test_left_out_zeros_are_counted():
    monitor = Measurer([0, 2], "logit", "float64", Options(num_eigenvalues=2), heatmap_samples=0)
    samples = Samples(torch.randn(4, 6), None)
    record = monitor.measure(mlp(torch.nn.ReLU), samples, step=0, logged_step=0, epoch=0)
    assert record.eigenvalues.shape[-1] == 2
    eigenvalues, counts = mean_spectrum(record, 0)
    assert not eigenvalues.any()
    assert counts.sum() == pytest.approx(6)
    assert mean_histogram(record, 0).num == pytest.approx(6)


def test_the_histogram_of_an_estimated_density():
    """Counts of an average sample, within the stated errors of the true ones; zeros from rounding count as zeros."""
    net, samples = mlp(torch.nn.ReLU, inputs=60, width=20).float(), Samples(torch.randn(3, 60), None)
    options = {"lanczos": Options("lanczos", 4, density_vectors=40), "low_rank": Options("low_rank")}
    ends, whole = (
        Measurer([0, 2], "prob", "float32", o, heatmap_samples=0).measure(net, samples, step=0, logged_step=0, epoch=0)
        for o in options.values()
    )
    assert not ends.complete
    assert ends.density_nodes.shape == (3, 2, 40, 40)
    for k in range(2):
        by_vector = np.stack([bin_counts(*points) for points in zip(*mean_spectrum(ends, k), strict=True)])
        truth = bin_counts(*(a[0] for a in mean_spectrum(whole, k)))
        np.testing.assert_allclose(by_vector.sum(axis=1), 60, rtol=1e-5)
        middle = len(BIN_EDGES) // 2
        assert truth[middle] >= 57
        error = by_vector.std(axis=0, ddof=1) / 40**0.5
        assert (np.abs(by_vector.mean(axis=0) - truth) <= 4 * error + 1e-6).all()
        assert largest_bin_error(ends, k) == pytest.approx(error.max())
        assert largest_bin_error(whole, k) is None
