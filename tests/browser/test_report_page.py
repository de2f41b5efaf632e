"""The page that ``lightning-hessian report`` writes, opened as a file: the same views with the same numbers."""

import dataclasses

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
from support.training import fit, small_monitor

from lightning_hessian import load_records
from lightning_hessian.cli import main
from lightning_hessian.records.files import save_record


@pytest.fixture(scope="module")
def page(chromium, logdir, tmp_path_factory, watched):
    """The page of both runs, opened."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert main(["report", str(logdir), "-o", str(path)]) == 0
    with watched() as tab:
        tab.open_page(path)
        yield tab


@pytest.fixture
def shown(page):
    """The same, showing what it shows at first."""
    page.reset()
    yield page
    page.check_quiet()


@pytest.mark.parametrize("run", ["gelu", "relu"])
def test_every_view_shows_the_records_numbers(shown, logdir, run):
    records = load_records(logdir / run)
    record = records[STEP]
    shown.run(run)
    shown.choose(class_id=CLASS_ID, sample=SAMPLE, step=STEP, metric="trace")
    for view in VIEWS:
        expect(shown.panel(view)).to_be_visible()
    mean = next(t for t in shown.traces("curves") if t.get("name", "").startswith(run))
    np.testing.assert_allclose(mean["y"], [r.trace[:, CLASS_INDEX].mean() for r in records], rtol=1e-3)
    shown_values = [number(text) for text in shown.traces("spectrum")[0]["text"]]
    values = record.eigenvalues[SAMPLE, CLASS_INDEX]
    np.testing.assert_allclose(shown_values, values[np.argsort(-np.abs(values), kind="stable")], rtol=1e-3)
    assert shown.traces("evolution")[0]["x"] == [r.logged_step for r in records]
    assert record.reason in shown.get("cost").inner_text()
    cells = shown.get("table").locator(f"tr[data-sample='{SAMPLE}'][data-class-id='{CLASS_ID}'] [data-key=lambda_max]")
    assert number(cells.inner_text()) == pytest.approx(record.lambda_max[SAMPLE, CLASS_INDEX], rel=5e-3)
    gradient = drawn(shown.get("map-gradient"))
    assert np.abs(gradient - colors(record.gradient[SAMPLE, CLASS_INDEX]).astype(int)).max() <= 2
    shown.screenshot(f"report_{run}")


@pytest.mark.parametrize("run", ["gelu", "relu"])
def test_pointing_at_an_input_pixel_shows_its_row_of_the_hessian(shown, logdir, run):
    record = load_records(logdir / run)[STEP]
    shown.run(run)
    shown.choose(class_id=CLASS_ID, sample=SAMPLE, step=STEP)
    matrix = whole_matrix(record)
    point_at(shown, 4, 3)
    assert np.abs(drawn(shown.get("row-map")) - colors(matrix[35]).astype(int)).max() <= 2


def test_what_is_estimated_or_not_converged_says_so(watched, tmp_path):
    """Lanczos with densities from three vectors, and an eigenvalue that is marked as not converged."""
    options = {"method": "lanczos", "num_eigenvalues": 4, "density_vectors": 3, "target": "prob"}
    fit(tmp_path / "run", small_monitor(**options, heatmap_samples=1), max_epochs=1)
    record = load_records(tmp_path / "run")[-1]
    largest = np.abs(record.eigenvalues[0, 0]).argmax()
    converged = np.ones_like(record.converged)
    converged[0, 0, largest] = False
    save_record(dataclasses.replace(record, converged=converged), tmp_path / "open")
    path = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "open"), "-o", str(path)]) == 0
    with watched() as tab:
        tab.open_page(path)
        assert "estimated from 3 random starting vectors" in tab.words("spectrum")
        assert "estimated from 3 random starting vectors" in tab.words("evolution")
        assert tab.traces("spectrum")[-1]["text"][0].endswith("(estimated)")
        cells = tab.get("table").locator("tr[data-sample='0'][data-class-id='2']")
        assert "±" in cells.locator("[data-key=gauss_newton_share]").inner_text()
        for name in ("normalized_curvature", "linear_radius"):
            text = cells.locator(f"[data-key={name}]").inner_text()
            assert text.endswith("not converged")
            assert number(text) == pytest.approx(getattr(record, name)[0, 0], rel=5e-3)
        other = tab.get("table").locator("tr[data-sample='1'][data-class-id='2']")
        assert "not converged" not in other.inner_text()
