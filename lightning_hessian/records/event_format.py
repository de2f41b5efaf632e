"""What the "Input Hessian" tab reads from an event file: names, arrays and how they are packed. Numpy only.

One event for each tag and step: a string tensor of shape ``[]`` that holds a safetensors payload. The arrays are those
of ``METRICS`` and the ones that ``pack_summary`` names; its metadata is JSON. What is large (matrices, vectors,
inputs) is in the record's file beside the event file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_hessian.records.histogram import histogram_accuracy, histogram_counts
from lightning_hessian.records.metrics import METRICS

if TYPE_CHECKING:
    from lightning_hessian.records.record import Record, Stage

Array = np.ndarray[Any, np.dtype[Any]]

PLUGIN_NAME = "input_hessian"
LAYOUT_VERSION = 1
CONTENT = b'{"layout": 1}'  # of the metadata of a tag: only the first one counts, so it is the same for all
META = "lightning_hessian"  # under which the JSON lies in the metadata of a safetensors payload or file
FOLDER = "input_hessian"  # of the records, beside the event file
MAX_EIGENVALUES = 64  # per problem
MAX_HEADER = 2**24  # bytes

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def tag(name: str | None, stage: Stage = "fit") -> str:
    """The tag of a monitor's events: ``input_hessian`` or ``input_hessian/NAME``.

    Outside a fit, ``input_hessian_test`` and the like: other samples, at a step that the fit has used already.
    """
    plugin = PLUGIN_NAME if stage == "fit" else f"{PLUGIN_NAME}_{stage}"
    return plugin if name is None else f"{plugin}/{name}"


def file_name(step: int, stage: Stage = "fit") -> str:
    """The name of a record's file in ``input_hessian/[NAME/]``, by optimizer steps."""
    return f"step_{step:09d}{'' if stage == 'fit' else f'_{stage}'}.safetensors"


def pack_summary(record: Record, in_file: Record | None = None) -> bytes:
    """The payload of a record's event: all numbers but those that grow with D, as safetensors.

    Arrays are float32 where nothing else is said: every one of ``METRICS`` ``[N, K]``; ``eigenvalues`` and
    ``residuals`` ``[N, K, M']`` with ``converged`` (uint8), M' ≤ 64 both ends and those of largest magnitude,
    descending and algebraic; ``histogram`` ``[N, K, 64]``, see ``histogram.histogram_counts``, absent where only
    ends are known (``histogram`` of the metadata says whether its counts are exact or estimated);
    ``labels`` ``[N]``, absent where unknown, ``predicted`` ``[N]`` and ``classes`` ``[N, K]`` (int32).

    Args:
        record: the measurement.
        in_file: the record as its file holds it, where that is less.

    Cost: no more than 4·N·K·(19 + 2·64 + 64) + N·K·64 bytes, and a few kB.
    """
    arrays = {m.name: record.metrics[m.name].astype(np.float32) for m in METRICS}
    arrays |= _largest_eigenvalues(record)
    histogram = histogram_counts(record)
    numbers = {"labels": record.labels, "predicted": record.predicted, "classes": record.classes}
    arrays |= {name: values.astype(np.int32) for name, values in numbers.items() if values is not None}
    if histogram is not None:
        arrays["histogram"] = histogram.astype(np.float32)
    return pack(arrays, _about(record, in_file or record))


def _largest_eigenvalues(record: Record) -> dict[str, Array]:
    weight = np.abs(record.eigenvalues)
    weight[..., :1] = weight[..., -1:] = np.inf  # both ends: the residuals of the extremes are read from them
    largest = np.argsort(-weight, axis=-1, kind="stable")[..., :MAX_EIGENVALUES]
    order = np.sort(largest, axis=-1)  # as the record lists them: descending
    kinds = {"eigenvalues": np.float32, "residuals": np.float32, "converged": np.uint8}
    return {n: np.take_along_axis(getattr(record, n), order, axis=-1).astype(kind) for n, kind in kinds.items()}


