"""What the tests in a browser do: start TensorBoard, open the tab, choose, read what is shown."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import matplotlib
import numpy as np
from playwright.sync_api import ConsoleMessage, FrameLocator, Page, expect

ARTEFACTS = Path(__file__).parent.parent / "browser" / "artefacts"
PATIENCE_MS = 60_000  # on a busy machine
HERE = {"127.0.0.1", "localhost"}
VIEWS = ("curves", "spectrum", "evolution", "hessian", "maps", "table", "cost")  # where there are few samples
NUM_PANELS = len(VIEWS) + 1  # the distribution is hidden then


@contextmanager
def tensorboard(logdir: Path, *flags: str) -> Iterator[str]:
    """A TensorBoard process that reads ``logdir`` again every second; yields its address, which ends with a slash."""
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={logdir}", "--port=0", "--reload_interval=1"]
    process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True, errors="replace")
    drain = threading.Thread(target=process.stderr.read, daemon=True)  # a full pipe would stop it
    try:
        output = ""
        while not (found := re.search(r"at (http://\S+?)/* \(Press", output)):
            line = process.stderr.readline()
            assert line, f"TensorBoard ended: {output}"
            output += line
        drain.start()
        yield f"{found.group(1)}/"
    finally:
        process.kill()
        process.wait()
        if drain.ident is not None:
            drain.join()
        process.stderr.close()


class Tab:
    """The views, in TensorBoard's frame or in a report, and the errors in the page's console."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        self.root: FrameLocator | Page = page

    def _hear(self, message: ConsoleMessage) -> None:
        url = message.location["url"]
        if message.type == "error" and "/font-roboto/" not in url:  # TensorBoard forgets the path prefix of its fonts
            self.errors.append(f"{message.text} ({url})")

    def open(self, address: str) -> None:
        """Opens the tab in TensorBoard, and waits for the views."""
        self.page.goto(address)
        self.root = self.page.frame_locator("iframe")
        self.settle()

    def open_when_active(self, address: str) -> None:
        """Opens the tab as soon as TensorBoard has read something for it."""
        self.page.goto(address)
        self.root = self.page.frame_locator("iframe")
        expect(self.get("empty")).to_be_attached(timeout=PATIENCE_MS)

    def reload_until(self, words: str) -> None:
        """Presses TensorBoard's own reload button until the step's text ends with ``words``."""
        until = time.monotonic() + PATIENCE_MS / 1000
        while words not in (shown := self.get("step-text").text_content()):
            assert time.monotonic() < until, shown
            self.page.locator("button.reload-button").click()
            self.page.wait_for_timeout(500)
        self.settle()

    def open_page(self, path: Path) -> None:
        """Opens a report as a file."""
        self.page.goto(path.as_uri())
        self.root = self.page
        self.settle()

    def check_quiet(self) -> None:
        """There has been no error so far, and no request left this machine."""
        local = ("data", "blob", "file", "about")
        away = [
            url for url in self.requests if urlsplit(url).scheme not in local and urlsplit(url).hostname not in HERE
        ]
        errors, self.errors, self.requests = self.errors, [], []
        assert errors == []
        assert away == []

    def forgive(self, words: str) -> None:
        """Drops the errors that a test has provoked."""
        self.errors = [error for error in self.errors if words not in error]

    def get(self, name: str):
        """The element of a test id."""
        return self.root.get_by_test_id(name)

    def settle(self) -> None:
        """Waits until every view has drawn what is selected."""
        expect(self.root.locator(".panel[aria-busy=false]")).to_have_count(NUM_PANELS, timeout=PATIENCE_MS)
        expect(self.root.locator(".panel[aria-busy=true]")).to_have_count(0, timeout=PATIENCE_MS)
        self.page.wait_for_timeout(50)  # a frame, for what is drawn in the next one

    def panel(self, name: str):
        """The section of one view, with its words."""
        return self.root.locator(f".panel-{name}")

    def run(self, name: str) -> None:
        """Looks at the details of a run, by its name."""
        select = self.get("focus-select")
        value = select.locator("option").filter(has_text=re.compile(f"^{name}")).get_attribute("value")
        select.select_option(value)
        self.settle()

    def choose(self, **choices: object) -> None:
        """Chooses in ``class-select`` and the others; ``step`` is the position of the slider."""
        for name, value in choices.items():
            if name == "step":
                self.get("step-slider").fill(str(value))
            else:
                self.get(f"{name.removesuffix('_id')}-select").select_option(str(value))
            self.settle()

    def traces(self, name: str) -> list[dict]:
        """What Plotly draws in a view."""
        return self.get(name).evaluate("e => e.data.map(t => JSON.parse(JSON.stringify(t)))")

    def reset(self) -> None:
        """Chooses what is shown at first."""
        self.page.mouse.move(0, 0)
        for box in self.get("run-select").locator("input").all():
            box.check()
        for name in ("focus", "class", "sample", "metric", "lines"):
            self.get(f"{name}-select").select_option(index=0)
        self.choose(step=self.get("step-slider").get_attribute("max"))

    def words(self, name: str) -> str:
        """The description above a view."""
        return self.get(f"{name}-words").inner_text()

    def link(self) -> str:
        """The link that the page offers: where it may not use the clipboard, it shows it."""
        self.get("copy-link").click()
        shown = self.root.locator(".buttons .hint")
        expect(shown).not_to_be_empty()
        copied = shown.inner_text() == "copied"
        return self.page.evaluate("navigator.clipboard.readText()") if copied else shown.inner_text()

    def artefact(self, name: str) -> Path:
        """The path of a picture; the folder is made when the first one is taken."""
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        return ARTEFACTS / f"{name}.png"

    def screenshot(self, name: str) -> None:
        """Saves a picture of all views: the window is made high enough for them, since frames end with it."""
        size = self.page.viewport_size
        high = self.root.locator(".input-hessian").evaluate("e => Math.ceil(e.getBoundingClientRect().height)")
        self.page.set_viewport_size({**size, "height": high + 80})
        self.page.wait_for_timeout(300)
        self.page.screenshot(path=self.artefact(name))
        self.page.set_viewport_size(size)


