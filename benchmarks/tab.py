"""How long the "Input Hessian" tab takes on a large run: until it shows data, and until a matrix follows a click.

The numbers in the run are random: only their amount matters. 300 measurements of 10 classes and 32 samples at D = 784,
and one at D = 3072. TensorBoard's own reading of the event file is reported separately.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from playwright.sync_api import Browser, sync_playwright
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from benchmarks.common import save
from lightning_hessian.curvature.options import Options
from lightning_hessian.records.event_format import pack_summary, tag
from lightning_hessian.records.files import save_record
from lightning_hessian.records.histogram import NUM_BINS
from lightning_hessian.records.metrics import METRICS
from lightning_hessian.records.record import Record
from lightning_hessian.training.measurement import measure
from lightning_hessian.training.samples import Samples
from lightning_hessian.training.settings import MeasurementSettings
from lightning_hessian.writers.tensorboard import add_payload

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.browsing import Tab, tensorboard
from support.get_chromium import FLAGS, NONE_FOUND, find_chromium

MANY, SAMPLES, CLASSES = 300, 32, 10

# From the choice of another class until the frame with its matrix has been painted, in milliseconds.
CHOOSE = """async (select, value) => {
  const panel = document.querySelector(".panel-hessian");
  const frame = () => new Promise(requestAnimationFrame);
  const begin = performance.now();
  select.value = value;
  select.dispatchEvent(new Event("change"));
  while (panel.getAttribute("aria-busy") === "true") await frame();
  await frame();
  const painted = new MessageChannel();
  await new Promise((resolve) => {
    painted.port1.onmessage = resolve;
    painted.port2.postMessage(null);
  });
  return performance.now() - begin;
}"""


def real() -> Record:
    """A small measurement, whose metadata the large ones share."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 10))
    settings = MeasurementSettings([0], "logit", "float32", Options(num_eigenvalues=4), heatmap_samples=1)
    record = measure(net, Samples(torch.rand(2, 1, 2, 2), torch.zeros(2, dtype=torch.long)), settings)
    assert record is not None
    return record


def large(template: Record, shape: tuple[int, ...], samples: int, classes: int, vectors: int = 10) -> Record:
    """A record of random numbers; the whole matrices of one sample."""
    rng = np.random.default_rng(0)
    size = int(np.prod(shape))

    def random(*lengths: int) -> Any:
        return rng.standard_normal((samples, classes, *lengths), np.float32)

    half = rng.standard_normal((1, classes, size, size), np.float32)
    nodes = np.sort(random(1, NUM_BINS), axis=-1)
    return replace(
        template,
        metrics={metric.name: random() for metric in METRICS},
        x=rng.random((samples, *shape), np.float32),
        labels=np.zeros(samples, np.int64),
        predicted=np.zeros(samples, np.int64),
        classes=np.tile(np.arange(classes), (samples, 1)),
        class_ids=tuple(range(classes)),
        eigenvalues=-np.sort(-random(vectors), axis=-1),
        residuals=np.full((samples, classes, vectors), 1e-6, np.float32),
        converged=np.ones((samples, classes, vectors), bool),
        complete=False,
        eigenvectors=random(vectors, size) / size**0.5,
        vector_index=np.tile(np.arange(vectors), (samples, classes, 1)),
        gradient=random(size),
        diagonal=random(size),
        diagonal_error=np.zeros((samples, classes, size), np.float32),
        density_nodes=nodes,
        density_weights=np.full_like(nodes, 1 / NUM_BINS),
        hessian=half + half.swapaxes(-1, -2),
    )


def write_run(folder: Path, record: Record, measurements: int) -> None:
    """Events of ``measurements`` steps; the file of the last one only."""
    with SummaryWriter(str(folder)) as writer:
        for number in range(measurements):
            last = replace(record, step=10 * number, logged_step=10 * number, epoch=number)
            add_payload(writer, tag(None), pack_summary(last), last.logged_step)
    save_record(last, folder)


def seen(browser: Browser, logdir: Path, steps: int) -> dict[str, Any]:
    """Opens the tab on a run as soon as TensorBoard has read it, and chooses one class after the other."""
    begin = time.perf_counter()
    with tensorboard(logdir) as address:
        while num_steps(address) < steps:
            time.sleep(0.1)
        read = time.perf_counter()
        page = browser.new_page(viewport={"width": 1400, "height": 3200})
        tab = Tab(page)
        tab.open(f"{address}#input_hessian")
        shown = time.perf_counter()
        select = tab.get("class-select")
        values = select.locator("option").evaluate_all("all => all.map(each => each.value)")
        clicks = [select.evaluate(CHOOSE, value) / 1000 for value in values[1:]]
        page.close()
    return {
        "tensorboard_has_read_after": round(read - begin, 2),
        "shown_after_opening": round(shown - read, 2),
        "matrix_after_click": [round(each, 4) for each in clicks],
        "matrix_median": round(statistics.median(clicks), 4),
        "matrix_worst": round(max(clicks), 4),
    }


def num_steps(address: str) -> int:
    """How many steps the plugin knows."""
    with urlopen(f"{address}data/plugin/input_hessian/runs") as answer:
        runs = json.load(answer)["runs"]
    return len(runs[0]["tags"][0]["steps"]) if runs else 0


def main() -> None:
    """Writes the runs, and measures."""
    chromium = find_chromium()
    if chromium is None:
        sys.exit(NONE_FOUND)
    template = real()
    cases = {
        "300x10x32, D=784": (large(template, (1, 28, 28), SAMPLES, CLASSES), MANY, 0.3),
        "1x4x1, D=3072": (large(template, (3, 32, 32), 1, 4), 1, 2.0),
    }
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        for number, (name, (record, steps, wanted)) in enumerate(cases.items()):
            logdir = Path(folder) / str(number)
            write_run(logdir / "run", record, steps)
            size = sum(path.stat().st_size for path in (logdir / "run").glob("events*"))
            results[name] = {
                "event_kB_each": round(size / steps / 1000, 1),
                "matrix_wanted_at_most": wanted,
                **seen(browser, logdir, steps),
            }
            print(name, results[name], flush=True)
        version = browser.version
        browser.close()
    save("tab", {"chromium": version, **results})


if __name__ == "__main__":
    main()
