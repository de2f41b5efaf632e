"""From the records of runs to the blocks of data that a standalone page holds. Knows no torch and no page.

A block is a gzipped safetensors payload in base64, named by its content, so that what is the same twice (the samples of
a run) is there once. No number is rounded: arrays of record files are narrowed only where nothing that a page shows
changes, and what does not fit below the page's size is left out and told.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from lightning_hessian.records import event_format
from lightning_hessian.records.files import load_record, monitors, precision, record_paths
from lightning_hessian.records.matrices import spans, to_triangle
from lightning_hessian.records.record import Array, Record, Stage

Summary = tuple[dict[str, Array], dict[str, Any]]

SPECTRA = ("eigenvalues", "residuals", "converged", "histogram")
SHARE = 0.5  # of the page for spectra, of the rest for maps, of what is left for matrices
SHOWN = 1e-6  # relative: far below the last digit of any number that a page shows


@dataclass
class Tag:
    """One monitor's measurements in one run and stage: small arrays of all, and where the blocks with the rest are.

    Attributes:
        run: name of the run on the page.
        name: in the event file, of the monitor and the stage.
        paths: the record files, in order of step.
        summaries: arrays and words of the event file's layout, one per measurement.
        blocks: names of blocks: ``series``; by place of the measurement ``spectra``, ``x`` and ``maps``;
            ``matrices`` by place, sample and column.
        notes: sentences on what was left out.
    """

    run: str
    name: str
    paths: list[Path]
    summaries: list[Summary]
    blocks: dict[str, Any] = field(
        default_factory=lambda: {"series": None, "spectra": [], "x": {}, "maps": {}, "matrices": {}}
    )
    notes: list[str] = field(default_factory=list)


class Store:
    """Blocks by name, together no more than ``room`` characters, except those that a page cannot do without."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.size = 0
        self.blocks: dict[str, str] = {}

    def add(self, arrays: dict[str, Array], meta: Any = None, *, room: float | None = None) -> str | None:
        """The name of a block with ``arrays``, or None where all would be more than ``room`` (None: it must fit)."""
        name, block = _block(arrays, meta)
        if name not in self.blocks:
            if room is not None and self.size + len(block) > room:
                return None
            self.blocks[name] = block
            self.size += len(block)
        return name


def _block(arrays: dict[str, Array], meta: Any = None) -> tuple[str, str]:
    payload = save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, {event_format.META: json.dumps(meta or {})})
    name = hashlib.sha256(payload).hexdigest()[:16]
    return name, base64.b64encode(gzip.compress(payload, compresslevel=6, mtime=0)).decode()


def find_runs(log_dirs: Sequence[str | os.PathLike[str]]) -> dict[str, Path]:
    """The runs in and below ``log_dirs``, by name: the path from the nearest directory that holds them all.

    Raises:
        FileNotFoundError: a directory does not exist, or holds no records.
    """
    found: list[Path] = []
    for given in log_dirs:
        top = Path(given).resolve()
        if not top.is_dir():
            raise FileNotFoundError(f"There is no directory {given}: give the directory of a run, or one above it.")
        runs = sorted(folder.parent for folder in top.rglob(event_format.FOLDER) if monitors(folder.parent))
        if not runs:
            raise FileNotFoundError(
                f"No records in {given} or below it: give the directory that holds a run's event file, for example "
                f"lightning_logs/version_0. An InputHessianMonitor saves them there, in {event_format.FOLDER}/."
            )
        found += runs
    runs = list(dict.fromkeys(found))
    above = Path(os.path.commonpath([run.parent for run in runs]))
    return {str(run.relative_to(above)): run for run in runs}


def gather(runs: dict[str, Path], max_bytes: int) -> tuple[list[Tag], Store]:
    """What of ``runs`` fits into ``max_bytes``.

    Derived quantities and spectra of every measurement, or of those that fit into half of it; then maps of input space
    and matrices. The last measurement comes first (and is there in any case), then the first, then those in between.

    Cost: every file is read up to four times; one record is held at a time.
    """
    store = Store(max_bytes)
    found = [_summarised(run, folder, name) for run, folder in runs.items() for name in monitors(folder)]
    tags = [tag for several in found for tag in several]
    reserved = sum(len(_block(*_series(tag))[1]) for tag in tags)  # added at the end, when it is known of which steps
    store.size += reserved
    _add_spectra(tags, store)
    half = store.size + SHARE * (store.room - store.size)
    _add_maps(tags, store, half)
    _add_matrices(tags, store)
    _add_maps(tags, store, store.room)
    store.size -= reserved
    for tag in tags:
        tag.notes += _left_out(tag)
        tag.blocks["series"] = store.add(*_series(tag))
    return tags, store


