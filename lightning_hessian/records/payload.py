"""Arrays with JSON metadata in the safetensors format: packed, unpacked, or read from a file, whole or in slices.

Nothing in a payload or file is trusted: headers are checked against the size, and nothing is executed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lightning_hessian.records.matrices import Array

META = "lightning_hessian"  # the key of our JSON in the metadata
DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
MAX_DIMENSIONS = 16
MAX_ENTRIES = 2**59  # more, numpy does not allow even where there are none: [0, 2**60]
MAX_HEADER_SIZE = 100_000_000  # as in the safetensors library


class DamagedDataError(ValueError):
    """Bytes that are not safetensors of this package, or arrays that do not fit each other."""


def pack(arrays: Mapping[str, Array], meta: Mapping[str, Any]) -> bytes:
    """Arrays and JSON metadata as one safetensors payload."""
    contiguous = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in arrays.items()}
    return save(contiguous, {META: json.dumps(meta, ensure_ascii=False, separators=(",", ":"))})


def unpack(payload: bytes) -> tuple[dict[str, Array], dict[str, Any]]:
    """The arrays and the metadata of a payload.

    Raises:
        DamagedDataError: it is no payload of this package.
    """
    try:
        arrays = load(payload)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DamagedDataError(f"it is not in the safetensors format: {error}") from error
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub" or array.ndim > MAX_DIMENSIONS:
            raise DamagedDataError(f"{name} has the type {array.dtype} and the shape {list(array.shape)}")
    header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
    return arrays, _meta(header.get("__metadata__"))


class ArrayFile:
    """An open safetensors file of this package, of which only what is asked for is read.

    Through ordinary reads, not a memory map: a file that is truncated meanwhile would end the process.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._opened = os.fstat(file.fileno())
        size = self._opened.st_size
        header, self._data_start = _read_header(file, size)
        self.meta = _meta(header.pop("__metadata__", None))
        self._stored = {name: _stored(name, entry) for name, entry in header.items()}
        end = 0
        for first, last in sorted((each.start, each.end) for each in self._stored.values()):
            if first != end:
                raise DamagedDataError("its arrays overlap, or there are gaps between them")
            end = last
        if self._data_start + end != size:
            raise DamagedDataError(f"its arrays take {end} bytes, but it holds {size - self._data_start}")

    def check_unchanged(self) -> None:
        """Checks that what was read is of one file, and not partly of what was written over it.

        Raises:
            DamagedDataError: it was written to since it was opened.
        """
        now = os.fstat(self._file.fileno())
        if (now.st_mtime_ns, now.st_size) != (self._opened.st_mtime_ns, self._opened.st_size):
            raise DamagedDataError("it was changed while it was read; try again")

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array.

        Raises:
            DamagedDataError: there is no such array.
        """
        if name not in self._stored:
            raise DamagedDataError(f"it holds no {name}")
        return self._stored[name].shape

    def read(self, name: str, *indices: int) -> Array:
        """An array, or what is in it at leading ``indices``.

        Raises:
            DamagedDataError: there is no such array, nothing at these indices, or the file has become shorter.
        """
        shape, stored = self.shape(name), self._stored[name]
        if len(indices) > len(shape) or any(not 0 <= i < n for i, n in zip(indices, shape, strict=False)):
            raise DamagedDataError(f"{name} has the shape {list(shape)} and nothing at {list(indices)}")
        shape, position = shape[len(indices) :], 0
        for index, length in zip(indices, stored.shape, strict=False):
            position = position * length + index
        count = math.prod(shape)
        self._file.seek(self._data_start + stored.start + position * count * stored.dtype.itemsize)
        values = np.fromfile(self._file, stored.dtype, count)
        if len(values) < count:
            raise DamagedDataError(f"{name} is incomplete: the file has become shorter")
        return values.reshape(shape)


@dataclass(frozen=True)
class _Stored:
    """Where an array is: its bytes from ``start`` to ``end`` of the data, that is, of what follows the header."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    end: int


@contextmanager
def open_arrays(path: str | os.PathLike[str]) -> Iterator[ArrayFile]:
    """A file for reading arrays, or slices of them.

    Raises:
        DamagedDataError: it is not a safetensors file of this package.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        yield ArrayFile(file)


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header of a file of ``size`` bytes, and where the data after it starts."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, MAX_HEADER_SIZE):
        raise DamagedDataError("it is not in the safetensors format: header too large, or none")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise DamagedDataError("it is not in the safetensors format: its header is not JSON") from error
    if not isinstance(header, dict):
        raise DamagedDataError("it is not in the safetensors format: its header is not a JSON object")
    return header, 8 + length


def _stored(name: str, entry: Any) -> _Stored:
    """What an entry of a header says about an array, where that is possible."""
    found = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = found.get("dtype"), _sizes(found.get("shape")), _sizes(found.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES or shape is None or not _is_possible(shape):
        raise DamagedDataError(f"{name} has the type {dtype!s:.20} and the shape {found.get('shape')!s:.200}")
    known = np.dtype(DTYPES[dtype])
    if offsets is None or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * known.itemsize:
        raise DamagedDataError(f"{name} has the shape {list(shape)} and the offsets {found.get('data_offsets')!s:.200}")
    return _Stored(known, shape, *offsets)


def _sizes(values: Any) -> tuple[int, ...] | None:
    """A list of whole numbers that are not negative, or None."""
    is_list = isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
    return tuple(values) if is_list else None


def _is_possible(shape: tuple[int, ...]) -> bool:
    return len(shape) <= MAX_DIMENSIONS and math.prod(max(length, 1) for length in shape) <= MAX_ENTRIES


def finite_json(text: str | bytes) -> Any:
    """JSON with None for NaN and infinity, which JSON in a browser does not know.

    Raises:
        DamagedDataError: it is not JSON.
    """

    def finite(digits: str) -> float | None:
        return value if math.isfinite(value := float(digits)) else None

    try:
        return json.loads(text, parse_constant=lambda _: None, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise DamagedDataError("its metadata is not JSON") from error


def _meta(metadata: Any) -> dict[str, Any]:
    text = metadata.get(META) if isinstance(metadata, dict) else None
    meta = finite_json(text) if isinstance(text, str) else None
    if not isinstance(meta, dict):
        raise DamagedDataError("it has no metadata of lightning-hessian")
    return meta
