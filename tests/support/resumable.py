"""A run that gives the same numbers whether it was resumed or not; as a program, one that waits to be killed."""

import sys
import time
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_hessian.training import run
from support.training import Classifier, digits, fit, small_monitor


class ByStep(Classifier):
    """Takes its batch, and the stream of its dropout, by the step: a resumed epoch goes on where it was."""

    def __init__(self, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__(activation)
        self.batches = digits().tensors

    def training_step(self, batch, batch_idx):
        start = self.global_step % 4 * 16
        with torch.random.fork_rng():
            torch.manual_seed(self.global_step)
            return super().training_step([t[start : start + 16] for t in self.batches], batch_idx)


class Saves(Callback):
    """Saves a checkpoint, before monitors that stand behind it measure: after every second step or at validation."""

    def __init__(self, folder: Path, when: str) -> None:
        self.folder, self.when = folder, when

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.when == "steps" and trainer.global_step % 2 == 0:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_validation_end(self, trainer, pl_module):
        if self.when == "validation" and not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


class WaitsToBeKilled(ByStep):
    """Waits for ever in its forward, when that belongs to the ``number``-th measurement."""

    def __init__(self, folder: Path, number: int) -> None:
        super().__init__()
        measure, self.left = run.measure, number
        self.signal = folder / "measuring"

        def counted(*arguments, **options):
            self.left -= 1
            return measure(*arguments, **options)

        run.measure = counted

    def forward(self, x):
        if self.left == 0:
            self.signal.touch()
            time.sleep(600)
        return super().forward(x)


def monitor_of(saves: str, **arguments):
    return small_monitor(every_n_train_steps=2 if saves == "steps" else None, **arguments)


def resumable_fit(folder: Path, saves: str, *, monitor=None, model=None, **arguments):
    """Three epochs of four steps, measured and saved after every second step or, at ``"validation"``, every epoch."""
    torch.manual_seed(1)
    callbacks = Saves(folder, saves), monitor or monitor_of(saves)
    return fit(folder, *callbacks, model=model or ByStep(), max_epochs=3, **arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, number, saves = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.manual_seed(1)
    resumable_fit(folder, saves, model=WaitsToBeKilled(folder, number))
