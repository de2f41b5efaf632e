"""Samples shared out over processes, and their results gathered: torch.distributed, and no Trainer.

Every rank calls the same collective methods in the same order. Between two of them there is only local work, and a rank
on which that fails still takes part in the next one: a failure reaches all ranks as the same message, and no rank waits
for another that is gone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hessian.curvature.options import Options
from lightning_hessian.errors import ConfigurationError, MeasurementError

T = TypeVar("T")
FLAT_SHARDS = {"FullyShardedDataParallel", "DeepSpeedEngine"}
Failure = tuple[bool, str]  # whether it is a ConfigurationError, and the message


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that measure together; by default this one alone.

    ``on_first``, ``on_all``, ``any``, ``gather``, ``agreed`` and ``tensors`` are collective.

    Args:
        rank: of this process.
        size: the number of processes: all of torch.distributed's default group.
        processes_per_node: how many of them share this machine's main memory.
    """

    rank: int = 0
    size: int = 1
    processes_per_node: int = 1

    def share(self, num_samples: int) -> slice:
        """Which samples are this rank's: consecutive ones, one more on the first ranks where they do not divide."""
        each, left = divmod(num_samples, self.size)
        start = self.rank * each + min(self.rank, left)
        return slice(start, start + each + (self.rank < left))

    def options(self, options: Options, device: torch.device) -> Options:
        """The options with the memory that is free now; on the CPU, the processes of a machine share it."""
        if options.max_memory is not None:
            return options
        sharers = self.processes_per_node if device.type == "cpu" else 1
        return replace(options, max_memory=max(1, options.memory(device) // sharers))

    def on_first(self, work: Callable[[], T]) -> T:
        """Runs ``work`` on rank 0, and returns its result on every rank; the result must be picklable.

        Raises:
            MeasurementError: ``work`` failed; a ConfigurationError stays one.
        """
        if self.size == 1:
            return work()
        value, error = _attempt(work) if self.rank == 0 else (None, None)
        sent: list[Any] = [(value, error and _failure(error))]
        dist.broadcast_object_list(sent, src=0)
        received, failure = sent[0]
        self._raise([failure], error)
        return value if self.rank == 0 else received  # type: ignore[return-value] # there was no error

    def on_all(self, work: Callable[[], T]) -> T:
        """Runs ``work`` on every rank, waits for all of them, and returns this rank's result.

        Raises:
            MeasurementError: it failed somewhere; the message says on which ranks and why, the same on all.
        """
        if self.size == 1:
            return work()
        value, error = _attempt(work)
        self._raise(self._from_all(error and _failure(error)), error)
        return value

    def gather(self, value: T) -> list[T] | None:
        """The values of all ranks, on rank 0; None elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0)
        return values

    def any(self, own: bool) -> bool:
        """Whether it is true on some rank."""
        return any(self._from_all(own)) if self.size > 1 else own

    def agreed(self, own: Callable[[], T | None], if_missing: str) -> T | None:
        """The result of ``own`` on rank 0, on every rank; None where it is None on all of them.

        Raises:
            MeasurementError: ``own`` failed on rank 0, or gave None there but not on another rank; then ``if_missing``
                says why that is a failure.
        """
        value = self.on_first(own)
        if value is None and self.size > 1 and any(self._from_all(_attempt(own)[0] is not None)):
            raise MeasurementError(f"On rank 0 of {self.size}: {if_missing}")
        return value

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """Parameters and buffers by name to measure with instead of the module's own: on the CPU, equal on all ranks.

        Sharded tensors are gathered, one at a time; buffers are those of rank 0, since batch norm's running statistics
        differ from rank to rank. The module itself is not changed. Cost: one copy of a sharded model in main memory on
        every rank.
        """
        whole = _gathered(module)
        if self.size == 1:
            return whole
        own = {name: b.detach().cpu() for name, b in module.named_buffers() if name not in whole}
        return {**whole, **self.on_first(lambda: own)}

    def _from_all(self, value: Any) -> list[Any]:
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def _raise(self, failures: Sequence[Failure | None], error: Exception | None) -> None:
        """Raises one exception for the failures of all ranks, if there are any."""
        failed = {rank: failure for rank, failure in enumerate(failures) if failure is not None}
        if not failed:
            return
        if all(misconfigured for misconfigured, _ in failed.values()):
            raise ConfigurationError(next(iter(failed.values()))[1]) from error
        ranks_by_message: dict[str, list[int]] = {}
        for rank, (_, message) in failed.items():
            ranks_by_message.setdefault(message, []).append(rank)
        sentences = [
            f"On rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} of {self.size}: {message}"
            for message, ranks in ranks_by_message.items()
        ]
        raise MeasurementError(" ".join(sentences)) from error


SINGLE_PROCESS = ProcessGroup()


def current_process_group() -> ProcessGroup:
    """All processes of torch.distributed where it is initialized, else this one alone."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return SINGLE_PROCESS
    size = dist.get_world_size()
    return ProcessGroup(dist.get_rank(), size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def _attempt(work: Callable[[], T]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # whatever it is, the other ranks must learn of it
        return None, error


def _failure(error: Exception) -> Failure:
    ours = isinstance(error, (ConfigurationError, MeasurementError))
    return isinstance(error, ConfigurationError), str(error) if ours else f"{type(error).__name__}: {error}"


def _gathered(module: nn.Module) -> dict[str, Tensor]:
    """Every sharded parameter and buffer (DTensor) as a whole tensor. Collective.

    Raises:
        ConfigurationError: parameters are in flat buffers, from which torch cannot restore a whole module.
    """
    flat = {type(inner).__name__ for inner in module.modules()} & FLAT_SHARDS
    if flat:
        raise ConfigurationError(
            f"Measuring a model inside of {flat.pop()} is not possible: it holds parameters in flat buffers of its "
            f"own. Use fully_shard (FSDP2), DDP or a single device."
        )
    if not dist.is_available() or not dist.is_initialized():
        return {}
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    for inner in module.modules():
        if isinstance(inner, FSDPModule):
            inner.reshard()  # after a validation forward the root holds copies, perhaps in a lower precision
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: t.full_tensor().detach().cpu() for name, t in named if isinstance(t, DTensor)}
