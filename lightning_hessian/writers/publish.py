"""A record to every logger of a Trainer, and to a file. Loggers are told by what they can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_hessian.record import Record, named
from lightning_hessian.record_files import Session, save_record
from lightning_hessian.writers.scalars import scalars
from lightning_hessian.writers.tensorboard import about_skipped, diagnosis_tag, write_layout, write_tensorboard


def tensorboard_loggers(loggers: Sequence[Any]) -> list[Any]:
    """The TensorBoard loggers, of ``lightning`` and ``pytorch_lightning`` alike (two class trees)."""
    return [logger for logger in loggers if any(c.__name__ == "TensorBoardLogger" for c in type(logger).__mro__)]


def publish(
    record: Record,
    loggers: Sequence[Any],
    folder: str | None,
    session: Session | None,
    *,
    keep_matrices: bool,
    first: bool,
) -> dict[str, float]:
    """Saves, logs and draws ``record``; gives the scalars that were logged.

    Args:
        record: what was measured.
        loggers: of the Trainer; all get the scalars, TensorBoard gets everything.
        folder: where the record is saved, or None for nowhere.
        session: that the file is to tell.
        keep_matrices: whether the saved file holds the whole matrices.
        first: whether this is the run's first record, with which the charts are laid out.
    """
    metrics = scalars(record)
    if folder is not None:
        save_record(record if keep_matrices else replace(record, hessian=None), folder, session)
    for logger in loggers:
        logger.log_metrics(metrics, step=record.logged_step)
    for logger in tensorboard_loggers(loggers):
        if first:
            write_layout(logger.experiment, record)
        write_tensorboard(logger.experiment, record)
    return metrics


def publish_failure(message: str, loggers: Sequence[Any], logged_step: int, name: str | None = None) -> None:
    """Tells TensorBoard in words why there is no measurement at this step."""
    for logger in tensorboard_loggers(loggers):
        logger.experiment.add_text(diagnosis_tag(name), f"**No measurement here.** {message}", logged_step)


def publish_skip(
    num_skipped: int, loggers: Sequence[Any], logged_step: int, name: str | None = None
) -> dict[str, float]:
    """Tells every logger how many measurements were skipped so far, TensorBoard at the first one in words too."""
    metrics = {f"hessian_cost/{named(name, 'skipped')}": float(num_skipped)}
    for logger in loggers:
        logger.log_metrics(metrics, step=logged_step)
    if num_skipped == 1:
        for logger in tensorboard_loggers(loggers):
            logger.experiment.add_text(diagnosis_tag(name), f"**Skipped here.** {about_skipped(1)}", logged_step)
    return metrics
