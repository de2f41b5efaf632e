"""Records are where Lightning writes, nothing is written where it writes nothing, and ``load_records`` finds them."""

import subprocess
import sys

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from support import training
from support.training import Classifier, digits, trainer_of
from support.training import quick_monitor as quick
from torch.utils.data import DataLoader

from lightning_hessian import load_records
from lightning_hessian.records import locations
from lightning_hessian.writers import publisher
from lightning_hessian.writers.loggers import tensorboard_loggers

NO_PICTURES = "ignore:.*No TensorBoard logger:UserWarning"
NO_FILES = "ignore:.*Lightning writes no files:UserWarning"
STEPS = [0, 4]


def fit(folder, *monitors, **arguments):
    """One epoch."""
    return training.fit(folder, *monitors, **{"max_epochs": 1, **arguments})


def steps(log_dir, name=None):
    return [(r.step, r.stage) if r.stage != "fit" else r.step for r in load_records(log_dir, name)]


class Without(Logger):
    """Has no directory, as loggers of a server have."""

    name, version = "server", 0

    def __init__(self, save_dir=None):
        super().__init__()
        self.given = save_dir

    @property
    def save_dir(self):
        return self.given

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *arguments, **more):
        pass


def tensorboard(folder, name=""):
    return TensorBoardLogger(folder, name=name, version="")


LOGGERS = {
    "tensorboard": lambda f: tensorboard(f / "a"),
    "csv": lambda f: CSVLogger(f / "a", name="", version=""),
    "csv_versions": lambda f: CSVLogger(f / "a"),
    "csv_tensorboard": lambda f: [CSVLogger(f / "a"), tensorboard(f / "b")],
    "tensorboard_csv": lambda f: [tensorboard(f / "b"), CSVLogger(f / "a")],
    "two_tensorboards": lambda f: [tensorboard(f / "a"), tensorboard(f / "b")],
    "same_folder": lambda f: [CSVLogger(f, name="", version=""), tensorboard(f)],
    "server": lambda f: Without(),
    "server_tensorboard": lambda f: [Without(), tensorboard(f / "b")],
    "folder_tensorboard": lambda f: [Without(str(f / "a")), tensorboard(f / "b")],
    "none": lambda f: False,
}


@pytest.mark.filterwarnings(NO_PICTURES)
@pytest.mark.parametrize("given", [True, False], ids=["root", ""])
@pytest.mark.parametrize("kind", LOGGERS)
def test_the_directory_that_lightning_names_leads_to_the_records(tmp_path, monkeypatch, recwarn, kind, given):
    monkeypatch.chdir(tmp_path)
    root = {"default_root_dir": tmp_path / "root" if given else None}
    trainer = fit(tmp_path, quick(), logger=LOGGERS[kind](tmp_path), **root)
    assert steps(trainer.log_dir) == STEPS
    files = [path for path in tmp_path.rglob("*.safetensors") if path.name.startswith("step_")]
    assert len(files) == (0 if kind in ("none", "server") and not given else len(STEPS))
    if "tensorboard" in kind:
        assert steps(tensorboard_loggers(trainer.loggers)[0].log_dir) == STEPS


@pytest.mark.filterwarnings("error::UserWarning")
def test_loggers_without_a_directory_say_that_nothing_is_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.warns(
        UserWarning, match=r"name no directory.*Trainer\(default_root_dir=...\) to keep them, and a Tens"
    ):
        trainer = fit(tmp_path, quick(), logger=Without(), default_root_dir=None)
    assert steps(trainer.log_dir) == STEPS


def test_a_fit_that_measures_nothing_says_nothing_of_places(tmp_path, recwarn):
    fit(tmp_path, quick(), logger=Without(), limit_train_batches=0)
    assert not [w for w in recwarn if "InputHessianMonitor" in str(w.message)]


@pytest.mark.filterwarnings(NO_FILES)
@pytest.mark.parametrize(
    "arguments",
    [
        {"logger": False},
        {"logger": None, "barebones": True, "log_every_n_steps": None},
        {"fast_dev_run": True},
    ],
    ids=["no_logger", "barebones", "fast_dev_run"],
)
def test_where_lightning_writes_nothing_nothing_is_written(tmp_path, monkeypatch, arguments, recwarn):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        trainer = fit(tmp_path, quick(), default_root_dir=None, **arguments)
        assert list(tmp_path.iterdir()) == []
        records = load_records(trainer.log_dir)
        assert [r.step for r in records] == ([0, 1] if "fast_dev_run" in arguments else STEPS)
        assert np.isfinite(records[-1].lambda_max).all()


