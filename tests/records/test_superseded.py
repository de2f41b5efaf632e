"""Where a run starts over in the directory of an earlier one, the earlier records are moved aside."""

import dataclasses
import warnings

import pytest
from support.quadratic import quadratic_record

from lightning_hessian import load_records
from lightning_hessian.records.files import monitors, record_folder, save_record, set_superseded_aside


@pytest.fixture
def log_dir(tmp_path):
    """Records of a fit at three steps, of a test, and of a fit by another monitor."""
    record = quadratic_record(3.0, 1.0)
    for step in (0, 4, 8):
        save_record(dataclasses.replace(record, step=step), tmp_path)
    save_record(dataclasses.replace(record, step=8, stage="test"), tmp_path)
    save_record(dataclasses.replace(record, step=8, name="other"), tmp_path)
    return tmp_path


def steps(log_dir, name=None):
    return [(record.step, record.stage) for record in load_records(log_dir, name)]


def aside(log_dir):
    (folder,) = record_folder(log_dir, None).glob("superseded_*")
    return sorted(path.name for path in folder.iterdir())


def test_a_resumed_fit_sets_later_records_aside(log_dir):
    set_superseded_aside(log_dir, None, 4)
    assert steps(log_dir) == [(0, "fit"), (4, "fit"), (8, "test")]
    assert aside(log_dir) == ["step_000000008.safetensors"]
    assert steps(log_dir, "other") == [(8, "fit")]


def test_a_fit_that_starts_anew_sets_all_of_them_aside(log_dir):
    set_superseded_aside(log_dir, None, 0)
    assert steps(log_dir) == [(8, "test")]
    assert aside(log_dir) == [f"step_{step:09d}.safetensors" for step in (0, 4, 8)]


def test_what_was_set_aside_is_no_monitor(log_dir):
    set_superseded_aside(log_dir, None, 0)
    assert monitors(log_dir) == [None, "other"]


def test_each_time_gets_a_folder_of_its_own(log_dir):
    for _ in range(2):
        save_record(dataclasses.replace(quadratic_record(1.0), step=8), log_dir)
        set_superseded_aside(log_dir, None, 4)
    folders = sorted(record_folder(log_dir, None).glob("superseded_*"))
    assert [[path.name for path in folder.iterdir()] for folder in folders] == [["step_000000008.safetensors"]] * 2


def test_where_nothing_is_superseded_there_is_no_folder(log_dir, tmp_path):
    set_superseded_aside(log_dir, None, 8)
    set_superseded_aside(tmp_path / "new", None, 0)
    assert not list(tmp_path.rglob("superseded_*"))


def test_half_written_files_are_removed(log_dir):
    leftover = record_folder(log_dir, None) / ".step_000000008.safetensors.a1b2"
    leftover.write_bytes(b"half")
    set_superseded_aside(log_dir, None, 8)
    assert not leftover.exists()


def test_what_cannot_be_moved_is_reported_and_raises_nothing(log_dir, monkeypatch):
    def forbidden(source, target):
        raise PermissionError("read-only file system")

    monkeypatch.setattr("pathlib.Path.replace", forbidden)  # that of Python 3.10 looks os.replace up at import
    warning = set_superseded_aside(log_dir, None, 0)
    assert "could not be moved aside (read-only file system): load_records" in warning
    monkeypatch.undo()
    assert len(load_records(log_dir)) == 4


def test_another_record_of_the_same_step_replaces_it(log_dir):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_record(dataclasses.replace(quadratic_record(1.0, 2.0), step=4), log_dir)
    assert [record.lambda_max.item() for record in load_records(log_dir)[:3]] == [3.0, 2.0, 3.0]
