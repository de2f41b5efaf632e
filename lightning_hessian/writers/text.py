"""A measurement in words: the diagnosis, a table of its metrics and how far they can be trusted, in markdown."""

from __future__ import annotations

from lightning_hessian.records.color_scale import MAX_CLASSES
from lightning_hessian.records.histogram import largest_bin_error
from lightning_hessian.records.metrics import LOGGED, escaped
from lightning_hessian.records.record import Record
from lightning_hessian.records.summary import about_accuracy, about_cost, mean_in_words
from lightning_hessian.records.validity import about_validity

FEW_CLASSES = 4  # have a column each, beside a row for each metric; the table of more is the other way round


def diagnosis_text(record: Record) -> str:
    """The diagnosis in words and a table of the measurement."""
    num_samples, _, num_inputs = record.gradient.shape
    classes = range(len(record.class_ids))
    columns = [["class" if record.has_classes else "output", *(record.id_name(k) for k in record.class_ids)]]
    columns += [[metric.title, *(mean_in_words(record, metric, k) for k in classes)] for metric in LOGGED]
    rows = columns if len(classes) <= FEW_CLASSES else list(zip(*columns, strict=True))
    rule = ["---"] * len(rows[0])
    return "\n\n".join(
        [
            f"**Input Hessian of `{record.target}`, {record.when}: {record.diagnosis}.** {record.message}",
            about_validity(record.finite_difference_error, record.valid),
            f"{num_samples} samples of {num_inputs} inputs; mean over samples (10th to 90th percentile).",
            "\n".join(f"| {' | '.join(map(escaped, row))} |" for row in (rows[0], rule, *rows[1:])),
            "\n".join(f"- **{m.title}** = {m.formula}: {m.meaning}." for m in LOGGED),
            f"{_about_classes(record)}{_about_histogram(record)} The color scale of a Hessian's picture ends at the "
            "99th percentile of |H| when it was first nonzero in this run, so that pictures of different steps "
            "compare.",
            f"{about_cost(record)} Method {record.method} ({record.reason}), {record.autodiff_mode}. "
            f"{about_accuracy(record)}",
        ]
    )


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
