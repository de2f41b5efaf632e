"""A reader of safetensors files that trusts nothing in them.

The header is checked against the file's size before anything is read, only what was asked for is read, and nothing
that a file says is executed. See the format at https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from lightning_hessian.records.event_format import DTYPES, MAX_HEADER, META
from lightning_hessian.records.record import Array
from lightning_hessian.tensorboard_plugin.refusal import DamagedFile

MAX_DIMENSIONS = 16


@dataclass(frozen=True)
class Entry:
    """Where an array lies in its file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int


class SafeFile:
    """The arrays of an open safetensors file, read piece by piece.

    Args:
        source: the file, at any place.
        size: its length in bytes.

    Raises:
        DamagedFile: the header is not that of a safetensors file of this size and of this package.
    """

    def __init__(self, source: BinaryIO, size: int) -> None:
        self._source = source
        header, start = _read_header(source, size)
        words = header.pop("__metadata__", {})
        text = words.get(META) if isinstance(words, dict) else None
        self.meta = finite_json(text) if isinstance(text, str) else None
        if not isinstance(self.meta, dict):
            raise DamagedFile("it does not say what it holds")
        self._entries = {name: _entry(name, told, start) for name, told in header.items()}
        _check_extent(self._entries.values(), start, size)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array.

        Raises:
            DamagedFile: there is no such array.
        """
        return self._get(name).shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """The type of an array's entries.

        Raises:
            DamagedFile: there is no such array.
        """
        return self._get(name).dtype

    def read(self, name: str, *indices: int, rows: tuple[int, int] | None = None) -> Array:
        """The part of an array at leading ``indices``, and of that the rows from ``rows[0]`` up to ``rows[1]``.

        Raises:
            DamagedFile: there is no such array or place in it, or the file ends before it.
        """
        entry = self._get(name)
        shape = entry.shape[len(indices) :]
        if any(not 0 <= i < n for i, n in zip(indices, entry.shape, strict=False)) or len(indices) > len(entry.shape):
            raise DamagedFile(f"{name} has the shape {list(entry.shape)} and nothing at {list(indices)}")
        offset = 0
        for index, length in zip(indices, entry.shape, strict=False):
            offset = offset * length + index
        offset *= math.prod(shape)
        if rows is not None:
            offset += rows[0] * math.prod(shape[1:])
            shape = (rows[1] - rows[0], *shape[1:])
        self._source.seek(entry.start + offset * entry.dtype.itemsize)
        num_bytes = math.prod(shape) * entry.dtype.itemsize
        data = self._source.read(num_bytes)
        if len(data) != num_bytes:
            raise DamagedFile("it ends too early")
        return np.frombuffer(data, entry.dtype).reshape(shape)

    def _get(self, name: str) -> Entry:
        if name not in self._entries:
            raise DamagedFile(f"it holds no {name}")
        return self._entries[name]


def finite_json(text: str | bytes) -> Any:
    """JSON with None for numbers that a browser's JSON does not know: NaN and infinity.

    Raises:
        DamagedFile: it is not JSON.
    """
    try:
        return json.loads(text, parse_constant=lambda _: None, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise DamagedFile("what it says of itself is not JSON") from error


def _finite(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None


def _read_header(source: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header, and where the data start."""
    source.seek(0)
    length = int.from_bytes(source.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise DamagedFile(f"it has {size} bytes, and its header would have {length}")
    text = source.read(length)
    header = finite_json(text) if len(text) == length else None
    if not isinstance(header, dict):
        raise DamagedFile("its header is not that of a safetensors file")
    return header, 8 + length


def _entry(name: str, told: Any, start: int) -> Entry:
    """What the header says of one array, checked."""
    match told:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]} if dtype in DTYPES:
            found = Entry(DTYPES[dtype], tuple(shape), start)
        case _:
            raise DamagedFile(f"what it says of {name} is not understood")
    if len(shape) > MAX_DIMENSIONS or not all(_is_count(n) for n in (*shape, begin, end)):
        raise DamagedFile(f"shape or place of {name} are not whole numbers of at least 0")
    if end - begin != math.prod(shape) * found.dtype.itemsize:
        raise DamagedFile(f"{name} does not fill its place")
    return Entry(found.dtype, found.shape, start + begin)


def _check_extent(entries: Any, start: int, size: int) -> None:
    """Arrays follow each other without gap or overlap and end with the file, as the format demands."""
    place = start
    for entry in sorted(entries, key=lambda e: (e.start, math.prod(e.shape))):
        if entry.start != place:
            raise DamagedFile("its arrays overlap or leave gaps")
        place += math.prod(entry.shape) * entry.dtype.itemsize
    if place != size:
        raise DamagedFile(f"it has {size} bytes, and its header promises {place}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62
