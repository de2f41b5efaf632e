"""The samples of a run: given, from a batch that passes by, or read ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_hessian.errors import ConfigurationError
from lightning_hessian.training.samples import Samples
from lightning_hessian.training.settings import MonitorSettings
from lightning_hessian.training.trainer_access import chosen_batch, first_validation_batch


class SampleFinder:
    """Finds what the settings ask for, and checks it.

    Args:
        settings: of the monitor.
        warn: shows a warning on the first process.
    """

    def __init__(self, settings: MonitorSettings, warn: Callable[[str], object]) -> None:
        self._source, self._measurement = settings.samples, settings.measurement
        self._warn = warn

    def given(self) -> Samples:
        """Those of the argument ``samples``.

        Raises:
            ConfigurationError: they cannot be used, or not be read.
        """
        try:
            return self._selected(self._source.select, self._source.given)
        except ConfigurationError:
            raise
        except Exception as error:  # of the user's dataset, or of tensors without data
            raise ConfigurationError(
                f"The given samples cannot be read: {type(error).__name__}: {error}. Give samples=x, samples=(x, "
                f"labels) or samples=dataset."
            ) from error

    def of_batch(self, trainer: Any, batch: Any, dataloader_idx: int) -> Samples | None:
        """Those of a validation or test batch; None if it comes from another loader."""
        chosen = chosen_batch(trainer, batch, dataloader_idx, self._source.val_dataloader_idx)
        return None if chosen is None else self._checked(self._source.select_from_batch, chosen)

    def ahead(self, trainer: Any) -> Samples | None:
        """Those of the first validation batch, before it comes; None where reading it might change the run."""
        batch = first_validation_batch(trainer, self._source.val_dataloader_idx)
        return None if batch is None else self._checked(self._source.select_from_batch, batch)

    def _checked(self, select: Callable[[Any], Samples], source: Any) -> Samples:
        """The samples of a batch that happened to come; warns if it has fewer than are wanted."""
        samples = self._selected(select, source)
        wanted = self._source.num_samples
        if self._source.sample_indices is None and len(samples) < wanted:
            self._warn(
                f"num_samples={wanted}, but the batch has only {len(samples)}; all of them are measured. Give "
                f"samples=... for more."
            )
        return samples

    def _selected(self, select: Callable[[Any], Samples], source: Any) -> Samples:
        try:
            samples = select(source)
        except ConfigurationError:
            raise
        except Exception as error:
            if self._source.input_fn is None:
                raise
            raise ConfigurationError(
                f"input_fn failed with {type(error).__name__}: {error}. It is called with a batch, here a "
                f"{type(source).__name__}, and returns x or (x, labels)."
            ) from error
        self._measurement.check_samples(samples)
        return samples
