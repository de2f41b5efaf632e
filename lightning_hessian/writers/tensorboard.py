"""What TensorBoard shows of a record besides scalars: histograms, pictures, words."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from lightning_hessian.records.color_scale import MAX_COLUMNS
from lightning_hessian.records.histogram import BIN_EDGES, binned, has_spectra, placed, whole_spectra
from lightning_hessian.records.record import Array, Record
from lightning_hessian.render.canvas import to_image
from lightning_hessian.render.composite import composite
from lightning_hessian.writers.scalars import (
    METRICS,
    PERCENTILES,
    TITLES,
    finite_samples,
    mean_errors,
    num_not_converged,
    spread_tag,
)

_layouts: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()  # what each writer was given so far


Histogram = dict[str, Any]  # the arguments of SummaryWriter.add_histogram_raw


def histograms(record: Record) -> dict[str, Histogram]:
    """The spectrum of each class on a signed logarithmic axis, by tag; none where only the ends are known."""
    if not has_spectra(record):
        return {}
    return {
        f"hessian_spectrum_signed_log10/{record.tag_suffix(record.class_ids[c])}": _histogram(record, c)
        for c in _shown(record)
    }


def draw(record: Record) -> dict[str, Array]:
    """The composite picture of each class ``[H, W, 3]``, by tag; none where no matrix was kept."""
    if record.hessian is None or not len(record.hessian):
        return {}
    return {f"hessian/{record.tag_suffix(record.class_ids[c])}": to_image(composite(record, c)) for c in _shown(record)}


def _shown(record: Record) -> range:
    """The class columns of which there are pictures, histograms and charts with margins: the first ones."""
    return range(min(MAX_COLUMNS, len(record.class_ids)))


def add_histograms(writer: Any, spectra: dict[str, Histogram], logged_step: int) -> None:
    """Writes what ``histograms`` made through a ``SummaryWriter``."""
    for tag, values in spectra.items():
        writer.add_histogram_raw(tag, **values, global_step=logged_step)


def add_pictures(writer: Any, pictures: dict[str, Array], logged_step: int) -> None:
    """Writes what ``draw`` made."""
    for tag, image in pictures.items():
        writer.add_image(tag, image, logged_step, dataformats="HWC")


def add_text(writer: Any, tag: str, words: str, logged_step: int) -> None:
    """Writes words in markdown."""
    writer.add_text(tag, words, logged_step)


def diagnosis_tag(name: str | None) -> str:
    """The tag of the words about a measurement, by the monitor's name."""
    return "hessian_diagnosis" if name is None else f"hessian_diagnosis/{name}"


def add_layout(writer: Any, record: Record) -> None:
    """Lays out a margin chart (mean, 10th to 90th percentile over samples) per metric and class; once a run.

    TensorBoard knows one layout of a run, the last: it has to hold the charts of the monitors before, too.
    """
    charts: dict[str, list[Any]] = {}
    for metric in reversed(METRICS):  # TensorBoard shows a layout's charts last one first
        for column in reversed(_shown(record)):
            slot = record.tag_suffix(record.class_ids[column])
            tags = [f"hessian_{metric}/{slot}", *(spread_tag(metric, slot, p) for p in PERCENTILES)]
            charts[f"{TITLES[metric]}, {slot.replace('_', ' ')}"] = ["Margin", tags]
    title = "Input-Hessian" if record.name is None else f"Input-Hessian {record.name}"
    layout = _layouts.setdefault(writer, {})
    layout[f"{title}: mean and 10th to 90th percentile over samples"] = charts
    writer.add_custom_scalars(layout)


def eigenvalue_counts(record: Record, column: int) -> tuple[Array, Array]:
    """Eigenvalues, and how many of the D of a mean sample each stands for: of one class column.

    Both ``[S, n]``, one row for each starting vector of an estimated density; a single row of exact ones. Where
    there is no density, they are those of the samples whose whole matrix was kept.
    """
    nodes, counts = whole_spectra(record, column)
    num_samples, num_vectors, _ = nodes.shape
    by_vector = [a.swapaxes(0, 1).reshape(num_vectors, -1) for a in (nodes, counts / num_samples)]
    return by_vector[0], by_vector[1]


def _is_estimated(record: Record) -> bool:
    """Whether the histogram is drawn from a density estimated from random starting vectors."""
    return not record.complete and record.density_nodes is not None


def _histogram(record: Record, column: int) -> Histogram:
    nodes, counts = eigenvalue_counts(record, column)
    eigenvalues, counts = nodes.ravel(), counts.ravel() / len(nodes)
    values = placed(eigenvalues[counts > 0])
    return {
        "min": float(values.min()),
        "max": float(values.max()),
        "num": float(counts.sum()),
        "sum": float((values * counts[counts > 0]).sum()),
        "sum_squares": float((np.square(values) * counts[counts > 0]).sum()),
        "bucket_limits": BIN_EDGES[1:].tolist(),
        "bucket_counts": binned(eigenvalues, counts).tolist(),
    }


