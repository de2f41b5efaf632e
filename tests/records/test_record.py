"""Records are written whole or not at all, and come back as they were."""

import copy
import dataclasses
import os
import pickle
import time

import numpy as np
import pytest
import torch
from support.measuring import Measurer
from support.networks import mlp

from lightning_hessian import load_records
from lightning_hessian.curvature.options import Options
from lightning_hessian.records.files import save_record
from lightning_hessian.records.metrics import METRICS
from lightning_hessian.training.samples import Samples


@pytest.fixture
def record():
    monitor = Measurer([0, 2], "prob", "float64", Options(), heatmap_samples=1, class_names=("a", "b", "c"))
    samples = Samples(torch.randn(2, 6), torch.tensor([0, 1]))
    return monitor.measure(mlp(), samples, step=7, logged_step=6, epoch=1)


def assert_same(found, expected):
    found, expected = ({**vars(record), **record.metrics} for record in (found, expected))
    assert found.pop("metrics").keys() == expected.pop("metrics").keys()
    assert set(found) == set(expected)
    for name, value in expected.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(found[name], value)
            assert found[name].dtype == value.dtype
        else:
            assert found[name] == value, name


def test_what_is_saved_comes_back(record, tmp_path):
    path = save_record(record, tmp_path)
    assert path == tmp_path / "input_hessian" / "step_000000007.safetensors"
    (loaded,) = load_records(tmp_path)
    assert_same(loaded, record)


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


def test_a_metric_is_an_attribute(record):
    assert set(record.metrics) == {metric.name for metric in METRICS}
    assert record.lambda_max is record.metrics["lambda_max"]
    assert {"lambda_max", "trace_error", "hessian", "matrix"} <= set(dir(record))
    assert not hasattr(record, "lambda_middle")
    with pytest.raises(AttributeError, match="'Record' object has no attribute 'lambda_middle'"):
        _ = record.lambda_middle


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_a_record_can_be_copied_and_pickled(record, duplicate):
    assert_same(duplicate(record), record)


def test_other_values_of_a_metric_leave_the_record_as_it_was(record):
    doubled = record.with_metrics(trace=2 * record.trace)
    np.testing.assert_array_equal(doubled.trace, 2 * record.metrics["trace"])
    np.testing.assert_array_equal(doubled.lambda_max, record.lambda_max)
    assert dataclasses.replace(doubled, step=8).trace is doubled.trace


def test_a_record_says_when_it_was_measured(record):
    assert 0 <= time.time() - record.measured_at < 60


def test_samples_and_classes_are_found_as_the_user_named_them(record):
    assert record.indices(1, 2) == (1, 1)
    assert record.indices(1) == (1, 0)
    assert record.class_name(1, 2) == "c"
    np.testing.assert_array_equal(record.matrix(0, 2), record.hessian[0, 1])
    np.testing.assert_array_equal(record.matrix(0), record.hessian[0, 0])


@pytest.mark.parametrize("sample", [-1, 2])
def test_a_sample_that_does_not_exist(record, sample):
    for method in (record.matrix, record.indices):
        with pytest.raises(IndexError, match=rf"sample={sample} is out of range: this record has samples 0 to 1"):
            method(sample, 0)


@pytest.mark.parametrize("class_id", [1, "label", False])
def test_a_class_that_was_not_measured(record, class_id):
    for method in (record.matrix, record.class_name):
        with pytest.raises(ValueError, match=rf"class_id={class_id!r} was not measured: this record has 0, 2"):
            method(0, class_id)


def test_outputs_are_named_as_their_classes(record):
    assert [record.output_name(k) for k in (0, 1, 2)] == ["a", "b", "c"]
    assert record.id_name(2) == "c"
    assert record.output_words(1, 2) == "class c"
    without = dataclasses.replace(record, class_names=None)
    assert (without.output_name(1), without.id_name(2), without.output_words(1, 2)) == ("1", "2", "class 2")
    labels = dataclasses.replace(record, class_ids=("label", "predicted"))
    assert labels.id_name("label") == "label"
    assert labels.output_words(0, "label") == "class a"


@pytest.mark.parametrize(("target", "labels", "expected"), [("logit", None, False), ("prob", None, True)])
def test_outputs_of_a_regression_are_not_classes(record, target, labels, expected):
    of_target = dataclasses.replace(record, class_names=None, target=target, labels=labels)
    assert of_target.has_classes is expected
    assert of_target.output_words(0, 2) == f"{'class' if expected else 'output'} 2"
    assert not dataclasses.replace(of_target, made_with={"num_outputs": 1}).has_classes


def test_a_hessian_that_is_not_valid_raises_and_does_not_count_as_open(record):
    converged = np.zeros_like(record.converged)
    doubtful = dataclasses.replace(record, valid=np.array([[True, False], [True, True]]), converged=converged)
    doubtful.check_valid(0, 0)
    with pytest.raises(ValueError, match="The Hessian of sample 0, class 2, is not valid at step 7"):
        doubtful.check_valid(0, 2)
    assert doubtful.not_converged.all(axis=2).tolist() == [[True, False], [True, True]]
    assert not record.not_converged.any()


def test_a_file_of_another_format_says_which(record, tmp_path):
    path = save_record(record, tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"format\\":2,', b'"format\\":1,'))
    with pytest.raises(ValueError, match="has format 1, and this version of lightning-hessian reads format 2"):
        load_records(tmp_path)
