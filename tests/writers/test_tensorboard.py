"""What TensorBoard gets of a record: scalars, histograms, pictures and text."""

import dataclasses
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.invalid import FOUR_SAMPLES, MESSAGE, invalidated
from support.measuring import Measurer
from support.networks import mlp

from lightning_hessian.curvature.options import Options
from lightning_hessian.records.histogram import largest_bin_error
from lightning_hessian.records.metrics import LOGGED
from lightning_hessian.training.samples import Samples
from lightning_hessian.writers.scalars import scalars
from lightning_hessian.writers.tensorboard import histograms, pictures
from lightning_hessian.writers.text import diagnosis_text


def record_of(target="prob", activation=torch.nn.GELU):
    monitor = Measurer([0, 2], target, "float64", Options(num_eigenvalues=2), heatmap_samples=0)
    return monitor.measure(mlp(activation), Samples(torch.randn(4, 6), None), step=0, logged_step=0, epoch=0)


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


def test_infinite_is_not_logged_but_shown_in_the_text():
    record = record_of("logit", torch.nn.ReLU)
    assert np.isinf(record.linear_radius).all()
    assert "hessian_linear_radius/logit_class_0" not in scalars(record)
    assert "| ∞ |" in diagnosis_text(record)
    assert "Hessian is exactly zero there" in diagnosis_text(record)


def test_the_text_gives_the_error_of_an_estimated_histogram():
    net, samples = mlp(torch.nn.ReLU, inputs=60, width=20).float(), Samples(torch.randn(3, 60), None)
    options = {"lanczos": Options("lanczos", 4, density_vectors=40), "low_rank": Options("low_rank")}
    ends, whole = (
        Measurer([0, 2], "prob", "float32", o, heatmap_samples=0).measure(net, samples, step=0, logged_step=0, epoch=0)
        for o in options.values()
    )
    found = re.search(
        r"the 60 eigenvalues of an average .* from 40 random .* at most ([0-9.e-]+) for each", diagnosis_text(ends)
    )
    largest = max(largest_bin_error(ends, k) for k in range(2))
    assert float(found.group(1)) == pytest.approx(largest, rel=0.05)
    assert "estimate from" not in diagnosis_text(whole)


def test_pictures_and_histograms_of_a_hundred_classes_are_those_of_ten():
    monitor = Measurer("all", "prob", "float64", Options(), heatmap_samples=1)
    samples = Samples(torch.randn(2, 6), None)
    record = monitor.measure(mlp(outputs=100), samples, step=0, logged_step=0, epoch=0)
    suffixes = [f"prob_class_{k}" for k in range(10)]
    assert list(histograms(record)) == [f"hessian_spectrum_signed_log10/{suffix}" for suffix in suffixes]
    assert list(pictures(record)) == [f"hessian/{suffix}" for suffix in suffixes]
    assert "show the first 10 of 100 classes" in diagnosis_text(record)
    assert "hessian_trace/prob_class_99" in scalars(record)
    assert record.color_scale.shape == (1, 10)


def test_what_did_not_converge_is_marked_where_it_counts():
    record = record_of()
    converged = np.ones_like(record.converged)
    converged[:3, 0, 0] = False
    row = cells_of(diagnosis_text(replace(record, converged=converged)), 0)
    assert "**3 of 4 not converged**" in row[0]
    assert "not converged" not in row[1] + row[3]  # of the smallest, and of the trace
    assert "not converged" not in diagnosis_text(record)
    ends = replace(record, converged=converged, method="lanczos")
    num_eigenvalues = record.converged.size
    assert f"; 3 of {num_eigenvalues} (all samples and classes) have **not converged**." in diagnosis_text(ends)


def test_the_table_is_one_in_markdown():
    """A bar inside a title would end its cell: header, rule and rows have as many cells."""
    table = table_of(diagnosis_text(record_of()))
    assert {len(row) for row in table} == {3}
    assert len(table) == 2 + len(LOGGED)


def test_many_classes_have_a_row_each():
    monitor = Measurer([0, 1, 2, 3, 4], "prob", "float64", Options(num_eigenvalues=2), heatmap_samples=0)
    samples = Samples(torch.randn(4, 6), None)
    text = diagnosis_text(monitor.measure(mlp(outputs=5), samples, step=0, logged_step=0, epoch=0))
    table = table_of(text)
    assert {len(row) for row in table} == {1 + len(LOGGED)}
    assert [row[0].strip() for row in table] == ["class", "---", "0", "1", "2", "3", "4"]
    assert cells_of(text, 4) == [cell.strip() for cell in table[-1][1:]]