def number(text: str) -> float:
    """The first number of a text written by the page, which has true minus signs and ∞."""
    plain = text.replace("−", "-").replace("∞", "inf")
    return float(re.search(r"-?(?:inf|\d+\.?\d*(?:e-?\d+)?)", plain).group())


# The 8×8 digits of the tests' runs

SAMPLE, CLASS_ID, STEP = 1, 3, 2  # what is chosen: not what is shown at first
CLASS_INDEX = 1  # of the class in the records' arrays


def colors(values: np.ndarray) -> np.ndarray:
    """Diverging colors of values between plus and minus the largest magnitude, by matplotlib."""
    limit = np.abs(values).max()
    levels = np.floor((values + limit) * (255 / (2 * limit)) + 0.5).astype(int)
    return matplotlib.colormaps["RdBu_r"](levels.clip(0, 255), bytes=True)[..., :3]


def drawn(canvas) -> np.ndarray:
    """The colors in the middle of the 8×8 cells of a map, which is as wide as its canvas."""
    script = """canvas => Array.from({length: 64}, (_, i) => Array.from(canvas.getContext("2d").getImageData(
        (i % 8 + 0.5) * canvas.width / 8, (Math.floor(i / 8) + 0.5) * canvas.width / 8, 1, 1).data).slice(0, 3))"""
    return np.array(canvas.evaluate(script))


def point_at(tab, row: int, column: int) -> None:
    """Moves the pointer to a pixel of the input."""
    cell = tab.get("input-map").evaluate("canvas => canvas.clientWidth") / 8
    tab.get("input-map").hover(position={"x": (column + 0.5) * cell, "y": (row + 0.5) * cell})
    expect(tab.get("row-map")).to_have_attribute("data-row", str(8 * row + column))
    tab.page.wait_for_timeout(50)


def whole_matrix(record) -> np.ndarray:
    """The stored matrix, or what the eigenvectors of all nonzero eigenvalues give."""
    if record.hessian is not None:
        return record.hessian[SAMPLE, CLASS_INDEX]
    values = np.take_along_axis(record.eigenvalues, record.vector_index, -1)[SAMPLE, CLASS_INDEX]
    vectors = record.eigenvectors[SAMPLE, CLASS_INDEX]
    return (vectors.T * values) @ vectors
