"""Every logger of a Trainer gets what it can take; what it got is read back from what it wrote."""

import csv
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from support.training import events, fit, scalar, small_monitor

from lightning_hessian import load_records

TAG = "hessian_lambda_max/logit_class_3"
PICTURE = "hessian/logit_class_3"


def means(folder) -> dict[int, float]:
    return {r.logged_step: r.lambda_max[:, 1].mean() for r in load_records(folder)}


def test_csv_gets_the_scalars_at_the_records_steps(tmp_path):
    with pytest.warns(UserWarning, match="No TensorBoard logger"):
        fit(tmp_path, small_monitor(), logger=CSVLogger(tmp_path, name="", version=""))
    with open(tmp_path / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get(TAG)]
    assert {int(row["step"]): float(row[TAG]) for row in rows} == pytest.approx(means(tmp_path))
    assert list(means(tmp_path)) == [0, 3, 7]


def assert_complete(folder, records):
    seen = events(folder)
    steps = [0, 3, 7]
    assert scalar(folder, TAG) == pytest.approx(means(records))
    assert [e.step for e in seen.Images("hessian/logit_class_3")] == steps
    assert [e.step for e in seen.Histograms("hessian_spectrum_signed_log10/logit_class_3")] == steps
    assert [e.step for e in seen.Tensors("hessian_diagnosis/text_summary")] == steps
    assert any("custom_scalars" in tag for tag in seen.Tags()["tensors"])
    assert len(list(folder.glob("events*"))) == 1


def test_two_tensorboard_loggers_get_everything_and_files_lie_beside_the_first(tmp_path):
    loggers = [TensorBoardLogger(tmp_path / name, name="", version="") for name in ("one", "two")]
    fit(tmp_path, small_monitor(), logger=loggers)
    for name in ("one", "two"):
        assert_complete(tmp_path / name, tmp_path / "one")
    assert not (tmp_path / "two" / "input_hessian").exists()


def test_tensorboard_may_be_the_second_logger(tmp_path):
    loggers = [
        CSVLogger(tmp_path / "csv", name="", version=""),
        TensorBoardLogger(tmp_path / "board", name="", version=""),
    ]
    fit(tmp_path, small_monitor(), logger=loggers)
    assert_complete(tmp_path / "board", tmp_path / "board")
    assert TAG in (tmp_path / "csv" / "metrics.csv").read_text()


def installed(monkeypatch, name, **contents):
    """A module that can be imported."""
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return module


class WandbRun:
    """wandb's rule: a row has a step of its own, which never goes back; what comes too late is dropped."""

    id, name = "run", "run"

    def __init__(self):
        self.rows, self.step = [], -1

    def log(self, data, step=None):
        step = self.step + 1 if step is None else step
        assert step > self.step, "wandb drops this row: steps must be monotonically increasing"
        self.step = step
        self.rows.append(data)


@pytest.fixture
def wandb_run(monkeypatch):
    """A stand-in for wandb under Lightning's own WandbLogger."""
    installed(monkeypatch, "wandb", run=None, Image=lambda array: ("image", array.shape, array.dtype))
    for name, part in (("wandb.sdk", "sdk"), ("wandb.sdk.lib", "RunDisabled"), ("wandb.wandb_run", "Run")):
        installed(monkeypatch, name, **{part: type(part, (), {})})
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    return WandbRun()


def test_wandb_gets_scalars_and_pictures_at_their_steps(tmp_path, wandb_run):
    logger = WandbLogger(save_dir=tmp_path, experiment=wandb_run)
    fit(tmp_path, small_monitor(on_error="warn"), logger=[logger, TensorBoardLogger(tmp_path, name="", version="")])
    logged = {row["trainer/global_step"]: row[TAG] for row in wandb_run.rows if TAG in row}
    assert logged == pytest.approx(means(tmp_path))
    pictures = [row for row in wandb_run.rows if PICTURE in row]
    assert [row["trainer/global_step"] for row in pictures] == [0, 3, 7]
    ((kind, (_, _, depth), dtype),) = pictures[0][PICTURE]
    assert (kind, depth, dtype) == ("image", 3, np.uint8)


class MlflowClient:
    """The public methods that are used, as mlflow defines them."""

    def __init__(self, uri):
        self.metrics, self.images = [], []

    def get_run(self, run_id):
        return SimpleNamespace(info=SimpleNamespace(experiment_id="0"))

    def log_batch(self, run_id, metrics=(), params=()):
        self.metrics += metrics

    def log_image(self, run_id, image, artifact_file=None, key=None, step=None):
        assert artifact_file is None
        assert image.dtype == np.uint8
        self.images.append((run_id, key, step))

    def set_terminated(self, run_id, status):
        self.images.append(status)


@pytest.fixture
def mlflow(monkeypatch):
    """A stand-in for mlflow under Lightning's own MLFlowLogger."""
    installed(monkeypatch, "mlflow", set_tracking_uri=lambda uri: None)
    installed(monkeypatch, "mlflow.tracking", MlflowClient=MlflowClient)
    installed(monkeypatch, "mlflow.entities", Metric=SimpleNamespace, Param=SimpleNamespace)
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", True)


@pytest.mark.usefixtures("mlflow")
def test_mlflow_gets_scalars_and_pictures_before_its_run_ends(tmp_path):
    logger = MLFlowLogger(save_dir=str(tmp_path), run_id="mine")
    fit(tmp_path, small_monitor(on_error="warn"), logger=[logger, TensorBoardLogger(tmp_path, name="", version="")])
    client = logger.experiment
    assert {m.step: m.value for m in client.metrics if m.key == TAG} == pytest.approx(means(tmp_path))
    *images, status = client.images
    assert [step for run_id, key, step in images if (run_id, key) == ("mine", PICTURE)] == [0, 3, 7]
    assert status == "FINISHED"


@pytest.mark.parametrize(("mode", "checkpoint_first"), [("min", True), ("max", False)])
def test_a_checkpoint_can_watch_the_curvature_wherever_it_stands(tmp_path, mode, checkpoint_first):
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", filename="{epoch}", monitor=TAG, mode=mode, save_top_k=1)
    callbacks = [checkpoint, small_monitor()] if checkpoint_first else [small_monitor(), checkpoint]
    fit(tmp_path, *callbacks, enable_checkpointing=True, max_epochs=4)
    after_epochs = list(means(tmp_path).values())[1:]
    best = {"min": np.argmin, "max": np.argmax}[mode](after_epochs)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"epoch={best}.ckpt"]
    assert float(checkpoint.best_model_score) == pytest.approx(after_epochs[best], rel=1e-6)
