"""What a monitor reads from a Trainer, in one place. Knows Trainers by their attributes: imports no Lightning."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from lightning_hessian.errors import ConfigurationError
from lightning_hessian.training.distributed import ProcessGroup
from lightning_hessian.training.samples import first_batch
from lightning_hessian.training.schedule import TrainingPosition
from lightning_hessian.writers.tags import SPREAD

# Strategies that hold parameters in flat buffers of their own, from which torch cannot restore a whole module.
UNSUPPORTED_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy")
TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
LIGHTNINGS_HOOKS = ("lightning.pytorch.core.hooks", "pytorch_lightning.core.hooks")


def in_both_packages(own: type) -> type:
    """A class of ``lightning``, which is also one of ``pytorch_lightning`` where that second package is in use."""
    home = own.__module__.replace("lightning.pytorch", "pytorch_lightning").replace(
        "lightning.fabric", "lightning_fabric"
    )
    twin = sys.modules.get(home)
    return own if twin is None else type(own.__name__, (own, getattr(twin, own.__name__)), {})


def process_group(trainer: Any) -> ProcessGroup:
    """The processes that train together.

    Raises:
        ConfigurationError: parameters are sharded in a way from which they cannot be gathered, or there are several
            processes that are not connected by torch.distributed.
    """
    strategy = type(trainer.strategy)
    if any(parent.__name__ in UNSUPPORTED_STRATEGIES for parent in strategy.__mro__):
        raise ConfigurationError(
            f"Measuring under {strategy.__name__} is not possible: it holds parameters in flat buffers of its own. Use "
            f"ModelParallelStrategy with fully_shard (FSDP2), DDP or a single device, or remove the callback."
        )
    if trainer.world_size == 1:
        return ProcessGroup()
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigurationError(
            f"Measuring under {strategy.__name__} with {trainer.world_size} processes is not possible: they are not "
            f"connected by torch.distributed. Use DDP or a single device, or remove the callback."
        )
    return ProcessGroup(dist.get_rank(), dist.get_world_size(), trainer.num_devices)


def optimizer_steps(trainer: Any) -> int:
    """Optimizer steps so far; batches so far where the user steps raw optimizers, which Lightning does not count."""
    if trainer.global_step or trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready


def logged_step(trainer: Any) -> int:
    """The loggers' step of the current batch; between two batches, of the next one."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def last_logged_step(trainer: Any) -> int:
    """The loggers' step of the batch that just ended, at which Lightning logs an epoch's own metrics."""
    return max(0, logged_step(trainer) - 1)


def training_position(trainer: Any) -> TrainingPosition:
    """Where training is, at the end of a batch."""
    return TrainingPosition(
        optimizer_steps(trainer), logged_step(trainer), trainer.current_epoch, trainer.is_last_batch
    )


def show_metrics(metrics: Mapping[str, float], trainer: Any) -> None:
    """Gives the scalars to callbacks that watch metrics, such as early stopping."""
    device = trainer.strategy.root_device
    watched = {k: torch.tensor(v, device=device) for k, v in metrics.items() if not k.startswith(SPREAD)}
    trainer.callback_metrics.update(watched)


def chosen_batch(trainer: Any, batch: Any, dataloader_idx: int, wanted: int) -> Any | None:
    """The part of a validation or test batch that comes from the loader ``wanted``, or None.

    A batch of several loaders that a hook of the user has rearranged is returned whole.

    Raises:
        ConfigurationError: there is no such loader.
    """
    loaders = _combined_loader(trainer)
    _check_index(loaders, wanted)
    if loaders._mode == "sequential":
        return batch if dataloader_idx == wanted else None
    try:
        return loaders._spec.flatten_up_to(batch)[wanted]
    except ValueError:
        return batch


def first_validation_batch(trainer: Any, wanted: int) -> Any | None:
    """The first batch of a validation loader, read from copies of its dataset and sampler.

    None where that is not possible, or where the user's own batch-transfer hooks would have to run once more: what
    they write to (counters, random streams, files) belongs to the run.

    Raises:
        ConfigurationError: there is no such loader.
    """
    loaders = _combined_loader(trainer)
    if loaders is None:
        return None
    _check_index(loaders, wanted)
    if _transfers_batches(trainer.lightning_module) or _transfers_batches(trainer.datamodule):
        return None
    batch = first_batch(loaders.flattened[wanted])
    return None if batch is None else trainer.precision_plugin.convert_input(batch)


def _transfers_batches(owner: Any) -> bool:
    """Whether a module or data module has batch-transfer hooks of its own, in place of Lightning's empty ones."""
    hooks = [getattr(owner, name, None) for name in TRANSFER_HOOKS]
    homes = [getattr(getattr(hook, "__func__", hook), "__module__", None) for hook in hooks if hook is not None]
    return any(home not in LIGHTNINGS_HOOKS for home in homes)


def _combined_loader(trainer: Any) -> Any:
    """All validation or test loaders of the running loop, or None where they have not been made yet."""
    fit, validate, test = trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop
    return {"fit": fit, "validate": validate, "test": test}[trainer.state.fn]._combined_loader


def _check_index(loaders: Any, wanted: int) -> None:
    if wanted >= len(loaders.flattened):
        raise ConfigurationError(
            f"val_dataloader_idx={wanted} is out of range: the number of loaders is {len(loaders.flattened)}, and they "
            f"are counted from 0."
        )
