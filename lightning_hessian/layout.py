"""How a measurement lies in TensorBoard's event file: names, tags and the payload. Knows no torch and no TensorBoard.

One event per tag and step holds a safetensors payload: small arrays over samples N and columns K, and a JSON text of
what was measured and how. Whole matrices, eigenvectors, gradients and inputs are in the record's file beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from lightning_hessian.histogram import problem_histograms
from lightning_hessian.record import Array, Record, Stage

PLUGIN_NAME = "input_hessian"
LAYOUT_VERSION = 1
META = "lightning_hessian"  # under which the JSON lies in the metadata of a safetensors payload or file
FOLDER = "input_hessian"  # of the records, beside the event file
MAX_EIGENVALUES = 64  # of largest magnitude, per problem

METRICS = {
    "lambda_max": "largest λ",
    "lambda_min": "smallest λ",
    "spectral_norm": "largest |λ|",
    "trace": "trace",
    "trace_error": "standard error of the trace",
    "frobenius_norm": "Frobenius norm",
    "frobenius_norm_error": "standard error of the Frobenius norm",
    "gradient_norm": "gradient norm",
    "normalized_curvature": "normalized curvature",
    "linear_radius": "linear radius",
    "head_share": "head share",
    "head_share_error": "standard error of the head share",
    "negative_share": "negative share",
    "effective_rank": "effective rank",
    "gradient_curvature": "curvature along the gradient",
    "gradient_alignment": "alignment of the gradient",
    "drift_cosine": "drift: |cos|",
    "drift_overlap": "drift: overlap",
    "asymmetry": "asymmetry",
}

TOLD = (
    *(
        "name",
        "step",
        "logged_step",
        "epoch",
        "stage",
        "moment",
        "target",
        "columns",
        "class_names",
        "diagnosis",
        "network",
        "message",
    ),
    *("method", "reason", "engine", "seconds", "num_hvps", "complete"),
)


def tag(name: str | None, stage: Stage = "fit") -> str:
    """The tag of a monitor's events: ``input_hessian[/NAME]``; outside a fit, ``input_hessian_test[/NAME]``."""
    plugin = PLUGIN_NAME if stage == "fit" else f"{PLUGIN_NAME}_{stage}"
    return plugin if name is None else f"{plugin}/{name}"


def file_name(step: int, stage: Stage = "fit") -> str:
    """The name of a record's file in ``input_hessian/[NAME/]``, by optimizer steps."""
    return f"step_{step:09d}{'' if stage == 'fit' else f'_{stage}'}.safetensors"


def pack_summary(record: Record) -> bytes:
    """What the event of ``record`` holds."""
    arrays = {metric: getattr(record, metric).astype(np.float32) for metric in METRICS}
    arrays |= {"classes": record.classes.astype(np.int32), "predicted": record.predicted.astype(np.int32)}
    if record.labels is not None:
        arrays["labels"] = record.labels.astype(np.int32)
    listed = _largest(record.eigenvalues)
    for field, dtype in (("eigenvalues", np.float32), ("residuals", np.float32), ("converged", np.uint8)):
        arrays[field] = np.take_along_axis(getattr(record, field), listed, axis=-1).astype(dtype)
    histogram = problem_histograms(record)
    if histogram is not None:
        arrays["histogram"] = histogram.astype(np.float32)
    kept = [] if record.hessian is None else list(range(len(record.hessian)))
    meta: dict[str, Any] = {
        "layout": LAYOUT_VERSION,
        **{field: getattr(record, field) for field in TOLD},
        "num_inputs": record.gradient.shape[-1],
        "shape": list(record.x.shape[1:]),
        "dtype": str(record.gradient.dtype),
        "kept": {"matrices": kept, "vectors": record.eigenvectors is not None, "why_not": _why_not(record)},
    }
    return save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, {META: json.dumps(meta)})


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
    """The arrays and the words of one of our own payloads; what others wrote is read by ``safe_file``."""
    length = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + length])
    return load(payload), json.loads(header["__metadata__"][META])


def _largest(eigenvalues: Array) -> Array:
    """Places of the eigenvalues of largest magnitude, in their own (descending) order."""
    places = np.argsort(-np.abs(eigenvalues), axis=-1, kind="stable")[..., :MAX_EIGENVALUES]
    return np.sort(places, axis=-1)


def _why_not(record: Record) -> str:
    if record.hessian is None:
        return "No whole matrix was kept: heatmap_samples=0, or keep_matrices=False."
    return f"Whole matrices were kept of the first {len(record.hessian)} samples only (heatmap_samples)."
