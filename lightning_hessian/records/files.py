"""Records on disk: written whole or not at all, set aside where a run starts over, and read back."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from lightning_hessian.records.event_format import FOLDER, file_name
from lightning_hessian.records.locations import (
    Location,
    LogDir,
    absolute,
    arrays_at,
    in_memory,
    is_in_memory,
    location,
    write_whole,
)
from lightning_hessian.records.matrices import from_triangle, to_triangle
from lightning_hessian.records.payload import DamagedDataError, pack
from lightning_hessian.records.record import Record

FORMAT_VERSION = 2
FILE_NAME = re.compile(r"step_(\d+)(_[a-z]+)?\.safetensors")  # as file_name makes them: step, stage outside a fit
POINTER = "location.txt"  # in the folder of a monitor whose records are beside another logger's files


def record_folder(log_dir: LogDir, name: str | None) -> Any:
    """Where the records of the monitor ``name`` are: a ``Location``."""
    return location(log_dir) / FOLDER / (name or "")


def record_path(record: Record, log_dir: LogDir) -> Any:
    """Where ``save_record`` writes: a ``Location``."""
    return record_folder(log_dir, record.name) / file_name(record.step, record.stage)


def save_record(record: Record, log_dir: LogDir) -> Any:
    """Writes ``<log_dir>/input_hessian/[<name>/]step_<step, 9 digits>.safetensors``, whole or not at all.

    Outside a fit, the stage is added to the name: ``step_000000008_test.safetensors``. The file holds each array under
    its name, whole matrices as their upper triangles, ``hessian_triangle`` ``[S, K, D(D+1)/2]``, and everything else
    as JSON.
    """
    path = record_path(record, log_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(_serialized(record), path)
    return path


def point_to(folder: LogDir, log_dir: LogDir, name: str | None, step: int | None) -> None:
    """Lets ``load_records(log_dir)`` find the records that a run saves in another ``folder``.

    Args:
        folder: that holds ``input_hessian``.
        log_dir: of the run.
        name: of the monitor, or None.
        step: optimizer steps already made, as for ``set_superseded_aside``; None: earlier records stay.
    """
    if step is not None:
        set_superseded_aside(log_dir, name, step)
    place, there = record_folder(log_dir, name), absolute(location(folder))
    place.mkdir(parents=True, exist_ok=True)
    if isinstance(place, Path) and isinstance(there, Path):
        with suppress(ValueError):  # of two drives of Windows
            there = Path(os.path.relpath(there, os.path.abspath(place)))  # they may be moved together
    write_whole(str(there).encode(), place / POINTER)


def set_superseded_aside(log_dir: LogDir, name: str | None, step: int) -> str | None:
    """Clears the way for a fit that continues after ``step`` optimizer steps, in the directory of an earlier one.

    Records of the fit at later steps, or all of them where ``step`` is 0, move to a new folder
    ``superseded_<UTC time>`` beside them; in memory, they are removed. Temporary files of an interrupted write and an
    earlier ``point_to`` are removed, too. Only one run at a time may write to a directory.

    Args:
        log_dir: the logger's directory of the run.
        name: of the monitor, or None.
        step: optimizer steps already made.

    Returns:
        None, or a warning where the file system does not allow it.
    """
    folder = record_folder(log_dir, name)
    try:
        for leftover in (*folder.glob(".step_*.safetensors.*"), *folder.glob(POINTER)):
            with suppress(OSError):
                leftover.unlink()
        found = _listed(folder)
        later = [path for (at, stage), path in found if not stage and (at > step or step == 0)]
        if is_in_memory(folder):
            for path in later if step else [path for _, path in found]:
                path.unlink()
        elif later:
            aside = folder / datetime.now(timezone.utc).strftime("superseded_%Y-%m-%dT%H.%M.%S.%fZ")
            aside.mkdir()
            for path in later:
                path.replace(aside / path.name)
    except Exception as error:  # of a disk, or of any file system that fsspec knows
        return (
            f"records of an earlier run in {folder} could not be moved aside ({error}): load_records and the Input "
            f"Hessian tab will show them among those of this run."
        )
    return None


def load_records(log_dir: LogDir, name: str | None = None) -> list[Record]:
    """The records that a run saved, in order of step.

    Args:
        log_dir: ``trainer.log_dir``, or the directory of a run (the one that holds ``input_hessian``), local or on any
            file system that fsspec knows (``s3://…``). Runs without a logger and without a ``default_root_dir`` leave
            no files; their records are kept in memory until the process ends, and are found in the same way.
        name: of the monitor, if it was given one.

    Raises:
        FileNotFoundError: there is no such directory, or the monitor saved nothing in it.
        ValueError: a file is damaged, or was not written by this version of lightning-hessian.

    Example:
        >>> from lightning_hessian import load_records
        >>> load_records("not_there")
        Traceback (most recent call last):
        ...
        FileNotFoundError: No records in not_there/input_hessian: give the directory of one run, ...
    """
    return [load_record(path) for path in record_paths(log_dir, name)]


def record_paths(log_dir: LogDir, name: str | None = None) -> list[Any]:
    """The files of the records that ``load_records`` returns, in their order, at least one: ``Location``s."""
    folder = record_folder(log_dir, name)
    for place in (record_folder(str(in_memory(log_dir)), name), folder):
        for each in (place, *_pointed(place, name)):
            if paths := [path for _, path in _listed(each)]:
                return paths
    raise FileNotFoundError(_where_else(log_dir, folder))


def monitors(log_dir: LogDir) -> list[str | None]:
    """The names of the monitors that saved records there, None for the unnamed one; empty where there are none."""
    folder = record_folder(log_dir, None)
    unnamed = [None] if any(folder.glob("step_*.safetensors")) else []
    others = {path.parent.name for path in folder.glob("*/step_*.safetensors")}
    return [*unnamed, *sorted(name for name in others if "." not in name)]  # superseded_… has dots, no monitor has


def load_record(path: Location, *, matrices: bool = True) -> Record:
    """The record in one file, or all of it but its whole matrices."""
    try:
        with arrays_at(path) as file:
            meta = file.meta
            arrays: dict[str, Any] = {name: file.read(name) for name in file if matrices or name != "hessian_triangle"}
        if (written := meta.pop("format")) != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format {written!r}, and this version of lightning-hessian reads format {FORMAT_VERSION}. "
                f"Read it with the version that wrote it, or measure checkpoints of that run with lightning-hessian "
                f"measure."
            )
        for name in ("class_ids", "class_names"):
            meta[name] = None if meta[name] is None else tuple(meta[name])
        if "hessian_triangle" in arrays:
            arrays["hessian"] = from_triangle(arrays.pop("hessian_triangle"), arrays["gradient"].shape[-1])
        elif not matrices:
            meta["hessian"] = None
        entries = arrays["lambda_max"].shape
        arrays.setdefault("finite_difference_error", np.full(entries, np.nan))  # absent from older files
        arrays.setdefault("valid", np.ones(entries, bool))
        known = {field.name for field in fields(Record)}
        metrics = {name: arrays.pop(name) for name in set(arrays) - known}
        return Record(**meta, **arrays, metrics=metrics)
    except (DamagedDataError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a record of lightning-hessian, or damaged: {error}") from error


def _pointed(place: Any, name: str | None) -> list[Any]:
    """The folder to which ``point_to`` points from a folder of records, if it does."""
    targets = [path.read_bytes().decode() for path in place.glob(POINTER)]
    return [record_folder(target if "://" in target else os.path.join(place, target), name) for target in targets]


def _listed(folder: Any) -> list[tuple[tuple[int, str], Any]]:
    """Step, stage and path of each record in a folder, in order of step; the stage of a fit is empty."""
    named = [(FILE_NAME.fullmatch(path.name), path) for path in folder.glob("step_*.safetensors")]
    return sorted(((int(match[1]), match[2] or ""), path) for match, path in named if match)


def _serialized(record: Record) -> bytes:
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    arrays = {**values.pop("metrics"), **{k: v for k, v in values.items() if isinstance(v, np.ndarray)}}
    if record.hessian is not None:
        arrays["hessian_triangle"] = to_triangle(arrays.pop("hessian"))
    meta = {k: v for k, v in values.items() if not isinstance(v, np.ndarray)}
    return pack(arrays, {"format": FORMAT_VERSION, **meta})


def _where_else(log_dir: LogDir, folder: Location) -> str:
    if names := monitors(log_dir):
        return f"No records in {folder}, but those of named monitors: give name={' or '.join(map(repr, names))}."
    return (
        f"No records in {folder}: give the directory of one run, the one that holds the event file, for example "
        f"lightning_logs/version_0."
    )
