"""One measurement as numpy arrays and metadata: what is saved, drawn and logged. Knows no torch."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

if TYPE_CHECKING:
    from lightning_hessian.curvature.measure import Measurement

FORMAT_VERSION = 1
FOLDER = "input_hessian"

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, repr=False)
class Record:
    """One measurement. Arrays are numpy; N samples, K classes, M eigenvalues, V eigenvectors, D inputs.

    The names shared with ``Spectrum`` mean the same there; in addition:

    Attributes:
        step: optimizer steps before the measurement (``trainer.global_step``).
        logged_step: the loggers' step, on the axis of Lightning's own curves.
        epoch: the epoch whose training made these weights, from 0 (Lightning's ``current_epoch``).
        x: the probe ``[N, *shape]``.
        labels: ``[N]``, or None.
        predicted: ``[N]``, the class of the largest output.
        classes: ``[N, K]``.
        columns: K names of the class columns, used in tags: ``class_3``, ``label``, ``predicted``.
        class_names: names of all classes, or None.
        density_nodes: ``[N, K, S, m]``, the nodes of ``Spectrum.density``, or None. S = 1: the eigenvalues themselves,
            zeros included; S ≥ 2: an estimate from S random starting vectors.
        density_weights: ``[N, K, S, m]``, their weights, which sum to 1 over m, or None.
        drift_cosine: ``[N, K]``, how much of the top eigenvector's direction is left of the measurement before; see
            ``drift.Drift``. NaN where that is not defined, as at the first measurement.
        drift_overlap: ``[N, K]``, the same of the space of top eigenvectors.
        hessian: ``[S, K, D, D]``, whole matrices of the first S samples, or None where not kept.
        diagnosis: kind of function of the input; see ``Diagnosis``.
        network: the same of the outputs themselves.
        message: the diagnosis in words.
        seconds: wall time of the measurement, without drawing and writing.
        num_hvps: HVPs per problem.
        memory: bytes by which memory rose at its peak, or None where that is not known; see ``Cost``.
        memory_exact: True if ``memory`` is that number, False if it is an upper bound.
        overhead: seconds spent measuring so far in this fit, drawing and writing included, per second of training; None
            before there was any training.
        skipped: how many measurements were skipped so far because of ``max_overhead``; None where none was given.
        made_with: versions and options.
    """

    step: int
    logged_step: int
    epoch: int
    x: Array
    labels: Array | None
    predicted: Array
    classes: Array
    columns: tuple[str, ...]
    class_names: tuple[str, ...] | None
    eigenvalues: Array
    eigenvectors: Array | None
    vector_index: Array | None
    residuals: Array
    converged: Array
    complete: bool
    gradient: Array
    gradient_norm: Array
    lambda_max: Array
    lambda_min: Array
    spectral_norm: Array
    trace: Array
    trace_error: Array
    frobenius_norm: Array
    frobenius_norm_error: Array
    head_norm: Array
    head_norm_error: Array
    network_norm: Array
    network_norm_error: Array
    head_share: Array
    head_share_error: Array
    diagonal: Array
    diagonal_error: Array
    negative_share: Array
    effective_rank: Array
    normalized_curvature: Array
    linear_radius: Array
    gradient_curvature: Array
    gradient_alignment: Array
    asymmetry: Array
    density_nodes: Array | None
    density_weights: Array | None
    drift_cosine: Array
    drift_overlap: Array
    hessian: Array | None
    target: str
    method: str
    reason: str
    engine: str
    diagnosis: str
    network: str
    message: str
    seconds: float
    num_hvps: int
    memory: int | None
    memory_exact: bool
    overhead: float | None
    skipped: int | None
    made_with: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"Record({self.target}, {self.moment}, classes {list(self.columns)}, x {self.x.shape}, {self.diagnosis})"

    @property
    def moment(self) -> str:
        """When the measurement was made, in words."""
        return "before training" if self.step == 0 else f"epoch {self.epoch}, after {self.step} optimizer steps"

    def class_name(self, sample: int, column: int) -> str:
        """The name of the class looked at in one problem, or its number."""
        k = int(self.classes[sample, column])
        return self.class_names[k] if self.class_names else str(k)


def make_record(measurement: Measurement, **context: Any) -> Record:
    """A record of ``measurement``; ``context`` gives the fields that a measurement does not know."""
    spectrum = measurement.spectrum
    told = {f.name for f in fields(Record)} - set(context)
    diagnosis, cost = spectrum.diagnosis, spectrum.cost
    values: dict[str, Any] = {
        "hessian": measurement.hessian,
        "density_nodes": spectrum.density and spectrum.density.nodes,
        "density_weights": spectrum.density and spectrum.density.weights,
        "drift_cosine": np.full(spectrum.trace.shape, np.nan),
        "drift_overlap": np.full(spectrum.trace.shape, np.nan),
        "diagnosis": diagnosis.kind,
        "network": diagnosis.network,
        "message": diagnosis.message,
        "seconds": cost.seconds,
        "num_hvps": cost.num_hvps,
        "memory": cost.memory,
        "memory_exact": cost.memory_exact,
        "overhead": None,
        "skipped": None,
    }
    values |= {name: getattr(spectrum, name) for name in told - set(values)}
    return Record(**{name: _array(value) for name, value in {**values, **context}.items()})


def _array(value: Any) -> Any:
    """A torch tensor as a numpy array, told by its methods; anything else as it is."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value


def save_record(record: Record, log_dir: str | os.PathLike[str]) -> Path:
    """Writes ``<log_dir>/input_hessian/step_<step, 9 digits>.safetensors``, whole or not at all."""
    folder = Path(log_dir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    arrays = {k: np.ascontiguousarray(v) for k, v in values.items() if isinstance(v, np.ndarray)}
    meta = {k: v for k, v in values.items() if not isinstance(v, np.ndarray)}
    payload = save(arrays, {"lightning_hessian": json.dumps({"format": FORMAT_VERSION, **meta})})
    path = folder / f"step_{record.step:09d}.safetensors"
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def load_records(log_dir: str | os.PathLike[str]) -> list[Record]:
    """The records that a run saved, in order of step.

    Args:
        log_dir: the logger's directory of the run (the one that holds ``input_hessian``).

    Raises:
        FileNotFoundError: there is no such directory, or the run saved nothing in it.
        ValueError: a file is not one of ours, or from a newer version.

    Example:
        >>> from lightning_hessian import load_records
        >>> load_records("not_there")
        Traceback (most recent call last):
        ...
        FileNotFoundError: No records in not_there/input_hessian: give the directory of one run, ...
    """
    folder = Path(log_dir) / FOLDER
    paths = sorted(folder.glob("step_*.safetensors"))
    if not paths:
        raise FileNotFoundError(
            f"No records in {folder}: give the directory of one run, the one that holds the event file, for "
            f"example lightning_logs/version_0."
        )
    return [_load(path) for path in paths]


def _load(path: Path) -> Record:
    try:
        with safe_open(path, framework="numpy") as file:
            meta = json.loads(file.metadata()["lightning_hessian"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a record of lightning-hessian, or damaged: {error}") from error
    if meta.pop("format") != FORMAT_VERSION:
        raise ValueError(f"{path} was written by another version of lightning-hessian: update the package.")
    for name in ("columns", "class_names"):
        meta[name] = None if meta[name] is None else tuple(meta[name])
    return Record(**meta, **arrays)
