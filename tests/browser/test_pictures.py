"""The pictures in TensorBoard's own dashboards, at the size in which they show them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect
from support.training import events

PICTURE = (350, 215)
DASHBOARDS = {"images": "tf-image-loader", "timeseries": "image-card"}


@pytest.fixture(scope="module")
def logged(logdir) -> np.ndarray:
    """The last picture of a class, as it was written."""
    seen = events(logdir / "gelu")
    tag = sorted(tag for tag in seen.Tags()["images"] if tag.startswith("hessian/"))[0]
    return np.asarray(Image.open(io.BytesIO(seen.Images(tag)[-1].encoded_image_string)).convert("RGB"))


def size_of(picture) -> list[float]:
    """What a picture that is shown takes of the card: Time Series fits it into a box of another shape."""
    return picture.evaluate(
        """e => { const b = e.getBoundingClientRect(), w = e.naturalWidth, h = e.naturalHeight;
                  const fit = Math.min(b.width / w, b.height / h); return [w * fit, h * fit]; }"""
    )


@pytest.mark.parametrize("dashboard", DASHBOARDS)
def test_a_card_shows_the_picture_unscaled(watched, server, logged, dashboard):
    with watched() as tab:
        tab.page.goto(f"{server}#{dashboard}")
        picture = tab.page.locator(f"{DASHBOARDS[dashboard]} img").first
        picture.scroll_into_view_if_needed()
        expect(picture).to_have_js_property("naturalWidth", PICTURE[0])
        assert size_of(picture) == pytest.approx(PICTURE, abs=1)
        tab.page.wait_for_timeout(500)
        tab.page.screenshot(path=tab.artefact(f"pictures_{dashboard}"))
        seen = np.asarray(Image.open(io.BytesIO(picture.screenshot())).convert("RGB"))
        rows, columns = (min(a, b) for a, b in zip(seen.shape[:2], logged.shape[:2], strict=True))
        assert np.abs(seen[:rows, :columns].astype(int) - logged[:rows, :columns]).mean() < 1
        tab.page.set_viewport_size({"width": 1280, "height": 800})  # a laptop's
        tab.page.wait_for_timeout(500)
        assert size_of(picture)[0] > 0.9 * PICTURE[0]
