"""Whole matrices out of the file of a measurement: by rows, and small enough to be drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lightning_hessian.records.answers.history import Answer, MissingError
from lightning_hessian.records.color_scale import PERCENTILE
from lightning_hessian.records.event_format import Summary
from lightning_hessian.records.matrices import Array, from_eigenvectors, from_triangle, spans, to_triangle
from lightning_hessian.records.payload import ArrayFile, DamagedDataError

Source = Literal["stored", "from eigenvectors", "none"]

MAX_CELLS = 1024  # across a drawn matrix; of a larger one, each cell stands for a block of entries
MAX_DRAWN_INPUTS = 1 << 15  # above, the entries of one matrix take minutes
ENTRIES_AT_ONCE = 1 << 22
ROWS_FOR_LIMIT = 1 << 12


@dataclass(frozen=True)
class Matrix:
    """A symmetric matrix that is read by rows.

    Attributes:
        num_inputs: D.
        source: where it comes from.
        rows: ``(first, end) -> [end − first, D]``.
    """

    num_inputs: int
    source: Source
    rows: Callable[[int, int], Array]


def matrix_source(file: ArrayFile, summary: Summary, sample: int, class_index: int) -> tuple[Source, str | None]:
    """Where the whole matrix of one sample and class comes from; if from nowhere, why.

    Raises:
        DamagedDataError: the arrays of the file do not fit each other.
    """
    if not summary.arrays["valid"][sample, class_index]:
        return (
            "none",
            f"Its Hessian is not valid at this step, so nothing is shown of it. {summary.meta.get('message')}",
        )
    samples = _stored_samples(file, summary)
    if sample in samples:
        return "stored", None
    num_inputs = file.shape("gradient")[-1]
    if file.meta.get("complete") is True and "eigenvectors" in file and "vector_index" in file:
        eigenvalues, index = (file.read(name, sample, class_index) for name in ("eigenvalues", "vector_index"))
        if file.shape("eigenvectors")[2:] != (len(index), num_inputs) or not is_index(index, len(eigenvalues)):
            raise DamagedDataError("eigenvectors do not fit eigenvalues and gradient")
        if spans(eigenvalues, index, num_inputs):
            return "from eigenvectors", None
    why_not = _in_file(summary).get("why_no_matrix")
    if isinstance(why_not, str) and why_not:
        return "none", why_not
    stored = f"only for sample {', '.join(map(str, samples))}" if samples else "for no sample"
    return "none", (
        f"The whole matrix was stored {stored} at this step, and the stored eigenvectors do not suffice to "
        f"reconstruct it."
    )


def read_matrix(file: ArrayFile, summary: Summary, sample: int, class_index: int) -> Matrix:
    """The whole matrix of one sample and class.

    Raises:
        MissingError: there is none.
        DamagedDataError: the arrays of the file do not fit each other.
    """
    source, why_not = matrix_source(file, summary, sample, class_index)
    if source == "none":
        raise MissingError(why_not)
    num_inputs = file.shape("gradient")[-1]
    if source == "stored":
        triangle = file.read("hessian_triangle", _stored_samples(file, summary).index(sample), class_index)
        return Matrix(num_inputs, source, lambda first, end: from_triangle(triangle, num_inputs, slice(first, end)))
    found = [file.read(name, sample, class_index) for name in ("eigenvalues", "eigenvectors", "vector_index")]

    def rows(first: int, end: int) -> Array:
        made = from_eigenvectors(*found, rows=slice(first, end))
        assert made is not None
        return made

    return Matrix(num_inputs, source, rows)


def matrix(found: Matrix, max_cells: int) -> Answer:
    """A matrix that is small enough to be drawn.

    Args:
        found: of any size.
        max_cells: n is at most that.

    Raises:
        MissingError: there are too many inputs.

    Returns:
        The upper triangle row by row, of each block of entries the one of largest magnitude, so that nothing vanishes.
    """
    size = found.num_inputs
    if size > MAX_DRAWN_INPUTS:
        raise MissingError(
            f"The matrix of {size} inputs is too large to be drawn (more than {MAX_DRAWN_INPUTS}). Single rows are "
            f"available."
        )
    block = max(1, math.ceil(size / max_cells))
    num_cells = math.ceil(size / block)
    stride = math.ceil(size / ROWS_FOR_LIMIT)
    step = block * max(1, ENTRIES_AT_ONCE // (block * size))
    drawn, magnitudes, diagonal, largest = [], [], [], 0.0
    for first in range(0, size, step):
        rows = found.rows(first, min(first + step, size)).astype(np.float32, copy=False)
        magnitude = np.abs(rows)
        largest = max(largest, float(np.max(magnitude, where=np.isfinite(magnitude), initial=0.0)))
        magnitudes.append(magnitude[-first % stride :: stride])
        diagonal.append(np.diagonal(magnitude, first))
        drawn.append(rows if block == 1 else _largest_of_blocks(rows, block, num_cells))
    every = np.concatenate(magnitudes, axis=None)
    finite = every if np.isfinite(every).all() else every[np.isfinite(every)]
    limit = float(np.percentile(finite, PERCENTILE)) if len(finite) else 0.0
    return {"triangle": to_triangle(np.concatenate(drawn))}, {
        "source": found.source,
        "size": size,
        "block": block,
        "num_cells": num_cells,
        "limit": limit or largest,
        "largest": largest,
        "start": int(np.nan_to_num(np.concatenate(diagonal)).argmax()),
    }


def row(found: Matrix, index: int) -> Answer:
    """One row ``row [D]`` of a matrix."""
    return {"row": found.rows(index, index + 1)[0]}, {"source": found.source, "index": index}


def is_index(values: Array, length: int) -> bool:
    """Whether all values are positions among ``length``."""
    return values.dtype.kind in "iu" and not ((values < 0) | (values >= length)).any()


def _in_file(summary: Summary) -> dict[str, object]:
    found = summary.meta.get("in_file")
    return found if isinstance(found, dict) else {}


def _stored_samples(file: ArrayFile, summary: Summary) -> list[int]:
    """The samples whose matrices the file holds: the event lists them, or they are the first ones."""
    if "hessian_triangle" not in file:
        return []
    (_, num_classes, num_inputs), shape = file.shape("gradient"), file.shape("hessian_triangle")
    if shape[1:] != (num_classes, num_inputs * (num_inputs + 1) // 2):
        raise DamagedDataError("hessian_triangle does not fit the gradient")
    listed = _in_file(summary).get("matrices")
    if isinstance(listed, list) and len(listed) == shape[0] and all(type(i) is int for i in listed):
        return listed
    return list(range(shape[0]))


def _largest_of_blocks(rows: Array, block: int, num_cells: int) -> Array:
    """Of each block of entries the one of largest magnitude."""
    num_rows = math.ceil(len(rows) / block)
    padded = np.zeros((num_rows * block, num_cells * block), rows.dtype)
    padded[: len(rows), : rows.shape[1]] = rows
    by_row = padded.reshape(num_rows, block, -1)
    high = by_row.max(axis=1).reshape(num_rows, num_cells, block).max(axis=2)
    low = by_row.min(axis=1).reshape(num_rows, num_cells, block).min(axis=2)
    return np.where(high >= -low, high, low)