def test_the_text_explains_every_metric_it_lists():
    text = diagnosis_text(record_of())
    titles = [row[0].strip() for row in table_of(text)]
    for metric in LOGGED:
        assert metric.title.replace("|", "\\|") in titles
        assert f"- **{metric.title}** = {metric.formula}: {metric.meaning}." in text


def test_errors_of_estimates_are_logged_and_in_the_text():
    net, samples = mlp(torch.nn.Tanh, inputs=40), Samples(torch.randn(2, 40), None)
    monitor = Measurer([0, 2], "prob", "float64", Options("lanczos", 4), heatmap_samples=0)
    record = monitor.measure(net, samples, step=0, logged_step=0, epoch=0)
    record = replace(record, residuals=np.arange(1.0, 17).reshape(2, 2, 4))
    values = scalars(record)
    names = (
        "lambda_max",
        "lambda_min",
        "spectral_norm",
        "trace",
        "frobenius_norm",
        "gauss_newton_share",
        "not_converged",
    )
    errors = {tag for tag in values if tag.startswith("hessian_error/")}
    assert errors == {f"hessian_error/{name}_prob_class_{k}" for name in names for k in (0, 2)}
    assert values["hessian_error/trace_prob_class_2"] == record.trace_error[:, 1].mean()
    assert values["hessian_error/lambda_min_prob_class_0"] == (4 + 12) / 2
    assert values["hessian_error/lambda_max_prob_class_0"] == (1 + 9) / 2
    largest = abs(record.eigenvalues[:, 0]).argmax(axis=-1)
    assert values["hessian_error/spectral_norm_prob_class_0"] == record.residuals[[0, 1], 0, largest].mean()
    assert f"{record.trace[:, 0].mean():.3g} ± {record.trace_error[:, 0].mean():.1g} (" in diagnosis_text(record)
    assert values["hessian_cost/matvecs"] == record.num_matvecs


def cells_of(text: str, class_id: int) -> list[str]:
    """The cells of a class in the table of a text."""
    header, _, *rows = ([cell.strip() for cell in row] for row in table_of(text))
    if str(class_id) in header:
        return [row[header.index(str(class_id))] for row in rows]
    return next(row[1:] for row in rows if row[0] == str(class_id))


def table_of(text: str) -> list[list[str]]:
    """The cells of the table of a text, row by row."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]


def test_the_text_says_what_is_not_valid_and_how_far_the_rest_agrees():
    record = record_of()
    text = diagnosis_text(invalidated(record, FOUR_SAMPLES["one sample"]))
    assert MESSAGE in text
    assert (
        "Agrees with finite differences to 3e-7 (at 2 of 4 samples). 1 of 4 samples has no valid Hessian and is "
        "excluded from means; the diagnosis says why."
    ) in text
    cell = cells_of(text, 2)[0]
    known = record.lambda_max[[0, 1, 3], 1]
    assert cell.startswith(f"{known.mean():.3g} (")
    assert cell.endswith(", 1 of 4 not valid)")
    assert "nan" not in text.lower()


@pytest.mark.parametrize("case", FOUR_SAMPLES)
@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_no_text_holds_a_number_that_is_none(case, method):
    valid = np.array(FOUR_SAMPLES[case], bool)
    record = invalidated(replace(record_of(), method=method), valid)
    text = diagnosis_text(record)
    assert "nan" not in text.lower()
    assert "not converged" not in text
    for k, class_id in enumerate(record.class_ids):
        num_invalid = int((~valid[:, k]).sum())
        cells = cells_of(text, class_id)
        if num_invalid == 4:
            assert set(cells) == {"not valid"}
        elif num_invalid:
            assert f"{num_invalid} of 4 not valid)" in cells[0]
        assert not any("not finite" in cell for cell in cells[:-2])  # the last two compare with an earlier measurement


@pytest.mark.parametrize(
    ("overhead", "words"),
    [
        (0.0123, "1.2 % of"),
        (0.5, "50 % of"),
        (1.033, "103 % of"),
        (2.24, "2.2 times"),
        (12.0, "more than ten times"),
    ],
)
def test_a_large_share_of_the_time_is_written_without_powers_of_ten(overhead, words):
    record = dataclasses.replace(record_of("logit", torch.nn.GELU), overhead=overhead)
    assert f"measuring has taken {words} the training time" in diagnosis_text(record)
