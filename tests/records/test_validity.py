"""What is not valid is left out: of means, percentiles, histograms, comparisons and pictures, and nothing else is."""

import warnings
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from support.invalid import FOUR_SAMPLES, invalidated, of_samples
from support.measuring import Measurer
from support.networks import mlp

from lightning_hessian import load_records, plot_hessian, plot_input, plot_spectrum, to_dataframe
from lightning_hessian.curvature.checks.certificate import LARGEST_ERROR
from lightning_hessian.curvature.options import Options
from lightning_hessian.records.color_scale import run_scale
from lightning_hessian.records.event_format import pack_summary, read_summary
from lightning_hessian.records.files import save_record
from lightning_hessian.records.histogram import histogram_counts, largest_bin_error, mean_histogram
from lightning_hessian.records.payload import open_arrays, pack
from lightning_hessian.records.retention import KeepMatrices, MatrixRetention
from lightning_hessian.records.subspace import subspace_overlap
from lightning_hessian.records.validity import AGREEMENT, about_validity
from lightning_hessian.training import measurement
from lightning_hessian.training.samples import Samples
from lightning_hessian.writers.scalars import scalars
from lightning_hessian.writers.tensorboard import histograms

SETTINGS = {
    "dense": (Options("dense"), "prob", torch.nn.GELU),
    "lanczos": (Options("lanczos", 4, density_vectors=3), "prob", torch.nn.GELU),
    "low_rank": (Options("low_rank"), "prob", torch.nn.ReLU),
}


def record_of(method="dense", step=0, **more):
    options, target, activation = SETTINGS[method]
    monitor = Measurer([0, 2], target, "float64", options, heatmap_samples=2)
    torch.manual_seed(0)
    samples = Samples(torch.randn(4, 12, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))
    return monitor.measure(mlp(activation, inputs=12), samples, step=step, logged_step=step, epoch=0, **more)


@pytest.fixture(scope="module", params=list(SETTINGS))
def whole(request):
    return record_of(request.param)


@pytest.fixture(params=list(FOUR_SAMPLES))
def valid(request):
    return np.array(FOUR_SAMPLES[request.param], bool)


def test_a_record_blanks_what_the_measurement_says_is_not_valid(valid, monkeypatch):
    def make_record(prepared, measured, *others, **when):
        spectrum = replace(measured.spectrum, valid=torch.tensor(valid))
        return original(prepared, replace(measured, spectrum=spectrum), *others, **when)

    expected, original = record_of(), measurement.make_record
    monkeypatch.setattr(measurement, "make_record", make_record)
    record = record_of()
    np.testing.assert_array_equal(record.valid, valid)
    arrays = {f.name: getattr(record, f.name) for f in fields(record)} | record.metrics
    numbers = {n: a for n, a in arrays.items() if isinstance(a, np.ndarray) and a.dtype.kind == "f"}
    for name, values in numbers.items():
        known, here = getattr(expected, name), valid[: len(values)]
        if name in ("x", "finite_difference_error") or name.startswith("top_"):
            continue
        if name == "color_scale":
            np.testing.assert_array_equal(values, np.where(here, known, 0))
            continue
        np.testing.assert_array_equal(values[here], known[here], err_msg=name)
        assert np.isnan(values[~here]).all(), name
    assert len(numbers) > 30
    assert not record.converged[~valid].any()
    assert record.converged[valid].all()


def test_nothing_changes_where_all_is_valid(whole):
    assert whole.valid.all()
    assert invalidated(whole, np.ones((4, 2))).gradient is whole.gradient


def test_scalars_and_histograms_are_those_of_the_valid_samples(whole, valid):
    record = invalidated(whole, valid)
    values, by_tag = scalars(record), histograms(record)
    assert np.isfinite(list(values.values())).all()
    for k, class_id in enumerate(whole.class_ids):
        suffix = whole.tag_suffix(class_id)
        kept = np.flatnonzero(valid[:, k])
        of_class = {tag: value for tag, value in values.items() if suffix in tag}
        if not len(kept):
            assert of_class == {}
            assert mean_histogram(record, k) is None
            assert not [tag for tag in by_tag if suffix in tag]
            assert largest_bin_error(record, k) is None
            continue
        expected = of_samples(whole, list(kept))
        assert of_class == pytest.approx({t: v for t, v in scalars(expected).items() if suffix in t}, rel=1e-12)
        found, known = (vars(mean_histogram(each, k)) for each in (record, expected))
        for name, value in known.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-12, err_msg=name)
        assert largest_bin_error(record, k) == largest_bin_error(expected, k)


def test_bars_of_single_samples(whole, valid):
    counts, known = histogram_counts(invalidated(whole, valid)), histogram_counts(whole)
    np.testing.assert_array_equal(counts[valid], known[valid])
    assert np.isnan(counts[~valid]).all()


def test_directions_are_compared_where_both_are_valid(whole, valid):
    defined = ~np.isnan(subspace_overlap(whole, whole).cosine)
    assert defined.any()
    record = invalidated(whole, valid)
    for pair in ((record, whole), (whole, record), (record, record)):
        np.testing.assert_array_equal(~np.isnan(subspace_overlap(*pair).cosine), defined & valid)


def test_color_scales_begin_with_the_first_valid_matrix(whole, valid):
    record = invalidated(whole, valid)
    first = run_scale(None, record.hessian)
    full = run_scale(None, whole.hessian)
    np.testing.assert_array_equal(first, np.where(valid[:2], full, 0))
    np.testing.assert_array_equal(run_scale(first, whole.hessian), full)
    np.testing.assert_array_equal(run_scale(full, record.hessian), full)