def spread_out(count: int) -> list[int]:
    """Places 0 to ``count`` - 1: the last, the first, then those in between, coarse before fine.

    Example:
        >>> spread_out(6)
        [5, 0, 4, 2, 1, 3]
    """
    order = dict.fromkeys([count - 1, 0])
    stride = 1 << count.bit_length()
    while stride := stride // 2:
        order |= dict.fromkeys(range(0, count, stride))
    return list(order)


def narrow(values: Array) -> Array:
    """``values`` in the narrowest of half, single and double precision that changes no number shown.

    Half precision only where it is exact, single where every number keeps six digits.
    """
    if values.dtype.kind != "f":
        return values
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
        if np.array_equal(half, values, equal_nan=True):
            return half
        single = values.astype(np.float32)
    close = np.isclose(single, values, rtol=SHOWN, atol=0, equal_nan=True)
    return single if close.all() else values.astype(np.float64)


def _summarised(run: str, folder: Path, monitor: str | None) -> list[Tag]:
    """A monitor's measurements by stage, those that can be shown side by side with the stage's last one."""
    by_stage: dict[Stage, dict[int, tuple[Path, Summary]]] = {}
    hidden: Counter[Stage] = Counter()
    for path in record_paths(folder, monitor):
        record = load_record(path)
        arrays, meta = event_format.read_arrays(event_format.pack_summary(record))
        summary = arrays, {**meta, "precision": precision(path)}
        by_step = by_stage.setdefault(record.stage, {})
        hidden[record.stage] += record.logged_step in by_step
        by_step[record.logged_step] = path, summary  # of two at a step the later one
    tags = []
    for stage, by_step in by_stage.items():
        measured = [by_step[step] for step in sorted(by_step)]
        alike = [each for each in measured if _kind(each[1]) == _kind(measured[-1][1])]
        paths, summaries = zip(*alike, strict=True)
        tags.append(Tag(run, event_format.tag(monitor, stage), list(paths), list(summaries)))
        if count := hidden[stage]:
            were = "1 measurement was" if count == 1 else f"{count} measurements were"
            tags[-1].notes.append(f"{were} followed by a later one at the same logged step, and left out.")
        if missing := len(measured) - len(alike):
            were = "1 measurement was" if missing == 1 else f"{missing} measurements were"
            tags[-1].notes.append(f"{were} of other samples, classes or targets than the last, and left out.")
    return tags


def _kind(summary: Summary) -> tuple[Any, ...]:
    arrays, meta = summary
    return meta["target"], meta["class_ids"], meta["shape"], arrays["classes"].shape


def _series(tag: Tag) -> tuple[dict[str, Array], Any]:
    """Small arrays of all measurements, one behind the other, and their words."""
    metas = [meta for _, meta in tag.summaries]
    names = [
        *event_format.METRICS,
        "classes",
        "predicted",
        *(["labels"] if all("labels" in arrays for arrays, _ in tag.summaries) else []),
    ]
    stacked = {name: np.stack([arrays[name] for arrays, _ in tag.summaries]) for name in names}
    ends = [event_format.extreme_errors(arrays) for arrays, _ in tag.summaries]
    stacked |= {name: np.stack([end[name] for end in ends]) for name in ends[0]}
    told = {
        "steps": np.array([meta["logged_step"] for meta in metas]),
        "epochs": np.array([meta["epoch"] for meta in metas]),
        "seconds": np.array([meta["seconds"] for meta in metas]),
        "num_matvecs": np.array([meta["num_matvecs"] for meta in metas]),
    }
    return stacked | told, {"summaries": metas}


def _by_importance(tags: Sequence[Tag]) -> Iterator[tuple[Tag, int]]:
    """Every measurement of every run, the runs in turn."""
    orders = [spread_out(len(tag.paths)) for tag in tags]
    for rank in range(max(map(len, orders))):
        for tag, order in zip(tags, orders, strict=True):
            if rank < len(order):
                yield tag, order[rank]


