"""Trainers of ``pytorch_lightning``, a second tree of Lightning's classes, and LightningCLI of both packages."""

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from lightning_hessian import InputHessianMonitor, load_records

# Each package in a process of its own: a user has one of them.
SCRIPT = """
import warnings
import {package} as pl
from {package}.callbacks import EarlyStopping
from {package}.cli import LightningCLI
from {package}.loggers import TensorBoardLogger
from {package}.utilities.exceptions import MisconfigurationException
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
warnings.filterwarnings("error")  # of libraries' imports, those of old versions are deprecations in newer ones
for harmless in ("`torch.jit.script` is deprecated", "`isinstance", ".*does not have many workers"):
    warnings.filterwarnings("ignore", harmless)
from lightning_hessian import InputHessianMonitor

images, labels = load_digits(return_X_y=True)
x = torch.tensor(images[:96], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
y = torch.tensor(labels[:96])

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 10))
    def forward(self, x):
        self.log("inside", x.mean())
        return self.net(x)
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(x[:64], y[:64]), 16)
    def val_dataloader(self):
        return DataLoader(TensorDataset(x[64:], y[64:]), 16)

def run(folder, *callbacks):
    torch.manual_seed(0)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=TensorBoardLogger(folder, name="", version=""), callbacks=[*callbacks],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1,
    )
    model = Net()
    trainer.fit(model, Data())
    return trainer, model
"""

FIT = """
monitor = InputHessianMonitor(3, num_samples=2, heatmap_samples=0, on_error="raise")
assert isinstance(monitor, pl.Callback)
watch = EarlyStopping("hessian_trace/logit_class_3", patience=9)
trainer, model = run("with", monitor, watch)
assert watch.best_score.isfinite()
plain, same = run("without")
assert trainer.callback_metrics["inside"] == plain.callback_metrics["inside"]
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters()))
trainer.validate(model, Data(), verbose=False)
for wrong in ({"num_samples": 0}, {"classes": 99}):
    try:
        run("wrong", InputHessianMonitor(**{"classes": 3, **wrong}))
    except MisconfigurationException as error:
        assert "InputHessianMonitor: " in str(error)
    else:
        raise AssertionError("nothing was raised")
"""

ARGUMENTS = {
    "classes": [2, 3],
    "target": "log_prob",
    "every_n_epochs": None,
    "epochs": [0],
    "every_n_train_steps": 3,
    "val_dataloader_idx": 0,
    "sample_indices": [0, 2],
    "num_samples": 2,
    "heatmap_samples": 1,
    "method": "dense",
    "num_eigenvalues": 4,
    "density_vectors": 2,
    "dtype": "float64",
    "wrt": "net.0",
    "input_fn": "functions.inputs",
    "forward_fn": "functions.forward",
    "output_fn": "functions.outputs",
    "chunk_size": 8,
    "max_memory": 1_000_000_000,
    "max_seconds": 3600.0,
    "max_overhead": None,  # a share would leave out measurements by the clock
    "keep_matrices": {"every_n": 2, "max_total_bytes": 1_000_000},
    "class_names": list("abcdefghij"),
    "on_error": "raise",
    "seed": 3,
    "name": "yaml",
}

FUNCTIONS = """
def inputs(batch):
    return batch[0], batch[1]

def forward(module, x):
    return module(x)

def outputs(z):
    return 2 * z

def target(outputs, classes):
    return outputs.gather(1, classes) ** 2
"""


def run(folder: Path, package: str, work: str) -> None:
    (folder / "functions.py").write_text(FUNCTIONS)
    (folder / "script.py").write_text(SCRIPT.format(package=package) + work)
    done = subprocess.run([sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_a_trainer_of_either_package(tmp_path, package):
    run(tmp_path, package, FIT)
    assert [(r.step, r.stage) for r in load_records(tmp_path / "with")] == [
        (0, "fit"), (4, "fit"), (8, "fit"), (8, "validate"),
    ]  # fmt: skip


def configuration(folder: Path, **arguments) -> None:
    monitor = {"class_path": "lightning_hessian.InputHessianMonitor", "init_args": arguments}
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": ".", "name": "", "version": "run"}}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    trainer = {"accelerator": "cpu", "max_epochs": 2, "logger": logger, "callbacks": [monitor], **quiet}
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 1, "trainer": trainer}))


# Lightning's own use of jsonargparse is what is deprecated.
CLI = """
from jsonargparse._deprecated import JsonargparseDeprecationWarning
warnings.simplefilter("ignore", JsonargparseDeprecationWarning)
LightningCLI(Net, Data, args=['fit', '--config', 'config.yaml'])
"""


def test_every_plain_argument_from_a_yaml_file(tmp_path):
    configuration(tmp_path, **ARGUMENTS)
    run(tmp_path, "lightning.pytorch", CLI)
    records = load_records(tmp_path / "run", name="yaml")
    assert [r.step for r in records] == [0, 3, 4, 6, 8]
    assert [r.hessian is not None for r in records] == [True, False, True, False, True]
    record = records[-2]
    assert (record.target, record.method, record.class_ids) == ("log_prob", "dense", (2, 3))
    assert (record.x.shape, record.x.dtype) == ((2, 64), np.float64)
    assert record.eigenvectors.shape == (2, 2, 4, 64)
    assert record.why_no_matrix == "Whole matrices are stored at every 2nd measurement only."
    assert record.class_names == tuple("abcdefghij")
    wanted = {
        "chunk_size": 8,
        "max_memory": 10**9,
        "max_seconds": 3600.0,
        "seed": 3,
        "density_vectors": 2,
        "dtype": "float64",
    }
    assert {name: record.made_with[name] for name in wanted} == wanted


def test_a_function_as_target_and_words_from_a_yaml_file(tmp_path):
    configuration(tmp_path, classes="label", target="functions.target", chunk_size="auto", wrt=None, num_samples=2)
    run(tmp_path, "pytorch_lightning", CLI)
    assert {(r.target, r.class_ids) for r in load_records(tmp_path / "run")} == {("target", ("label",))}


def test_the_yaml_file_names_every_argument():
    assert set(inspect.signature(InputHessianMonitor).parameters) == {*ARGUMENTS, "samples"}  # which is no plain value
