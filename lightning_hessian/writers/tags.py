"""Every tag that a monitor logs under, but that of the tab's events (``records.event_format``).

``suffix`` is what ``Record.tag_suffix`` returns for a class: ``prob_class_3``, after the monitor's name if it has one.
"""

from __future__ import annotations

from lightning_hessian.records.record import with_name

SPREAD = "hessian_spread/"


def metric_tag(metric: str, suffix: str) -> str:
    """The mean of a metric over samples."""
    return f"hessian_{metric}/{suffix}"


def spread_tag(metric: str, suffix: str, percent: int) -> str:
    """A percentile of a metric over samples."""
    return f"{SPREAD}{metric}_{suffix}_p{percent}"


def error_tag(name: str, suffix: str) -> str:
    """How far a mean may be off, or how many eigenvalues have not converged."""
    return f"hessian_error/{name}_{suffix}"


def cost_tag(name: str, monitor: str | None) -> str:
    """What a measurement cost."""
    return f"hessian_cost/{with_name(monitor, name)}"


def histogram_tag(suffix: str) -> str:
    """The histogram of a spectrum."""
    return f"hessian_spectrum_signed_log10/{suffix}"


def picture_tag(suffix: str) -> str:
    """The picture of a class."""
    return f"hessian/{suffix}"


def diagnosis_tag(monitor: str | None) -> str:
    """The text about a measurement."""
    return "hessian_diagnosis" if monitor is None else f"hessian_diagnosis/{monitor}"