def test_it_comes_back_from_a_file(whole, valid, tmp_path):
    record = invalidated(whole, valid)
    save_record(record, tmp_path)
    (loaded,) = load_records(tmp_path)
    for name in ("valid", "finite_difference_error", "hessian", "eigenvectors", "converged", "trace"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(record, name))


def test_a_file_from_before_this_was_checked_counts_as_valid(whole, tmp_path):
    path = save_record(whole, tmp_path)
    with open_arrays(path) as file:
        arrays = {name: file.read(name) for name in file if name not in ("valid", "finite_difference_error")}
        path.write_bytes(pack(arrays, file.meta))
    (loaded,) = load_records(tmp_path)
    assert loaded.valid.all()
    assert np.isnan(loaded.finite_difference_error).all()
    assert loaded.valid.shape == loaded.finite_difference_error.shape == (4, 2)


def test_the_event_says_what_is_valid(whole, valid):
    record = invalidated(whole, valid)
    summary = read_summary(pack_summary(record), 0)
    np.testing.assert_array_equal(summary.arrays["valid"], valid)
    assert summary.arrays["valid"].dtype == np.uint8
    error = summary.arrays["finite_difference_error"]
    np.testing.assert_array_equal(error, record.finite_difference_error.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(summary.arrays["lambda_max"]), ~valid)
    if whole.method == "dense":  # exact: no array of zeros for errors of what is valid
        assert not summary.arrays["trace_error"].any()


def test_a_data_frame_says_what_is_valid(whole, valid):
    table = to_dataframe(invalidated(whole, valid))
    np.testing.assert_array_equal(table["valid"], valid.ravel())
    np.testing.assert_array_equal(table["lambda_max"].isna(), ~valid.ravel())
    np.testing.assert_array_equal(table["max_residual"].isna(), ~valid.ravel())
    np.testing.assert_allclose(table["finite_difference_error"][:2], np.where(valid[0], 3e-7, 0.4))


@pytest.mark.parametrize("show", [plot_spectrum, plot_hessian, plot_input])
def test_there_is_no_plot_or_matrix_of_what_is_not_valid(show):
    record = invalidated(record_of(), FOUR_SAMPLES["one class of one sample"])
    with pytest.raises(
        ValueError, match=r"sample 1, class 2, is not valid at step 0: there are no numbers\. The target"
    ):
        show(record, 1, 2)
    with pytest.raises(ValueError, match="sample 1, class 2, is not valid"):
        record.matrix(1, 2)
    show(record, 1, 0)
    assert np.isfinite(record.matrix(1, 0)).all()


def test_matrices_that_valid_eigenvectors_give_are_not_stored(valid):
    record = invalidated(record_of("low_rank"), valid)
    assert record.is_spanned
    stored = MatrixRetention(KeepMatrices()).apply(record)
    assert stored.hessian is None


def test_counted_as_not_converged_is_only_what_is_valid():
    record = record_of("lanczos")
    converged = record.converged.copy()
    converged[0] = converged[1] = False
    record = invalidated(replace(record, converged=converged), FOUR_SAMPLES["the first sample"])
    assert scalars(record)["hessian_error/not_converged_prob_class_0"] == 4


NAN = np.nan


@pytest.mark.parametrize(
    ("error", "valid", "words"),
    [
        ([[3e-7], [2e-7]], [[1], [1]], "Agrees with finite differences to 3e-7 (at 2 of 2 samples)."),
        (
            [[NAN, 0.004], [NAN, NAN]],
            [[1, 1], [1, 1]],
            "Agrees with finite differences to 0.004 (at 1 of 2 samples).",
        ),
        ([[0.0]], [[1]], "Agrees with finite differences to 0 (at 1 of 1 samples)."),
        ([[3e-12]], [[1]], "Agrees with finite differences to 3e-12 (at 1 of 1 samples)."),
        ([[0.5]], [[1]], "Differs from finite differences by up to 0.5 (at 1 of 1 samples)."),
        ([[NAN]], [[1]], "Not compared with finite differences at this step."),
        (
            [[NAN], [0.4], [3e-7]],
            [[1], [0], [1]],
            "Agrees with finite differences to 3e-7 (at 1 of 3 samples). 1 of 3 samples has no valid Hessian and "
            "is excluded from means; the diagnosis says why.",
        ),
        (
            [[NAN, NAN], [0.4, 0.4], [0.4, 0.4]],
            [[1, 1], [0, 0], [0, 0]],
            "Not compared with finite differences at this step. 2 of 3 samples have no valid Hessian and are excluded "
            "from means; the diagnosis says why.",
        ),
        (
            [[3e-7, 0.4], [3e-7, 3e-7]],
            [[1, 0], [1, 1]],
            "Agrees with finite differences to 3e-7 (at 2 of 2 samples). 1 of 4 Hessians (2 samples × 2 classes) "
            "is not valid and is excluded from means; the diagnosis says why.",
        ),
        (
            [[0.4, 0.4], [3e-7, 0.4]],
            [[0, 0], [1, 0]],
            "Agrees with finite differences to 3e-7 (at 1 of 2 samples). 3 of 4 Hessians (2 samples × 2 classes) "
            "are not valid and are excluded from means; the diagnosis says why.",
        ),
        ([[0.4], [NAN]], [[0], [0]], "No Hessian is valid, so there are no numbers; the diagnosis says why."),
    ],
)
def test_validity_in_words(error, valid, words):
    assert about_validity(np.array(error), np.array(valid, bool)) == words
    assert about_validity(np.float32(error), np.uint8(valid)) == words


def test_agreement_is_what_the_finite_difference_check_certifies():
    assert AGREEMENT == LARGEST_ERROR


def test_nothing_warns(whole, valid):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = invalidated(whole, valid)
        scalars(record), histograms(record), pack_summary(record), subspace_overlap(record, record)
        run_scale(None, record.hessian)
