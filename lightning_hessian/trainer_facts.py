"""What a monitor reads from a Trainer, in one place. Trainers are told by what they have: imports no Lightning."""

from __future__ import annotations

from typing import Any

from lightning_hessian.isolation import frozen_random_streams, preserved
from lightning_hessian.probe import first_batch
from lightning_hessian.schedule import Place
from lightning_hessian.writers.publish import tensorboard_loggers


def steps(trainer: Any) -> int:
    """Optimizer steps so far; batches so far where the user steps raw optimizers, which Lightning does not count."""
    return trainer.global_step or trainer.fit_loop.epoch_loop.batch_progress.total.ready


def logged_step(trainer: Any) -> int:
    """The loggers' step of the next batch."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def last_logged_step(trainer: Any) -> int:
    """The loggers' step of the batch that just ended, at which Lightning logs an epoch's own metrics."""
    return max(0, logged_step(trainer) - 1)


def place(trainer: Any) -> Place:
    """Where the run is, at the end of a batch."""
    return Place(steps(trainer), logged_step(trainer), trainer.current_epoch, trainer.is_last_batch)


def log_folder(trainer: Any) -> str | None:
    """Where records are saved: beside the event file if there is one; nowhere in a fast_dev_run."""
    log_dir = trainer.log_dir  # collective: every process must ask
    if trainer.fast_dev_run:
        return None
    loggers = tensorboard_loggers(trainer.loggers)
    return loggers[0].log_dir if loggers else log_dir


def first_validation_batch(trainer: Any, pl_module: Any) -> Any | None:
    """The first validation batch as the user's hooks shape it, read from copies; None where that is not possible."""
    loader = trainer.val_dataloaders
    while isinstance(loader, (list, tuple, dict)) and loader:
        loader = next(iter(loader.values() if isinstance(loader, dict) else loader))
    batch = first_batch(loader)
    if batch is None:
        return None
    # It goes the way of every validation batch; the user's hooks may look at the trainer's stage.
    trainer.validating = True
    try:
        with frozen_random_streams(trainer.strategy.root_device), preserved(pl_module):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
            return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    finally:
        trainer.training = True
