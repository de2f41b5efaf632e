"""The pictures of gallery.md: one function for each file in ``examples/``, named like it.

What an example logs is read back from its records; one that logs nothing is imported, and its own functions are called.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_hessian import Record, input_spectrum, load_records
from lightning_hessian.records.statistics import over_samples

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZE = (6.0, 3.1)  # inches
sys.path.insert(0, str(EXAMPLES))


def new_figure(columns: int = 1, height: float = SIZE[1]) -> tuple[Figure, list[Axes]]:
    """A figure of the gallery's width, and its axes from left to right."""
    figure = Figure(figsize=(SIZE[0], height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
    return figure, list(np.atleast_1d(figure.subplots(1, columns)))


def show(axes: Axes, values: np.ndarray, title: str, quantile: float = 1) -> None:
    """A map, red where positive, blue where negative. Colors end at that quantile of |values|, which stands below."""
    values = np.asarray(values, dtype=float)
    limit = float(np.quantile(np.abs(values), quantile))
    axes.imshow(values, cmap="RdBu_r", vmin=-(limit or 1), vmax=limit or 1, interpolation="nearest")
    axes.set_title(title, fontsize=11)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel((f"colors to ±{limit:.2g}" if limit else "all exactly zero"), fontsize=10)


def draw_curve(axes: Axes, records: Sequence[Record], metric: str, label: str, k: int = 0) -> None:
    """Means over samples at every step, and a band from the 10th to the 90th percentile."""
    values = over_samples(np.stack([getattr(record, metric)[:, k] for record in records]), axis=1)
    steps = [record.step for record in records]
    (line,) = axes.plot(steps, values.mean, marker="o", markersize=4, label=label)
    axes.fill_between(steps, values.p10, values.p90, alpha=0.2, color=line.get_color(), lw=0)


def labeled(axes: Axes, x: str, y: str) -> None:
    """Axis labels, and a legend where there is something to say."""
    axes.set(xlabel=x, ylabel=y)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=9)


def scalars(run: Path, tag: str) -> tuple[list[int], list[float]]:
    """Steps and values of one curve in an event file."""
    events = EventAccumulator(str(run)).Reload().Scalars(tag)
    return [event.step for event in events], [event.value for event in events]


def run(name: str, folder: Path) -> Path:
    """Runs an example, and gives the directory with its records."""
    path = EXAMPLES / f"{name}.py"
    arguments = ["--log-dir", str(folder)]
    if name == "lightning_cli":
        config = str(path.with_suffix(".yaml"))
        arguments = ["fit", "--config", config, "--trainer.logger.init_args.save_dir", str(folder)]
    subprocess.run([sys.executable, str(path), *arguments], check=True, cwd=folder)
    return folder


def records_of(folder: Path) -> list[Record]:
    """Those of the only run in a directory."""
    (records,) = {path.parent.parent for path in folder.rglob("step_*.safetensors")}
    return load_records(records)


def mnist_cnn(folder: Path) -> Figure:
    """Digit, gradient and Hessian."""
    record = records_of(run("mnist_cnn", folder))[-1]
    figure, axes = new_figure(3, height=2.5)
    show(axes[0], record.x[0, 0], "held-out digit")
    show(axes[1], record.gradient[0, 0].reshape(28, 28), "gradient, class 2")
    show(axes[2], record.matrix(0, 2), "Hessian, 784×784", quantile=0.99)
    return figure


def zero_hessian(folder: Path) -> Figure:
    """Three Hessians of one digit."""
    from zero_hessian import digits, trained

    from lightning_hessian import input_hessian

    x, y = digits()
    figure, axes = new_figure(3, height=2.5)
    for ax, (activation, target) in zip(axes, (("ReLU", "logit"), ("GELU", "logit"), ("ReLU", "prob")), strict=True):
        network = trained(activation, x[:1500], y[:1500])
        hessian = input_hessian(network, x[1500:1501], int(y[1500]), target)[0, 0]
        show(ax, hessian, f"{activation}, {target}", quantile=0.98)
    return figure


def digits_mlp(folder: Path) -> Figure:
    """Eigenvalues and radius over training."""
    records = records_of(run("digits_mlp", folder))
    figure, axes = new_figure(2)
    draw_curve(axes[0], records, "lambda_max", "largest λ")
    draw_curve(axes[0], records, "lambda_min", "smallest λ")
    labeled(axes[0], "step", "logit per input unit²")
    draw_curve(axes[1], records, "linear_radius", "")
    axes[1].set_ylim(bottom=0)
    labeled(axes[1], "step", "linear radius, input units")
    return figure


def text_at_embedding(folder: Path) -> Figure:
    """Blocks of the last passage."""
    import text_at_embedding as example

    record = records_of(run("text_at_embedding", folder))[-1]
    words, _, held_out = example.passages()
    last = [w for w, out in zip(words, held_out, strict=True) if out]
    passage = last[2 * (len(last) // 3)]
    blocks = example.interactions(record.matrix(2))
    np.fill_diagonal(blocks, np.nan)
    figure = Figure(figsize=(SIZE[0], 4.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(blocks, cmap="Reds")
    axes.set_xticks(range(len(passage)), passage, rotation=90, fontsize=9)
    axes.set_yticks(range(len(passage)), passage, fontsize=9)
    figure.colorbar(image, ax=axes, label="norm of the block of two words")
    return figure


def pinn_laplacian(folder: Path) -> Figure:
    """Laplacian and its error."""
    from pinn_laplacian import compare, trace

    found = compare()
    figure, axes = new_figure(2)
    for ax, values, title in (
        (axes[0], trace(found.hessian), "trace of the Hessian"),
        (axes[1], trace(found.hessian_error), "its error"),
    ):
        limit = float(values.abs().max())
        image = ax.imshow(
            values.reshape(64, 64).T, origin="lower", extent=(0, 1, 0, 1), cmap="RdBu_r", vmin=-limit, vmax=limit
        )
        ax.set_title(title, fontsize=11)
        figure.colorbar(image, ax=ax, shrink=0.85)
    return figure


def molecule_modes(folder: Path) -> Figure:
    """Modes as arrows."""
    from molecule_modes import MASSES, NAMES, modes

    found = modes()
    position = (found.molecule / MASSES.sqrt()).reshape(3, 3).numpy()
    position = position - position[0]
    plane = np.linalg.svd(position)[2][:2]  # the molecule is flat
    atoms = position @ plane.T
    figure, axes = new_figure(3, height=1.75)
    for ax, name, frequency, mode in zip(
        axes, NAMES, found.frequencies, found.spectrum.eigenvectors[0, 0], strict=False
    ):
        arrows = (mode / MASSES.sqrt()).reshape(3, 3).numpy() @ plane.T
        arrows *= 0.45 / np.linalg.norm(arrows, axis=1).max()
        for hydrogen in (1, 2):
            ax.plot(*atoms[[0, hydrogen]].T, color="gray", lw=3, zorder=1)
        ax.scatter(*atoms.T, s=[420, 180, 180], c=["#b2182b", "#dddddd", "#dddddd"], edgecolors="black", zorder=2)
        ax.quiver(*atoms.T, *arrows.T, angles="xy", scale_units="xy", scale=1, width=0.02, color="#2166ac", zorder=3)
        ax.set(aspect="equal", xlim=(atoms[:, 0].min() - 0.4, atoms[:, 0].max() + 0.4))
        ax.set_ylim(atoms[:, 1].min() - 0.4, atoms[:, 1].max() + 0.3)
        ax.set_title(f"{name}\n{frequency:.1f} cm⁻¹", fontsize=11)
        ax.axis("off")
    return figure


def lightning_cli(folder: Path) -> Figure:
    """Curves of two classes."""
    records = records_of(run("lightning_cli", folder))
    figure, axes = new_figure(2)
    for k, name in enumerate(("two", "three")):
        draw_curve(axes[0], records, "spectral_norm", name, k)
        draw_curve(axes[1], records, "normalized_curvature", name, k)
    labeled(axes[0], "step", "max |λ|, logit per input unit²")
    labeled(axes[1], "step", "max |λ| / ‖gradient‖")
    return figure


def two_processes_ddp(folder: Path) -> Figure:
    """Eigenvalues of both ways, and how they differ."""
    import torch
    from digits_mlp import DigitsMLP

    *_, record = records_of(run("two_processes_ddp", folder))
    (checkpoint,) = folder.rglob("*.ckpt")
    model = DigitsMLP.load_from_checkpoint(checkpoint)
    x, labels = torch.tensor(record.x), torch.tensor(record.labels)[:, None]
    alone = input_spectrum(model, x, labels, "logit").eigenvalues[:, 0].numpy()
    together = record.eigenvalues[:, 0]
    figure, axes = new_figure(2)
    axes[0].plot(alone.ravel(), together.ravel(), ".")
    axes[0].set_xscale("symlog", linthresh=1e-3)
    axes[0].set_yscale("symlog", linthresh=1e-3)
    for axis in (axes[0].xaxis, axes[0].yaxis):
        axis.set_ticks([-1, 0, 1])
    labeled(axes[0], "λ by one process", "λ by two processes")
    axes[1].plot(np.arange(1, 65), np.abs(together - alone).max(0) / np.abs(alone).max(), ".")
    axes[1].set_yscale("log")
    axes[1].set_ylim(1e-9, 1e-3)
    labeled(axes[1], "number of the eigenvalue", "difference / max |λ|")
    return figure


def early_stopping_on_curvature(folder: Path) -> Figure:
    """Radius and accuracy of both runs."""
    from early_stopping_on_curvature import SMALLEST_RADIUS

    run("early_stopping_on_curvature", folder)
    figure, axes = new_figure(2)
    for name, label, style in (("whole", "to the end", "-"), ("stopped", "stopped early", "--")):
        place = folder / name / "version_0"
        for ax, tag in zip(axes, ("hessian_linear_radius/logit_label", "val_accuracy"), strict=True):
            ax.plot(*scalars(place, tag), style, lw=3 if name == "stopped" else 1.5, marker=".", label=label)
    axes[0].axhline(SMALLEST_RADIUS, color="gray", lw=1)
    axes[1].set_ylim(0.7, 1)
    labeled(axes[0], "step", "linear radius, input units")
    labeled(axes[1], "step", "held-out accuracy")
    return figure


def functions(folder: Path) -> Figure:
    """The last figure of the notebook."""
    cells = json.loads((EXAMPLES / "functions.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Figure] = {}
    exec("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"), names)
    figure = names["figure"]
    figure.set_size_inches(SIZE)
    return figure


def plain_pytorch(folder: Path) -> Figure:
    """Curves of two classes."""
    records = records_of(run("plain_pytorch", folder))
    figure, (axes,) = new_figure()
    for k, name in enumerate(records[0].class_ids):
        draw_curve(axes, records, "spectral_norm", f"class {name}", k)
    labeled(axes, "step", "max |λ|, logit per input unit²")
    return figure


def fabric_bf16(folder: Path) -> Figure:
    """Loss and curvature."""
    records = records_of(run("fabric_bf16", folder))
    (events,) = {path.parent for path in folder.rglob("events*")}
    figure, axes = new_figure(2)
    axes[0].plot(*scalars(events, "loss"), lw=1)
    labeled(axes[0], "step", "training loss, bf16")
    draw_curve(axes[1], records, "spectral_norm", "")
    labeled(axes[1], "step", "max |λ| of log_prob, float32")
    return figure


def transformers_trainer(folder: Path) -> Figure:
    """A digit, its gradient and the most curved direction."""
    record = records_of(run("transformers_trainer", folder))[-1]
    figure, axes = new_figure(3, height=2.5)
    for ax, values, title in zip(
        axes,
        (record.x[0], record.gradient[0, 0], record.eigenvectors[0, 0, 0]),
        ("held-out digit", "gradient", "most curved direction"),
        strict=True,
    ):
        show(ax, values.reshape(8, 8), title)
    return figure


def operator_algorithms(folder: Path) -> Figure:
    """All eigenvalues, and the one that each library finds."""
    import torch
    from hessian_eigenthings import LambdaOperator, lanczos
    from operator_algorithms import trained
    from scipy.sparse.linalg import eigsh

    from lightning_hessian import input_hessian_operator

    network, x, y = trained()
    with input_hessian_operator(network, x[:1], int(y[0]), "log_prob", dtype=torch.float64) as hessian:
        one = hessian[0, int(y[0])]
        (scipy,), _ = eigsh(one.to_scipy(), k=1, which="LM")
        wrapped = LambdaOperator(one.matvec, one.shape[0], dtype=one.dtype)
        theirs = float(lanczos(wrapped, k=1, max_iter=40, which="LM", seed=0).eigenvalues[0])
        ours = hessian.spectrum(method="dense").eigenvalues[0, 0].numpy()
    figure, (axes,) = new_figure()
    axes.plot(np.arange(1, 65), ours, "o", ms=4, label="input_spectrum, all 64")
    place = 64 if scipy < 0 else 1
    axes.plot(place, scipy, "s", ms=13, mfc="none", color="C1", label="SciPy, largest magnitude")
    axes.plot(place, theirs, "D", ms=19, mfc="none", color="C2", label="hessian-eigenthings, largest magnitude")
    axes.margins(x=0.08, y=0.15)
    axes.set(xlabel="number of the eigenvalue", ylabel="λ of log_prob")
    axes.legend(fontsize=9, markerscale=0.5)
    return figure


def curvature_and_errors(folder: Path) -> Image.Image:
    """The first two panels of the picture that the example draws; three are too small here."""
    picture = Image.open(run("curvature_and_errors", folder) / "curvature_and_errors.png").convert("RGB")
    return picture.crop((0, 0, round(0.56 * picture.width), picture.height))


def regularization(folder: Path) -> Image.Image:
    """The outer panels of the picture that the example draws; three are too small here."""
    picture = Image.open(run("regularization", folder) / "regularization.png").convert("RGB")
    left, right = round(0.4 * picture.width), round(0.705 * picture.width)
    outer = Image.new("RGB", (left + picture.width - right, picture.height))
    outer.paste(picture.crop((0, 0, left, picture.height)), (0, 0))
    outer.paste(picture.crop((right, 0, picture.width, picture.height)), (left, 0))
    return outer


def known_results(folder: Path) -> Image.Image:
    """One of the pictures of known_results.md, which takes minutes to make."""
    return Image.open(EXAMPLES.parent / "docs" / "images" / "known_saturating_softmax.png").convert("RGB")
