"""Makes the pictures of the documentation: ``make screenshots``, some minutes on two cores.

The CNN of ``examples/mnist_cnn.py`` is trained twice from the same weights on the same batches, without and with weight
decay. Then TensorBoard is opened on both runs in a headless Chromium. The numbers for the captions are printed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from torch.utils.data import DataLoader

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]

from mnist_cnn import MnistCNN, digits  # noqa: E402
from support.browsing import Tab, tensorboard  # noqa: E402
from support.get_chromium import FLAGS, NONE_FOUND, find_chromium  # noqa: E402

from lightning_hessian import InputHessianMonitor, load_records  # noqa: E402
from lightning_hessian.render.composite import composite  # noqa: E402

IMAGES = ROOT / "docs" / "images"
MAX_BYTES = 300_000
RUNS = {"no_decay": 0.0, "weight_decay": 0.01}  # of Adam: the gradient of ½ · decay · ‖w‖² is added
WIDTH = 1400


class Decayed(MnistCNN):
    """The example's network with a weight decay."""

    def __init__(self, weight_decay: float) -> None:
        super().__init__("gelu")
        self.weight_decay = weight_decay

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, as in the example."""
        return torch.optim.Adam(self.parameters(), lr=1e-3, weight_decay=self.weight_decay)


def train(log_dir: Path, name: str, epochs: int) -> None:
    """One run, with five measurements."""
    seed_everything(0, verbose=False)
    train_set, held_out = digits()
    monitor = InputHessianMonitor(classes=[2, 3], num_samples=6, heatmap_samples=2)
    trainer = Trainer(
        max_epochs=epochs,
        logger=TensorBoardLogger(log_dir, name=name, version=""),
        callbacks=[monitor],
        accelerator="auto",
        devices=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=10,
    )
    loaders = (DataLoader(train_set, batch_size=64, shuffle=True), DataLoader(held_out, batch_size=250))
    trainer.fit(Decayed(RUNS[name]), *loaders)
    print(f"{name}: held-out accuracy {trainer.callback_metrics['val_accuracy']:.1%}")


def print_numbers(log_dir: Path) -> None:
    """Prints the numbers in the captions: means over samples, class by class, first and last."""
    for name in RUNS:
        records = load_records(log_dir / name)
        for metric in ("spectral_norm", "gradient_norm", "frobenius_norm", "normalized_curvature", "linear_radius"):
            first, last = (getattr(records[i], metric).mean(0) for i in (0, -1))
            print(f"{name} {metric}: {first.round(4)} -> {last.round(4)}")


def shrink(path: Path) -> None:
    """Fewer colors where the file is too large, chosen so that rare ones (those of color bars) stay apart."""
    for colors in (256, 128, 64):
        if path.stat().st_size <= MAX_BYTES:
            return
        palette = (
            Image.open(path)
            .convert("RGB")
            .quantize(colors, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        )
        palette.save(path, optimize=True)
    raise ValueError(f"{path} has {path.stat().st_size} bytes, more than {MAX_BYTES}.")


def save(page: Page, name: str, clip: dict[str, float] | None = None) -> None:
    """Saves what is visible, or a part of it."""
    path = IMAGES / f"{name}.png"
    page.screenshot(path=path, **({"clip": clip} if clip else {}))
    shrink(path)


def photograph_tab(tab: Tab, address: str) -> None:
    """The curves with the spectra below, and the Hessian while a pixel is pointed at."""
    tab.open(f"{address}#input_hessian")
    tab.choose(metric="spectral_norm")
    size = {"width": WIDTH, "height": tab.root.locator(".input-hessian").evaluate("e => e.scrollHeight") + 120}
    tab.page.set_viewport_size(size)
    tab.page.wait_for_timeout(1000)
    bottom = tab.panel("evolution").bounding_box()
    save(tab.page, "tab_curves", {"x": 0, "y": 0, "width": WIDTH, "height": bottom["y"] + bottom["height"] + 10})
    canvas = tab.get("input-map")
    cell = canvas.evaluate("e => e.clientWidth") / 28
    canvas.hover(position={"x": 14.5 * cell, "y": 12.5 * cell})
    tab.page.wait_for_timeout(500)
    save(tab.page, "tab_hessian", tab.panel("hessian").bounding_box())
    save(tab.page, "tab_maps", tab.panel("maps").bounding_box())


def photograph_dashboard(page: Page, address: str) -> None:
    """The margin charts under *Custom scalars*."""
    page.set_viewport_size({"width": WIDTH, "height": 760})
    page.goto("about:blank")
    page.goto(f"{address}#custom_scalars")
    page.wait_for_timeout(6000)
    save(page, "custom_scalars")


def draw_picture(log_dir: Path) -> None:
    """The picture under *Images*, three times as large as there."""
    picture = composite(load_records(log_dir / "no_decay")[-1], 2, scale=3).to_array()
    Image.fromarray(picture).save(IMAGES / "mnist_gelu.png", optimize=True)
    shrink(IMAGES / "mnist_gelu.png")


def main() -> None:
    """Trains, unless a directory with the runs is given, and takes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log-dir", type=Path, help="save the runs here; existing ones are not trained again")
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        sys.exit(NONE_FOUND)
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        log_dir = arguments.log_dir or Path(temporary)
        for name in RUNS:
            if not (log_dir / name).exists():
                train(log_dir, name, arguments.epochs)
        print_numbers(log_dir)
        draw_picture(log_dir)
        os.chdir(log_dir)  # TensorBoard shows the path that it was given, which should not be a private one
        with tensorboard(Path(".")) as address, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
            page = browser.new_page(viewport={"width": WIDTH, "height": 1000})
            photograph_tab(Tab(page), address)
            photograph_dashboard(page, address)
            browser.close()


if __name__ == "__main__":
    main()
