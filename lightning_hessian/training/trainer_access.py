"""What a monitor reads from a Trainer, in one place. Knows Trainers by their attributes: imports no Lightning."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist
import torch.utils._pytree as pytree

from lightning_hessian.errors import ConfigurationError
from lightning_hessian.model.isolation import frozen_random_streams, preserved
from lightning_hessian.training.distributed import ProcessGroup
from lightning_hessian.training.samples import first_batch
from lightning_hessian.training.schedule import TrainingPosition
from lightning_hessian.writers.loggers import tensorboard_loggers

# Strategies that hold parameters in flat buffers of their own, from which torch cannot restore a whole module.
UNSUPPORTED_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy")


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


def log_folder(trainer: Any) -> str | None:
    """Where records are saved: beside the event file if there is one; nowhere in a fast_dev_run. Collective."""
    log_dir = trainer.log_dir  # Lightning broadcasts it
    if trainer.fast_dev_run:
        return None
    loggers = tensorboard_loggers(trainer.loggers)
    return loggers[0].log_dir if loggers else log_dir


def chosen_batch(trainer: Any, batch: Any, dataloader_idx: int, wanted: int) -> Any | None:
    """The part of a validation or test batch that comes from the loader ``wanted``, or None.

    Raises:
        ConfigurationError: there is no such loader.
    """
    loaders = _combined_loader(trainer)
    _check_index(loaders, wanted)
    if loaders._mode == "sequential":
        return batch if dataloader_idx == wanted else None
    return _part(loaders, batch, wanted)


def first_validation_batch(trainer: Any, pl_module: Any, wanted: int) -> Any | None:
    """The first batch of a validation loader, read from copies and passed through the user's hooks; None if impossible.

    Raises:
        ConfigurationError: there is no such loader.
    """
    loaders = _combined_loader(trainer)
    if loaders is None:
        return None
    _check_index(loaders, wanted)
    one_by_one = loaders._mode == "sequential"
    batch = first_batch(loaders.flattened[wanted]) if one_by_one else pytree.tree_map(first_batch, loaders.iterables)
    if batch is None or (not one_by_one and _part(loaders, batch, wanted) is None):
        return None
    index = wanted if one_by_one else 0
    # It is processed like any validation batch; the user's hooks may look at the trainer's stage.
    trainer.validating = True
    try:
        with frozen_random_streams(trainer.strategy.root_device), preserved(pl_module):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=index)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=index)
    finally:
        trainer.training = True
    return batch if one_by_one else _part(loaders, batch, wanted)


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


def _part(loaders: Any, batch: Any, wanted: int) -> Any:
    """The part of a combined batch that comes from the loader ``wanted``: both have the same structure."""
    paths, _ = pytree.tree_flatten_with_path(loaders.iterables)
    return pytree.key_get(batch, paths[wanted][0])
