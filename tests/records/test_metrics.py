"""The table of metrics is complete, and what is made from it is current."""

import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from support.measuring import Measurer
from support.networks import mlp
from torch import randn

from lightning_hessian import to_dataframe
from lightning_hessian.curvature.options import Options
from lightning_hessian.records import event_format, metrics
from lightning_hessian.records.metrics import COMPARISON, LOGGED, METRICS, Metric, to_markdown
from lightning_hessian.records.payload import unpack
from lightning_hessian.training.samples import Samples
from lightning_hessian.writers.scalars import scalars
from lightning_hessian.writers.text import diagnosis_text

ROOT = Path(__file__).parents[2]


def test_each_metric_is_defined_where_the_table_says():
    for metric in METRICS:
        module, name = metric.defined_in.rsplit(".", 1)
        defined = getattr(import_module(f"lightning_hessian.{module}"), name)
        if metric.defined_in != COMPARISON:
            assert metric.name in {*dir(defined), *defined.__dataclass_fields__}


def test_the_table_is_complete():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert len(LOGGED) == 11
    for metric in METRICS:
        assert metric.title
        assert metric.meaning
        assert not metric.meaning.endswith(".")
        assert metric.is_error == metric.name.endswith("_error")
        assert metric.is_error or metric.formula
        if metric.has_error:
            assert f"{metric.name}_error" in names


def test_the_page_is_current():
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page == to_markdown(), "run: python -m lightning_hessian.records.metrics > docs/metrics.md"


def test_the_page_on_charts_names_the_tags_that_are_logged():
    page = (ROOT / "docs" / "concepts" / "charts.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `hessian_")]
    named = [tag for row in rows for tag in re.findall(r"`hessian_(\w+)/…`", row.split(" | ")[0])]
    others = ["spread", "spectrum_signed_log10", "error", "cost"]
    assert [name for name in named if name not in others] == [metric.name for metric in LOGGED]


def measured():
    monitor = Measurer([0, 2], "prob", "float64", Options(), heatmap_samples=0)
    return monitor.measure(mlp(), Samples(randn(3, 6), None), step=0, logged_step=0, epoch=0)


@pytest.fixture
def one_more(monkeypatch):
    """A new metric: a property of ``Spectrum`` and a row of the table."""
    from lightning_hessian.curvature.spectrum import Spectrum
    from lightning_hessian.records import dataframe
    from lightning_hessian.training import recording
    from lightning_hessian.writers import scalars, text

    monkeypatch.setattr(Spectrum, "third_of_trace", property(lambda s: s.trace / 3), raising=False)
    row = Metric("third_of_trace", "third of the trace", "", "Σ λ / 3", "for this test", is_logged=True)
    for module in (metrics, event_format, dataframe, recording):
        monkeypatch.setattr(module, "METRICS", (*METRICS, row))
    for module in (scalars, text):
        monkeypatch.setattr(module, "LOGGED", (*LOGGED, row))


@pytest.mark.usefixtures("one_more")
def test_a_new_metric_needs_a_property_and_a_row():
    record = measured()
    np.testing.assert_allclose(record.third_of_trace, record.trace / 3)
    tag = "hessian_{}/prob_class_2"
    found = scalars(record)
    assert found[tag.format("third_of_trace")] == pytest.approx(found[tag.format("trace")] / 3)
    assert "| third of the trace |" in diagnosis_text(record)
    assert "- **third of the trace** = Σ λ / 3: for this test." in diagnosis_text(record)
    assert "third_of_trace" in to_dataframe(record).columns
    arrays, _ = unpack(event_format.pack_summary(record))
    np.testing.assert_allclose(arrays["third_of_trace"], record.trace / 3, rtol=1e-6)
