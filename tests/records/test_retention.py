"""Which matrices a run stores, how they come back, and what is said of those that were not stored."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.measuring import Measurer
from support.networks import mlp

from lightning_hessian import ConfigurationError, KeepMatrices, load_records
from lightning_hessian.curvature.options import Options
from lightning_hessian.records.files import save_record, set_superseded_aside
from lightning_hessian.records.matrices import from_eigenvectors, from_triangle, to_triangle
from lightning_hessian.records.retention import MatrixRetention, keep_policy
from lightning_hessian.training.samples import Samples


def record_of(activation=torch.nn.GELU, inputs=12, dtype="float32", **options):
    monitor = Measurer([0, 2], "prob", dtype, Options(**options), heatmap_samples=2)
    return monitor.measure(
        mlp(activation, inputs=inputs).to(getattr(torch, dtype)),
        Samples(torch.randn(3, inputs), None),
        step=0,
        logged_step=0,
        epoch=0,
    )


def test_the_triangle_of_a_known_matrix():
    matrix = np.array([[1, 2, 3], [2, 4, 5], [3, 5, 6]])
    assert to_triangle(matrix).tolist() == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(from_triangle(np.arange(1, 7), 3), matrix)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_upper_triangle_is_exact_and_half(tmp_path, dtype):
    record = record_of(inputs=60, dtype=dtype)
    size, without = (
        save_record(r, tmp_path / str(i)).stat().st_size for i, r in enumerate((record, replace(record, hessian=None)))
    )
    (loaded,) = load_records(tmp_path / "0")
    np.testing.assert_array_equal(loaded.hessian, record.hessian)
    assert loaded.hessian.dtype == record.hessian.dtype
    assert size - without == pytest.approx(record.hessian.nbytes / 2, rel=0.05)


def test_a_complete_low_rank_spectrum_is_the_matrix(tmp_path):
    record = record_of(torch.nn.ReLU, num_eigenvalues=1)
    assert record.method == "low_rank"
    assert record.eigenvectors.shape == (3, 2, 3, 12)  # all C, though one was asked for
    stored = MatrixRetention(KeepMatrices()).apply(record)
    save_record(stored, tmp_path)
    (loaded,) = load_records(tmp_path)
    assert (loaded.hessian, loaded.why_no_matrix) == (
        None,
        "The stored eigenvectors reproduce every matrix to rounding.",
    )
    for sample in range(2):
        scale = abs(record.hessian[sample, 1]).max()
        np.testing.assert_allclose(loaded.matrix(sample, 2), record.hessian[sample, 1], rtol=0, atol=1e-5 * scale)
    assert loaded.matrix(2, 0).shape == (12, 12)  # of a sample whose matrix was not formed


def test_known_eigenvectors_give_the_known_matrix_only_if_none_is_missing():
    values, vectors = np.array([3.0, 0.0, -1.0]), np.eye(4)[:3]
    found = from_eigenvectors(values, vectors[[0, 2]], np.array([0, 2]))
    np.testing.assert_array_equal(found, np.diag([3.0, 0, -1, 0]))
    assert from_eigenvectors(values, vectors[[0]], np.array([0])) is None


def test_ends_of_a_spectrum_are_no_matrix():
    record = record_of(inputs=40, method="lanczos", num_eigenvalues=4)
    assert not record.is_spanned
    np.testing.assert_array_equal(record.matrix(1, 2), record.hessian[1, 1])
    with pytest.raises(ValueError, match=r"no whole Hessian of sample 2.*heatmap_samples sets"):
        record.matrix(2, 2)


def test_every_nth_measurement_is_stored():
    retention = MatrixRetention(keep_policy(3))
    stored = [retention.apply(record_of(num_eigenvalues=2)) for _ in range(4)]
    assert [r.hessian is not None for r in stored] == [True, False, False, True]
    assert stored[1].why_no_matrix == "Whole matrices are stored at every 3rd measurement only."


def test_the_bytes_of_a_run_are_bounded():
    record, size = record_of(num_eigenvalues=2), 4 * 78 * 4
    for room, expected in ((2 * size, [True, True, False]), (2 * size - 1, [True, False, False])):
        retention = MatrixRetention(KeepMatrices(max_total_bytes=room))
        stored = [retention.apply(record) for _ in range(3)]
        assert [r.hessian is not None for r in stored] == expected
        assert f"would exceed max_total_bytes={room}" in stored[-1].why_no_matrix


def test_after_a_resume_the_files_count(tmp_path):
    record = record_of(num_eigenvalues=2)
    size = save_record(record, tmp_path).stat().st_size
    room = KeepMatrices(max_total_bytes=size + 4 * 78 * 4 - 1)
    assert MatrixRetention(room).apply(record).hessian is not None
    assert MatrixRetention(room, tmp_path / "input_hessian").apply(record).hessian is None
    set_superseded_aside(tmp_path, None, 0)
    assert MatrixRetention(room, tmp_path / "input_hessian").apply(record).hessian is None


def test_the_ways_to_say_it():
    assert keep_policy(True) == KeepMatrices(1, 2**30)
    assert keep_policy(False) is None
    assert keep_policy(5) == keep_policy(np.int64(5)) == KeepMatrices(every_n=5)
    assert type(keep_policy(np.int64(5)).every_n) is int
    assert keep_policy({"every_n": 2, "max_total_bytes": 7}) == KeepMatrices(2, 7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0, "every_n=0 must be a whole number of at least 1"),
        (np.arange(2), "must be a whole number of at least 1"),
        (2.5, "must be True, False, a whole number"),
        ({"storage": "float16"}, "must be True, False, a whole number"),
        ({"max_total_bytes": -1}, "max_total_bytes=-1 must be"),
        ({"every": 2}, "must be True, False, a whole number"),
        ("often", "must be True, False, a whole number"),
    ],
)
def test_what_is_not_allowed_raises(given, message):
    with pytest.raises(ConfigurationError, match=message):
        keep_policy(given)
