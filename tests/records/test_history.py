"""Curves and spectra over training: statistics over samples, errors, and what is left out."""

import numpy as np
import pytest

from lightning_hessian.records.answers.history import MissingError, history, metric_table, series, spectra, uncertainty
from lightning_hessian.records.event_format import Summary
from lightning_hessian.records.metrics import METRICS

# Two samples of one class: both ends listed, and a complete spectrum whose smallest eigenvalue is a zero not listed.
ARRAYS = {
    "lambda_max": np.float32([[3.0], [5.0]]),
    "lambda_min": np.float32([[-2.0], [0.0]]),
    "eigenvalues": np.float32([[[3.0, 1.0, -2.0]], [[5.0, 4.0, 1.0]]]),
    "residuals": np.float32([[[0.25, 9.0, 0.5]], [[0.125, 9.0, 9.0]]]),
    "converged": np.uint8([[[1, 1, 0]], [[1, 0, 0]]]),
    "finite_difference_error": np.float32([[3e-7], [np.nan]]),
    "valid": np.uint8([[1], [1]]),
}
DERIVED = {
    "spectral_norm": np.float32([[3.0], [5.0]]),
    "normalized_curvature": np.float32([[6.0], [10.0]]),
    "linear_radius": np.float32([[1.0], [np.inf]]),
    "gradient_alignment": np.float32([[0.5], [0.5]]),
}
META = {"step": 1, "num_inputs": 4, "class_ids": [3], "target": "logit", "shape": [4], "epoch": 0, "seconds": 0.5}


def summary(step: int, arrays: dict | None = None, **meta) -> Summary:
    return Summary(step, {**ARRAYS, **DERIVED, **(arrays or {})}, {**META, **meta})


def test_errors_are_the_residuals_of_the_ends_and_zero_for_a_zero_that_is_not_listed():
    found = uncertainty(ARRAYS)
    np.testing.assert_array_equal(found["lambda_max_error"], [[0.25], [0.125]])
    np.testing.assert_array_equal(found["lambda_min_error"], [[0.5], [0.0]])


def test_an_end_that_has_not_converged_is_not_converged():
    found = uncertainty(ARRAYS)
    np.testing.assert_array_equal(found["lambda_max_converged"], [[1], [1]])
    np.testing.assert_array_equal(found["lambda_min_converged"], [[0], [1]])


def test_a_spectrum_without_listed_eigenvalues_has_no_errors():
    empty = {name: array[..., :0] if array.ndim == 3 else array for name, array in ARRAYS.items()}
    found = uncertainty(empty)
    assert not any(array.any() for name, array in found.items() if name.endswith("_error"))
    assert all(array.all() for name, array in found.items() if name.endswith("_converged"))


@pytest.mark.parametrize("sign", [1, -1])
def test_errors_of_what_the_largest_magnitude_decides_are_relative_to_it(sign):
    """To first order; with ``sign`` -1, lambda_min is the end of largest magnitude."""
    ends = {
        "lambda_max": np.float32([[2.0 - sign]]),
        "lambda_min": np.float32([[-2.0 - sign]]),
        "eigenvalues": np.float32([[[2.0 - sign, -2.0 - sign]]]),
        "residuals": np.float32([[[0.6, 0.3]]]),
        "converged": np.uint8([[[1, 0]]]),
        **{name: np.float32([[10.0]]) for name in ("spectral_norm", "normalized_curvature", "linear_radius")},
        "top_eigenvector_cosine": np.float32([[0.5]]),
    }
    found = uncertainty(ends)
    error = 0.3 if sign > 0 else 0.6
    np.testing.assert_allclose(found["spectral_norm_error"], [[error]], rtol=1e-6)
    for name in ("normalized_curvature", "linear_radius"):
        np.testing.assert_allclose(found[f"{name}_error"], [[10 * error / 3]], rtol=1e-6)
        assert found[f"{name}_converged"] == (sign < 0)
    assert found["top_eigenvector_cosine_converged"] == 0
    assert "top_eigenvector_cosine_error" not in found


