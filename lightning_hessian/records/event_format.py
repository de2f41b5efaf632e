"""The events that the "Input Hessian" tab reads: their names, arrays and metadata, written and read.

One event for each tag and step: a string tensor of shape ``[]`` that holds a safetensors payload. The arrays are those
of ``metrics.METRICS`` and the ones that ``pack_summary`` names; the metadata is JSON. What is large (matrices, vectors,
inputs) is in the record's file beside the event file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_hessian.records.histogram import histogram_accuracy, histogram_counts
from lightning_hessian.records.matrices import Array
from lightning_hessian.records.metrics import METRICS
from lightning_hessian.records.payload import DamagedDataError, pack, unpack

if TYPE_CHECKING:
    from lightning_hessian.records.record import ClassId, Record, Stage

PLUGIN_NAME = "input_hessian"
EVENT_FORMAT_VERSION = 2
CONTENT = json.dumps({"format": EVENT_FORMAT_VERSION}).encode()  # only a tag's first metadata counts: the same for all
FOLDER = "input_hessian"  # of the records, beside the event file
MAX_EIGENVALUES = 64  # per sample and class
CHECKS = ("finite_difference_error", "valid")  # not in events of older versions
SPECTRA = ("eigenvalues", "residuals", "converged", "histogram")

ERRORS = tuple(metric.name for metric in METRICS if metric.is_error)
WHEN = ("step", "logged_step", "epoch", "stage", "when", "measured_at")
WHAT = ("name", "target", "class_ids", "class_names", "has_classes", "diagnosis", "network", "message")
HOW = ("method", "reason", "autodiff_mode", "complete", "seconds", "num_matvecs", "overhead")


def tag(name: str | None, stage: Stage = "fit") -> str:
    """The tag of a monitor's events: ``input_hessian`` or ``input_hessian/NAME``.

    Outside a fit, ``input_hessian_test`` and ``input_hessian_validate``: other samples, at a step that the fit has
    used already.
    """
    plugin = PLUGIN_NAME if stage == "fit" else f"{PLUGIN_NAME}_{stage}"
    return plugin if name is None else f"{plugin}/{name}"


def file_name(step: int, stage: Stage = "fit") -> str:
    """The name of a record's file in ``input_hessian/[NAME/]``, by optimizer steps."""
    return f"step_{step:09d}{'' if stage == 'fit' else f'_{stage}'}.safetensors"


@dataclass(frozen=True)
class Summary:
    """One measurement as its event holds it: N samples, K classes.

    Attributes:
        logged_step: the loggers' step.
        arrays: see ``pack_summary``.
        meta: the metadata, with at least ``step``, ``num_inputs`` and ``class_ids``.
        written: wall time of the event.
    """

    logged_step: int
    arrays: Mapping[str, Array]
    meta: Mapping[str, Any]
    written: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        num_samples, num_classes = self.arrays["lambda_max"].shape
        return num_samples, num_classes

    @property
    def class_ids(self) -> list[ClassId]:
        """The K classes, as the user named them."""
        return list(self.meta["class_ids"])

    @property
    def nbytes(self) -> int:
        """About how much memory it takes."""
        return 10_000 + sum(array.nbytes for array in self.arrays.values())


def pack_summary(record: Record, in_file: Record | None = None) -> bytes:
    """The payload of a record's event: everything but what grows with D.

    Arrays are float32 unless noted: each of ``METRICS`` ``[N, K]``, standard errors only where one is not 0;
    ``eigenvalues`` and ``residuals`` ``[N, K, M']`` with ``converged`` (uint8), M' ≤ 64, descending: both ends and
    those of largest magnitude; ``histogram`` ``[N, K, 64]``, see ``histogram.histogram_counts``, absent where only the
    ends are known (``histogram`` in the metadata says whether its counts are exact or estimated); ``labels`` ``[N]``,
    absent where unknown, ``predicted`` ``[N]`` and ``classes`` ``[N, K]`` (int32); ``finite_difference_error``
    ``[N, K]``, NaN where not checked, and ``valid`` ``[N, K]`` (uint8).

    Args:
        record: the measurement.
        in_file: the record as its file holds it, where that is less.

    Cost: at most 4·N·K·(24 + 2·64 + 64) + N·K·65 bytes, and a few kB.
    """
    arrays = {metric.name: record.metrics[metric.name].astype(np.float32) for metric in METRICS}
    arrays = {name: values for name, values in arrays.items() if name not in ERRORS or np.nan_to_num(values).any()}
    arrays |= _largest_eigenvalues(record)
    arrays["finite_difference_error"] = record.finite_difference_error.astype(np.float32)
    arrays["valid"] = record.valid.astype(np.uint8)
    numbers = {"labels": record.labels, "predicted": record.predicted, "classes": record.classes}
    arrays |= {name: values.astype(np.int32) for name, values in numbers.items() if values is not None}
    histogram = histogram_counts(record)
    if histogram is not None:
        arrays["histogram"] = histogram.astype(np.float32)
    return pack(arrays, _metadata(record, in_file or record))


