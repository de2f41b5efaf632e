"""The numbers behind histograms and tables."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.measuring import Measurer
from support.networks import mlp

from lightning_hessian.curvature.methods.plan import Options
from lightning_hessian.records.color_scale import run_scale
from lightning_hessian.records.histogram import BIN_EDGES, binned, signed_log10
from lightning_hessian.training.samples import Samples
from lightning_hessian.writers.scalars import scalars
from lightning_hessian.writers.tensorboard import diagnosis_text, draw, eigenvalue_counts, histograms


def record_of(target="prob", activation=torch.nn.GELU):
    monitor = Measurer([0, 2], target, "float64", Options(num_eigenvalues=2), heatmap_samples=0)
    return monitor.measure(mlp(activation), Samples(torch.randn(4, 6), None), step=0, logged_step=0, epoch=0)


def test_signed_log10():
    values = np.array([1.0, -1e-3, 1e2, 0.0, 1e-13, -1e-20])
    np.testing.assert_allclose(signed_log10(values), [12, -9, 14, 0, 0, 0], atol=1e-12)


def test_left_out_zeros_are_counted():
    record = record_of("logit", torch.nn.ReLU)
    assert record.eigenvalues.shape[-1] == 2
    eigenvalues, counts = eigenvalue_counts(record, 0)
    assert not eigenvalues.any()
    assert counts.sum() == pytest.approx(6)


def test_scalars_are_means_and_percentiles_over_samples():
    record = record_of()
    values = scalars(record)
    assert values["hessian_trace/prob_class_2"] == pytest.approx(record.trace[:, 1].mean())
    assert values["hessian_spread/trace_prob_class_2_p90"] == pytest.approx(np.percentile(record.trace[:, 1], 90))


def test_eigenvalues_that_have_not_converged_are_counted_where_they_are_iterated():
    record, tag = record_of(), "hessian_error/not_converged_prob_class_2"
    assert tag not in scalars(record)
    converged = np.ones_like(record.converged)
    converged[:3, 1, 0] = False
    iterated = replace(record, method="lanczos", converged=converged)
    assert scalars(iterated)[tag] == 3
    assert scalars(iterated)["hessian_error/not_converged_prob_class_0"] == 0


def test_infinite_is_not_logged_and_said_in_words():
    record = record_of("logit", torch.nn.ReLU)
    assert np.isinf(record.linear_radius).all()
    assert "hessian_linear_radius/logit_class_0" not in scalars(record)
    assert "| ∞ |" in diagnosis_text(record)
    assert "exactly zero almost everywhere" in diagnosis_text(record)


def test_the_histogram_of_an_estimated_density():
    """Counts of a mean sample, within the errors told of the whole spectra; zeros from rounding count as zeros."""
    net, samples = mlp(torch.nn.ReLU, inputs=60, width=20).float(), Samples(torch.randn(3, 60), None)
    options = {"lanczos": Options("lanczos", 4, density_vectors=40), "low_rank": Options("low_rank")}
    ends, whole = (
        Measurer([0, 2], "prob", "float32", o, heatmap_samples=0).measure(net, samples, step=0, logged_step=0, epoch=0)
        for o in options.values()
    )
    assert not ends.complete
    assert ends.density_nodes.shape == (3, 2, 40, 40)
    for column in range(2):
        by_vector = np.stack([binned(*points) for points in zip(*eigenvalue_counts(ends, column), strict=True)])
        truth = binned(*(a[0] for a in eigenvalue_counts(whole, column)))
        np.testing.assert_allclose(by_vector.sum(axis=1), 60, rtol=1e-5)
        middle = len(BIN_EDGES) // 2
        assert truth[middle] >= 57
        error = by_vector.std(axis=0, ddof=1) / 40**0.5
        assert (np.abs(by_vector.mean(axis=0) - truth) <= 4 * error + 1e-6).all()
    told = re.search(
        r"the 60 eigenvalues of a mean .* from 40 random .* at most ([0-9.e-]+) for each", diagnosis_text(ends)
    )
    assert float(told.group(1)) == pytest.approx(error.max(), rel=0.5)
    assert "estimate from" not in diagnosis_text(whole)


def test_pictures_and_histograms_of_a_hundred_classes_are_those_of_ten():
    monitor = Measurer("all", "prob", "float64", Options(), heatmap_samples=1)
    samples = Samples(torch.randn(2, 6), None)
    record = monitor.measure(mlp(outputs=100), samples, step=0, logged_step=0, epoch=0)
    slots = [f"prob_class_{k}" for k in range(10)]
    assert list(histograms(record)) == [f"hessian_spectrum_signed_log10/{slot}" for slot in slots]
    assert list(draw(record)) == [f"hessian/{slot}" for slot in slots]
    assert "of the first 10 of 100 classes" in diagnosis_text(record)
    assert "hessian_trace/prob_class_99" in scalars(record)
    assert record.picture_scale.shape == (1, 10)


def test_what_did_not_converge_is_marked_where_it_counts():
    record = record_of()
    converged = np.ones_like(record.converged)
    converged[:3, 0, 0] = False
    row = diagnosis_text(replace(record, converged=converged)).split("\n| 0 |")[1].split("\n")[0].split("|")
    assert "**3 of 4 not converged**" in row[0]
    assert "not converged" not in row[1] + row[2]
    assert "not converged" not in diagnosis_text(record)


def test_the_scale_of_pictures_is_that_of_the_first_hessian_that_is_not_zero():
    scale = run_scale(None, np.zeros((1, 1, 2, 2)))
    assert scale.tolist() == [[0]]
    scale = run_scale(scale, np.full((1, 1, 2, 2), -3.0))
    assert scale.tolist() == [[3]]
    for size, kept in ((0.1, 3), (8.9, 3), (50.0, 50), (3.0, 50)):  # grows where exceeded far, and never shrinks
        scale = run_scale(scale, np.full((1, 1, 2, 2), size))
        assert scale.tolist() == [[kept]]
    assert run_scale(scale, None) is scale


def test_the_table_is_one_in_markdown():
    """A bar inside a title would end its cell: header, rule and rows have as many cells."""
    lines = [line for line in diagnosis_text(record_of()).splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert len({len(re.split(r"(?<!\\)\|", line)) for line in lines}) == 1
