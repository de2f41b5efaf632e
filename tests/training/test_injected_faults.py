"""Faults of the machine and of other people's code: the run ends as it would have, with one warning of ours."""

import errno
import gc
import os
import signal
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from support.footprint_cases import Case, differing, run
from support.footprint_learners import Learner
from support.footprint_networks import mlp
from support.training import Classifier, fit, quick_monitor, small_monitor
from torch import nn

from lightning_hessian import load_records
from lightning_hessian.training.schedule import Budget
from lightning_hessian.writers import publisher


@pytest.fixture(name="one_warning")
def _one_warning(monkeypatch):
    """Runs a case without the monitor, and with it under a fault: both are the same, and the monitor warns once."""

    def check(case, folder, *parts, inject=lambda: None):
        without = run(case, folder / "without")
        inject()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            monitored = run(case, folder / "with", small_monitor(every_n_train_steps=2, on_error="warn"))
        assert differing(without, monitored) == []
        messages = [str(w.message) for w in caught if "InputHessianMonitor" in str(w.message)]
        assert len(messages) == bool(parts)
        assert all(part in messages[0] for part in parts)

    return check


CASE = Case(lambda: Learner(mlp()))


def raising(error):
    def fails(*arguments, **more):
        raise error

    return fails


def test_a_full_disk(tmp_path, monkeypatch, one_warning):
    full = raising(OSError(errno.ENOSPC, "No space left on device"))
    one_warning(CASE, tmp_path, "No space left", "Free space in", inject=lambda: monkeypatch.setattr(os, "fsync", full))
    assert not list((tmp_path / "with" / "input_hessian").iterdir())


def test_a_directory_that_is_read_only(tmp_path, monkeypatch, one_warning):
    refused = raising(PermissionError(errno.EACCES, "Permission denied"))
    one_warning(
        CASE,
        tmp_path,
        "PermissionError",
        "make it writable",
        inject=lambda: monkeypatch.setattr(tempfile, "mkstemp", refused),
    )


def test_a_file_system_that_fails_in_its_own_way(tmp_path, monkeypatch, one_warning):
    class ServerError(Exception):
        """Is no OSError."""

    def inject():
        monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.pipe_file", raising(ServerError("503")))
        monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.glob", raising(ServerError("503")))

    case = Case(lambda: Learner(mlp()), {"logger": CSVLogger(f"memory://{tmp_path.name}")})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        without = run(case, tmp_path / "without")
        inject()
        assert differing(without, run(case, tmp_path / "with", small_monitor(on_error="warn"))) == []


class Hangs(CSVLogger):
    """Takes its time for what the monitor logs."""

    def log_metrics(self, metrics, step=None):
        if any(tag.startswith("hessian") for tag in metrics):
            time.sleep(0.3)
        super().log_metrics(metrics, step)


def test_a_logger_that_hangs(tmp_path, monkeypatch, one_warning):
    monkeypatch.setattr(publisher, "SLOW", 0.25)
    case = Case(lambda: Learner(mlp()), {"logger": [TensorBoardLogger(tmp_path / "tb"), Hangs(tmp_path / "csv")]})
    one_warning(case, tmp_path, "logging scalars to Hangs took", "for which training waited")


class Closes(Callback):
    """Closes the logger's writer in the middle of the fit."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.logger.experiment.close()


def test_a_logger_that_is_closed(tmp_path, one_warning):
    one_warning(Case(lambda: Learner(mlp()), callbacks=lambda: [Closes()]), tmp_path)
    assert [r.step for r in load_records(tmp_path / "with")] == [0, 2, 3, 4, 6]


def test_a_clock_that_jumps(tmp_path, monkeypatch, one_warning):
    now, jumps = time.time, iter(range(10**9))

    def jumping():
        return now() + (-86400, 0, 86400)[next(jumps) % 3]

    one_warning(CASE, tmp_path, inject=lambda: monkeypatch.setattr(time, "time", jumping))
    assert [r.step for r in load_records(tmp_path / "with")] == [0, 2, 3, 4, 6]


def test_a_budget_under_a_clock_that_jumps_never_fails():
    times = iter([0.0, 100.0, 50.0, -7.0, 1e9, 3.0, 3.0, 3.0, -1e9, 0.0, 1.0, 2.0, 3.0, 4.0] * 4)
    budget = Budget(0.05, clock=lambda: next(times))
    budget.start()
    overheads = []
    for _ in range(5):
        if budget.allows():
            with budget.measuring():
                overheads.append(budget.overhead)
        budget.skip()
    assert overheads
    assert all(overhead is None or isinstance(overhead, float) for overhead in overheads)
    assert isinstance(budget.takes_much, bool)


class Moves(Learner):
    """Is moved to another dtype, and gets new tensors, in the middle of the fit, as by ``.to``."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.double()
            for parameter in self.parameters():
                parameter.data = parameter.data.clone()

    def validation_step(self, batch, batch_idx):
        pass


