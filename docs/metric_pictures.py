"""Makes the pictures of the metrics' pages from one real run: ``.venv/bin/python docs/metric_pictures.py [NAME ...]``.

The MLP of ``examples/digits_mlp.py`` is trained once, while two monitors measure the logit and the probability of the
label at 16 held-out digits; seconds on two cores. Each picture has the metric over the training on the left, and on the
right what its last value says of one digit (``metric_panels.py``). The captions are in ``metric_notes.md``.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import gallery_pictures
import matplotlib
from digits_mlp import DigitsMLP, loaders
from gallery import save
from gallery_pictures import draw_curve
from lightning.pytorch import Trainer, seed_everything
from matplotlib.figure import Figure
from metric_panels import ONE, TWO, Run

from lightning_hessian import InputHessianMonitor, load_records
from lightning_hessian.records.metrics import BY_NAME

IMAGES = Path(__file__).parent / "images" / "metrics"
SHORT = {"top_eigenvector_cosine": "|cos| of top eigenvectors", "top_subspace_overlap": "overlap of top subspaces"}
OF_PROB = ("gauss_newton_norm", "functional_norm", "gauss_newton_share")
FROM_ZERO = (
    "gradient_norm",
    "linear_radius",
    "effective_rank",
    "frobenius_norm",
    "spectral_norm",
    "normalized_curvature",
)


def measured(folder: Path) -> Run:
    """Trains and measures."""
    seed_everything(0, verbose=False)
    names = ("logit", "prob")
    monitors = [InputHessianMonitor("label", name, num_samples=16, name=name) for name in names]
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=8, default_root_dir=folder, logger=False, callbacks=monitors, accelerator="cpu", **quiet
    )
    model = DigitsMLP()
    trainer.fit(model, *loaders())
    logit, prob = (load_records(folder, name) for name in names)
    return Run(logit, prob, copy.deepcopy(model.net).double().eval())


def picture(run: Run, name: str) -> Figure:
    """The metric over the training, and what it says of one digit."""
    metric, target = BY_NAME[name], "prob" if name in OF_PROB else "logit"
    figure = Figure(figsize=(gallery_pictures.SIZE[0], 2.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.05)
    ratios = [1, 1] if name in ONE else [1.1, 0.6, 0.6]
    left, *right = figure.subplots(1, len(ratios), width_ratios=ratios)
    draw_curve(left, getattr(run, target), name, "")
    unit = metric.unit.replace("target", target)
    title = SHORT.get(name, metric.title)
    left.set(xlabel="step", ylabel=f"{title},\n{unit}" if unit and unit != "none" else title)
    if name in FROM_ZERO:
        left.set_ylim(bottom=0)
    elif name in ("gauss_newton_share", "negative_share", "gradient_alignment", *SHORT):
        left.set_ylim(0, 1.03)
    left.set_title("16 digits: mean, 10 to 90 %", fontsize=10)
    if name in ONE:
        ONE[name](run, right[0])
    else:
        TWO[name](run, right)
    for axes in figure.axes:
        axes.tick_params(labelsize=8.5)
        axes.xaxis.label.set_size(9)
        axes.yaxis.label.set_size(9)
        axes.title.set_size(min(axes.title.get_size(), 10))
    return figure


def main() -> None:
    """Makes the pictures named, or all."""
    names = [*ONE, *TWO]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *names], help=", ".join(names))
    chosen = parser.parse_args().names or names
    matplotlib.use("agg")
    IMAGES.mkdir(exist_ok=True, parents=True)
    with tempfile.TemporaryDirectory() as folder:
        run = measured(Path(folder))
    for name in chosen:
        save(picture(run, name), IMAGES / f"{name}.png", max_bytes=25_000)
        print(f"{name}: {(IMAGES / f'{name}.png').stat().st_size} bytes")


if __name__ == "__main__":
    main()
