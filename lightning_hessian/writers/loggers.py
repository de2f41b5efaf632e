"""What a Trainer's loggers accept. They are recognized by their class names: imports no logger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning_hessian.records.record import Array


def tensorboard_loggers(loggers: Sequence[Any]) -> list[Any]:
    """The TensorBoard loggers, of ``lightning`` and ``pytorch_lightning`` alike (two class trees)."""
    return [logger for logger in loggers if "TensorBoardLogger" in _names(logger)]


def picture_loggers(loggers: Sequence[Any]) -> list[Any]:
    """The other loggers that have a public method for pictures."""
    return [logger for logger in loggers if _names(logger) & set(_LOG)]


def log_picture(logger: Any, tag: str, image: Array, step: int) -> None:
    """Logs a picture ``[H, W, 3]`` of uint8 to one of ``picture_loggers``; on the training thread, as its scalars."""
    (name,) = _names(logger) & set(_LOG)
    _LOG[name](logger, tag, image, step)


def _log_to_wandb(logger: Any, tag: str, image: Array, step: int) -> None:
    logger.log_image(tag, [image], step=step)


def _log_to_mlflow(logger: Any, tag: str, image: Array, step: int) -> None:
    logger.experiment.log_image(logger.run_id, image, key=tag, step=step)


_LOG: dict[str, Callable[[Any, str, Array, int], None]] = {"WandbLogger": _log_to_wandb, "MLFlowLogger": _log_to_mlflow}


def _names(logger: Any) -> set[str]:
    return {c.__name__ for c in type(logger).__mro__}