def _about_histogram(record: Record) -> str:
    """What the histogram of the spectrum shows, and how far it may be off, in words."""
    axis = (
        "In the histogram of the spectrum, x = ±(12 + log10 |λ|): ±9 is λ = ±1e-3, ±12 is λ = ±1; the bars sum to the "
        f"{record.gradient.shape[-1]} eigenvalues of a mean sample."
    )
    if not _is_estimated(record):
        return axis
    errors = []
    for column in _shown(record):
        by_vector = np.stack([binned(*points) for points in zip(*eigenvalue_counts(record, column), strict=True)])
        errors.append(by_vector.std(axis=0, ddof=1).max() / len(by_vector) ** 0.5)
    return (
        f"{axis} It is an estimate from {len(by_vector)} random starting vectors, with a standard error of at most "
        f"{max(errors):.2g} for each bar. Where eigenvalues lie close, a bin may hold those of its neighbours."
    )


def diagnosis_text(record: Record) -> str:
    """The diagnosis in words and a table of the last measurement, in markdown."""
    num_samples, _, num_inputs = record.gradient.shape
    titles = [title.replace("|", "\\|") for title in TITLES.values()]
    header = "| class | " + " | ".join(titles) + " |\n|" + "---|" * (len(METRICS) + 1)
    rows = [
        "| " + " | ".join([str(class_id), *(_cell(record, metric, c) for metric in METRICS)]) + " |"
        for c, class_id in enumerate(record.class_ids)
    ]
    return "\n\n".join(
        [
            f"**Input-Hessian of `{record.target}`, {record.when}: {record.diagnosis}.** {record.message}",
            f"{num_samples} samples of {num_inputs} inputs; mean over samples (10th to 90th percentile).",
            "\n".join([header, *rows]),
            "Normalized curvature is max |λ| / ‖gradient‖. Linear radius is 2 ‖gradient‖ / max |λ|: the distance, in "
            "input units (L2), at which bending may equal the slope: the linear picture holds well within it. Head "
            "share is the part of the Frobenius norm that the target puts on the outputs' slopes; the rest is the "
            "network's own bending. Drift "
            "compares with the measurement before: |cos| between the top eigenvectors, and the overlap of the spaces "
            "of the top ones; 1 means that they have not turned, and undefined is what no gap separates from the rest.",
            f"{_about_shown(record)}{_about_histogram(record)} The colours of a Hessian's picture end where 99 % of "
            "its entries did when it was first not zero in this run, so that pictures of different steps compare. For "
            "readable pictures tick *Show actual image size* in the Images tab.",
            f"{_about_cost(record)} Method {record.method} ({record.reason}), {record.autodiff_mode}. {_trust(record)}",
        ]
    )


def _about_shown(record: Record) -> str:
    """Of which classes there are pictures, where not of all."""
    if len(record.class_ids) <= MAX_COLUMNS:
        return ""
    return (
        f"Pictures, histograms and charts with margins are made of the first {MAX_COLUMNS} of {len(record.class_ids)} "
        "classes; scalars, the table and the Input Hessian tab have all of them. "
    )


def _about_cost(record: Record) -> str:
    """What the measurement cost, in words."""
    told = f"{record.seconds:.2f} s, {record.num_matvecs} Hessian-vector products for each sample and class"
    if record.memory is not None:
        mebibytes = round(record.memory / 2**20)
        told += f", {'' if record.memory_exact and mebibytes else 'at most '}{max(1, mebibytes)} MiB of memory"
    told += "."
    if record.overhead is not None:
        told += f" Measuring has taken {100 * record.overhead:.2g} % of the training time so far."
    return f"{told} {about_skipped(record.skipped)}" if record.skipped else told


def about_skipped(num_skipped: int) -> str:
    """How many measurements are missing because of their price, in words."""
    counted = "1 measurement has" if num_skipped == 1 else f"{num_skipped} measurements have"
    return f"{counted} been skipped so far: the time would have exceeded max_overhead."


def _trust(record: Record) -> str:
    """How exact the numbers are, in words."""
    if record.method != "lanczos":
        return "All eigenvalues are exact to rounding."
    missed = int((~record.converged).sum())
    told = f"{missed} of them have **not converged**" if missed else "all of them have converged"
    return (
        f"{record.eigenvalues.shape[-1]} eigenvalues at the ends of each spectrum, residual at most "
        f"{float(record.residuals.max()):.1g}; {told}. After ±: for λ the mean residual; for trace, Frobenius "
        f"norm and head share, which are estimates, the standard error."
    )


def _cell(record: Record, metric: str, column: int) -> str:
    finite = finite_samples(record, metric, column)
    num_samples = len(record.x)
    if not len(finite):
        return "∞" if np.isinf(getattr(record, metric)[:, column]).any() else "undefined"
    low, high = np.percentile(finite, PERCENTILES)
    error = mean_errors(record, column).get(metric)
    slack = "" if error is None else f" ± {error:.1g}"
    left_out = "" if len(finite) == num_samples else f", {num_samples - len(finite)} of {num_samples} not finite"
    missed = num_not_converged(record, metric, column)
    mark = f" **{missed} of {num_samples} not converged**" if missed else ""
    return f"{finite.mean():.3g}{slack} ({low:.3g} to {high:.3g}{left_out}){mark}"
