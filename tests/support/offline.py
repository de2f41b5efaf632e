"""A training that saves checkpoints, and what makes its models, for ``lightning-hessian measure``."""

import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from support.training import Classifier, digits, fit, small_monitor


class Tanh(nn.Module):
    """A plain module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))

    def forward(self, x):
        return self.net(x)


class Counting(Tanh):
    """Counts in buffers that are named as positions in a training are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.tensor(7))
        self.register_buffer("epoch", torch.tensor(2))


class TwoInputs(nn.Module):
    """Takes them by position."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(2, 6), nn.Linear(6, 3)

    def forward(self, a, b):
        return self.head(torch.tanh(self.first(a) * self.second(b)))


class Sequence(nn.Sequential):
    """Layers are numbers."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def linear() -> nn.Module:
    """A model without curvature."""
    return nn.Linear(4, 3)


class Sized(Classifier):
    """A module with an argument that it does not save."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size


def not_a_model() -> int:
    """Makes no model."""
    return 3


class Slowly(Callback):
    """Waits after every epoch."""

    def on_train_epoch_end(self, trainer, module):
        time.sleep(1.0)


def train(folder: Path, *callbacks, **arguments):
    """Two epochs with a checkpoint after each, and ``last.ckpt``; the samples are 2 of the held-out digits."""
    saved = ModelCheckpoint(dirpath=folder / "checkpoints", save_top_k=-1, save_last=True)
    monitor = small_monitor(samples=digits(64, 96).tensors, heatmap_samples=0)
    return fit(folder / "run", monitor, saved, *callbacks, enable_checkpointing=True, **arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), Slowly(), max_epochs=4)
