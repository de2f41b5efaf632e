"""How far extreme eigenvalues may be off, as told beside the curves."""

import numpy as np

from lightning_hessian.records.event_format import extreme_errors

# Two samples of one class: both ends listed, and a complete spectrum whose smallest eigenvalue is a zero not listed.
PAYLOAD = {
    "lambda_max": np.float32([[3.0], [5.0]]),
    "lambda_min": np.float32([[-2.0], [0.0]]),
    "eigenvalues": np.float32([[[3.0, 1.0, -2.0]], [[5.0, 4.0, 1.0]]]),
    "residuals": np.float32([[[0.25, 9.0, 0.5]], [[0.125, 9.0, 9.0]]]),
    "converged": np.uint8([[[1, 1, 0]], [[1, 0, 0]]]),
}


def test_errors_are_the_residuals_of_the_ends_and_zero_for_a_zero_that_is_not_listed():
    told = extreme_errors(PAYLOAD)
    np.testing.assert_array_equal(told["lambda_max_error"], [[0.25], [0.125]])
    np.testing.assert_array_equal(told["lambda_min_error"], [[0.5], [0.0]])


def test_an_end_that_has_not_converged_is_open():
    told = extreme_errors(PAYLOAD)
    np.testing.assert_array_equal(told["lambda_max_open"], [[0], [0]])
    np.testing.assert_array_equal(told["lambda_min_open"], [[1], [0]])


def test_a_spectrum_without_listed_eigenvalues_has_no_errors():
    empty = {name: array[..., :0] if array.ndim == 3 else array for name, array in PAYLOAD.items()}
    assert not any(array.any() for array in extreme_errors(empty).values())
