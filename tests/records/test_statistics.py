"""Mean and percentiles over samples are numpy's own, of the finite values."""

import numpy as np
import pytest

from lightning_hessian.records.statistics import over_samples


@pytest.mark.parametrize("num_samples", [1, 2, 3, 8, 33])
def test_of_finite_values_they_are_numpys_bit_for_bit(num_samples):
    values = np.random.default_rng(0).normal(size=(num_samples, 2, 3))
    found = over_samples(values)
    np.testing.assert_array_equal(found.p10, np.percentile(values, 10, axis=0))
    np.testing.assert_array_equal(found.p90, np.percentile(values, 90, axis=0))
    np.testing.assert_array_equal(found.mean, [[values[:, i, j].copy().mean() for j in range(3)] for i in range(2)])
    np.testing.assert_array_equal(found.num_finite, np.full((2, 3), num_samples))


@pytest.mark.parametrize("axis", [0, 1])
def test_what_is_not_finite_is_left_out(axis):
    values = np.float32([[1, np.nan, np.inf], [2, 5, -np.inf], [4, 9, np.nan]])
    found = over_samples(values if axis == 0 else values.T, axis)
    np.testing.assert_allclose(found.mean, [7 / 3, 7, np.nan])
    np.testing.assert_allclose(found.p10, [1.2, 5.4, np.nan])
    np.testing.assert_allclose(found.p90, [3.6, 8.6, np.nan])
    assert found.num_finite.tolist() == [3, 2, 0]


def test_single_precision_is_averaged_in_double():
    values = np.full((1000, 1), 0.1, np.float32)
    assert over_samples(values).mean == pytest.approx(float(np.float32(0.1)), rel=1e-12)
