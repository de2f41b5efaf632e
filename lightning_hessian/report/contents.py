"""From the records of runs to the blocks of data that a standalone page holds. Knows no torch and no page.

A block is one answer that the tab would get from TensorBoard, as gzipped safetensors in base64, and is named by its
content, so that equal ones (the samples of a run) are stored once. Numbers are narrowed to float32 only where nothing
that a page shows changes. What does not fit into the size of the page is left out, and the page says so.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from lightning_hessian.records.answers import history, matrix, sample
from lightning_hessian.records.answers.history import Answer, History, count
from lightning_hessian.records.event_format import FOLDER, Summary, pack_summary, read_summary, tag
from lightning_hessian.records.files import load_record, monitors, record_paths
from lightning_hessian.records.matrices import Array
from lightning_hessian.records.payload import ArrayFile, open_arrays, pack
from lightning_hessian.records.record import Stage

Contents = dict[str, Callable[[], Answer]]
"""Answers of one file about one sample and class, by kind."""

SHARE = 0.5  # of the page for spectra, of the rest for maps, of what remains for matrices
AROUND = 120  # characters of a page around a block: its element, and the line of the catalog that names it
VISIBLE = 1e-6  # relative: far below the last digit of any number that a page shows


@dataclass(eq=False)  # one is equal to itself only
class Tag:
    """One monitor's measurements in one run and stage.

    Attributes:
        run: name of the run on the page.
        name: in the event file, of the monitor and the stage.
        paths: the record files, by logged step.
        measured: the measurements on the page.
        blocks: names of blocks by what they answer: ``series``, ``spectra/SAMPLE/CLASS``, ``input/STEP/SAMPLE``, and
            ``maps``, ``matrix`` and ``whole``, each ``/STEP/SAMPLE/CLASS``.
        notes: sentences on what was left out.
    """

    run: str
    name: str
    paths: dict[int, Path]
    measured: History
    blocks: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def samples_and_classes(self) -> Iterator[tuple[int, int, str]]:
        """The index of every sample and of every class, and the end of their keys."""
        last = self.measured.summaries[-1]
        for n, k in np.ndindex(*last.shape):
            yield n, k, f"{n}/{last.class_ids[k]}"


class Store:
    """Blocks by name, together at most ``max_size`` characters, except those that a page cannot do without."""

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.size = 0
        self.blocks: dict[str, str] = {}

    def add(self, answer: Answer, *, max_size: float | None = None) -> str | None:
        """The name of a block with ``answer``, or None where all would exceed ``max_size`` (None: it must fit)."""
        name, block = make_block(answer)
        if name not in self.blocks:
            size = len(block) + AROUND
            if max_size is not None and self.size + size > max_size:
                return None
            self.blocks[name] = block
            self.size += size
        return name


def make_block(answer: Answer) -> tuple[str, str]:
    """An answer as a block, after its name."""
    arrays, meta = answer
    payload = pack({name: narrow(array) for name, array in arrays.items()}, meta)
    name = hashlib.sha256(payload).hexdigest()[:16]
    return name, base64.b64encode(gzip.compress(payload, compresslevel=6, mtime=0)).decode()


def find_runs(log_dirs: Sequence[str | os.PathLike[str]]) -> dict[str, Path]:
    """The runs in and below ``log_dirs``, by name: the path from the nearest directory that contains them all.

    Raises:
        FileNotFoundError: a directory does not exist, or holds no records.
    """
    found: list[Path] = []
    for given in log_dirs:
        top = Path(given).resolve()
        if not top.is_dir():
            raise FileNotFoundError(f"There is no directory {given}: give the directory of a run, or one above it.")
        runs = sorted(folder.parent for folder in top.rglob(FOLDER) if monitors(folder.parent))
        if not runs:
            raise FileNotFoundError(
                f"No records in {given} or below it: give the directory that holds a run's event file, for example "
                f"lightning_logs/version_0. An InputHessianMonitor saves them there, in {FOLDER}/."
            )
        found += runs
    runs = list(dict.fromkeys(found))
    above = Path(os.path.commonpath([run.parent for run in runs]))
    return {str(run.relative_to(above)): run for run in runs}


def gather(runs: dict[str, Path], max_bytes: int) -> tuple[list[Tag], Store]:
    """What of ``runs`` fits into ``max_bytes``.

    Curves and spectra of every measurement, or of those that fit into half of it; then maps of input space and
    matrices. The last measurement comes first (and is there in any case), then the first, then those in between.

    Cost: every file is read up to four times; one record is in memory at a time.
    """
    store = Store(max_bytes)
    tags = [each for run, folder in runs.items() for name in monitors(folder) for each in _tags(run, folder, name)]
    reserved = sum(len(make_block(history.series(each.measured))[1]) for each in tags)  # added when steps are known
    store.size += reserved
    _add_spectra(tags, store)
    _add_from_files(tags, store, store.size + SHARE * (store.max_size - store.size), _maps)
    num_matrices = _add_from_files(tags, store, store.max_size, _matrices)
    num_maps = _add_from_files(tags, store, store.max_size, _maps)
    store.size -= reserved
    for each in tags:
        for kind, title, total in (("maps", "Maps of input space", num_maps), ("matrix", "Matrices", num_matrices)):
            here = sum(key.startswith(f"{kind}/") for key in each.blocks)
            if here < total[each]:
                each.notes.append(f"{title}: {here} of {total[each]} are on this page.")
        each.measured = replace(each.measured, left_out=" ".join(each.notes) or None)
        _add(store, each, "series", None, partial(history.series, each.measured))
    return tags, store


def _tags(run: str, folder: Path, monitor: str | None) -> list[Tag]:
    """A monitor's measurements by stage."""
    found: dict[Stage, dict[int, tuple[Path, Summary]]] = {}
    num_hidden: dict[Stage, int] = {}
    for path in record_paths(folder, monitor):
        record = load_record(path)
        summary = read_summary(pack_summary(record), record.logged_step, record.measured_at)
        of_stage = found.setdefault(record.stage, {})
        num_hidden[record.stage] = num_hidden.get(record.stage, 0) + (record.logged_step in of_stage)
        of_stage[record.logged_step] = path, summary  # of two at one logged step the later one
    tags = []
    for stage, of_stage in found.items():
        summaries = [of_stage[step][1] for step in sorted(of_stage)]
        measured = history.history(summaries, history.hidden(num_hidden[stage]))
        notes = [measured.left_out] if measured.left_out else []
        paths = {step: path for step, (path, _) in of_stage.items()}
        tags.append(Tag(run, tag(monitor, stage), paths, measured, notes=notes))
    return tags


