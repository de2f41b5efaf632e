"""A small but real training run on scikit-learn's digits, for tests of the callback."""

from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import DEFAULT_SIZE_GUIDANCE, EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_hessian import InputHessianMonitor, Record


def digits(start: int = 0, stop: int = 64) -> TensorDataset:
    """Real 8x8 digits as ``[N, 1, 8, 8]`` in [0, 1], with their labels."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[start:stop], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return TensorDataset(x, torch.tensor(labels[start:stop]))


class Augmented(Dataset):
    """Adds noise drawn from torch's global stream, as many image transforms do."""

    def __init__(self, inner: Dataset) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, i: int):
        x, y = self.inner[i]
        return x + 0.05 * torch.randn_like(x), y


class Stream(IterableDataset):
    """Held-out digits, as a stream: the package does not read it ahead."""

    def __iter__(self):
        yield from digits(64, 96)


class Classifier(LightningModule):
    """A small CNN with everything that has state: batch norms (one frozen by the user), dropout, buffers."""

    def __init__(self, activation: type[nn.Module] = nn.GELU, frozen: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            activation(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.BatchNorm1d(36),
            nn.Dropout(0.3),
            nn.Linear(36, 10),
        )
        self.frozen = frozen
        self.flags: list[list[bool]] = []

    def forward(self, x):
        self.last_input = x  # a plain attribute that a forward writes
        return self.net(x)

    def on_train_epoch_start(self):
        if self.frozen:
            self.net[1].eval()

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.flags.append([m.training for m in self.modules()])
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class TurnsNaN(Classifier):
    """Its weights become NaN in the second epoch."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            nn.init.constant_(self.net[0].weight, float("nan"))


def small_monitor(**arguments) -> InputHessianMonitor:
    """A monitor that measures two samples of classes 2 and 3."""
    return InputHessianMonitor(**{"classes": [2, 3], "num_samples": 2, "on_error": "raise", **arguments})


def quick_monitor(**arguments) -> InputHessianMonitor:
    """A monitor of one class and without pictures: what is looked at here is when it measures."""
    return small_monitor(**{"classes": [3], "heatmap_samples": 0, **arguments})


def trainer_of(folder: Path, *callbacks, **arguments) -> Trainer:
    """A quiet Trainer of two epochs that logs to TensorBoard."""
    return Trainer(
        **{
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": TensorBoardLogger(folder, name="", version=""),
            "callbacks": list(callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "log_every_n_steps": 1,
            "default_root_dir": folder,
            **arguments,
        }
    )


def fit(
    folder: Path,
    *callbacks,
    model: LightningModule | None = None,
    train: Dataset | None = None,
    held_out: Dataset | None = None,
    loaders=None,
    shuffle: bool = True,
    ckpt_path: Path | None = None,
    **trainer_arguments,
) -> Trainer:
    """Trains for two epochs of four batches, and gives the Trainer. ``loaders``: several, in place of ``held_out``."""
    torch.manual_seed(1)
    model = Classifier() if model is None else model
    trainer = trainer_of(folder, *callbacks, **trainer_arguments)
    if loaders is None and held_out is not False:
        loaders = DataLoader(digits(64, 96) if held_out is None else held_out, batch_size=16)
    train_loader = DataLoader(digits() if train is None else train, batch_size=16, shuffle=shuffle)
    trainer.fit(model, train_loader, loaders, ckpt_path=ckpt_path)
    return trainer


def events(folder: Path) -> EventAccumulator:
    """What TensorBoard's own reader finds in the event file, every step of it."""
    return EventAccumulator(str(folder), size_guidance=dict.fromkeys(DEFAULT_SIZE_GUIDANCE, 0)).Reload()


def scalar(folder: Path, tag: str) -> dict[int, float]:
    """The values of a scalar by step."""
    return {event.step: event.value for event in events(folder).Scalars(tag)}


def whole_hessians(record: Record, num_samples: int) -> np.ndarray:
    """``[num_samples, K, D, D]``: as saved, or from the eigenvectors of complete spectra."""
    return np.stack([[record.matrix(n, class_id) for class_id in record.class_ids] for n in range(num_samples)])