def test_statistics_over_samples_and_what_is_not_finite():
    arrays, meta = series(history([summary(0), summary(5)]))
    np.testing.assert_array_equal(arrays["steps"], [0, 5])
    np.testing.assert_array_equal(arrays["lambda_max_mean"], [[4.0], [4.0]])
    np.testing.assert_allclose(arrays["lambda_max_p10"][0], np.percentile([3, 5], 10))
    np.testing.assert_allclose(arrays["lambda_max_p90"][0], np.percentile([3, 5], 90))
    np.testing.assert_array_equal(arrays["linear_radius_mean"], [[1.0], [1.0]])
    np.testing.assert_array_equal(arrays["linear_radius_num_finite"], [[1], [1]])
    np.testing.assert_allclose(arrays["lambda_max_error_mean"][1], [0.1875])
    np.testing.assert_array_equal(arrays["lambda_max_all_converged"], [[1], [1]])
    np.testing.assert_array_equal(arrays["gradient_alignment_all_converged"], [[0], [0]])
    assert meta["total_seconds"] == 1.0


def test_a_step_that_lacks_an_array():
    with_labels = {"labels": np.int32([2, 3]), "trace": np.float32([[1.0], [2.0]])}
    arrays, _ = series(history([summary(0), summary(5, with_labels)]))
    np.testing.assert_array_equal(arrays["labels"], [[-1, -1], [2, 3]])
    np.testing.assert_array_equal(arrays["trace"][:, 0], [[np.nan], [1.0]])


def test_what_is_said_of_listed_eigenvalues():
    arrays, _ = spectra(history([summary(0)]), 0, 0)
    assert (arrays["num_listed"][0], arrays["num_converged"][0]) == (3, 2)
    assert arrays["largest_residual"][0] == 9
    np.testing.assert_allclose(arrays["negative_share"], [2 / 6])


@pytest.mark.parametrize("changed", [{"target": "prob"}, {"class_ids": [4]}, {"shape": [2, 2]}])
def test_measurements_of_another_kind_than_the_last_are_left_out(changed):
    measured = history([summary(0, **changed), summary(1), summary(2)], ["1 damaged measurement"])
    assert [each.logged_step for each in measured.summaries] == [1, 2]
    assert measured.left_out == (
        "Left out: 1 damaged measurement; 1 measurement of other samples, classes or targets than the last."
    )


def test_a_step_that_was_not_measured():
    measured = history([summary(3), summary(7)])
    assert measured.at(7).logged_step == 7
    with pytest.raises(MissingError, match=r"no measurement at step 5\. There are 2, from step 3 to 7"):
        measured.at(5)


def test_every_metric_but_standard_errors_can_be_chosen():
    assert [row["name"] for row in metric_table()] == [metric.name for metric in METRICS if not metric.is_error]
    assert all(row["title"] and row["meaning"] for row in metric_table())


def test_what_is_not_valid_is_left_out():
    """The second sample at step 1: statistics and errors are those of the first."""
    names = ("lambda_max", "lambda_min", "eigenvalues", "residuals", *DERIVED)
    nan = {
        name: np.stack([a[0], np.full_like(a[0], np.nan)]) for name, a in {**ARRAYS, **DERIVED}.items() if name in names
    }
    invalid = {**nan, "valid": np.uint8([[1], [0]]), "converged": np.uint8([[[1, 1, 1]], [[0, 0, 0]]])}
    measured = history([summary(0), summary(1, invalid)])
    arrays, meta = series(measured)
    np.testing.assert_array_equal(arrays["valid"], [[[1], [1]], [[1], [0]]])
    np.testing.assert_array_equal(arrays["lambda_max_mean"], [[4.0], [3.0]])
    np.testing.assert_array_equal(arrays["lambda_max_error_mean"], [[0.1875], [0.25]])
    np.testing.assert_array_equal(arrays["lambda_max_all_converged"], [[1], [1]])
    np.testing.assert_array_equal(arrays["lambda_max_num_finite"], [[2], [1]])
    assert meta["validity"] == [
        "Agrees with finite differences to 3e-7 (at 1 of 2 samples).",
        "Agrees with finite differences to 3e-7 (at 1 of 2 samples). 1 of 2 samples has no valid Hessian and is "
        "excluded from means; the diagnosis says why.",
    ]
    assert meta["agreement"] == 0.01
    arrays, _ = spectra(measured, 1, 0)
    np.testing.assert_array_equal(arrays["valid"], [1, 0])
    np.testing.assert_array_equal(arrays["num_listed"], [3, 0])
    assert np.isnan(arrays["eigenvalues"][1]).all()
    assert np.isnan(arrays["negative_share"][1])