def spread_out(number: int) -> list[int]:
    """Positions 0 to ``number`` - 1: the last, the first, then those in between, coarse before fine.

    Example:
        >>> spread_out(6)
        [5, 0, 4, 2, 1, 3]
    """
    order = dict.fromkeys([number - 1, 0])
    stride = 1 << number.bit_length()
    while stride := stride // 2:
        order |= dict.fromkeys(range(0, number, stride))
    return list(order)


def narrow(values: Array) -> Array:
    """``values`` in single precision where every number keeps six digits, else unchanged."""
    if values.dtype != np.float64:
        return values
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    return single if np.isclose(single, values, rtol=VISIBLE, atol=0, equal_nan=True).all() else values


def _by_importance(tags: Sequence[Tag]) -> Iterator[tuple[Tag, Summary]]:
    """Every measurement of every run, the runs in turn."""
    orders = [spread_out(len(each.measured.summaries)) for each in tags]
    for rank in range(max(map(len, orders))):
        for each, order in zip(tags, orders, strict=True):
            if rank < len(order):
                yield each, each.measured.summaries[order[rank]]


def _add(store: Store, to: Tag, key: str, max_size: float | None, answer: Callable[[], Answer]) -> bool:
    """Adds the block of an answer where it fits, and says whether it is there."""
    if key not in to.blocks and (name := store.add(answer(), max_size=max_size)):
        to.blocks[key] = name
    return key in to.blocks


def _add_spectra(tags: Sequence[Tag], store: Store) -> None:
    """Spectra of as many measurements as fit; the others go altogether: no number is shown without its residual."""
    order = list(_by_importance(tags))
    max_size = SHARE * store.max_size - store.size
    while True:
        by_tag = [[summary for other, summary in order if other is each] for each in tags]
        by_tag = [sorted(chosen, key=lambda summary: summary.logged_step) for chosen in by_tag]
        found = [
            {f"spectra/{end}": history.spectra(History(chosen), n, k) for n, k, end in each.samples_and_classes()}
            for each, chosen in zip(tags, by_tag, strict=True)
        ]
        size = sum(len(make_block(answer)[1]) + AROUND for answers in found for answer in answers.values())
        if size <= max_size or len(order) == len(tags):
            break
        order = order[: max(len(tags), min(len(order) - 1, int(len(order) * max_size / size)))]
    for each, chosen, answers in zip(tags, by_tag, found, strict=True):
        if len(chosen) < len(each.measured.summaries):
            each.notes.append(
                f"{len(chosen)} of {count(len(each.measured.summaries), 'measurement')} are on this page."
            )
        each.measured = History(chosen)
        each.blocks = {key: str(store.add(answer)) for key, answer in answers.items()}


def _add_from_files(
    tags: Sequence[Tag], store: Store, max_size: float, contents: Callable[[ArrayFile, Summary, int, int], Contents]
) -> Counter[Tag]:
    """Adds the ``contents`` of every file; of a run for which one does not fit, no more are tried.

    Returns:
        Of how many samples and classes there are any.
    """
    total: Counter[Tag] = Counter()
    full: set[Tag] = set()
    for each, summary in _by_importance(tags):
        with open_arrays(each.paths[summary.logged_step]) as file:
            for n, k, end in each.samples_and_classes():
                found = contents(file, summary, n, k)
                total[each] += bool(found)
                for kind, answer in found.items():
                    key = f"{kind}/{summary.logged_step}/{n if kind == 'input' else end}"
                    if each not in full and not _add(store, each, key, max_size, answer):
                        full.add(each)
    return total


def _maps(file: ArrayFile, summary: Summary, n: int, k: int) -> Contents:
    """Input, gradient, diagonal and eigenvectors."""
    return {"input": partial(sample.input_of, file, n), "maps": partial(sample.maps, file, summary, n, k)}


def _matrices(file: ArrayFile, summary: Summary, n: int, k: int) -> Contents:
    """The matrix as it is drawn; where that is smaller, also the whole one, off which single rows are read."""
    size = summary.meta["num_inputs"]
    if size > matrix.MAX_DRAWN_INPUTS or matrix.matrix_source(file, summary, n, k)[0] == "none":
        return {}

    def drawn(max_cells: int) -> Answer:
        return matrix.matrix(matrix.read_matrix(file, summary, n, k), max_cells)

    whole = {"whole": partial(drawn, size)} if size > matrix.MAX_CELLS else {}
    return {"matrix": partial(drawn, matrix.MAX_CELLS), **whole}
