"""Every view of the tab shows the numbers of the records, in a real browser, with either loader of TensorBoard."""

import numpy as np
import pytest
from playwright.sync_api import expect
from support.browsing import (
    CLASS_ID,
    CLASS_INDEX,
    SAMPLE,
    STEP,
    VIEWS,
    colors,
    drawn,
    number,
    point_at,
    whole_matrix,
)

from lightning_hessian import load_records
from lightning_hessian.records.histogram import BIN_EDGES

LEFT, TOP, SIDE = 52, 8, 500  # of the heatmap on its canvas


@pytest.fixture
def records(logdir):
    return load_records(logdir / "gelu")


@pytest.fixture
def record(records, tab):
    """What the tab shows after another class, sample and step have been chosen."""
    tab.choose(class_id=CLASS_ID, sample=SAMPLE, step=STEP)
    return records[STEP]


def test_the_tab_stands_in_tensorboards_bar_and_opens_with_a_click(server, watched):
    with watched() as tab:
        tab.page.goto(server)
        tab.page.get_by_role("tab", name="Input Hessian").click()
        tab.root = tab.page.frame_locator("iframe")
        tab.settle()
        for view in VIEWS:
            expect(tab.panel(view)).to_be_visible()
        tab.page.screenshot(path=tab.artefact("tensorboard"))


def test_the_last_step_of_the_first_run_is_shown_at_first(opened, records):
    tab = opened
    last, many = records[-1], len(records)
    assert tab.get("step-text").inner_text() == f"step {last.logged_step}, epoch {last.epoch} ({many} of {many})"
    assert tab.get("class-select").input_value() == str(last.class_ids[0])
    expect(tab.root.locator(".message:visible")).to_have_count(0)
    tab.screenshot("tab")


