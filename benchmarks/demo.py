"""The share of the demo's time that goes to measuring: examples/mnist_cnn.py as it is, and without heatmaps."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from benchmarks.common import save
from lightning_hessian import InputHessianMonitor, load_records

EXAMPLE = Path(__file__).parents[1] / "examples" / "mnist_cnn.py"
EPOCHS = 4
# Activation, samples with heatmaps, and the largest share that is wanted.
CASES = (("gelu", 2, 0.33), ("gelu", 0, 0.1), ("relu", 2, 0.03))


def example() -> ModuleType:
    """The demo as a module."""
    spec = importlib.util.spec_from_file_location("mnist_cnn", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fitted(demo: ModuleType, activation: str, monitors: list[InputHessianMonitor]) -> tuple[float, Any]:
    """Seconds of one fit, and the records of its measurements."""
    seed_everything(0, verbose=False)
    train, held_out = demo.digits()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=EPOCHS,
            logger=TensorBoardLogger(folder),
            callbacks=list(monitors),
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            log_every_n_steps=10,
        )
        begin = time.perf_counter()
        trainer.fit(
            demo.MnistCNN(activation),
            DataLoader(train, batch_size=64, shuffle=True),
            DataLoader(held_out, batch_size=250),
        )
        took = time.perf_counter() - begin
        return took, load_records(trainer.log_dir) if monitors else []


def main() -> None:
    """About three minutes on two cores."""
    demo, rows = example(), []
    alone = {activation: fitted(demo, activation, [])[0] for activation in ("gelu", "relu")}
    for activation, heatmap_samples, wanted in CASES:
        monitor = InputHessianMonitor(classes=[2, 3], num_samples=4, heatmap_samples=heatmap_samples)
        took, records = fitted(demo, activation, [monitor])
        measured = [record.seconds for record in records]
        rows.append(
            {
                "activation": activation,
                "heatmap_samples": heatmap_samples,
                "method": records[-1].method,
                "fit_seconds": round(took, 2),
                "fit_seconds_without": round(alone[activation], 2),
                "measurements": [round(seconds, 2) for seconds in measured],
                "share": round(sum(measured) / took, 3),
                "share_by_difference": round(1 - alone[activation] / took, 3),
                "wanted_at_most": wanted,
            }
        )
        print("demo:", rows[-1], flush=True)
        save("demo", {"rows": rows})


if __name__ == "__main__":
    main()
