"""Records are written whole or not at all, and come back as they were."""

import dataclasses
import os

import numpy as np
import pytest
import torch
from support.measuring import Measurer
from support.networks import mlp

from lightning_hessian import load_records
from lightning_hessian.curvature.methods.plan import Options
from lightning_hessian.records.files import save_record
from lightning_hessian.training.samples import Samples


@pytest.fixture
def record():
    monitor = Measurer([0, 2], "prob", "float64", Options(), heatmap_samples=1, class_names=("a", "b", "c"))
    samples = Samples(torch.randn(2, 6), torch.tensor([0, 1]))
    return monitor.measure(mlp(), samples, step=7, logged_step=6, epoch=1)


def test_what_is_saved_comes_back(record, tmp_path):
    path = save_record(record, tmp_path)
    assert path == tmp_path / "input_hessian" / "step_000000007.safetensors"
    (loaded,) = load_records(tmp_path)
    for field in dataclasses.fields(record):
        before, after = getattr(record, field.name), getattr(loaded, field.name)
        if isinstance(before, np.ndarray):
            np.testing.assert_array_equal(after, before)
            assert after.dtype == before.dtype
        else:
            assert after == before, field.name


def test_records_come_in_order_of_step(record, tmp_path):
    for step in (10, 2, 7):
        save_record(dataclasses.replace(record, step=step, hessian=None), tmp_path)
    records = load_records(tmp_path)
    assert [r.step for r in records] == [2, 7, 10]
    assert records[0].hessian is None


def test_a_failed_write_leaves_nothing(record, tmp_path, monkeypatch):
    save_record(record, tmp_path)

    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_record(dataclasses.replace(record, step=8), tmp_path)
    assert [p.name for p in (tmp_path / "input_hessian").iterdir()] == ["step_000000007.safetensors"]


def test_a_folder_without_records(tmp_path):
    with pytest.raises(FileNotFoundError, match="give the directory of one run"):
        load_records(tmp_path)


def test_a_damaged_file_is_named(record, tmp_path):
    path = save_record(record, tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"step_000000007.safetensors is not a record.*or damaged"):
        load_records(tmp_path)
