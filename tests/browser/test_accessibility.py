"""The tab for people who use a keyboard or a screen reader, by axe-core; and what it says of runs that differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import axe_playwright_python
import pytest
from playwright.sync_api import Frame, expect
from support.browsing import tensorboard
from support.make_run import train, write_run
from torch import nn

AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")


def violations(frame: Frame) -> list[str]:
    """What axe-core finds wrong in a page, one line for each rule."""
    frame.evaluate(AXE.read_text(encoding="utf-8"))
    found = frame.evaluate("axe.run(document, { iframes: false })")
    assert len(found["passes"]) > 20
    return [f"{v['id']}: {v['help']}: {v['nodes'][0]['html'][:200]}" for v in found["violations"]]


def frame_of(tab) -> Frame:
    (frame,) = (frame for frame in tab.page.frames if frame != tab.page.main_frame)
    return frame


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_wrong(watched, server, scheme):
    with watched(color_scheme=scheme) as tab:
        tab.open(f"{server}#input_hessian")
        assert violations(frame_of(tab)) == []


def test_every_control_is_reached_by_the_tab_key_in_the_order_of_the_page(tab):
    """From top to bottom, and visibly: no positive tabindex, no control left out."""
    tab.get("focus-select").focus()
    ids = [
        "class-select",
        "sample-select",
        "play",
        "step-slider",
        "reload",
        "copy-link",
        "metric-select",
        "lines-select",
    ]
    for name in ids:
        tab.page.keyboard.press("Tab")
        expect(tab.get(name)).to_be_focused()


def test_heatmaps_have_a_name_and_a_role(tab):
    pictures = tab.root.locator("canvas")
    names = [canvas.get_attribute("aria-label") for canvas in pictures.all()]
    assert len(names) > 4
    assert all(names)
    roles = {canvas.get_attribute("id"): canvas.get_attribute("role") for canvas in pictures.all()}
    by_keys = {
        name for name, role in roles.items() if role == "application"
    }  # screen readers leave the arrow keys to it
    assert by_keys == {"heatmap", "input-map"}
    assert set(roles.values()) == {"img", "application"}


def test_no_chart_offers_to_send_its_data_away(tab):
    titles = [button.get_attribute("data-title") for button in tab.root.locator(".modebar-btn").all()]
    assert "Download plot as a PNG" in titles
    assert not any("share" in title.lower() or "cloud" in title.lower() for title in titles)


def test_runs_of_other_targets_are_named(tab):
    assert "The runs measure different targets (logit, prob): their values do not compare." in tab.words("curves")
    tab.get("run-select").locator("input").nth(1).uncheck()
    tab.settle()
    assert "different targets" not in tab.words("curves")


def test_runs_without_the_class_are_named_and_zeros_are_gray(watched, tmp_path):
    records = train(nn.ReLU, target="logit")
    write_run(tmp_path / "both", records)
    write_run(tmp_path / "other", [replace(record, class_ids=(0, 2)) for record in records])
    with tensorboard(tmp_path) as address, watched() as tab:
        tab.open(f"{address}#input_hessian")
        words = tab.words("curves")
        assert "Not drawn, since the class or sample was not measured there: other" in words
        assert "different targets" not in words
        assert "the Hessian is exactly zero" in tab.words("spectrum")
        points = next(trace for trace in tab.traces("spectrum") if trace.get("mode") == "markers")
        muted = tab.root.locator(".input-hessian").evaluate(
            "e => getComputedStyle(e).getPropertyValue('--muted').trim()"
        )
        assert set(points["marker"]["color"]) == {muted}
