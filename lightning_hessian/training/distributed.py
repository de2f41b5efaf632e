"""TargetBatch shared out over processes, and their results gathered: torch.distributed, and no Trainer.

Every rank calls the same methods in the same order. Between two of them only local work is done, and a rank on which
that fails still takes part in the next: so a failure reaches all ranks as one message, and no rank waits for another
that has gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hessian.curvature.options import Options
from lightning_hessian.errors import ConfigurationError, MeasurementError

T = TypeVar("T")
Told = tuple[bool, str]  # whether it is a ConfigurationError, and the message


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that measure together; the default is a process of its own.

    Args:
        rank: of this process.
        size: how many there are: all of torch.distributed's default group.
        neighbours: how many of them share this process's main memory.
    """

    rank: int = 0
    size: int = 1
    neighbours: int = 1

    def share(self, num_samples: int) -> slice:
        """Which samples are this rank's: neighbouring ones, on the first ranks one more where they do not divide."""
        each, left = divmod(num_samples, self.size)
        start = self.rank * each + min(self.rank, left)
        return slice(start, start + each + (self.rank < left))

    def options(self, options: Options, device: torch.device) -> Options:
        """The options of one of several processes: neighbours on the CPU share what is free."""
        if options.max_memory is not None or device.type != "cpu":
            return options
        return replace(options, max_memory=max(1, options.memory(device) // self.neighbours))

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on rank 0, on every rank; it must be possible to pickle.

        Raises:
            MeasurementError: ``work`` failed on rank 0; a ConfigurationError stays one.
        """
        if self.size == 1:
            return work()
        value, error = _tried(work) if self.rank == 0 else (None, None)
        sent: list[Any] = [(value, error and _told(error))]
        dist.broadcast_object_list(sent, src=0)
        received, told = sent[0]
        self._raise([told], error)
        return value if self.rank == 0 else received  # type: ignore[return-value] # there was no error

    def together(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on this rank, once it has ended on all.

        Raises:
            MeasurementError: it failed somewhere; the message says on which ranks and why, the same on all.
        """
        if self.size == 1:
            return work()
        value, error = _tried(work)
        self._raise(self._from_all(error and _told(error)), error)
        return value

    def gather(self, value: T) -> list[T] | None:
        """The values of all ranks, on rank 0; None elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0)
        return values

    def agreed(self, own: Callable[[], T | None], otherwise: str) -> T | None:
        """What ``own`` gives on rank 0, on every rank; None where it gives None on all of them.

        Raises:
            MeasurementError: ``own`` failed on rank 0, or gave None there and not on another; then ``otherwise``.
        """
        value = self.first(own)
        if value is None and self.size > 1 and any(self._from_all(_tried(own)[0] is not None)):
            raise MeasurementError(f"On rank 0 of {self.size}: {otherwise}")
        return value

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """What to measure with in place of the module's own tensors: the same on all ranks, on the CPU, by name.

        Sharded tensors are gathered, one at a time; buffers are those of rank 0, since batch norm's running
        statistics differ from rank to rank. The module's own are not written. Cost: one copy of a sharded model in
        main memory on every rank.
        """
        whole = _gathered(module)
        if self.size == 1:
            return whole
        own = {name: b.detach().cpu() for name, b in module.named_buffers() if name not in whole}
        return {**whole, **self.first(lambda: own)}

    def _from_all(self, value: Any) -> list[Any]:
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def _raise(self, told: Sequence[Told | None], error: Exception | None) -> None:
        """One exception for the failures of all ranks, if there are any."""
        failures = {rank: failure for rank, failure in enumerate(told) if failure is not None}
        if not failures:
            return
        if all(misconfigured for misconfigured, _ in failures.values()):
            raise ConfigurationError(next(iter(failures.values()))[1]) from error
        by_message: dict[str, list[int]] = {}
        for rank, (_, message) in failures.items():
            by_message.setdefault(message, []).append(rank)
        sentences = [
            f"On rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} of {self.size}: {message}"
            for message, ranks in by_message.items()
        ]
        raise MeasurementError(" ".join(sentences)) from error


SINGLE_PROCESS = ProcessGroup()


def _tried(work: Callable[[], T]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # whatever it is, the other ranks must hear of it
        return None, error


def _told(error: Exception) -> Told:
    ours = isinstance(error, (ConfigurationError, MeasurementError))
    return isinstance(error, ConfigurationError), str(error) if ours else f"{type(error).__name__}: {error}"


def _gathered(module: nn.Module) -> dict[str, Tensor]:
    """Every sharded parameter and buffer (DTensor) as a whole one. Collective: every rank must call it."""
    if not dist.is_available() or not dist.is_initialized():
        return {}
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    for inner in module.modules():
        if isinstance(inner, FSDPModule):
            inner.reshard()  # after a validation forward the root holds copies, perhaps in a lower precision
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: t.full_tensor().detach().cpu() for name, t in named if isinstance(t, DTensor)}
