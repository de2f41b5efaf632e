"""Measurements without a Trainer."""

from math import prod
from typing import Any

import torch
from torch import nn

from lightning_hessian import Record
from lightning_hessian.curvature.options import Options
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


def record_of_shape(*shape: int, labels: bool = True, num_samples: int = 2) -> Record:
    """A record of a small curved network of inputs of some shape, with every matrix."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(prod(shape), 5), nn.Tanh(), nn.Linear(5, 3))
    samples = Samples(torch.rand(num_samples, *shape), torch.arange(num_samples) % 2 * 2 if labels else None)
    monitor = Measurer([1, 2], "logit", "float32", Options(), heatmap_samples=num_samples)
    return monitor.measure(net, samples, step=12, logged_step=11, epoch=3)
