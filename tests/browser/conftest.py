"""A real run, a real TensorBoard on it, and a Chromium that looks at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright
from support.browsing import Tab, tensorboard
from support.get_chromium import FLAGS, NONE_FOUND, find_chromium
from support.training import Classifier, fit, small_monitor
from torch import nn

from lightning_hessian import write_report


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The browser; no longer open than these tests, since Playwright runs an event loop in this thread."""
    path = find_chromium()
    if path is None:
        pytest.fail(NONE_FOUND, pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def logdir(tmp_path_factory) -> Path:
    """Two runs: whole matrices of a GELU network's logits, and a ReLU network whose eigenvectors are the matrix."""
    logdir = tmp_path_factory.mktemp("logs")
    fit(logdir / "gelu", small_monitor(num_samples=3, heatmap_samples=2), max_epochs=3)
    fit(logdir / "relu", small_monitor(num_samples=3, heatmap_samples=0, target="prob"), model=Classifier(nn.ReLU))
    return logdir


@pytest.fixture(scope="module", params=["fast", "slow"])
def server(request, logdir) -> Iterator[str]:
    """The address of a TensorBoard: with the Rust loader; with the Python one, under a path prefix."""
    flags = {
        "fast": ["--load_fast=true"],
        "slow": ["--load_fast=false", "--path_prefix=/some/where"],
    }
    with tensorboard(logdir, *flags[request.param]) as address:
        yield address


@contextmanager
def watched_page(chromium: Browser, **options) -> Iterator[Tab]:
    """A page; at the end it must not have contacted another machine, nor logged an error."""
    context = chromium.new_context(viewport={"width": 1400, "height": 1000}, **options)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab = Tab(context.new_page())
    yield tab
    context.close()
    tab.check_quiet()


@pytest.fixture(scope="module")
def opened(chromium, server) -> Iterator[Tab]:
    """The Input Hessian tab of a TensorBoard."""
    with watched_page(chromium) as tab:
        tab.open(f"{server}#input_hessian")
        yield tab


@pytest.fixture
def tab(opened) -> Iterator[Tab]:
    """The same, showing what it shows at first."""
    opened.reset()
    yield opened
    opened.check_quiet()


@pytest.fixture(scope="module")
def watched(chromium):
    """``watched_page`` of this browser, for tests that open pages of their own."""
    return lambda **options: watched_page(chromium, **options)


@pytest.fixture(scope="module")
def opened_in(watched, tmp_path_factory) -> Callable[[str, Path], AbstractContextManager[Tab]]:
    """Opens a log directory in the ``"tab"`` of TensorBoard, or as a ``"report"``."""

    @contextmanager
    def opened(kind: str, logdir: Path) -> Iterator[Tab]:
        with watched() as tab:
            if kind == "tab":
                with tensorboard(logdir) as address:
                    tab.open(f"{address}#input_hessian")
                    yield tab
            else:
                tab.open_page(write_report(logdir, tmp_path_factory.mktemp("page") / "report.html"))
                yield tab

    return opened
