"""A matrix that is reduced for drawing loses nothing that is large."""

import numpy as np
import pytest

from lightning_hessian.records.answers import matrix
from lightning_hessian.records.answers.matrix import Matrix
from lightning_hessian.records.matrices import from_eigenvectors, from_triangle


def draw(values: np.ndarray, size: int) -> tuple[np.ndarray, dict]:
    """The drawn matrix, as a page unpacks it, and the metadata."""
    arrays, meta = matrix.matrix(Matrix(len(values), "stored", lambda first, end: values[first:end]), size)
    return from_triangle(arrays["triangle"], meta["num_cells"]), meta


def symmetric(num_inputs: int) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((num_inputs, num_inputs)).astype(np.float32)
    return values + values.T


@pytest.mark.parametrize(("num_inputs", "size"), [(12, 5), (12, 4), (13, 4), (13, 1), (7, 7), (7, 100), (1, 1)])
@pytest.mark.parametrize("at_once", [1, 30, 1 << 22])
def test_each_cell_is_the_entry_of_largest_magnitude_of_its_block(num_inputs, size, at_once, monkeypatch):
    monkeypatch.setattr(matrix, "ENTRIES_AT_ONCE", at_once)
    values = symmetric(num_inputs)
    drawn, meta = draw(values, size)
    block = -(-num_inputs // size) if size < num_inputs else 1
    assert meta["block"] == block
    assert meta["size"] == num_inputs
    starts = range(0, num_inputs, block)
    blocks = [[values[i : i + block, j : j + block].ravel() for j in starts] for i in starts]
    expected = [[b[np.abs(b).argmax()] for b in row] for row in blocks]
    np.testing.assert_array_equal(drawn, expected)
    assert drawn.shape[0] <= size
    assert meta["limit"] == pytest.approx(np.percentile(np.abs(values), 99))
    assert meta["largest"] == np.abs(values).max()
    assert meta["start"] == np.abs(np.diagonal(values)).argmax()


def test_one_entry_does_not_vanish():
    values = np.zeros((300, 300), np.float32)
    values[250, 3] = values[3, 250] = -2
    drawn, meta = draw(values, 10)
    assert drawn.min() == -2
    assert (drawn == -2).sum() == 2
    assert meta["limit"] == 2  # the 99th percentile is zero


def test_a_matrix_of_zeros():
    drawn, meta = draw(np.zeros((4, 4)), 2)
    assert not drawn.any()
    assert meta["limit"] == 0


def test_what_is_not_finite_is_drawn_and_not_counted():
    values = np.ones((4, 4))
    values[1, 2] = values[2, 1] = np.nan
    values[3, 3] = -np.inf
    drawn, meta = draw(values, 4)
    np.testing.assert_array_equal(drawn, values)
    assert meta["limit"] == meta["largest"] == 1
    assert np.isnan(draw(values, 2)[0][0, 1])


def test_the_limit_of_a_very_large_matrix_is_that_of_every_nth_row(monkeypatch):
    monkeypatch.setattr(matrix, "ROWS_FOR_LIMIT", 4)
    monkeypatch.setattr(matrix, "ENTRIES_AT_ONCE", 20)
    values = symmetric(10)
    assert draw(values, 10)[1]["limit"] == pytest.approx(np.percentile(np.abs(values[::3]), 99))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_from_eigenvectors_are_those_of_the_whole_matrix(dtype):
    rng = np.random.default_rng(0)
    vectors = np.linalg.qr(rng.standard_normal((30, 4)))[0].T.astype(dtype)
    eigenvalues, index = np.array([3, 1, -0.5, -2], dtype), np.arange(4)
    whole = from_eigenvectors(eigenvalues, vectors, index)
    np.testing.assert_array_equal(whole, whole.T)
    np.testing.assert_allclose(whole, (vectors.T * eigenvalues) @ vectors, atol=1e-6)
    for rows in (slice(0, 30), slice(7, 8), slice(12, 25)):
        found = from_eigenvectors(eigenvalues, vectors, index, rows=rows)
        np.testing.assert_allclose(found, whole[rows], rtol=0, atol=np.finfo(dtype).eps)


def test_rows_from_an_upper_triangle():
    values = symmetric(9)
    triangle = values[np.triu_indices(9)]
    for first, end in ((0, 9), (4, 5), (7, 9)):
        np.testing.assert_array_equal(from_triangle(triangle, 9, slice(first, end)), values[first:end])


def test_more_inputs_than_can_be_drawn(monkeypatch):
    monkeypatch.setattr(matrix, "MAX_DRAWN_INPUTS", 8)
    with pytest.raises(LookupError, match="9 inputs is too large to be drawn"):
        draw(np.zeros((9, 9)), 4)
