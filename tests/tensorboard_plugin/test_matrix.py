"""A matrix made small for drawing loses nothing that is large."""

import numpy as np
import pytest

from lightning_hessian.tensorboard_plugin import matrix
from lightning_hessian.tensorboard_plugin.matrix import Matrix, draw


def given(values: np.ndarray) -> Matrix:
    return Matrix(len(values), "kept", lambda first, end: values[first:end])


def symmetric(num_inputs: int) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((num_inputs, num_inputs)).astype(np.float32)
    return values + values.T


@pytest.mark.parametrize(("num_inputs", "size"), [(12, 5), (12, 4), (13, 4), (13, 1), (7, 7), (7, 100), (1, 1)])
@pytest.mark.parametrize("at_once", [1, 30, 1 << 22])
def test_each_cell_is_the_entry_of_largest_magnitude_of_its_block(num_inputs, size, at_once, monkeypatch):
    monkeypatch.setattr(matrix, "ENTRIES_AT_ONCE", at_once)
    values = symmetric(num_inputs)
    drawn = draw(given(values), size)
    block = -(-num_inputs // size) if size < num_inputs else 1
    assert drawn["block"] == block
    assert drawn["size"] == num_inputs
    starts = range(0, num_inputs, block)
    blocks = [[values[i : i + block, j : j + block].ravel() for j in starts] for i in starts]
    expected = [[b[np.abs(b).argmax()] for b in row] for row in blocks]
    np.testing.assert_array_equal(drawn["matrix"], expected)
    assert drawn["matrix"].shape[0] <= size
    assert drawn["limit"] == pytest.approx(np.percentile(np.abs(values), 99))
    assert drawn["largest"] == np.abs(values).max()


def test_one_entry_does_not_vanish():
    values = np.zeros((300, 300), np.float32)
    values[250, 3] = values[3, 250] = -2
    drawn = draw(given(values), 10)
    assert drawn["matrix"].min() == -2
    assert (drawn["matrix"] == -2).sum() == 2
    assert drawn["limit"] == 2  # the 99th percentile is zero


def test_a_matrix_of_zeros():
    drawn = draw(given(np.zeros((4, 4))), 2)
    assert not drawn["matrix"].any()
    assert drawn["limit"] == 0


def test_what_is_not_finite_is_drawn_and_not_counted():
    values = np.ones((4, 4))
    values[1, 2], values[3, 3] = np.nan, -np.inf
    drawn = draw(given(values), 4)
    np.testing.assert_array_equal(drawn["matrix"], values)
    assert drawn["limit"] == drawn["largest"] == 1
    assert np.isnan(draw(given(values), 2)["matrix"][0, 1])


def test_the_limit_of_a_very_large_matrix_is_that_of_every_nth_row(monkeypatch):
    monkeypatch.setattr(matrix, "ROWS_FOR_LIMIT", 4)
    monkeypatch.setattr(matrix, "ENTRIES_AT_ONCE", 20)
    values = symmetric(10)
    assert draw(given(values), 10)["limit"] == pytest.approx(np.percentile(np.abs(values[::3]), 99))
