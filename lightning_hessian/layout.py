"""How a measurement lies in TensorBoard's event file: names, tags and the payload. Knows no torch and no TensorBoard.

One event per tag and step holds a safetensors payload: small arrays over samples N and columns K, and a JSON text of
what was measured and how. Whole matrices, eigenvectors, gradients and inputs are in the record's file beside it.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from lightning_hessian.record import Array, Record

PLUGIN_NAME = "input_hessian"
LAYOUT_VERSION = 1
META_KEY = "lightning_hessian"
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

SMALLEST_DECADE = -12  # |λ| at or below 1e-12 is drawn at 0
NUM_BINS = 64
BIN_EDGES = np.linspace(-20, 20, NUM_BINS + 1)  # of sign(λ) · max(0, log10 |λ| + 12); |λ| up to 1e8

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


def tag_of(name: str | None) -> str:
    """The tag of a monitor's measurements."""
    return f"{PLUGIN_NAME}/{name}" if name else PLUGIN_NAME


def pack_summary(record: Record) -> bytes:
    """What the event of ``record`` holds."""
    arrays = {metric: getattr(record, metric).astype(np.float32) for metric in METRICS}
    arrays |= {"classes": record.classes.astype(np.int32), "predicted": record.predicted.astype(np.int32)}
    if record.labels is not None:
        arrays["labels"] = record.labels.astype(np.int32)
    listed = _largest(record.eigenvalues)
    for field, dtype in (("eigenvalues", np.float32), ("residuals", np.float32), ("converged", np.uint8)):
        arrays[field] = np.take_along_axis(getattr(record, field), listed, axis=-1).astype(dtype)
    if record.density_nodes is not None and record.density_weights is not None:
        arrays["histogram"] = _histogram(record.density_nodes, record.density_weights, record.gradient.shape[-1])
    kept = [] if record.hessian is None else list(range(len(record.hessian)))
    meta: dict[str, Any] = {
        "layout": LAYOUT_VERSION,
        **{field: getattr(record, field) for field in TOLD},
        "num_inputs": record.gradient.shape[-1],
        "shape": list(record.x.shape[1:]),
        "dtype": str(record.gradient.dtype),
        "kept": {"matrices": kept, "vectors": record.eigenvectors is not None, "why_not": _why_not(record)},
    }
    return save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, {META_KEY: json.dumps(meta)})


def read_arrays(payload: bytes) -> tuple[dict[str, Array], dict[str, Any]]:
    """The arrays and the words of one of our own payloads; what others wrote is read by ``safe_file``."""
    length = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + length])
    return load(payload), json.loads(header["__metadata__"][META_KEY])


def _largest(eigenvalues: Array) -> Array:
    """Places of the eigenvalues of largest magnitude, in their own (descending) order."""
    places = np.argsort(-np.abs(eigenvalues), axis=-1, kind="stable")[..., :MAX_EIGENVALUES]
    return np.sort(places, axis=-1)


def _histogram(nodes: Array, weights: Array, num_inputs: int) -> Array:
    """Expected number of eigenvalues per bin of the signed logarithmic axis, ``[N, K, 64]``."""
    with np.errstate(divide="ignore"):
        decades = np.maximum(np.log10(np.abs(nodes)) - SMALLEST_DECADE, 0)
    places = np.clip(np.sign(nodes) * decades, BIN_EDGES[0], BIN_EDGES[-1])
    shares = weights * (num_inputs / nodes.shape[2])
    counts = [
        np.histogram(p, BIN_EDGES, weights=w)[0]
        for p, w in zip(places.reshape(-1, places[0, 0].size), shares.reshape(-1, places[0, 0].size), strict=True)
    ]
    return np.reshape(counts, (*nodes.shape[:2], NUM_BINS)).astype(np.float32)


def _why_not(record: Record) -> str:
    if record.hessian is None:
        return "No whole matrix was kept: heatmap_samples=0, or keep_matrices=False."
    return f"Whole matrices were kept of the first {len(record.hessian)} samples only (heatmap_samples)."
