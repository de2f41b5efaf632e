"""Files, pictures and words are written off the training thread, in order, and none is lost when training ends."""

import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from support.measuring import Measurer
from support.networks import mlp
from support.training import Classifier, events, fit, small_monitor

from lightning_hessian import KeepMatrices, load_records
from lightning_hessian.curvature.options import Options
from lightning_hessian.training.samples import Samples
from lightning_hessian.writers import publisher as publisher_module
from lightning_hessian.writers.background import THREAD_NAME
from lightning_hessian.writers.publisher import MAX_UNFINISHED, Publisher


def writers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith(THREAD_NAME)]


def idle_publisher(*loggers, folder=None):
    publisher = Publisher(loggers, keep_matrices=KeepMatrices())
    publisher.save_in(folder)
    return publisher


def test_jobs_run_in_order_on_a_thread_that_ends_with_them():
    publisher, seen = idle_publisher(), []
    publisher._jobs.submit(lambda: time.sleep(0.1))
    for number in range(5):
        publisher._jobs.submit(lambda number=number: seen.append((number, threading.current_thread().name)))
    publisher.flush()
    assert seen == [(number, THREAD_NAME) for number in range(5)]
    assert not writers()


def test_whoever_gives_jobs_waits_while_too_many_are_unfinished():
    publisher, gate, seen = idle_publisher(), threading.Event(), []
    running = threading.Event()
    publisher._jobs.submit(lambda: (running.set(), gate.wait()))
    running.wait()
    for number in range(MAX_UNFINISHED - 1):
        publisher._jobs.submit(lambda number=number: seen.append(number))
    giver = threading.Thread(target=publisher._jobs.submit, args=(lambda: seen.append("last"),))
    giver.start()
    giver.join(0.2)
    assert giver.is_alive()
    gate.set()
    giver.join()
    publisher.flush()
    assert seen == [*range(MAX_UNFINISHED - 1), "last"]


def test_a_job_that_fails_is_reported_and_the_jobs_after_it_run():
    publisher, seen, gate = idle_publisher(), [], threading.Event()

    def leave():
        gate.wait()
        raise SystemExit

    publisher._jobs.submit(leave)
    publisher._jobs.submit(lambda: seen.append("after"))
    gate.set()
    publisher.flush()
    assert seen == ["after"]
    (fault,) = publisher.faults()
    assert isinstance(fault.__cause__, SystemExit)


