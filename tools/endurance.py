"""Measures many times in one fit, and prints what the process holds meanwhile: memory, open files, threads.

    python tools/endurance.py 2000
    python tools/endurance.py 400 --pictures
    python tools/endurance.py 20 --logger-hangs 30

The network is tiny, so that what grows would be the monitor's. With ``--logger-hangs``, one logger sleeps that many
seconds at the tenth measurement. The run must end as it would have, in that many seconds more, with one warning.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hessian import InputHessianMonitor, load_records


class Net(LightningModule):
    """Four inputs, three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """One step."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Brings the samples."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As usual."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Watch(Callback):
    """Prints what the process holds, twenty times in a fit."""

    def __init__(self, steps: int) -> None:
        self.every = max(steps // 20, 1)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        """Looks."""
        if trainer.global_step % self.every == 0:
            gc.collect()
            status = Path("/proc/self/status").read_text()
            resident = int(status.split("VmRSS:")[1].split()[0]) / 1024
            files = len(os.listdir("/proc/self/fd"))
            print(f"{trainer.global_step:6d} {resident:8.1f} MiB {files:4d} files {threading.active_count()} threads")


class Hangs(CSVLogger):
    """Sleeps once."""

    def __init__(self, folder: str, seconds: float) -> None:
        super().__init__(folder)
        self.seconds, self.told = seconds, 0

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Logs, late."""
        self.told += any(name.startswith("hessian") for name in metrics)
        if self.told == 10:
            self.told += 1
            time.sleep(self.seconds)
        super().log_metrics(metrics, step)


def main() -> None:
    """Two fits, one without the monitor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurements", type=int)
    parser.add_argument("--pictures", action="store_true", help="draw one at each measurement: ten times slower")
    parser.add_argument("--logger-hangs", type=float, default=0.0, metavar="SECONDS")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    weights = []
    for measured in (False, True):
        torch.manual_seed(0)
        model, data = Net(), TensorDataset(torch.randn(64, 4), torch.arange(64) % 3)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
            monitor = InputHessianMonitor(
                every_n_epochs=None, every_n_train_steps=1, num_samples=1, heatmap_samples=int(arguments.pictures)
            )
            loggers = [TensorBoardLogger(folder), Hangs(folder, arguments.logger_hangs)]
            trainer = Trainer(
                max_steps=arguments.measurements,
                max_epochs=-1,
                accelerator="cpu",
                logger=loggers if arguments.logger_hangs else loggers[:1],
                callbacks=[*([monitor] if measured else []), Watch(arguments.measurements)],
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
                limit_val_batches=1,
                check_val_every_n_epoch=10**6,
            )
            start = time.perf_counter()
            trainer.fit(model, DataLoader(data, 8, shuffle=True), DataLoader(data, 8))
            seconds = time.perf_counter() - start
            number = len(load_records(trainer.log_dir)) if measured else 0
            said = [str(w.message) for w in caught if "InputHessianMonitor" in str(w.message)]
        print(f"{number} records in {seconds:.0f} s; warnings of the monitor: {said}\n")
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    print(f"The same weights: {torch.equal(*weights)}")


if __name__ == "__main__":
    main()
