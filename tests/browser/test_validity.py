"""Hessians that are not valid: every view says so, in the tab and in a report, and shows all the others."""

import numpy as np
import pytest
from playwright.sync_api import expect
from support.browsing import number
from support.invalid import FOUR_SAMPLES, MESSAGE, invalidated
from support.make_run import train, write_run

CASES = {"sample": "one sample", "class": "one class of one sample", "none": "all"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of three steps, at the last of which some Hessians are not valid; of the last run, at all steps."""
    logdir, records = tmp_path_factory.mktemp("logs"), train(num_samples=4)
    checked = [invalidated(record, np.ones((4, 2))) for record in records]
    for name, case in CASES.items():
        changed = [invalidated(record, FOUR_SAMPLES[case]) for record in records]
        write_run(logdir / name, changed if name == "none" else [*checked[:2], changed[2]])
    return logdir, records


@pytest.fixture(scope="module", params=["tab", "report"])
def opened(request, runs, opened_in):
    with opened_in(request.param, runs[0]) as tab:
        yield tab


@pytest.fixture
def tab(opened):
    opened.reset()
    yield opened
    opened.check_quiet()


def cells(tab, key: str) -> list[str]:
    """A column of the table, by sample and class."""
    return tab.get("table").locator(f"tbody [data-key={key}]").all_inner_texts()


def test_a_sample_that_is_not_valid(tab, runs, request):
    tab.run("sample")
    tab.choose(sample=2, class_id=3)
    assert (
        cells(tab, "validity")
        == ["agrees to 3e−7"] * 4 + ["not valid: differs by 0.4"] * 2 + ["not confirmed at this step"] * 2
    )
    known = runs[1][2].lambda_max
    shown = cells(tab, "lambda_max")
    assert shown[4:6] == ["not valid"] * 2
    assert [number(text) for text in shown[:4] + shown[6:]] == pytest.approx(known[[0, 1, 3]].ravel(), rel=5e-3)
    assert "2 of the 8 rows are not valid" in tab.words("table")
    expect(tab.panel("spectrum").locator(".message")).to_contain_text("not valid at step 19")
    expect(tab.panel("hessian").locator(".message")).to_contain_text(MESSAGE)
    expect(tab.get("map-x")).to_be_visible()
    expect(tab.get("map-gradient")).to_have_count(0)
    assert "only the input is shown" in tab.words("maps")
    assert len(tab.traces("evolution")[0]["x"]) == 3
    assert "Agrees with finite differences to 3e-7 (at 2 of 4 samples). 1 of 4 samples has no valid" in (
        tab.get("cost").inner_text()
    )
    assert MESSAGE in tab.get("cost").inner_text()
    tab.screenshot("invalid_sample")
    tab.choose(step=1)
    expect(tab.get("map-gradient")).to_be_visible()
    expect(tab.panel("spectrum").locator(".message")).to_be_hidden()
    assert cells(tab, "validity")[4] == "agrees to 3e−7"


def test_lines_have_gaps_and_means_are_of_what_is_valid(tab, runs):
    records = runs[1]
    for box in tab.get("run-select").locator("input:not([data-run=sample])").all():
        box.uncheck()
    tab.settle()
    tab.choose(sample=2, class_id=3, metric="trace", lines="sample")
    (line,) = tab.traces("curves")
    assert line["y"][2] is None
    assert line["y"][:2] == pytest.approx([r.trace[2, 1] for r in records[:2]], rel=1e-5)
    tab.choose(lines="spread")
    *_, mean = tab.traces("curves")
    assert mean["y"][2] == pytest.approx(records[2].trace[[0, 1, 3], 1].mean(), rel=1e-5)
    assert "whose Hessian is not valid" in tab.words("curves")


def test_one_class_of_a_sample(tab):
    tab.run("class")
    tab.choose(sample=1, class_id=1)
    expect(tab.get("map-gradient")).to_be_visible()
    tab.choose(class_id=3)
    expect(tab.get("map-gradient")).to_have_count(0)
    assert cells(tab, "trace").count("not valid") == 1
    assert "1 of the 8 rows is not valid" in tab.words("table")
    tab.root.locator("[data-sort=trace]").click()
    assert cells(tab, "trace")[-1] == "not valid"
    tab.root.locator("[data-sort=sample]").click()


def test_a_run_in_which_nothing_is_valid(tab):
    tab.run("none")
    tab.choose(metric="trace")
    for view in ("spectrum", "evolution", "hessian"):
        expect(tab.panel(view).locator(".message")).to_contain_text("not valid")
    assert set(cells(tab, "trace")) == {"not valid"}
    assert "No Hessian is valid" in tab.get("cost").inner_text()


def test_long_messages_wrap(tab):
    tab.run("sample")
    tab.choose(sample=2)
    tab.page.set_viewport_size({"width": 420, "height": 800})
    tab.page.wait_for_timeout(300)
    for place in (tab.get("cost").locator("dd").first, tab.panel("hessian").locator(".message")):
        assert place.evaluate("e => e.scrollWidth <= e.clientWidth + 1")
        right = place.evaluate("e => e.getBoundingClientRect().right")
        assert right <= tab.root.locator(".input-hessian").evaluate("e => e.getBoundingClientRect().right")
    tab.page.set_viewport_size({"width": 1400, "height": 1000})
