"""Curves and spectra over training: what the events of one tag answer, without any file.

tensorboard_plugin/http_api.md describes the arrays and the metadata of every answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lightning_hessian.records.event_format import CHECKS, SPECTRA, Summary
from lightning_hessian.records.histogram import BIN_EDGES, NUM_BINS
from lightning_hessian.records.matrices import Array
from lightning_hessian.records.metrics import BY_NAME, METRICS
from lightning_hessian.records.statistics import over_samples
from lightning_hessian.records.validity import AGREEMENT, about_validity

Answer = tuple[dict[str, Array], dict[str, Any]]
"""Arrays by name, and metadata that is JSON."""

PER_TAG = ("name", "target", "class_ids", "class_names", "has_classes", "num_inputs", "shape")
PER_STEP = (
    *("step", "stage", "when", "diagnosis", "network", "message"),
    *("method", "reason", "autodiff_mode", "complete", "overhead", "dtype", "in_file"),
)


class MissingError(LookupError):
    """What was asked for does not exist; the message says why."""


@dataclass(frozen=True)
class History:
    """The measurements of one tag that are shown together, at least one.

    Attributes:
        summaries: in order of step, all of the same samples, classes and target as the last.
        left_out: which measurements are missing and why, in words, or None.
    """

    summaries: Sequence[Summary]
    left_out: str | None = None

    def at(self, step: int) -> Summary:
        """The measurement at a logged step.

        Raises:
            MissingError: there is none.
        """
        for summary in self.summaries:
            if summary.logged_step == step:
                return summary
        first, last = self.summaries[0].logged_step, self.summaries[-1].logged_step
        raise MissingError(
            f"There is no measurement at step {step}. There are {len(self.summaries)}, from step {first} to {last}."
        )


def history(summaries: Sequence[Summary], left_out: Sequence[str] = ()) -> History:
    """The measurements that can be shown together with the last one.

    Args:
        summaries: in order of step, at least one.
        left_out: what was left out before, each as a noun phrase.
    """
    shown = [summary for summary in summaries if _kind(summary) == _kind(summaries[-1])]
    phrases = [*left_out]
    if others := len(summaries) - len(shown):
        phrases.append(f"{count(others, 'measurement')} of other samples, classes or targets than the last")
    return History(shown, f"Left out: {'; '.join(phrases)}." if phrases else None)


def count(number: int, noun: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def hidden(number: int) -> list[str]:
    """The phrase for measurements of which a later one at the same step is shown; empty where there are none."""
    return [f"{count(number, 'measurement')} followed by a later one at the same logged step"] if number else []


def describe(measured: History, tag: str) -> dict[str, Any]:
    """What the list of runs says about one tag."""
    last = measured.summaries[-1]
    return {
        "tag": tag,
        **{name: last.meta.get(name) for name in PER_TAG},
        "num_samples": last.shape[0],
        "steps": [summary.logged_step for summary in measured.summaries],
        "epochs": [_integer(summary.meta.get("epoch")) for summary in measured.summaries],
        "written": [summary.written for summary in measured.summaries],
        "left_out": measured.left_out,
    }


def metric_table() -> list[dict[str, Any]]:
    """The metrics that a reader can choose from; standard errors belong to theirs."""
    shown = ("name", "title", "unit", "formula", "meaning", "is_logged")
    return [{name: asdict(metric)[name] for name in shown} for metric in METRICS if not metric.is_error]


def series(measured: History) -> Answer:
    """Every metric over S steps, N samples and K classes, its statistics over samples, and metadata by step."""
    summaries = measured.summaries
    arrays: dict[str, Array] = {
        "steps": np.array([s.logged_step for s in summaries], np.int64),
        "epochs": np.array([_integer(s.meta.get("epoch")) for s in summaries], np.int64),
        "num_matvecs": np.array([_integer(s.meta.get("num_matvecs")) for s in summaries], np.int64),
        "seconds": np.array([_number(s.meta.get("seconds")) for s in summaries], np.float32),
    }
    found = [{**s.arrays, **uncertainty(s.arrays)} for s in summaries]
    for name in dict.fromkeys(name for each in found for name in each if _is_known(name)):
        arrays[name] = _stack(found, name)
    for metric in METRICS:
        arrays |= _statistics(arrays, metric.name)
    return arrays, {
        **{name: [s.meta.get(name) for s in summaries] for name in PER_STEP},
        "validity": [about_validity(*(s.arrays[name] for name in CHECKS)) for s in summaries],
        "agreement": AGREEMENT,
        "total_seconds": float(np.nansum(arrays["seconds"])),
        "left_out": measured.left_out,
    }


def _is_known(name: str) -> bool:
    """Whether an array of an event is one of ours over samples, with a fixed shape; another version may add others."""
    metric = name.removesuffix("_error").removesuffix("_converged")
    return metric in BY_NAME or name in ("labels", "predicted", "classes", *CHECKS)


def uncertainty(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """How far the metrics of one measurement that depend on extreme eigenvalues may be off, ``[N, K]`` each.

    ``<metric>_error`` follows, to first order, from the residual of the listed eigenvalue that it depends on (0 for a
    zero that a complete spectrum does not list, NaN where the metric is); ``<metric>_converged`` says whether
    that has converged.
    """
    if not {"eigenvalues", "residuals", "converged"} <= set(arrays):
        return {}
    high, low = _listed(arrays, "lambda_max", 0), _listed(arrays, "lambda_min", -1)
    is_low = np.abs(arrays["lambda_min"]) > np.abs(arrays["lambda_max"])
    strongest = tuple(np.where(is_low, a, b) for a, b in zip(low, high, strict=True))
    both = np.full_like(high[0], np.nan), high[1] & low[1]
    ends = {"largest": high, "smallest": low, "largest magnitude": strongest, "both ends": both}
    found: dict[str, Array] = {}
    for metric in METRICS:
        if metric.depends_on is None or metric.name not in arrays:
            continue
        residual, converged = ends[metric.depends_on]
        found[f"{metric.name}_converged"] = converged.astype(np.uint8)
        if metric.name in ("normalized_curvature", "linear_radius"):
            with np.errstate(divide="ignore", invalid="ignore"):
                relative = residual / np.maximum(np.abs(arrays["lambda_min"]), np.abs(arrays["lambda_max"]))
                residual = np.where(residual > 0, np.abs(arrays[metric.name]) * relative, 0)
        if metric.depends_on != "both ends":
            residual = np.where(np.isnan(arrays[metric.name]), np.nan, residual)
            found[f"{metric.name}_error"] = residual.astype(np.float32)
    return found


def _listed(arrays: Mapping[str, Array], name: str, position: int) -> tuple[Array, Array]:
    """The residual of an extreme eigenvalue, and whether it has converged."""
    end = slice(position, position + 1 or None)
    is_listed = arrays["eigenvalues"][..., end] == arrays[name][..., None]
    residual = np.where(is_listed, arrays["residuals"][..., end], 0).max(axis=-1, initial=0)
    return residual, ~(is_listed & (arrays["converged"][..., end] == 0)).any(axis=-1)


def spectra(measured: History, sample: int, class_index: int) -> Answer:
    """The spectra of one sample and class over S steps, and statistics of their listed eigenvalues."""
    summaries = measured.summaries
    width = max((s.arrays["eigenvalues"].shape[-1] for s in summaries if "eigenvalues" in s.arrays), default=0)
    arrays: dict[str, Array] = {"steps": np.array([s.logged_step for s in summaries], np.int64)}
    for name in SPECTRA:
        length = NUM_BINS if name == "histogram" else width
        arrays[name] = np.full((len(summaries), length), np.nan, np.float32)
        for row, summary in zip(arrays[name], summaries, strict=True):
            if name in summary.arrays:
                values = summary.arrays[name][sample, class_index][:length]
                row[: len(values)] = values
    values = np.nan_to_num(arrays["eigenvalues"].astype(np.float64))
    with np.errstate(invalid="ignore"):
        negative = np.maximum(-values, 0).sum(axis=1) / np.abs(values).sum(axis=1)
    arrays |= {
        "bin_edges": BIN_EDGES.astype(np.float32),
        "valid": np.array([s.arrays["valid"][sample, class_index] for s in summaries], np.uint8),
        "num_listed": np.isfinite(arrays["eigenvalues"]).sum(axis=1, dtype=np.int32),
        "num_converged": (arrays["converged"] == 1).sum(axis=1, dtype=np.int32),
        "largest_residual": np.max(arrays["residuals"], axis=1, initial=0, where=np.isfinite(arrays["residuals"])),
        "negative_share": negative.astype(np.float32),
    }
    return arrays, {"histogram": [s.meta.get("histogram") for s in summaries], "left_out": measured.left_out}


def _kind(summary: Summary) -> tuple[Any, ...]:
    """What must be the same for measurements to be shown together."""
    return summary.shape, *(summary.meta.get(name) for name in ("target", "class_ids", "shape"))


def _stack(found: Sequence[Mapping[str, Array]], name: str) -> Array:
    """An array of every step; NaN, or -1 among integers, where a step has none."""
    known = next(each[name] for each in found if name in each)
    missing = np.full_like(known, np.nan if known.dtype.kind == "f" else -1 if known.dtype.kind == "i" else 1)
    return np.stack([each.get(name, missing) for each in found])


def _statistics(arrays: Mapping[str, Array], name: str) -> dict[str, Array]:
    """Statistics of one metric over samples ``[S, K]``."""
    found: dict[str, Array] = {}
    if name in arrays:
        values = over_samples(arrays[name], axis=1)
        found = {f"{name}_{part}": getattr(values, part).astype(np.float32) for part in ("mean", "p10", "p90")}
        found[f"{name}_num_finite"] = values.num_finite.astype(np.int32)
    if f"{name}_error" in arrays:
        found[f"{name}_error_mean"] = over_samples(arrays[f"{name}_error"], axis=1).mean.astype(np.float32)
    if f"{name}_converged" in arrays:
        found[f"{name}_all_converged"] = np.asarray(arrays[f"{name}_converged"].all(axis=1), np.uint8)
    return found


def _integer(value: object) -> int:
    return value if type(value) is int and abs(value) < 1 << 62 else -1


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e30 else float("nan")