def test_curves_are_means_and_percentiles_over_samples(tab, logdir):
    tab.choose(class_id=3, metric="trace")
    traces = tab.traces("curves")
    for place, run in enumerate(("gelu", "relu")):
        low, high, mean = traces[3 * place : 3 * place + 3]
        records = load_records(logdir / run)
        values = np.array([r.trace[:, CLASS_INDEX] for r in records])
        assert mean["name"].startswith(run)
        assert mean["x"] == [r.logged_step for r in records]
        np.testing.assert_allclose(mean["y"], values.mean(1), rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(low["y"], np.percentile(values, 10, axis=1), rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(high["y"], np.percentile(values, 90, axis=1), rtol=1e-4, atol=1e-7)


def test_curves_of_one_sample_and_of_one_run(tab, records, record):
    tab.root.locator("[data-run=relu]").uncheck()
    tab.choose(metric="linear_radius", lines="sample")
    (line,) = tab.traces("curves")
    np.testing.assert_allclose(line["y"], [r.linear_radius[SAMPLE, CLASS_INDEX] for r in records], rtol=1e-5)


def test_spectrum_lists_all_eigenvalues_with_their_residuals(tab, record):
    points, bars = tab.traces("spectrum")
    values, residuals = record.eigenvalues[SAMPLE, CLASS_INDEX], record.residuals[SAMPLE, CLASS_INDEX]
    order = np.argsort(-np.abs(values), kind="stable")
    parts = [text.split(" ± ") for text in points["text"]]
    np.testing.assert_allclose([number(value) for value, _ in parts], values[order], rtol=1e-4)
    np.testing.assert_allclose([number(residual) for _, residual in parts], residuals[order], rtol=0.5, atol=1e-12)
    assert points["y"] == list(range(1, 65))
    assert sum(number(text) for text in bars["text"]) == pytest.approx(64)
    negative = np.abs(values[values < 0]).sum() / np.abs(values).sum()
    assert f"{negative:.0%}".replace("%", " %") in tab.words("spectrum")


def test_evolution_counts_eigenvalues_at_every_step(tab, records, record):
    image = tab.traces("evolution")[0]
    assert image["x"] == [r.logged_step for r in records]
    edges = np.array(image["y"])
    for step, each in enumerate(records):
        counts = np.array([number(row[step]) for row in image["text"]])
        values = each.density_nodes[SAMPLE, CLASS_INDEX, 0].astype(float)  # where the spectrum is complete: all of it
        places = np.sign(values) * np.maximum(np.log10(np.abs(values) + 1e-300) + 12, 0)
        expected = np.histogram(places, BIN_EDGES)[0]
        sides = ((counts[edges[:-1] > 0][::-1], expected[32:][::-1]), (counts[edges[1:] < 0], expected[:32]))
        for shown, known in sides:  # from the largest |λ| inwards, as far as the picture reaches
            shown, known = np.trim_zeros(shown, "f"), np.trim_zeros(known, "f")
            np.testing.assert_array_equal(shown, known[: len(shown)])
        assert counts.sum() == 64


@pytest.mark.parametrize("run", ["gelu", "relu"])
def test_pointing_at_an_input_pixel_shows_its_row_of_the_hessian(tab, logdir, run):
    record = load_records(logdir / run)[STEP]
    tab.run(run)
    tab.choose(class_id=CLASS_ID, sample=SAMPLE, step=STEP)
    matrix = whole_matrix(record)
    for row, column in ((2, 5), (4, 3)):
        index = 8 * row + column
        point_at(tab, row, column)
        assert np.abs(drawn(tab.get("row-map")) - colors(matrix[index]).astype(int)).max() <= 2
        assert f"row {row}, column {column}" in tab.get("row-title").inner_text()
        assert float(tab.get("heatmap-readout").get_attribute("data-value")) == pytest.approx(
            matrix[index, index], rel=1e-4, abs=1e-7
        )
    tab.screenshot(f"hover_{run}")


def test_pointing_at_the_heatmap_shows_the_entry_and_both_positions(tab, record):
    i, j = 20, 43
    at = {"x": LEFT + (j + 0.5) * SIDE / 64, "y": TOP + (i + 0.5) * SIDE / 64}
    tab.get("heatmap").hover(position=at)
    readout = tab.get("heatmap-readout")
    expect(readout).to_have_attribute("data-column", str(j))
    assert float(readout.get_attribute("data-value")) == pytest.approx(
        record.hessian[SAMPLE, CLASS_INDEX, i, j], rel=1e-5
    )
    text = readout.inner_text()
    assert f"H[{i}, {j}]" in text
    assert "row 2, column 4" in text  # of i
    assert "row 5, column 3" in text  # of j


def test_the_heatmap_zooms_and_shows_all_again(tab):
    corner = {"x": LEFT + 2, "y": TOP + 2}
    heatmap, readout = tab.get("heatmap"), tab.get("heatmap-readout")
    heatmap.hover(position={"x": LEFT + SIDE / 2, "y": TOP + SIDE / 2})
    for _ in range(4):
        tab.page.mouse.wheel(0, -100)
    tab.page.wait_for_timeout(100)
    heatmap.hover(position=corner)
    expect(readout).not_to_have_attribute("data-row", "0")
    expect(readout).to_have_attribute("data-row", "17")  # 32 − 32 · exp(−0.8) = 17.6
    heatmap.dblclick(position=corner)
    heatmap.hover(position={"x": corner["x"] + 1, "y": corner["y"]})
    expect(readout).to_have_attribute("data-row", "0")


def test_maps_are_the_records_arrays(tab, record):
    captions = tab.get("maps").locator("figcaption").all_inner_texts()
    chosen = record.vector_index[SAMPLE, CLASS_INDEX]
    assert len(captions) == 3 + len(chosen)
    assert f"label {record.labels[SAMPLE]}, predicted {record.predicted[SAMPLE]}" in captions[0]
    assert number(captions[1].split("=")[1]) == pytest.approx(record.gradient_norm[SAMPLE, CLASS_INDEX], rel=5e-3)
    for rank, place in enumerate(chosen):
        value = record.eigenvalues[SAMPLE, CLASS_INDEX, place]
        assert number(captions[3 + rank].split("λ =")[1]) == pytest.approx(value, rel=5e-4)
    for name, values in (
        ("gradient", record.gradient),
        ("diagonal", record.diagonal),
        ("eigenvector-0", record.eigenvectors[:, :, 0]),
        ("eigenvector-3", record.eigenvectors[:, :, 3]),
    ):
        shown = drawn(tab.get(f"map-{name}"))
        assert np.abs(shown - colors(values[SAMPLE, CLASS_INDEX]).astype(int)).max() <= 2


def test_the_table_has_every_sample_and_class_is_sorted_and_selects(tab, record):
    rows = tab.get("table").locator("tbody tr")
    assert rows.count() == record.lambda_max.size
    cells_of = "row => Object.fromEntries([...row.cells].map(cell => [cell.dataset.key, cell.textContent]))"
    table = [row.evaluate(cells_of) for row in rows.all()]
    for position, cells in enumerate(table):
        sample, index = divmod(position, 2)
        assert (cells["sample"], cells["class"]) == (str(sample), str(record.classes[sample, index]))
        assert (cells["label"], cells["predicted"]) == (str(record.labels[sample]), str(record.predicted[sample]))
        for name in (
            "lambda_max",
            "lambda_min",
            "spectral_norm",
            "trace",
            "normalized_curvature",
            "linear_radius",
            "top_eigenvector_cosine",
        ):
            assert number(cells[name]) == pytest.approx(getattr(record, name)[sample, index], rel=5e-3)
    how = f"Method: {record.method}, {record.autodiff_mode.replace('_', ' ')}. Diagnosis: {record.diagnosis}."
    assert how in tab.words("table")
    tab.root.locator("[data-sort=lambda_max]").click()
    shown = [number(text) for text in tab.get("table").locator("[data-key=lambda_max]").all_inner_texts()]
    assert shown == sorted(shown)
    tab.get("table").locator("tr[data-sample='2'][data-class-id='2']").click()
    tab.settle()
    assert tab.get("sample-select").input_value() == "2"
    assert tab.get("class-select").input_value() == str(record.class_ids[0])


def test_cost_shows_method_reason_and_price(tab, record):
    text = tab.get("cost").inner_text()
    for words in (record.message, record.reason, f"{record.num_matvecs} Hessian-vector products", "float32", "D = 64"):
        assert words in text


def test_a_matrix_that_was_not_stored_is_explained(tab):
    tab.choose(sample=2)
    expect(tab.panel("hessian").locator(".message")).to_contain_text("The whole matrix was stored only for sample 0, 1")
    expect(tab.get("map-gradient")).to_be_visible()


def test_the_slider_plays_to_the_end(tab, records):
    tab.choose(step=0)
    tab.get("play").click()
    expect(tab.get("step-text")).to_contain_text(f"({len(records)} of {len(records)})")


def test_a_link_leads_to_what_was_selected(tab, watched):
    tab.choose(class_id=3, sample=SAMPLE, step=STEP, metric="trace")
    shown = tab.get("step-text").inner_text()
    with watched() as other:
        other.open(tab.link())
        assert other.get("class-select").input_value() == "3"
        assert other.get("sample-select").input_value() == str(SAMPLE)
        assert other.get("metric-select").input_value() == "trace"
        assert other.get("step-text").inner_text() == shown


def test_dark_mode_follows_tensorboard(server, watched):
    with watched(color_scheme="dark") as tab:
        tab.open(f"{server}#input_hessian")
        expect(tab.root.locator(".input-hessian")).to_have_attribute("data-theme", "dark")
        tab.screenshot("dark")
