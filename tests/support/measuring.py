"""Measurements without a Trainer."""

from typing import Any

from lightning_hessian import Record
from lightning_hessian.training.measurement import RunState, measure
from lightning_hessian.training.samples import Samples
from lightning_hessian.training.schedule import TrainingPosition
from lightning_hessian.training.settings import MeasurementSettings


class Measurer:
    """Measures with the same settings again and again, as a run does."""

    def __init__(self, *settings: Any, **more: Any) -> None:
        self.settings = MeasurementSettings(*settings, **more)
        self.state = RunState()

    def measure(
        self, model: Any, samples: Samples, *, step: int = 0, logged_step: int = 0, epoch: int = 0, **options: Any
    ) -> Record:
        """The next record."""
        position = TrainingPosition(step, logged_step, epoch)
        record = measure(model, samples, self.settings, self.state, position=position, **options)
        assert record is not None
        return record