def test_a_model_that_is_moved(tmp_path, one_warning):
    one_warning(Case(lambda: Moves(mlp(), torch.optim.SGD)), tmp_path)
    assert [r.step for r in load_records(tmp_path / "with")] == [0, 2, 3, 4, 6]


class Offloaded(Learner):
    """Is on another device, without values, from the end of a validation to the start of the next epoch."""

    def on_validation_end(self):
        if not self.trainer.sanity_checking and self.trainer.current_epoch == 0:
            self.__dict__["kept"] = {name: value.clone() for name, value in self.state_dict().items()}
            self.to("meta")

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.to_empty(device="cpu")
            self.load_state_dict(self.kept)


def test_a_model_that_is_on_another_device_for_a_while(tmp_path, one_warning):
    """Where it has no values, there is nothing to measure; later measurements are made."""
    one_warning(
        Case(lambda: Offloaded(mlp(), torch.optim.SGD)), tmp_path, "no measurement at step 3", "on the meta device"
    )
    assert [r.step for r in load_records(tmp_path / "with")] == [0, 2, 4, 6]


class Terminated(Classifier):
    """Receives SIGTERM in step 2: in its measurement, or beside it."""

    def __init__(self, measured):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))
        self.measured, self.sent = measured, False

    def send(self):
        if not self.sent and self.trainer.training and self.trainer.global_step == 2:
            self.__dict__["sent"] = True
            os.kill(os.getpid(), signal.SIGTERM)

    def forward(self, x):
        if self.measured and not self.training:
            self.send()
        return super().forward(x)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if not self.measured:
            self.send()


def test_sigterm_in_a_measurement(tmp_path):
    """Lightning ends the run after the step, measured or not; what was measured until then is whole."""
    handler = signal.getsignal(signal.SIGTERM)
    weights = []
    try:
        for measured in (False, True):
            torch.manual_seed(0)
            model, monitors = Terminated(measured), [quick_monitor(every_n_train_steps=2)] if measured else []
            with pytest.raises(SystemExit):
                fit(tmp_path / str(measured), *monitors, model=model)
            weights.append(model.state_dict())
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    assert [r.step for r in load_records(tmp_path / "True")] == [0, 2]
    assert all(path.name.startswith("step_") for path in (tmp_path / "True" / "input_hessian").iterdir())


class Watches(Callback):
    """Notes open files, threads and objects."""

    def __init__(self):
        self.files, self.objects = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % 25 == 0:
            gc.collect()
            self.files.append(len(os.listdir("/proc/self/fd")))
            self.objects.append(len(gc.get_objects()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by /proc")
def test_many_measurements_hold_nothing(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(4), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 10))
    model, watches = Classifier(), Watches()
    model.net = net
    monitor = quick_monitor(every_n_train_steps=1, num_samples=1, every_n_epochs=None)
    fit(tmp_path, monitor, watches, model=model, max_epochs=-1, max_steps=100, limit_val_batches=1)
    assert len(load_records(tmp_path)) == 101
    assert max(watches.files) <= watches.files[0] + 2
    growth = (watches.objects[-1] - watches.objects[1]) / 50
    assert growth < 10  # objects per measurement; Lightning and the event file keep a few
    assert threading.active_count() < 10


def test_the_thread_that_writes_ends_with_its_work(tmp_path):
    """A DataLoader that forks its workers beside another thread is warned of by Python 3.12."""
    names = []

    class Looks(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and self.writing():
                time.sleep(0.01)
            names.append(self.writing())

        def writing(self):
            return [t.name for t in threading.enumerate() if "lightning-hessian" in t.name]

    fit(tmp_path, small_monitor(on_error="warn"), Looks())
    assert names == [[], []]