@pytest.mark.filterwarnings(NO_FILES)
def test_records_in_memory_are_limited(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(publisher, "MAX_IN_MEMORY", 1)
    with pytest.warns(UserWarning, match=r"Saving the record failed. MemoryError.*Give the Trainer a logger"):
        trainer = fit(tmp_path, quick(on_error="warn"), logger=False, default_root_dir=None)
    assert steps(trainer.log_dir) == [0]


@pytest.mark.filterwarnings(NO_PICTURES)
def test_a_file_system_of_fsspec(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = f"memory://{tmp_path.name}"
    monitors = [quick(), quick(name="other")]
    for _ in range(2):  # the second time, the first records are set aside
        trainer = fit(tmp_path, *monitors, logger=False, default_root_dir=root)
        assert trainer.log_dir == root
        assert steps(root) == steps(root, "other") == STEPS
    assert list(tmp_path.iterdir()) == []
    aside = locations.location(root) / "input_hessian"
    assert len(aside.glob("superseded_*/step_*.safetensors")) == 2
    with pytest.raises(FileNotFoundError, match="No records in memory://nowhere/input_hessian"):
        load_records("memory://nowhere")


@pytest.mark.filterwarnings(NO_PICTURES)
def test_a_run_is_resumed_from_a_file_system_of_fsspec(tmp_path):
    root = f"memory://{tmp_path.name}"
    fit(tmp_path, quick(), logger=False, default_root_dir=root).save_checkpoint(tmp_path / "one.ckpt")
    fit(tmp_path, quick(), logger=False, default_root_dir=root, ckpt_path=tmp_path / "one.ckpt", max_epochs=2)
    records = load_records(root)
    assert [r.step for r in records] == [0, 4, 8]
    assert np.isfinite(records[-1].top_subspace_overlap).any()  # the last record of the first part was found


def test_a_later_run_elsewhere_is_the_one_that_is_found(tmp_path, recwarn):
    """First beside a CSV file, then beside an event file, then beside the CSV file again."""
    for kind in ("csv", "both", "csv"):
        loggers = [CSVLogger(tmp_path / "csv", name="", version="")]
        loggers += [tensorboard(tmp_path / "events")] if kind == "both" else []
        fit(tmp_path, quick(), logger=loggers, max_epochs=1 if kind == "csv" else 2)
        assert steps(tmp_path / "csv") == ([0, 4] if kind == "csv" else [0, 4, 8])
    assert steps(tmp_path / "events") == [0, 4, 8]


def test_a_test_after_a_fit_is_found_with_it(tmp_path):
    class Tested(Classifier):
        def test_step(self, batch, batch_idx):
            pass

    trainer = trainer_of(
        tmp_path, quick(), max_epochs=1, logger=[CSVLogger(tmp_path / "csv"), tensorboard(tmp_path / "events")]
    )
    model, loader = Tested(), DataLoader(digits(64, 96), 16)
    trainer.fit(model, DataLoader(digits(), 16), loader)
    trainer.test(model, loader, verbose=False)
    assert steps(trainer.log_dir) == [0, 4, (4, "test")]


OTHER = """
import sys
from lightning_hessian.training.places import Places, RecordFolder
folder = RecordFolder(None)
print(folder.claim(Places(sys.argv[1], sys.argv[1]), 0)[1], flush=True)
sys.stdin.read()
"""


def test_two_runs_in_one_directory_keep_their_records_apart(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "[]\n"
        with pytest.warns(UserWarning, match="Another fit is saving its records in") as caught:
            trainer = fit(tmp_path, quick())
        assert sum("InputHessianMonitor" in str(warning.message) for warning in caught) == 1
        (apart,) = tmp_path.glob("concurrent_*")
        assert steps(apart) == STEPS
        assert steps(trainer.log_dir) == STEPS  # in this process
        assert not list((tmp_path / "input_hessian").iterdir())
    finally:
        other.communicate("")
    fit(tmp_path, quick())
    assert steps(tmp_path) == STEPS