def test_where_no_thread_can_be_started_the_work_is_done_at_once(monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    publisher, seen = idle_publisher(), []
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        for _ in range(MAX_UNFINISHED + 1):
            publisher._jobs.submit(lambda: seen.append(threading.current_thread()))
    assert seen == [threading.main_thread()] * (MAX_UNFINISHED + 1)
    publisher._jobs.submit(lambda: seen.append(threading.current_thread()))
    publisher.flush()
    assert len(seen) == MAX_UNFINISHED + 2
    assert seen[-1] is not threading.main_thread()


def test_an_interrupt_while_working_at_once_is_not_swallowed(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    def fail(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    publisher = idle_publisher()
    with pytest.raises(KeyboardInterrupt):
        publisher._jobs.submit(interrupted)


EXITS = """
import sys, time
from lightning_hessian.writers.publisher import Publisher
publisher = Publisher([], keep_matrices=None)
for number in range(3):
    publisher._jobs.submit(lambda number=number: (time.sleep(0.1), print(number, flush=True)))
"""


def test_nothing_is_lost_when_the_interpreter_exits():
    command = [sys.executable, "-c", EXITS]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == ["0", "1", "2"]


def record_of(step=0):
    monitor = Measurer([0, 2], "prob", "float64", Options(), heatmap_samples=1)
    return monitor.measure(mlp(), Samples(torch.randn(2, 6), None), step=step, logged_step=step, epoch=0)


class Writer:
    """Notes the calls of a SummaryWriter by tag."""

    def __init__(self):
        self.steps = defaultdict(list)
        self.threads = set()

    def _note(self, tag, step):
        self.steps[tag].append(step)
        self.threads.add(threading.current_thread())

    def add_histogram_raw(self, tag, global_step, **values):
        self._note(tag, global_step)

    def add_image(self, tag, image, step, dataformats):
        assert image.dtype == np.uint8
        self._note(tag, step)

    def add_text(self, tag, text, step):
        self._note(tag, step)

    def _get_file_writer(self):
        return self

    def add_summary(self, summary, step):
        self._note(summary.value[0].tag, step)


class TensorBoardLogger:
    """Known by its name, as the loggers of both of Lightning's packages are."""

    def __init__(self):
        self.experiment = Writer()
        self.threads = set()

    def log_metrics(self, metrics, step):
        self.threads.add(threading.current_thread())


def test_only_scalars_are_logged_on_the_calling_thread_and_each_tag_keeps_its_order(tmp_path, monkeypatch):
    savers = set()
    save = publisher_module.save_record
    monkeypatch.setattr(
        publisher_module, "save_record", lambda *record: (savers.add(threading.current_thread()), save(*record))
    )
    logger = TensorBoardLogger()
    publisher = idle_publisher(logger, folder=str(tmp_path))
    for step in range(5):
        publisher.publish(record_of(step))
        publisher.publish_failure("words", step + 100)
    publisher.flush()
    assert publisher.faults() == []
    assert logger.threads == {threading.main_thread()}
    assert threading.main_thread() not in savers | logger.experiment.threads
    steps = logger.experiment.steps
    assert steps.pop("custom_scalars__config__") == [0]
    assert steps.pop("hessian_diagnosis") == [0, 100, 1, 101, 2, 102, 3, 103, 4, 104]
    kinds = ("hessian", "hessian_spectrum_signed_log10")
    assert set(steps) == {f"{kind}/prob_class_{k}" for kind in kinds for k in (0, 2)} | {"input_hessian"}
    assert all(seen == [0, 1, 2, 3, 4] for seen in steps.values())
    assert [r.step for r in load_records(tmp_path)] == [0, 1, 2, 3, 4]


class WandbLogger:
    """Known by its name; its pictures must not be logged from another thread."""

    def __init__(self):
        self.calls = []

    def log_metrics(self, metrics, step):
        self.calls.append(("scalars", step))

    def log_image(self, tag, images, step):
        assert threading.current_thread() is threading.main_thread()
        self.calls.append((tag, step))


def test_a_picture_is_logged_right_before_newer_scalars():
    """W&B puts what a user logs without a step at the last step it was given: that must be the newest one."""
    logger = WandbLogger()
    publisher = idle_publisher(logger)
    publisher.publish(record_of(0))
    publisher._jobs.wait()
    publisher.publish(record_of(1))
    publisher.flush()
    pictures = [[(f"hessian/prob_class_{k}", step) for k in (0, 2)] for step in (0, 1)]
    assert logger.calls == [("scalars", 0), *pictures[0], ("scalars", 1), *pictures[1]]


def streams():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002 - users'


def test_writing_draws_from_no_random_stream(tmp_path):
    record = record_of()
    before = streams()
    publisher = idle_publisher(TensorBoardLogger(), folder=str(tmp_path))
    publisher.publish(record)
    publisher.flush()
    assert streams() == before


class Slowly:
    """Makes every file take a while, so that who does not wait for it is seen."""

    def __init__(self):
        self.save = publisher_module.save_record

    def __call__(self, *arguments):
        time.sleep(0.1)
        return self.save(*arguments)


@pytest.fixture
def slow_disk(monkeypatch):
    monkeypatch.setattr(publisher_module, "save_record", Slowly())


class Look(Callback):
    """Notes which records are there when a checkpoint is saved, and pickles the monitor."""

    def __init__(self, folder, monitor):
        self.folder, self.monitor, self.seen = folder, monitor, {}

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.seen[trainer.global_step] = [r.step for r in load_records(self.folder)]
        pickle.dumps(self.monitor)


def test_a_checkpoint_waits_for_the_files_of_what_it_says_was_measured(tmp_path, slow_disk):
    monitor = small_monitor(on_error="warn")
    look = Look(tmp_path, monitor)
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1)
    fit(tmp_path, monitor, look, checkpoint, enable_checkpointing=True)
    assert look.seen == {4: [0, 4], 8: [0, 4, 8]}


def test_all_is_written_when_the_fit_returns_by_one_event_file(tmp_path, slow_disk):
    fit(tmp_path, small_monitor(on_error="warn"))
    assert not writers()
    assert [r.step for r in load_records(tmp_path)] == [0, 4, 8]
    assert len(list(tmp_path.glob("events*"))) == 1
    seen = events(tmp_path)
    assert [e.step for e in seen.Images("hessian/logit_class_2")] == [0, 3, 7]
    assert [e.step for e in seen.Tensors("hessian_diagnosis/text_summary")] == [0, 3, 7]


class Ends(Classifier):
    """Training ends early, right after a measurement."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            raise self.how


@pytest.mark.parametrize(
    ("raised", "seen"), [(ZeroDivisionError("a user's own"), ZeroDivisionError), (KeyboardInterrupt(), SystemExit)]
)
def test_what_was_measured_is_written_when_training_ends_early(tmp_path, slow_disk, raised, seen):
    handler = signal.getsignal(signal.SIGINT)
    monitor = small_monitor(on_error="warn")
    try:
        with pytest.raises(seen):
            fit(tmp_path, monitor, model=Ends(raised))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from then on
    assert not writers()
    assert [r.step for r in load_records(tmp_path)] == [0, 4]
    assert [e.step for e in events(tmp_path).Images("hessian/logit_class_2")] == [0, 3]
    fit(tmp_path / "again", monitor)
    assert [r.step for r in load_records(tmp_path / "again")] == [0, 4, 8]