def _largest_eigenvalues(record: Record) -> dict[str, Array]:
    weight = np.abs(record.eigenvalues)
    weight[..., :1] = weight[..., -1:] = np.inf  # both ends: the errors of the extreme eigenvalues are read from them
    largest = np.argsort(-weight, axis=-1, kind="stable")[..., :MAX_EIGENVALUES]
    order = np.sort(largest, axis=-1)  # as the record lists them: descending
    dtypes = {"eigenvalues": np.float32, "residuals": np.float32, "converged": np.uint8}
    return {n: np.take_along_axis(getattr(record, n), order, axis=-1).astype(dtype) for n, dtype in dtypes.items()}


def _metadata(record: Record, in_file: Record) -> dict[str, Any]:
    num_matrices = 0 if in_file.hessian is None else len(in_file.hessian)
    return {
        "format": EVENT_FORMAT_VERSION,
        **{name: getattr(record, name) for name in (*WHEN, *WHAT, *HOW)},
        "num_inputs": record.gradient.shape[-1],
        "shape": record.x.shape[1:],
        "dtype": str(record.x.dtype),
        "histogram": histogram_accuracy(record),
        "in_file": {
            "matrices": list(range(num_matrices)),
            "eigenvectors": in_file.eigenvectors is not None,
            "why_no_matrix": in_file.why_no_matrix,
        },
    }


def read_summary(payload: bytes, logged_step: int, written: float = 0.0) -> Summary:
    """The measurement in the payload of an event.

    Args:
        payload: made by ``pack_summary``.
        logged_step: the step of the event.
        written: the wall time of the event.

    Raises:
        DamagedDataError: it is no such payload, or its arrays do not fit each other.
    """
    arrays, meta = unpack(payload)
    if meta.get("format") != EVENT_FORMAT_VERSION:
        raise DamagedDataError(_other_format(meta.get("format")))
    table: tuple[int, ...] = arrays["lambda_max"].shape if "lambda_max" in arrays else ()
    if len(table) != 2:
        raise DamagedDataError("lambda_max is not a table of samples and classes")
    if not all(type(meta.get(name)) is int and meta[name] >= 0 for name in ("step", "num_inputs")):
        raise DamagedDataError("it does not say at which step and of how many inputs it is")
    ids = meta.get("class_ids")
    if not isinstance(ids, list) or len(ids) != table[1] or not all(type(i) in (int, str) for i in ids):
        raise DamagedDataError("it does not list its classes")
    for name, array in arrays.items():
        if not _fits(name, array.shape, table):
            raise DamagedDataError(f"{name} has the shape {list(array.shape)}")
    if len({arrays[name].shape for name in SPECTRA[:3] if name in arrays}) > 1:
        raise DamagedDataError("eigenvalues and their residuals have different shapes")
    absent = dict.fromkeys(ERRORS, np.zeros(table, np.float32))
    absent |= {"finite_difference_error": np.full(table, np.nan, np.float32), "valid": np.ones(table, np.uint8)}
    return Summary(logged_step, absent | arrays, meta, written)


_TABLES = {*(metric.name for metric in METRICS), *CHECKS, "classes"}


def _fits(name: str, shape: tuple[int, ...], table: tuple[int, ...]) -> bool:
    """Whether an array has a shape that fits the table of samples and classes; others than these are not read."""
    if name in SPECTRA:
        return len(shape) == 3 and shape[:2] == table
    if name in ("labels", "predicted"):
        return shape == table[:1]
    return shape == table if name in _TABLES else True


def check_event_format(content: bytes) -> str | None:
    """Why events with this plugin content cannot be read, in words; None where they can."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    version = found.get("format") if isinstance(found, dict) else None
    return None if version == EVENT_FORMAT_VERSION else _other_format(version)


def _other_format(version: object) -> str:
    return (
        f"The event has format {version!r}, and this version of lightning-hessian reads format "
        f"{EVENT_FORMAT_VERSION}. Update the package where TensorBoard runs."
    )
