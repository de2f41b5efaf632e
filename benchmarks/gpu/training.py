"""Real fits on this device: the weights are the same with and without the monitor, and what the default one costs."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.gpu.suite import Suite
from benchmarks.price import ResNet18Widths

Works = dict[str, Callable[[], dict[str, Any]]]


def works(suite: Suite) -> Works:
    """Every fit by name."""
    device = suite.device
    return {
        "same weights, float32": lambda: same_weights(device, "32-true"),
        "same weights, bf16-mixed": lambda: same_weights(device, "bf16-mixed"),
        "same weights, torch.compile": lambda: same_weights(device, "32-true", compiled=True),
        "overhead of the default callback": lambda: overhead(device, suite.sizes.fit_images),
    }


def _learner(network: nn.Module) -> Any:
    from lightning.pytorch import LightningModule

    class Learner(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x)

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self(x), y)

        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)

    return Learner()


def _fit(
    network: nn.Module, device: torch.device, shape: tuple[int, ...], monitor: Any, folder: str, **options: Any
) -> tuple[Any, float]:
    """A fitted module, and the seconds of the fit."""
    from lightning.pytorch import Trainer, seed_everything
    from lightning.pytorch.loggers import CSVLogger

    seed_everything(0, verbose=False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    y = torch.randint(10, (len(x),), generator=generator)
    batch_size = options.pop("batch_size", 32)
    train = DataLoader(TensorDataset(x, y), batch_size, shuffle=True)
    held_out = DataLoader(TensorDataset(x[:64], y[:64]), 64)
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        callbacks=[] if monitor is None else [monitor],
        logger=CSVLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    module = _learner(network)
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, train, held_out)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return module, time.perf_counter() - begin


def _network() -> nn.Module:
    torch.manual_seed(0)
    conv = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.GELU(), nn.Conv2d(16, 16, 3, stride=2), nn.GELU()]
    return nn.Sequential(*conv, nn.Dropout(0.1), nn.Flatten(), nn.LazyLinear(10))


def same_weights(device: torch.device, precision: str, compiled: bool = False) -> dict[str, Any]:
    """Two epochs with deterministic algorithms, with and without the monitor: every tensor of the state, bit by bit."""
    from lightning_hessian import InputHessianMonitor, load_records

    states = []
    records: list[Any] = []
    for with_monitor in (False, True):
        network = _network()
        with torch.no_grad():
            network(torch.zeros(1, 3, 16, 16))
        network = torch.compile(network) if compiled else network
        with tempfile.TemporaryDirectory() as folder:
            monitor = InputHessianMonitor("label", num_samples=4, on_error="raise") if with_monitor else None
            options = {"precision": precision, "max_epochs": 2, "deterministic": True}
            module, _ = _fit(network, device, (256, 3, 16, 16), monitor, folder, **options)
            if with_monitor:
                records = load_records(module.trainer.log_dir)
        states.append({name: t.detach().cpu().clone() for name, t in module.state_dict().items()})
    different = [name for name, t in states[0].items() if not torch.equal(t, states[1][name])]
    errors = [
        float(r.finite_difference_error[~torch.isnan(torch.tensor(r.finite_difference_error))].max()) for r in records
    ]
    return {
        "ok": not different and bool(records),
        "different": different,
        "measurements": len(records),
        "valid": all(bool(r.valid.all()) for r in records),
        "finite_difference_error": max(errors, default=None),
    }


def overhead(device: torch.device, num_images: int) -> dict[str, Any]:
    """Three epochs of a ResNet-18 on 3×32×32, plain and with the default monitor, after a fit that warms up."""
    from lightning_hessian import InputHessianMonitor

    seconds = {}
    for name in ("warm-up", "plain", "monitor", "monitor, no heatmap"):
        torch.manual_seed(0)
        monitor = None
        if name.startswith("monitor"):
            monitor = InputHessianMonitor("label", heatmap_samples=0 if "no" in name else 1)
        with tempfile.TemporaryDirectory() as folder:
            options = {"max_epochs": 1 if name == "warm-up" else 3, "batch_size": 256}
            shape = (num_images, 3, 32, 32)
            _, seconds[name] = _fit(ResNet18Widths(), device, shape, monitor, folder, **options)
            seconds[f"{name}, bytes written"] = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
    return {
        "images": num_images,
        "epochs": 3,
        "measurements": 4,
        **{name: round(value, 3) for name, value in seconds.items()},
        "share": round(1 - seconds["plain"] / seconds["monitor"], 4),
        "share_without_heatmap": round(1 - seconds["plain"] / seconds["monitor, no heatmap"], 4),
    }
