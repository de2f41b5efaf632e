"""What cannot be saved or shown warns once, everything else is still written, and training ends normally."""

import errno
import os
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from support.training import Classifier, events, fit, scalar, small_monitor

from lightning_hessian import load_records
from lightning_hessian.errors import WritingError
from lightning_hessian.writers import tensorboard

TAG = "hessian_trace/logit_class_2"


def forgiving(**arguments):
    return small_monitor(on_error="warn", **arguments)


@contextmanager
def one_warning(*parts):
    """The monitor warns once, and the warning holds each of ``parts``."""
    with pytest.warns(UserWarning, match="InputHessianMonitor") as caught:
        yield
    messages = [str(w.message) for w in caught]
    (message,) = [m for m in messages if "InputHessianMonitor" in m and "No TensorBoard logger" not in m]
    for part in parts:
        assert part in message


def images(folder) -> list[int]:
    return [event.step for event in events(folder).Images("hessian/logit_class_2")]


def texts(folder) -> list[int]:
    return [event.step for event in events(folder).Tensors("hessian_diagnosis/text_summary")]


def test_a_log_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    remedy = "make it writable, or give this run another directory"
    with one_warning("Saving the record failed. NotADirectoryError", remedy):
        trainer = fit(tmp_path, forgiving(), logger=False, default_root_dir=tmp_path / "file" / "logs")
    assert trainer.current_epoch == 2
    assert TAG in trainer.callback_metrics


def test_records_that_cannot_be_saved_are_still_shown(tmp_path):
    (tmp_path / "input_hessian").write_text("in the way")
    with one_warning("Saving the record failed. FileExistsError"):
        fit(tmp_path, forgiving())
    assert list(scalar(tmp_path, TAG)) == images(tmp_path) == texts(tmp_path) == [0, 3, 7]


def fill_disk_at(number, monkeypatch):
    """One of the files that are written does not fit, counted from 1."""
    flush, calls = os.fsync, []

    def full_once(descriptor):
        calls.append(descriptor)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full_once)


def test_a_disk_that_is_full_for_a_while(tmp_path, monkeypatch):
    fill_disk_at(2, monkeypatch)
    with one_warning("No space left on device", "Free space in"):
        fit(tmp_path, forgiving())
    assert [r.step for r in load_records(tmp_path)] == [0, 8]
    assert len(list((tmp_path / "input_hessian").iterdir())) == 2
    assert images(tmp_path) == texts(tmp_path) == [0, 3, 7]


def test_a_disk_that_stays_full_warns_once(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with one_warning("No space"):
        fit(tmp_path, forgiving())
    assert list((tmp_path / "input_hessian").iterdir()) == []


def test_the_last_record_that_cannot_be_saved_warns_too(tmp_path, monkeypatch):
    fill_disk_at(3, monkeypatch)
    with pytest.warns(UserWarning, match="Saving the record failed.*No space"):
        fit(tmp_path, forgiving())
    assert [r.step for r in load_records(tmp_path)] == [0, 4]


class Fragile(CSVLogger):
    """Refuses what the monitor logs."""

    def log_metrics(self, metrics, step=None):
        if any("hessian" in tag for tag in metrics):
            raise ConnectionError("the server is away")
        super().log_metrics(metrics, step)


def test_a_logger_that_refuses_scalars_keeps_no_other_from_them(tmp_path):
    after = TensorBoardLogger(tmp_path, name="", version="")
    with one_warning("Logging scalars to Fragile failed. ConnectionError: the server is away. Fix the logger"):
        trainer = fit(tmp_path, forgiving(), logger=[Fragile(tmp_path / "csv", name="", version=""), after])
    assert list(scalar(tmp_path, TAG)) == images(tmp_path) == texts(tmp_path) == [0, 3, 7]
    assert [r.step for r in load_records(tmp_path)] == [0, 4, 8]
    assert TAG in trainer.callback_metrics


def test_an_event_file_that_refuses_pictures_still_gets_the_rest(tmp_path, monkeypatch):
    def failing(*arguments, **more):
        raise ValueError("no pictures today")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_image", failing)
    with one_warning("Adding the pictures to the event file failed. ValueError: no pictures today"):
        fit(tmp_path, forgiving())
    seen = events(tmp_path)
    assert seen.Tags()["images"] == []
    assert len(seen.Histograms("hessian_spectrum_signed_log10/logit_class_2")) == 3
    assert list(scalar(tmp_path, TAG)) == texts(tmp_path) == [0, 3, 7]


def test_a_record_that_cannot_be_drawn_is_still_logged(tmp_path, monkeypatch):
    composite = tensorboard.composite

    def no_second_picture(record, class_id, **how):
        if record.step == 4:
            raise MemoryError("the canvas is too large")
        return composite(record, class_id, **how)

    monkeypatch.setattr(tensorboard, "composite", no_second_picture)
    with one_warning("Drawing the pictures failed. MemoryError", "heatmap_samples=0 draws none"):
        fit(tmp_path, forgiving())
    assert images(tmp_path) == [0, 7]
    assert list(scalar(tmp_path, TAG)) == texts(tmp_path) == [0, 3, 7]
    assert [r.step for r in load_records(tmp_path)] == [0, 4, 8]


@pytest.mark.parametrize("fault", ["file", "logger", "picture"])
def test_on_error_raise_ends_training_at_the_measurement_that_fails(tmp_path, monkeypatch, fault):
    model, loggers = Classifier(), [TensorBoardLogger(tmp_path, name="", version="")]
    if fault == "file":
        (tmp_path / "input_hessian").write_text("in the way")
    if fault == "logger":
        loggers.append(Fragile(tmp_path / "csv", name="", version=""))
    if fault == "picture":
        monkeypatch.setattr(tensorboard, "composite", lambda *_: 1 / 0)
    with pytest.raises(WritingError) as caught:
        fit(tmp_path, small_monitor(), model=model, logger=loggers)
    assert caught.value.__cause__ is not None
    assert model.flags == []  # not one step was trained
    assert list(scalar(tmp_path, TAG)) == [0]


def test_weights_are_those_of_a_run_without_faults(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "input_hessian").write_text("in the way")
    with pytest.warns(UserWarning, match="Saving the record failed"):
        one = fit(tmp_path / "bad", forgiving())
    two = fit(tmp_path / "good")
    weights = (t.lightning_module.state_dict().values() for t in (one, two))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
