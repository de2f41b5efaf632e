"""The heatmap and the input without a mouse: arrow keys, what is announced, and where the focus is."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect
from support.browsing import CLASS_ID, CLASS_INDEX, SAMPLE, STEP

from lightning_hessian import load_records

SIDE = 64  # of the matrix


@pytest.fixture
def matrix(tab, logdir):
    """The Hessian shown, where no row is pointed at yet."""
    tab.choose(class_id=CLASS_ID, sample=SAMPLE, step=STEP)
    return load_records(logdir / "gelu")[STEP].hessian[SAMPLE, CLASS_INDEX]


def entry(tab) -> tuple[int, int]:
    """The entry that the readout speaks of."""
    readout = tab.get("heatmap-readout")
    return int(readout.get_attribute("data-row")), int(readout.get_attribute("data-column"))


def expect_entry(tab, row: int, column: int) -> None:
    readout = tab.get("heatmap-readout")
    expect(readout).to_have_attribute("data-row", str(row))
    expect(readout).to_have_attribute("data-column", str(column))


def press(tab, *keys: str) -> None:
    for key in keys:
        tab.page.keyboard.press(key)


def test_arrow_keys_move_through_the_heatmap_and_stop_at_its_edges(tab, matrix):
    row, column = entry(tab)
    assert row == column == abs(matrix.diagonal()).argmax()
    tab.get("heatmap").focus()
    press(tab, *["ArrowUp"] * 2, *["ArrowRight"] * 3)
    row, column = max(row - 2, 0), min(column + 3, SIDE - 1)
    expect_entry(tab, row, column)
    value = float(tab.get("heatmap-readout").get_attribute("data-value"))
    assert value == pytest.approx(matrix[row, column], rel=1e-5)
    press(tab, *["Shift+ArrowUp"] * 7, *["Shift+ArrowLeft"] * 7)
    expect_entry(tab, 0, 0)
    press(tab, "Shift+ArrowDown", "ArrowRight")
    expect_entry(tab, 10, 1)
    press(tab, *["Shift+ArrowDown"] * 7)
    expect_entry(tab, SIDE - 1, 1)


def test_arrow_keys_move_through_the_input(tab, matrix):
    start, _ = entry(tab)
    tab.get("input-map").focus()
    press(tab, *["Shift+ArrowUp", "Shift+ArrowLeft"], "ArrowDown", "ArrowDown", "ArrowRight")
    expect_entry(tab, 17, 17)
    assert "row 2, column 1" in tab.get("row-title").inner_text()
    expect(tab.get("row-map")).to_have_attribute("data-row", "17")
    press(tab, *["ArrowRight"] * 9)
    expect_entry(tab, 23, 23)
    assert start != 23


def test_enter_pins_a_row_for_the_mouse_but_not_for_the_keys(tab, matrix):
    tab.get("input-map").focus()
    press(tab, "Shift+ArrowUp", "Shift+ArrowLeft", "Enter")
    expect(tab.get("row-title")).to_contain_text("pinned")
    tab.get("input-map").hover(position={"x": 100, "y": 100})
    expect_entry(tab, 0, 0)
    press(tab, "ArrowDown")
    expect_entry(tab, 8, 8)
    expect(tab.get("row-title")).to_contain_text("pinned")
    press(tab, "Enter")
    expect(tab.get("row-title")).not_to_contain_text("pinned")


def test_keys_zoom_around_the_entry_and_follow_it(tab, matrix):
    heatmap = tab.get("heatmap")
    corner = {"x": 54, "y": 10}
    heatmap.focus()
    press(tab, *["Shift+ArrowUp"] * 7, *["Shift+ArrowLeft"] * 7, *["+"] * 9)
    expect_entry(tab, 0, 0)
    press(tab, *["Shift+ArrowDown"] * 7, "ArrowUp")
    expect_entry(tab, SIDE - 2, 0)
    tab.page.wait_for_timeout(100)
    heatmap.hover(position=corner)
    row, _ = entry(tab)
    assert SIDE - 12 < row < SIDE - 2  # 64 · exp(−1.8) = 10.6 rows are shown, with the last at the bottom
    press(tab, "0")
    heatmap.hover(position={"x": corner["x"] + 1, "y": corner["y"]})
    expect_entry(tab, 0, 0)


def test_a_color_image_keeps_its_channel_and_others_lie_side_by_side(tab):
    source = """async ([shape, index, down, right, channel]) => {
        const { InputShape } = await import(new URL("input_shape.js", document.baseURI));
        return new InputShape(shape).neighbor(index, down, right, channel);
    }"""

    def neighbor(*arguments: object) -> int:
        return tab.root.locator(".input-hessian").evaluate(f"(_, given) => ({source})(given)", list(arguments))

    assert neighbor([2, 3, 4], 3, 0, 1, None) == 12  # from the right edge of one channel to the next
    assert neighbor([2, 3, 4], 12, 0, -1, None) == 3
    assert neighbor([2, 3, 4], 23, 1, 1, None) == 23
    assert neighbor([3, 3, 4], 3, 0, 1, 0) == 3
    assert neighbor([3, 3, 4], 3, 1, -1, 2) == 30
    assert neighbor([5], 2, 1, 1, None) == 3


def test_focus_is_seen_and_the_entry_is_announced(tab, matrix):
    tab.get("heatmap").focus()
    press(tab, "Tab")
    expect(tab.get("input-map")).to_be_focused()
    press(tab, "Shift+Tab")
    for name in ("heatmap", "input-map"):
        canvas = tab.get(name)
        expect(canvas).to_be_focused()
        outline = canvas.evaluate("e => [getComputedStyle(e).outlineStyle, getComputedStyle(e).outlineWidth]")
        assert outline == ["solid", "2px"]
        assert "arrow keys" in canvas.get_attribute("aria-label")
        assert canvas.get_attribute("aria-describedby") == "heatmap-readout"
        press(tab, "Tab")
    readout = tab.get("heatmap-readout")
    assert readout.get_attribute("role") == "status"
    assert "row" in readout.inner_text()


def test_no_column_of_the_table_is_cut(tab):
    tab.page.set_viewport_size({"width": 1400, "height": 1000})
    box = tab.get("table")
    tab.screenshot("table")
    assert box.evaluate("e => e.scrollWidth - e.clientWidth") <= 0


def test_a_row_pointed_at_does_not_look_selected(tab):
    rows = tab.get("table").locator("tbody tr")
    other = tab.get("table").locator("tbody tr:not(.selected)").first
    other.hover()
    color = "e => getComputedStyle(e).backgroundColor"
    selected = tab.get("table").locator("tr.selected").evaluate(color)
    assert rows.count() > 1
    assert other.evaluate(color) != selected
    assert "0.07" in other.evaluate(color)
