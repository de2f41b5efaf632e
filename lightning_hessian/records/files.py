"""Records on disk: written whole or not at all, told apart by session, and read back."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lightning_hessian.records.event_format import FOLDER, file_name
from lightning_hessian.records.matrices import HALF, from_half, from_triangle, to_half, to_triangle
from lightning_hessian.records.record import Array, Record
from lightning_hessian.records.retention import Storage

FORMAT_VERSION = 2


@dataclass(frozen=True)
class Session:
    """One start of a run, as the files that it wrote tell it.

    Attributes:
        id: its own.
        started: seconds since 1970.
        resumed_from: optimizer steps of the checkpoint that it went on from; None: it began anew.
    """

    id: str
    started: float
    resumed_from: int | None


UNKNOWN_SESSION = Session("", 0.0, None)  # older than any


def begin_session(log_dir: str | os.PathLike[str] | None, name: str | None, step: int) -> Session:
    """A new session after ``step`` optimizer steps; what a killed one left half-written is removed."""
    if log_dir is not None:
        for leftover in record_folder(log_dir, name).glob(".step_*.safetensors.*"):
            with suppress(OSError):  # no reason to stop a training
                leftover.unlink()
    return Session(uuid.uuid4().hex[:12], time.time(), step or None)


def record_folder(log_dir: str | os.PathLike[str], name: str | None) -> Path:
    """Where the records of the monitor ``name`` lie."""
    return Path(log_dir) / FOLDER / (name or "")


def save_record(
    record: Record,
    log_dir: str | os.PathLike[str],
    session: Session | None = None,
    storage: Storage = "upper_triangle",
) -> Path:
    """Writes ``<log_dir>/input_hessian/[<name>/]step_<step, 9 digits>.safetensors``, whole or not at all.

    Outside a fit, the stage is added to the name: ``step_000000008_test.safetensors``. A fit's file of an earlier
    session with the same step is kept, as ``step_<step>.before_<session>.safetensors``. Whole matrices are stored
    as ``storage`` says, see ``KeepMatrices``: as ``hessian``, or ``hessian_triangle`` ``[S, K, D(D+1)/2]``, with
    ``hessian_scale`` ``[S, K]`` where that is in float16.
    """
    folder = record_folder(log_dir, record.name)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(record.step, record.stage)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_serialised(record, session, storage))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        if session is not None and path.exists():
            os.replace(path, path.with_suffix(f".before_{session.id}.safetensors"))
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def _serialised(record: Record, session: Session | None, storage: Storage) -> bytes:
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    arrays = {k: v for k, v in values.items() if isinstance(v, np.ndarray)}
    arrays |= {} if record.hessian is None else _stored(arrays.pop("hessian"), storage)
    arrays = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
    meta = {k: v for k, v in values.items() if not isinstance(v, np.ndarray)}
    about = {"format": FORMAT_VERSION, "session": asdict(session or UNKNOWN_SESSION)}
    return save(arrays, {"lightning_hessian": json.dumps({**about, **meta})})


def _stored(hessian: Array, storage: Storage) -> dict[str, Array]:
    if storage == "float32":
        return {"hessian": hessian.astype(np.float32)}
    triangle = to_triangle(hessian)
    if storage == "upper_triangle":
        return {"hessian_triangle": triangle}
    halved, scale = to_half(triangle)
    return {"hessian_triangle": halved, "hessian_scale": scale}


def _restored(arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a record from those of its file."""
    triangle, scale = (arrays.pop(name, None) for name in ("hessian_triangle", "hessian_scale"))
    if triangle is None:
        return arrays
    packed = triangle if scale is None else from_half(triangle, scale)
    return {**arrays, "hessian": from_triangle(packed, arrays["gradient"].shape[-1])}


def load_records(log_dir: str | os.PathLike[str], name: str | None = None) -> list[Record]:
    """The records that a run saved, in order of step.

    Where a run was resumed into the same directory, only what leads to its present end: records of an older
    session beyond the step from which a newer one went on are left out, and of equal steps the newest counts.
    Their files stay.

    Args:
        log_dir: the logger's directory of the run (the one that holds ``input_hessian``).
        name: of the monitor, where it was given one.

    Raises:
        FileNotFoundError: there is no such directory, or the monitor saved nothing in it.
        ValueError: a file is not one of ours, or from a newer version.

    Example:
        >>> from lightning_hessian import load_records
        >>> load_records("not_there")
        Traceback (most recent call last):
        ...
        FileNotFoundError: No records in not_there/input_hessian: give the directory of one run, ...
    """
    return [load_record(path) for path in record_paths(log_dir, name)]


def record_paths(log_dir: str | os.PathLike[str], name: str | None = None) -> list[Path]:
    """The files of the records that ``load_records`` gives, in their order, at least one."""
    folder = record_folder(log_dir, name)
    paths = sorted(folder.glob("step_*.safetensors"))
    if not paths:
        raise FileNotFoundError(_where_else(Path(log_dir), folder))
    written = {path: _written(path) for path in paths}
    fits = {path: (step, session) for path, (step, stage, session) in written.items() if stage == "fit"}
    alone = [path for path, (_, stage, _) in written.items() if stage != "fit"]
    return sorted([*present(fits), *alone], key=lambda path: written[path][0])


def monitors(log_dir: str | os.PathLike[str]) -> list[str | None]:
    """The names of the monitors that saved records there, None for the unnamed one; empty where there are none."""
    folder = record_folder(log_dir, None)
    unnamed = [None] if any(folder.glob("step_*.safetensors")) else []
    return [*unnamed, *sorted({path.parent.name for path in folder.glob("*/step_*.safetensors")})]


def present(written: Mapping[Path, tuple[int, Session]]) -> list[Path]:
    """The files that are not superseded, in order of step, from the step and the session of each."""
    kept: dict[int, Path] = {}
    limit: float = math.inf
    newest_first = sorted({s for _, s in written.values()}, key=lambda s: (s.started, s.id), reverse=True)
    for session in newest_first:
        for path, (step, by) in written.items():
            if by == session and step <= limit:
                kept.setdefault(step, path)
        limit = min(limit, -1 if session.resumed_from is None else session.resumed_from)
    return [kept[step] for step in sorted(kept)]


def _where_else(log_dir: Path, folder: Path) -> str:
    if names := monitors(log_dir):
        return f"No records in {folder}, but those of named monitors: give name={' or '.join(map(repr, names))}."
    return (
        f"No records in {folder}: give the directory of one run, the one that holds the event file, for example "
        f"lightning_logs/version_0."
    )


def _written(path: Path) -> tuple[int, str, Session]:
    with _opened(path) as (_, meta):
        return meta["step"], meta["stage"], Session(**meta["session"])


def precision(path: Path) -> str | None:
    """How far off the matrices in one file are, in words; None where they are as they were measured."""
    with _opened(path) as (file, _):
        return HALF if "hessian_scale" in file.keys() else None  # noqa: SIM118 - not a dict


def load_record(path: Path) -> Record:
    """The record in one file."""
    with _opened(path) as (file, meta):
        arrays: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    del meta["format"], meta["session"]
    for name in ("class_ids", "class_names"):
        meta[name] = None if meta[name] is None else tuple(meta[name])
    return Record(**meta, **_restored(arrays))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A file of ours and its metadata."""
    try:
        with safe_open(path, framework="numpy") as file:
            meta = json.loads(file.metadata()["lightning_hessian"])
            if meta["format"] != FORMAT_VERSION:
                raise ValueError(f"{path} was written by another version of lightning-hessian: update the package.")
            yield file, meta
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a record of lightning-hessian, or damaged: {error}") from error
