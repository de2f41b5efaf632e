"""The tab and the report with more samples than anyone looks at one by one."""

import numpy as np
import pytest
import torch
from playwright.sync_api import expect
from support.browsing import number
from support.training import Classifier
from torch import nn

from lightning_hessian import InputHessianRecorder, load_records, write_report

NUM_SAMPLES, PAGE, STEP = 120, 50, 1
METRIC = "normalized_curvature"


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """The log directory of a run with many samples at two steps."""
    folder = tmp_path_factory.mktemp("many")
    torch.manual_seed(0)
    x, labels = torch.rand(NUM_SAMPLES, 1, 8, 8), torch.arange(NUM_SAMPLES) % 10
    with InputHessianRecorder(folder, (x, labels), 2, "prob", num_samples=NUM_SAMPLES, progress_bar=False) as recorder:
        for step in range(2):
            recorder.measure(Classifier(nn.ReLU), step=step)
    return folder


@pytest.fixture(scope="module")
def record(many):
    return load_records(many)[STEP]


@pytest.fixture(scope="module", params=["tab", "report"])
def shown(request, many, opened_in):
    with opened_in(request.param, many) as tab:
        yield tab


def choose_sample(tab, sample: int) -> None:
    tab.get("sample-number").fill(str(sample))
    tab.get("sample-number").press("Enter")
    tab.settle()


def test_the_distribution_counts_every_sample_once(shown, record):
    shown.choose(metric=METRIC)
    values = record.normalized_curvature[:, 0]
    right = record.predicted == record.labels
    bars = {trace["name"]: np.array(trace["y"]) for trace in shown.traces("distribution")}
    assert {name: counts.sum() for name, counts in bars.items()} == {
        "predicted = label": right.sum(),
        "predicted ≠ label": (~right).sum(),
    }
    trace = shown.traces("distribution")[0]
    is_log = values.max() > 0 and np.percentile(values, 99) > 30 * np.percentile(values, 1)
    places = np.log10(values) if is_log else values
    expected = np.histogram(places, np.linspace(places.min(), places.max(), len(trace["x"]) + 1))[0]
    assert np.abs(sum(bars.values()) - expected).sum() <= 2  # a value on an edge, in float32
    words = shown.words("distribution")
    for name, percent in (("median", 50), ("quartiles", 25), ("percentile", 10)):
        assert number(words.split(name)[1]) == pytest.approx(np.percentile(values, percent), rel=5e-3)
    assert f"of {NUM_SAMPLES} samples." in words


def test_a_click_on_a_bar_goes_to_a_sample_in_it(shown, record):
    shown.choose(metric=METRIC)
    choose_sample(shown, 0)
    first, *others = shown.traces("distribution")
    counts = np.sum([trace["y"] for trace in (first, *others)], axis=0)
    highest = int(counts.argmax())
    place = """(e, [x, y]) => { const {xaxis, yaxis} = e._fullLayout;
        return {x: xaxis._offset + xaxis.l2p(x), y: yaxis._offset + yaxis.l2p(y)}; }"""
    chart = shown.get("distribution")
    chart.click(position=chart.evaluate(place, [first["x"][highest], float(counts[highest]) - 0.5]))
    shown.settle()
    value = record.normalized_curvature[int(shown.get("sample-number").input_value()), 0]
    low, high = (number(part) for part in first["text"][highest].split(", ")[1].split(" to "))
    assert low * 0.99 <= value <= high * 1.01


def test_quantiles_over_samples(shown, many):
    shown.choose(metric=METRIC, lines="quantiles")
    *edges, median = shown.traces("curves")
    values = np.array([record.normalized_curvature[:, 0] for record in load_records(many)])
    np.testing.assert_allclose(median["y"], np.median(values, axis=1), rtol=1e-4)
    for trace, percent in zip(edges, (0, 100, 5, 95, 25, 75), strict=True):
        np.testing.assert_allclose(trace["y"], np.percentile(values, percent, axis=1), rtol=1e-4)
    shown.choose(lines="spread")


def test_the_table_has_pages_and_follows_the_sample(shown, record):
    choose_sample(shown, 0)
    rows = shown.get("table").locator("tbody tr")
    expect(rows).to_have_count(PAGE)
    expect(shown.get("table-rows")).to_have_text("rows 1 to 50 of 120")
    shown.root.get_by_role("button", name="last").click()
    expect(rows).to_have_count(NUM_SAMPLES - 2 * PAGE)
    shown.root.get_by_role("button", name="previous").click()
    expect(shown.get("table-rows")).to_have_text("rows 51 to 100 of 120")
    choose_sample(shown, 117)
    expect(shown.get("table-rows")).to_have_text("rows 101 to 120 of 120")
    expect(shown.get("table").locator("tr.selected")).to_be_visible()
    choose_sample(shown, 49)  # the last one of its page: the table has scrolled to it
    expect(shown.get("table").locator("tr.selected")).to_be_in_viewport()
    shown.root.locator("[data-sort=lambda_max]").click()
    expect(shown.get("table-rows")).to_have_text("rows 1 to 50 of 120")
    expect(rows.first).to_be_in_viewport()
    found = [number(text) for text in shown.get("table").locator("[data-key=lambda_max]").all_inner_texts()]
    np.testing.assert_allclose(found, np.sort(record.lambda_max[:, 0])[:PAGE], rtol=5e-3)
    shown.root.locator("[data-sort=sample]").click()


def test_one_is_said_in_the_singular(shown):
    words = shown.panel("cost").inner_text()
    assert f"s for {NUM_SAMPLES} samples × 1 class;" in words
    assert "the whole matrix of sample 0;" in words or "no whole matrix;" in words


def test_a_sample_is_chosen_by_its_number(shown, record):
    expect(shown.get("sample-select")).to_be_hidden()
    choose_sample(shown, 77)
    assert "sample 77." in shown.words("maps")
    choose_sample(shown, 10_000)
    assert shown.get("sample-number").input_value() == str(NUM_SAMPLES - 1)
    shown.screenshot("many_samples")


def test_a_small_report_says_which_samples_it_holds(many, watched, tmp_path):
    whole = write_report(many, tmp_path / "whole.html").stat().st_size / 1e6
    path = write_report(many, tmp_path / "small.html", max_size=whole - 0.9)
    assert path.stat().st_size / 1e6 <= whole - 0.9
    with watched() as tab:
        tab.open_page(path)
        tab.choose(step=0)
        choose_sample(tab, NUM_SAMPLES - 1)
        message = tab.panel("hessian").locator(".message")
        expect(message).to_contain_text("The matrix of sample 119 at step 0 was left out")
        expect(message).to_contain_text("The page has it for step 1.")
