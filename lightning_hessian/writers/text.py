"""A measurement in words: the diagnosis, a table of its metrics and how far they can be trusted, in markdown."""

from __future__ import annotations

import numpy as np

from lightning_hessian.records.color_scale import MAX_CLASSES
from lightning_hessian.records.histogram import largest_bin_error
from lightning_hessian.records.metrics import LOGGED, Metric, escaped
from lightning_hessian.records.record import Record
from lightning_hessian.records.statistics import over_samples
from lightning_hessian.records.validity import about_validity
from lightning_hessian.writers.scalars import mean_errors, num_not_converged


def diagnosis_text(record: Record) -> str:
    """The diagnosis in words and a table of the measurement."""
    num_samples, _, num_inputs = record.gradient.shape
    titles = [escaped(metric.title) for metric in LOGGED]
    cells = [_cells(record, metric) for metric in LOGGED]
    rows = [titles, ["---"] * len(titles), *zip(*cells, strict=True)]
    outputs = "class" if record.has_classes else "output"
    names = [escaped(record.id_name(class_id)) for class_id in record.class_ids]
    table = zip([outputs, "---", *names], rows, strict=True)
    return "\n\n".join(
        [
            f"**Input-Hessian of `{record.target}`, {record.when}: {record.diagnosis}.** {record.message}",
            about_validity(record.finite_difference_error, record.valid),
            f"{num_samples} samples of {num_inputs} inputs; mean over samples (10th to 90th percentile).",
            "\n".join(f"| {first} | {' | '.join(others)} |" for first, others in table),
            "\n".join(f"- **{m.title}** = {m.formula}: {m.meaning}." for m in LOGGED),
            f"{_about_classes(record)}{_about_histogram(record)} The color scale of a Hessian's picture ends at the "
            "99th percentile of |H| when it was first nonzero in this run, so that pictures of different steps "
            "compare.",
            f"{_about_cost(record)} Method {record.method} ({record.reason}), {record.autodiff_mode}. "
            f"{_about_accuracy(record)}",
        ]
    )


def _cells(record: Record, metric: Metric) -> list[str]:
    """The cells of one metric, for each class."""
    values = record.metrics[metric.name]
    found = over_samples(values)
    num_samples = len(values)
    cells = []
    for k, num_finite in enumerate(found.num_finite):
        num_invalid = int((~record.valid[:, k]).sum())
        if not num_finite:
            others = "∞" if np.isinf(values[:, k]).any() else "undefined"
            cells.append("not valid" if num_invalid == num_samples else others)
            continue
        error = mean_errors(record, k).get(metric.name)
        plus_minus = "" if error is None else f" ± {error:.1g}"
        missing = {"not valid": num_invalid, "not finite": num_samples - num_finite - num_invalid}
        left_out = "".join(f", {n} of {num_samples} {why}" for why, n in missing.items() if n)
        num_open = num_not_converged(record, metric, k)
        mark = f" **{num_open} of {num_samples} not converged**" if num_open else ""
        cells.append(f"{found.mean[k]:.3g}{plus_minus} ({found.p10[k]:.3g} to {found.p90[k]:.3g}{left_out}){mark}")
    return cells


def _about_classes(record: Record) -> str:
    """For which classes there are pictures, where not for all."""
    if len(record.class_ids) <= MAX_CLASSES:
        return ""
    return (
        f"Pictures, histograms and margin charts show the first {MAX_CLASSES} of {len(record.class_ids)} classes; "
        "scalars, this table and the Input Hessian tab show all of them. "
    )


def _about_histogram(record: Record) -> str:
    """What the histogram of the spectrum shows, and how far it may be off."""
    axis = (
        "In the histogram of the spectrum, x = ±(12 + log10 |λ|): ±9 is λ = ±1e-3, ±12 is λ = ±1; the bars sum to the "
        f"{record.gradient.shape[-1]} eigenvalues of an average sample."
    )
    errors = [largest_bin_error(record, k) for k in range(min(MAX_CLASSES, len(record.class_ids)))]
    known = [error for error in errors if error is not None]
    if not known or record.density_nodes is None:
        return axis
    return (
        f"{axis} It is an estimate from {record.density_nodes.shape[2]} random starting vectors, with a standard error "
        f"of at most {max(known):.2g} for each bar. Closely spaced eigenvalues may be counted in a neighboring bin."
    )


def _about_cost(record: Record) -> str:
    """What the measurement cost."""
    memory = ""
    if record.memory is not None:
        mebibytes = round(record.memory / 2**20)
        bound = "" if record.memory_exact and mebibytes else "at most "
        memory = f", {bound}{max(1, mebibytes)} MiB of memory"
    sentences = [f"{record.seconds:.2f} s, {record.num_matvecs} Hessian-vector products per sample and class{memory}."]
    if record.overhead is not None:
        percent = 100 * record.overhead
        readable = f"{percent:.0f}" if percent >= 10 else f"{percent:.2g}"
        sentences.append(f"So far, measuring has taken {readable} % of the training time.")
    if record.skipped:
        sentences.append(about_skipped(record.skipped))
    return " ".join(sentences)


def about_skipped(num_skipped: int) -> str:
    """How many measurements are missing because of their cost."""
    counted = "1 measurement has" if num_skipped == 1 else f"{num_skipped} measurements have"
    return f"{counted} been skipped so far: the time would have exceeded max_overhead."


def _about_accuracy(record: Record) -> str:
    """How exact the numbers are."""
    if not record.valid.any():
        return ""
    if record.method != "lanczos":
        return "All eigenvalues are exact to rounding."
    num_open = int(record.not_converged.sum())
    converged = "all of them have converged"
    if num_open:
        converged = (
            f"{num_open} of {record.converged[record.valid].size} (all samples and classes) have **not converged**"
        )
    largest = float(record.residuals[record.valid].max())
    return (
        f"{record.eigenvalues.shape[-1]} eigenvalues at the ends of each spectrum, residual at most "
        f"{largest:.1g}; {converged}. After ±: for λ the mean residual; for trace, Frobenius "
        f"norm and Gauss–Newton share, which are estimates, the standard error."
    )
