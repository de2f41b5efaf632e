"""Which whole matrices a run keeps in its files, and how: they are by far the largest of what it writes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_hessian.errors import ConfigurationError
from lightning_hessian.records.record import Record

Storage = Literal["upper_triangle", "float16", "float32"]


@dataclass(frozen=True)
class KeepMatrices:
    """Which whole matrices are kept, and how.

    Args:
        every_n: those of every n-th measurement of a run, from the first.
        storage: ``"upper_triangle"``: exact, and half of the size. ``"float16"``: the triangle in half precision,
            scaled to the matrix's largest entry; half again. ``"float32"``: whole matrices, for other readers.
        max_total_bytes: what the matrices of a run may take, by default 1 GiB; from there on, none are kept. After a
            resume, the files that lie there count in full.

    Raises:
        ConfigurationError: an argument is not one of those allowed.
    """

    every_n: int = 1
    storage: Storage = "upper_triangle"
    max_total_bytes: int = 2**30

    def __post_init__(self) -> None:
        for name, least in (("every_n", 1), ("max_total_bytes", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigurationError(f"keep_matrices: {name}={value!r} must be a whole number of at least {least}.")
        if self.storage not in get_args(Storage):
            raise ConfigurationError(
                f"keep_matrices: storage={self.storage!r} is not known. Choose one of "
                f"{', '.join(map(repr, get_args(Storage)))}."
            )


def keep_policy(wanted: bool | int | Mapping[str, Any] | KeepMatrices | None) -> KeepMatrices | None:
    """What ``keep_matrices`` asks for; None: nothing is kept.

    Raises:
        ConfigurationError: it is none of the things allowed.
    """
    if wanted is None or isinstance(wanted, KeepMatrices):
        return wanted
    if isinstance(wanted, bool):
        return KeepMatrices() if wanted else None
    if isinstance(wanted, int):
        return KeepMatrices(every_n=wanted)
    try:
        return KeepMatrices(**wanted)
    except TypeError:
        raise ConfigurationError(
            f"keep_matrices={wanted!r} must be True, False, a whole number n (every n-th measurement), or a mapping "
            f"with some of every_n, storage and max_total_bytes."
        ) from None


class MatrixKeeper:
    """Decides for each record of one run what of its matrices the file holds.

    Args:
        policy: or None to keep nothing.
        folder: of the run's records; what lies there already counts.
    """

    def __init__(self, policy: KeepMatrices | None, folder: Path | None = None) -> None:
        self._policy = policy
        self._num_records = 0
        self._num_bytes = 0
        if policy is not None and folder is not None:
            with suppress(OSError):  # a folder that cannot be looked into: saving will tell
                self._num_bytes = sum(path.stat().st_size for path in folder.glob("step_*.safetensors"))

    @property
    def storage(self) -> Storage:
        """How matrices are stored."""
        return "upper_triangle" if self._policy is None else self._policy.storage

    def kept(self, record: Record) -> Record:
        """The record as its file holds it: without matrices that are not kept, and with the reason why."""
        number, self._num_records = self._num_records, self._num_records + 1
        if record.hessian is None:
            formed = "No whole matrices were formed: heatmap_samples=0, or memory was short."
            return replace(record, why_no_matrix=record.why_no_matrix or formed)
        why_not = self._why_not(record, number)
        return record if why_not is None else replace(record, hessian=None, why_no_matrix=why_not)

    def _why_not(self, record: Record, number: int) -> str | None:
        assert record.hessian is not None
        if record.is_spanned:
            return "The eigenvectors kept give every matrix to rounding."
        if self._policy is None:
            return "Whole matrices are not kept: keep_matrices=False."
        if number % self._policy.every_n:
            return f"Whole matrices are kept at every {_ordinal(self._policy.every_n)} measurement only."
        needed = _stored_bytes(record, self._policy.storage)
        if self._num_bytes + needed > self._policy.max_total_bytes:
            return (
                f"The run's matrices take {self._num_bytes / 2**20:.4g} MiB already, and those of this measurement, "
                f"{needed / 2**20:.4g} MiB, would exceed max_total_bytes={self._policy.max_total_bytes}. Keep fewer "
                f"with heatmap_samples or every_n, or allow more."
            )
        self._num_bytes += needed
        return None


def _stored_bytes(record: Record, storage: Storage) -> int:
    assert record.hessian is not None
    matrices, size = record.hessian.size // record.gradient.shape[-1] ** 2, record.gradient.shape[-1]
    triangle = matrices * size * (size + 1) // 2
    return {
        "upper_triangle": triangle * record.hessian.itemsize,
        "float16": triangle * 2,
        "float32": record.hessian.size * 4,
    }[storage]


def _ordinal(n: int) -> str:
    suffix = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"
