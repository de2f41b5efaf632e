"""Arrays with JSON metadata in the safetensors format: packed, unpacked, or read in parts from a file.

Nothing in a payload or file is trusted: the library checks the header against the size, and executes nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

Array = np.ndarray[Any, np.dtype[Any]]

META = "lightning_hessian"  # the key of our JSON in the metadata
DTYPES = frozenset({"F64", "F32", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL"})
MAX_DIMENSIONS = 16


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
    """An open safetensors file of this package, of which only the parts asked for are read."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened
        self.meta = _meta(opened.metadata())
        self._slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        for name, array in self._slices.items():
            if array.get_dtype() not in DTYPES or len(array.get_shape()) > MAX_DIMENSIONS:
                raise DamagedDataError(f"{name} has the type {array.get_dtype()} and the shape {array.get_shape()}")

    def __contains__(self, name: str) -> bool:
        return name in self._slices

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array.

        Raises:
            DamagedDataError: there is no such array.
        """
        if name not in self._slices:
            raise DamagedDataError(f"it holds no {name}")
        return tuple(self._slices[name].get_shape())

    def read(self, name: str, *indices: int) -> Array:
        """An array, or its part at leading ``indices``.

        Raises:
            DamagedDataError: there is no such array, or nothing at these indices.
        """
        shape = self.shape(name)
        if len(indices) > len(shape) or any(not 0 <= i < n for i, n in zip(indices, shape, strict=False)):
            raise DamagedDataError(f"{name} has the shape {list(shape)} and nothing at {list(indices)}")
        part: Array = self._slices[name][indices] if indices else self._opened.get_tensor(name)
        return part


@contextmanager
def open_arrays(path: str | os.PathLike[str]) -> Iterator[ArrayFile]:
    """A file for reading parts of it.

    Raises:
        DamagedDataError: it is not a safetensors file of this package.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path, framework="numpy") as opened:
            yield ArrayFile(opened)
    except SafetensorError as error:
        raise DamagedDataError(f"it is not in the safetensors format: {error}") from error


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


def _meta(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    meta = finite_json((metadata or {}).get(META, "null"))
    if not isinstance(meta, dict):
        raise DamagedDataError("it has no metadata of lightning-hessian")
    return meta
