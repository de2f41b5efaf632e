"""What the tab does while a run goes on, and when something is missing."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Callback
from playwright.sync_api import expect
from support.browsing import number, tensorboard
from support.training import fit, small_monitor

from lightning_hessian import load_records

MISSING = "Failed to load resource"  # what Chromium itself says of an answer with an error's status


@pytest.fixture
def own_logdir(logdir, tmp_path) -> Path:
    """A copy of the runs, to be spoiled."""
    return shutil.copytree(logdir, tmp_path / "logs")


class Look(Callback):
    """Looks at the tab at the end of every epoch of a training that goes on meanwhile."""

    def __init__(self, look) -> None:
        self.look = look

    def on_train_epoch_end(self, trainer, pl_module):
        self.look(trainer.current_epoch)


@pytest.mark.parametrize("loader", ["true", "false"])
def test_a_reload_shows_a_step_measured_meanwhile(watched, tmp_path, loader):
    with tensorboard(tmp_path, f"--load_fast={loader}") as address, watched() as tab:

        def look(epoch: int) -> None:
            if epoch == 0:
                tab.open_when_active(f"{address}#input_hessian")
            seen = epoch + 2  # one measurement before training
            tab.reload_until(f"({seen} of {seen})")
            records = load_records(tmp_path / "run")[:seen]
            mean = tab.traces("curves")[2]
            assert mean["x"] == [r.logged_step for r in records]
            np.testing.assert_allclose(mean["y"], [r.lambda_max[:, 0].mean() for r in records], rtol=1e-5)
            shown = number(tab.get("maps").locator("figcaption").nth(1).inner_text().split("=")[1])
            assert shown == pytest.approx(records[-1].gradient_norm[0, 0], rel=5e-3)

        fit(tmp_path / "run", small_monitor(), Look(look), max_epochs=3)


def test_a_file_that_was_removed_is_reported_in_the_views_that_need_it(watched, own_logdir):
    records = load_records(own_logdir / "gelu")
    with tensorboard(own_logdir) as address, watched() as tab:
        tab.open(f"{address}#input_hessian")
        (own_logdir / "gelu" / "input_hessian" / f"step_{records[1].step:09d}.safetensors").unlink()
        tab.choose(step=1)
        for view in ("hessian", "maps"):
            expect(tab.panel(view).get_by_test_id("error")).to_contain_text("is not beside the events of this run")
        assert len(tab.traces("spectrum")[0]["x"]) == 64
        expect(tab.get("table").locator("tbody tr")).to_have_count(6)
        tab.screenshot("missing_file")
        tab.choose(step=2)
        expect(tab.get("heatmap")).to_be_visible()
        tab.forgive(MISSING)


def test_a_damaged_file_is_reported_in_words(watched, own_logdir):
    records = load_records(own_logdir / "gelu")
    path = own_logdir / "gelu" / "input_hessian" / f"step_{records[1].step:09d}.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with tensorboard(own_logdir) as address, watched() as tab:
        tab.open(f"{address}#input_hessian")
        tab.choose(step=1)
        expect(tab.panel("hessian").get_by_test_id("error")).to_contain_text("is damaged")
        tab.forgive(MISSING)


def test_without_measurements_the_tab_says_what_to_attach(watched, tmp_path):
    fit(tmp_path / "run")
    with tensorboard(tmp_path) as address, watched() as tab:
        tab.page.goto(f"{address}#input_hessian")
        tab.root = tab.page.frame_locator("iframe")
        expect(tab.get("empty")).to_contain_text("Attach InputHessianMonitor")


def test_when_tensorboard_has_ended_the_tab_says_so(watched, logdir):
    with watched() as tab:
        with tensorboard(logdir) as address:
            tab.open(f"{address}#input_hessian")
        tab.get("reload").click()
        expect(tab.get("error")).to_contain_text("TensorBoard does not answer")
        tab.forgive(MISSING)
