"""A measurement in words: what was measured, its numbers and what they say, how it was computed and what it cost."""

from __future__ import annotations

import numpy as np

from lightning_hessian.records.metrics import SUMMARIZED, Metric
from lightning_hessian.records.record import Record
from lightning_hessian.records.statistics import mean_errors, num_not_converged, over_samples
from lightning_hessian.records.validity import about_validity

MAX_CLASSES = 10  # in a summary


def summary(record: Record) -> str:
    """See ``Record.summary``."""
    accuracy = about_accuracy(record).replace("**", "")
    notes = [record.message, about_validity(record.finite_difference_error, record.valid), accuracy]
    made = [record.made_with.get("dtype"), record.made_with.get("device")]
    versions = [
        f"{name} {record.made_with[name]}" for name in ("lightning_hessian", "torch") if name in record.made_with
    ]
    with_what = f", {' on '.join(filter(None, made))}" if any(made) else ""
    lines = [
        f"Input Hessian of {record.target}{f' ({record.name})' if record.name else ''}, {record.when}: "
        f"{_about_size(record)}.",
        *filter(None, notes),
        "",
        "Means over samples (10th to 90th percentile); what they say holds to second order, at the mean:",
        *(line for metric in SUMMARIZED for line in _about_metric(record, metric)),
        "",
        f"Method {record.method} ({record.reason}), {record.autodiff_mode}{with_what}. {about_cost(record)}",
        *([f"Made with {', '.join(versions)}."] if versions else []),
    ]
    return "\n".join(lines)


def _about_size(record: Record) -> str:
    """How many samples, inputs and classes."""
    num_samples, _, num_inputs = record.gradient.shape
    shape = f" ({' × '.join(map(str, record.x.shape[1:]))})" if record.x.ndim > 2 else ""
    names = [_class_words(record, k) for k in range(len(record.class_ids))][:MAX_CLASSES]
    more = len(record.class_ids) - len(names)
    listed = ", ".join([*names, *([f"{more} more"] if more else [])])
    return f"{num_samples} {'sample' if num_samples == 1 else 'samples'}, D = {num_inputs}{shape}, {listed}"


def mean_in_words(record: Record, metric: Metric, class_index: int) -> str:
    """The mean of a metric over samples, its error and percentiles, and how many samples are left out of it."""
    values = record.metrics[metric.name]
    num_samples = len(values)
    found = over_samples(values[:, class_index])
    num_finite = int(found.num_finite)
    num_invalid = int((~record.valid[:, class_index]).sum())
    if not num_finite:
        if num_invalid == num_samples:
            return "not valid"
        if metric.needs_all and not record.complete:
            return "unknown: only the ends of the spectra were computed"
        return "∞" if np.isinf(values[:, class_index]).any() else "undefined"
    error = mean_errors(record, class_index).get(metric.name)
    plus_minus = "" if error is None else f" ± {error:.1g}"
    missing = {"not valid": num_invalid, "not finite": num_samples - num_finite - num_invalid}
    left_out = "".join(f", {n} of {num_samples} {why}" for why, n in missing.items() if n)
    num_open = num_not_converged(record, metric, class_index)
    mark = f" **{num_open} of {num_samples} not converged**" if num_open else ""
    return f"{found.mean:.3g}{plus_minus} ({found.p10:.3g} to {found.p90:.3g}{left_out}){mark}"


def about_cost(record: Record) -> str:
    """What the measurement cost."""
    memory = ""
    if record.memory is not None:
        mebibytes = round(record.memory / 2**20)
        bound = "" if record.memory_exact and mebibytes else "at most "
        memory = f", {bound}{max(1, mebibytes)} MiB of memory"
    sentences = [f"{record.seconds:.2f} s, {record.num_matvecs} Hessian-vector products per sample and class{memory}."]
    if record.overhead is not None:
        sentences.append(f"So far, measuring has taken {of_training_time(record.overhead)}.")
    if record.skipped:
        sentences.append(about_skipped(record.skipped))
    return " ".join(sentences)


def of_training_time(share: float) -> str:
    """A share of the training time in words: ``12 % of the training time``."""
    if share > 10:  # training has hardly begun, or is elsewhere
        return "more than ten times the training time"
    if share >= 1.5:
        return f"{share:.1f} times the training time"
    percent = 100 * share
    return f"{percent:.0f} % of the training time" if percent >= 10 else f"{percent:.2g} % of the training time"


def about_skipped(num_skipped: int) -> str:
    """How many measurements are missing because of their cost."""
    counted = "1 measurement has" if num_skipped == 1 else f"{num_skipped} measurements have"
    return f"{counted} been skipped so far: the time would have exceeded max_overhead."


def about_accuracy(record: Record) -> str:
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


def _about_metric(record: Record, metric: Metric) -> list[str]:
    """What a metric is, then a line for each class with its mean and what that says."""
    assert metric.reading is not None
    unit = metric.unit.replace("target", record.target)
    lines = [f"- {metric.title}{f', in {unit}' if unit else ''}: {metric.meaning}."]
    for k in range(min(MAX_CLASSES, len(record.class_ids))):
        mean = float(over_samples(record.metrics[metric.name][:, k]).mean)
        reading = f" {metric.reading(mean)}" if np.isfinite(mean) else ""
        lines.append(f"    {_class_words(record, k)}: {mean_in_words(record, metric, k).replace('**', '')}.{reading}")
    return lines


def _class_words(record: Record, class_index: int) -> str:
    """A class, or an output of a regression, with its name if it has one."""
    class_id = record.class_ids[class_index]
    if isinstance(class_id, str):
        return class_id
    words = f"{'class' if record.has_classes else 'output'} {class_id}"
    return f"{words} ({record.output_name(class_id)})" if record.class_names else words
