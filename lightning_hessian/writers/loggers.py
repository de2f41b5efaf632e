"""What loggers accept: those of a Trainer, recognized by their class names, and event files without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_hessian.records.matrices import Array


class EventFile:
    """A directory's event file, with what publishing asks of a logger; opened when it is first written to.

    Args:
        log_dir: the directory.
        writer: a ``SummaryWriter`` of that directory, if there is one already: TensorBoard may lose what is in a second
            file. It stays open.
    """

    def __init__(self, log_dir: str, writer: Any = None) -> None:
        self._log_dir, self._writer, self._is_own = log_dir, writer, writer is None

    @property
    def experiment(self) -> Any:
        """Its ``SummaryWriter``."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._log_dir)
        return self._writer

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Writes scalars."""
        for tag, value in metrics.items():
            self.experiment.add_scalar(tag, value, step)

    def flush(self) -> None:
        """Writes out what is buffered."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Closes it, if it was opened here."""
        self.flush()
        if self._writer is not None and self._is_own:
            self._writer.close()
            self._writer = None


def tensorboard_loggers(loggers: Sequence[Any]) -> list[Any]:
    """The TensorBoard loggers, of ``lightning`` and ``pytorch_lightning`` alike (two class trees), and event files."""
    return [logger for logger in loggers if isinstance(logger, EventFile) or "TensorBoardLogger" in _names(logger)]


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
