"""Which whole matrices the files of a run hold: they are by far the largest part of what it writes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, SupportsIndex

from lightning_hessian.errors import ConfigurationError, whole_number
from lightning_hessian.records.record import Record


@dataclass(frozen=True)
class KeepMatrices:
    """Which whole matrices are saved, as exact upper triangles.

    Args:
        every_n: save those of every n-th measurement of a run, starting with the first.
        max_total_bytes: the total size of a run's matrices, by default 1 GiB; beyond that, none are saved. After a
            resume, existing files count in full.

    Raises:
        ConfigurationError: an argument is invalid.
    """

    every_n: int = 1
    max_total_bytes: int = 2**30

    def __post_init__(self) -> None:
        for name, least in (("every_n", 1), ("max_total_bytes", 0)):
            object.__setattr__(self, name, whole_number(f"keep_matrices: {name}", getattr(self, name), least))


def keep_policy(given: bool | int | Mapping[str, Any] | KeepMatrices | None) -> KeepMatrices | None:
    """The policy that the argument ``keep_matrices`` stands for; None: no matrices are saved.

    Raises:
        ConfigurationError: it is none of the forms allowed.
    """
    if given is None or isinstance(given, KeepMatrices):
        return given
    if isinstance(given, bool):
        return KeepMatrices() if given else None
    if isinstance(given, SupportsIndex):  # NumPy's whole numbers too
        return KeepMatrices(every_n=whole_number("keep_matrices: every_n", given, 1))
    try:
        return KeepMatrices(**given)
    except TypeError:
        raise ConfigurationError(
            f"keep_matrices={given!r} must be True, False, a whole number n (every n-th measurement), or a mapping "
            f"with some of every_n and max_total_bytes."
        ) from None


class MatrixRetention:
    """Decides for each record of one run whether its file holds the whole matrices.

    Args:
        policy: or None to store none.
        folder: of the run's records; files that are already there count.
    """

    def __init__(self, policy: KeepMatrices | None, folder: Path | None = None) -> None:
        self._policy = policy
        self._num_records = 0
        self._num_bytes = 0
        if policy is not None and folder is not None:
            with suppress(OSError):  # an unreadable folder is reported when saving fails
                files = chain(folder.glob("step_*.safetensors"), folder.glob("superseded_*/step_*.safetensors"))
                self._num_bytes = sum(path.stat().st_size for path in files)

    def apply(self, record: Record) -> Record:
        """The record as its file holds it: without the matrices that are not stored, and with the reason why."""
        number, self._num_records = self._num_records, self._num_records + 1
        if record.hessian is None:
            not_formed = "No whole matrices were formed: heatmap_samples=0, or there was not enough memory."
            return replace(record, why_no_matrix=record.why_no_matrix or not_formed)
        why_not = self._why_not(record, number)
        return record if why_not is None else replace(record, hessian=None, why_no_matrix=why_not)

    def _why_not(self, record: Record, number: int) -> str | None:
        if record.is_spanned:
            return "The stored eigenvectors reproduce every matrix to rounding."
        if self._policy is None:
            return "Whole matrices are not stored: keep_matrices=False."
        if number % self._policy.every_n:
            return f"Whole matrices are stored at every {_ordinal(self._policy.every_n)} measurement only."
        needed = _triangle_bytes(record)
        if self._num_bytes + needed > self._policy.max_total_bytes:
            return (
                f"The run's matrices already take {self._num_bytes / 2**20:.4g} MiB, and those of this measurement, "
                f"{needed / 2**20:.4g} MiB, would exceed max_total_bytes={self._policy.max_total_bytes}. Store fewer "
                f"with heatmap_samples or every_n, or allow more."
            )
        self._num_bytes += needed
        return None


def _triangle_bytes(record: Record) -> int:
    assert record.hessian is not None
    size = record.hessian.shape[-1]
    return record.hessian[..., 0, 0].size * size * (size + 1) // 2 * record.hessian.itemsize


def _ordinal(n: int) -> str:
    suffix = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"
