"""Every logger of a Trainer gets what it can take; what it got is read back from what it wrote."""

import csv

import numpy as np
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from training import events, fit, scalar, small_monitor

from lightning_hessian import load_records

TAG = "hessian_lambda_max/logit_class_3"


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


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("checkpoint_first", [True, False])
def test_a_checkpoint_can_watch_the_curvature_wherever_it_stands(tmp_path, mode, checkpoint_first):
    checkpoint = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", monitor=TAG, mode=mode, save_top_k=1)
    callbacks = [checkpoint, small_monitor()] if checkpoint_first else [small_monitor(), checkpoint]
    fit(tmp_path, *callbacks, enable_checkpointing=True, max_epochs=4)
    after_epochs = list(means(tmp_path).values())[1:]
    best = {"min": np.argmin, "max": np.argmax}[mode](after_epochs)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [f"epoch={best}.ckpt"]
    assert float(checkpoint.best_model_score) == pytest.approx(after_epochs[best], rel=1e-6)