def _add_spectra(tags: Sequence[Tag], store: Store) -> None:
    """Spectra, in whose place goes a measurement that does not fit: no number is shown without its residual."""
    names: dict[tuple[int, int], str] = {}
    for tag, place in _by_importance(tags):
        arrays = {name: narrow(a) for name, a in tag.summaries[place][0].items() if name in SPECTRA}
        is_last = place == len(tag.paths) - 1
        if name := store.add(arrays, room=None if is_last else SHARE * store.room):
            names[id(tag), place] = name
    for tag in tags:
        here = [place for place in range(len(tag.paths)) if (id(tag), place) in names]
        if len(here) < len(tag.paths):
            tag.notes.append(f"{len(here)} of {len(tag.paths)} measurements are on this page.")
        tag.paths = [tag.paths[place] for place in here]
        tag.summaries = [tag.summaries[place] for place in here]
        tag.blocks["spectra"] = [names[id(tag), place] for place in here]


def _add_maps(tags: Sequence[Tag], store: Store, room: float) -> None:
    """Inputs, gradients, diagonals and eigenvectors; of a run with one that does not fit, no more are tried."""
    full: set[int] = set()
    for tag, place in _by_importance(tags):
        if id(tag) in full or place in tag.blocks["maps"]:
            continue
        record = load_record(tag.paths[place])
        x = store.add({"x": narrow(record.x)}, room=room)
        maps = None if x is None else store.add(maps_of(record), room=room)
        if x is None or maps is None:
            full.add(id(tag))
            continue
        tag.blocks["x"][place], tag.blocks["maps"][place] = x, maps


def _add_matrices(tags: Sequence[Tag], store: Store) -> None:
    """Whole matrices that were kept; those that eigenvectors make up need none."""
    for tag, place in _by_importance(tags):
        if not tag.summaries[place][1]["kept"]["matrices"] or store.size >= store.room:
            continue
        record = load_record(tag.paths[place])
        assert record.hessian is not None
        for sample, column in np.ndindex(*record.hessian.shape[:2]):
            if name := store.add(packed_matrix(record.hessian[sample, column]), room=store.room):
                tag.blocks["matrices"].setdefault(place, {})[f"{sample},{column}"] = name


def maps_of(record: Record) -> dict[str, Array]:
    """What is shown in the shape of the input, of all problems of a record.

    ``whole`` is 1 where the eigenvectors with their eigenvalues make up the matrix.
    """
    maps = {name: narrow(getattr(record, name)) for name in ("gradient", "diagonal", "diagonal_error")}
    if record.eigenvectors is None or record.vector_index is None:
        return maps
    places = record.vector_index
    for name in ("eigenvalues", "residuals", "converged"):
        values = np.take_along_axis(getattr(record, name), places, axis=-1)
        maps[f"vector_{name}"] = values.astype(np.uint8) if name == "converged" else narrow(values)
    whole = np.zeros(record.classes.shape, np.uint8)
    for problem in np.ndindex(whole.shape):
        spanned = spans(record.eigenvalues[problem], places[problem], record.gradient.shape[-1])
        whole[problem] = record.complete and spanned
    return {**maps, "eigenvectors": narrow(record.eigenvectors), "whole": whole}


def packed_matrix(matrix: Array) -> dict[str, Array]:
    """A symmetric matrix as its upper triangle, row by row; any other as it is."""
    if np.array_equal(matrix, matrix.T):
        return {"triangle": narrow(to_triangle(matrix))}
    return {"matrix": narrow(matrix)}


def _left_out(tag: Tag) -> list[str]:
    """What of a run is not on the page, in words."""
    count = len(tag.paths)
    kept = {
        place: len(meta["kept"]["matrices"]) * len(meta["class_ids"]) for place, (_, meta) in enumerate(tag.summaries)
    }
    here = {
        "maps of input space": (len(tag.blocks["maps"]), count, "measurements"),
        "matrices": (sum(map(len, tag.blocks["matrices"].values())), sum(kept.values()), "that were kept"),
    }
    return [
        f"{what[0].upper()}{what[1:]}: {some} of {all_} {which} are on this page."
        for what, (some, all_, which) in here.items()
        if some < all_
    ]