def _about(record: Record, in_file: Record) -> dict[str, Any]:
    when = ("step", "logged_step", "epoch", "stage", "when", "measured_at")
    what = ("name", "target", "class_ids", "class_names", "diagnosis", "network", "message")
    how = ("method", "reason", "autodiff_mode", "seconds", "num_matvecs", "complete")
    num_kept = 0 if in_file.hessian is None else len(in_file.hessian)
    return {
        "layout": LAYOUT_VERSION,
        **{name: getattr(record, name) for name in (*when, *what, *how)},
        "num_inputs": record.gradient.shape[-1],
        "shape": record.x.shape[1:],
        "dtype": str(record.x.dtype),
        "histogram": histogram_accuracy(record),
        "kept": {
            "matrices": list(range(num_kept)),
            "vectors": in_file.eigenvectors is not None,
            "why_not": in_file.why_no_matrix,
        },
    }


def pack(arrays: Mapping[str, Array], about: Mapping[str, Any]) -> bytes:
    """Arrays and JSON metadata as one safetensors payload; every array begins at a multiple of its item's size."""
    ordered = sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {META: json.dumps(about)}}
    blocks, end = [], 0
    for name, values in ordered:
        little = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).reshape(values.shape)
        begin, end = end, end + little.nbytes
        header[name] = {"dtype": _CODES[little.dtype], "shape": list(values.shape), "data_offsets": [begin, end]}
        blocks.append(little.tobytes())
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + b"".join(blocks)


def extreme_errors(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """How far the extreme eigenvalues in a payload may be off, ``[N, K]`` each.

    ``lambda_max_error`` and ``lambda_min_error`` are the residuals of the listed eigenvalues that they are (0 where it
    is a zero that a complete spectrum does not list), ``lambda_max_open`` and ``lambda_min_open`` say which have not
    converged.
    """
    told = {}
    for name, place in (("lambda_max", slice(0, 1)), ("lambda_min", slice(-1, None))):
        is_listed = arrays["eigenvalues"][..., place] == arrays[name][..., None]
        residual = np.where(is_listed, arrays["residuals"][..., place], 0)
        is_open = is_listed & (arrays["converged"][..., place] == 0)
        told[f"{name}_error"] = residual.max(axis=-1, initial=0).astype(np.float32)
        told[f"{name}_open"] = is_open.any(axis=-1).astype(np.uint8)
    return told


def read_arrays(payload: bytes) -> tuple[dict[str, Array], dict[str, Any]]:
    """The arrays of a payload, read-only views into it, and its JSON metadata.

    Raises:
        ValueError: it is no such payload, damaged, or of another version.
    """
    if len(payload) < 8:
        raise ValueError("The payload is shorter than its header's length: it is damaged.")
    size = int.from_bytes(payload[:8], "little")
    if size > min(MAX_HEADER, len(payload) - 8):
        raise ValueError(f"The payload of {len(payload)} bytes claims a header of {size}: it is damaged.")
    try:
        header = json.loads(payload[8 : 8 + size])
        about = json.loads(header.pop("__metadata__")[META])
        data = memoryview(payload)[8 + size :]
        arrays = {name: _view(data, name, entry) for name, entry in header.items()}
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"The payload is not one of lightning-hessian, or damaged: {error!r}") from error
    if about.get("layout") != LAYOUT_VERSION:
        raise ValueError(
            f"The payload has the layout {about.get('layout')!r}, and this version reads {LAYOUT_VERSION}: update "
            f"lightning-hessian where TensorBoard runs."
        )
    return arrays, about


def _view(data: memoryview, name: str, entry: Mapping[str, Any]) -> Array:
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    if not whole or end > len(data) or math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"The array {name!r} does not lie where the payload says: it is damaged.")
    return np.frombuffer(data[begin:end], dtype).reshape(shape)
