"""The table of records holds the records' numbers, one row per sample, class and step."""

import dataclasses
import sys

import numpy as np
import pytest
from support.measuring import Measurer
from support.networks import mlp
from torch import randn

from lightning_hessian import to_dataframe
from lightning_hessian.curvature.options import Options
from lightning_hessian.records.metrics import METRICS
from lightning_hessian.training.samples import Samples


@pytest.fixture
def records():
    monitor = Measurer([2, 0], "prob", "float64", Options(), class_names=("a", "b", "c"))
    samples = Samples(randn(3, 6), randn(3).argsort())
    return [monitor.measure(mlp(), samples, step=7 * i, logged_step=7 * i, epoch=i) for i in range(2)]


def test_one_row_per_sample_class_and_step(records):
    table = to_dataframe(records)
    assert len(table) == 2 * 3 * 2
    for _, row in table.iterrows():
        record = records[row["epoch"]]
        index = row["sample"], record.class_ids.index(row["class_id"])
        assert row["step"] == record.step
        assert row["class"] == record.classes[index]
        assert row["class_name"] == "abc"[row["class"]]
        assert row["label"] == record.labels[row["sample"]]
        assert row["predicted"] == record.predicted[row["sample"]]
        assert row["max_residual"] == record.residuals[index].max()
        assert row["num_matvecs"] == record.num_matvecs
        for metric in METRICS:
            np.testing.assert_equal(row[metric.name], record.metrics[metric.name][index])
    assert table.groupby(["step", "sample", "class_id"]).size().eq(1).all()


def test_unknown_labels_are_not_numbers(records):
    unknown = dataclasses.replace(records[0], labels=None)
    assert to_dataframe(unknown)["label"].isna().all()
    both = to_dataframe([unknown, records[1]])["label"]
    assert both.isna().sum() == 6
    assert str(both.dtype) == "Int64"


def test_what_did_not_converge_is_marked(records):
    (first, _) = records
    converged = first.converged.copy()
    converged[1, 0, 2] = False
    table = to_dataframe(dataclasses.replace(first, converged=converged))
    assert table.loc[~table["converged"], ["sample", "class_id"]].to_numpy().tolist() == [[1, 2]]


def test_no_records_no_table():
    with pytest.raises(ValueError, match="no records to make a table of: give at least one"):
        to_dataframe([])


def test_without_pandas_a_sentence(records, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-hessian\[notebook\]'"):
        to_dataframe(records)
