"""Runs that are killed and resumed, and several monitors in one Trainer."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support.footprint_cases import Case, differing, run
from support.footprint_learners import Learner
from support.footprint_networks import cnn
from support.resumable import resumable_fit
from support.training import Classifier, TurnsNaN, digits, events, fit, scalar, small_monitor, trainer_of
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from lightning_hessian import load_records
from lightning_hessian.training.resume import from_state, to_state
from lightning_hessian.training.run_state import RunState
from lightning_hessian.training.schedule import Schedule, TrainingPosition

TAG = "hessian_trace/logit_class_2"
KEY = "InputHessianMonitor{'name': None}"
X, Y = digits(200, 210).tensors

# The data are read anew from the start after a resume in mid-epoch; the model of these tests takes its batch by step.
pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")


def killed_in_measurement(folder: Path, number: int, saves: str) -> None:
    """Starts a run in another process, and kills it while it measures for the ``number``-th time."""
    tests = Path(__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, "-m", "support.resumable", folder, str(number), saves],
        env={**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"},
    )
    ready = folder / "measuring"
    while not ready.exists():
        assert process.poll() is None, "the run ended before it was to be killed"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def numbers(folder: Path) -> dict[int, dict[str, np.ndarray]]:
    """What was measured at each step."""
    names = (
        "x",
        "labels",
        "eigenvalues",
        "trace",
        "hessian",
        "top_eigenvector_cosine",
        "top_subspace_overlap",
        "epoch",
        "logged_step",
        "color_scale",
    )
    return {r.step: {name: getattr(r, name) for name in names} for r in load_records(folder)}


def assert_same(found, expected):
    assert list(found) == list(expected)
    for step, values in expected.items():
        for name, value in values.items():
            np.testing.assert_array_equal(found[step][name], value, err_msg=f"{name} at step {step}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folders of runs that nothing stopped."""
    folders = {saves: tmp_path_factory.mktemp(saves) for saves in ("validation", "steps")}
    for saves, folder in folders.items():
        resumable_fit(folder, saves)
    return folders


@pytest.mark.parametrize(
    ("saves", "number", "killed_at"),
    [
        ("validation", 3, 8),  # the end of an epoch
        ("steps", 4, 6),  # the middle of an epoch
        ("steps", 5, 8),  # its last batch, after which Lightning does not resume the epoch
    ],
)
def test_a_run_killed_while_it_measures_goes_on_without_a_gap(tmp_path, uninterrupted, saves, number, killed_at):
    """The checkpoint was saved before the measurement."""
    killed_in_measurement(tmp_path, number, saves)
    (tmp_path / "input_hessian" / ".step_000000008.safetensors.left").write_bytes(b"half of a reco")
    before, expected = numbers(tmp_path), numbers(uninterrupted[saves])
    assert list(before) == [step for step in expected if step < killed_at]
    checkpoint = tmp_path / f"{killed_at}.ckpt"
    assert torch.load(checkpoint, weights_only=True)["callbacks"][KEY]["measured_step"] == list(before)[-1]
    trainer = resumable_fit(tmp_path, saves, ckpt_path=checkpoint)
    assert trainer.global_step == 12
    assert_same(numbers(tmp_path), expected)
    files = [f"step_{step:09d}.safetensors" for step in expected]  # none measured twice, none left half-written
    assert sorted(p.name for p in (tmp_path / "input_hessian").iterdir()) == files
    assert scalar(tmp_path, TAG) == scalar(uninterrupted[saves], TAG)


def test_a_run_resumed_from_an_earlier_checkpoint_supersedes_what_came_after_it(tmp_path, uninterrupted):
    shutil.copytree(uninterrupted["steps"], tmp_path, dirs_exist_ok=True)
    monitor = small_monitor(every_n_epochs=2, seed=1)
    with pytest.warns(UserWarning, match=r"resumed with other settings than the checkpoint's: seed: 1 \(was 0\)\."):
        resumable_fit(tmp_path, "steps", monitor=monitor, ckpt_path=tmp_path / "4.ckpt")
    records = [(r.step, r.made_with["seed"]) for r in load_records(tmp_path)]
    assert records == [(0, 0), (2, 0), (4, 0), (8, 1), (12, 1)]
    (aside,) = (tmp_path / "input_hessian").glob("superseded_*")
    assert sorted(path.name for path in aside.iterdir()) == [f"step_{s:09d}.safetensors" for s in (6, 8, 10, 12)]


def test_a_fresh_fit_sets_all_records_of_an_earlier_one_aside_but_not_those_of_a_test(tmp_path):
    fit(tmp_path, small_monitor(), max_epochs=1)
    trainer_of(tmp_path, small_monitor()).validate(Classifier(), DataLoader(digits(64, 96), 16), verbose=False)
    fit(tmp_path, small_monitor(seed=1), max_epochs=1)
    records = [(r.step, r.stage, r.made_with["seed"]) for r in load_records(tmp_path)]
    assert sorted(records) == [(0, "fit", 1), (0, "validate", 0), (4, "fit", 1)]
    (aside,) = (tmp_path / "input_hessian").glob("superseded_*")
    assert sorted(path.name for path in aside.iterdir()) == ["step_000000000.safetensors", "step_000000004.safetensors"]


@pytest.mark.parametrize(
    ("position", "measured_step", "step", "missed"),
    [
        (TrainingPosition(), None, 0, True),
        (TrainingPosition(), 0, 0, False),
        (TrainingPosition(4, 3, 0, True), 0, 4, True),
        (TrainingPosition(4, 3, 0, True), 4, 4, False),
        (TrainingPosition(4, 3, 0, False), 0, 4, False),  # in the middle of an epoch
        (TrainingPosition(6, 5, 0, False), 0, 6, True),
        (TrainingPosition(6, 5, 0, False), 0, 12, False),  # not the position of this checkpoint
    ],
)
def test_what_a_killed_run_missed(position, measured_step, step, missed):
    schedule = Schedule(every_n_epochs=1, every_n_train_steps=6)
    assert schedule.missed(step, position, measured_step) is missed


def test_what_a_limit_in_seconds_decided_ends_with_it():
    """A run that gave up complete spectra for ``max_seconds`` does not do so where there is no limit any more."""
    limited, free = (small_monitor(**limit)._settings for limit in ({"max_seconds": 10}, {}))
    saved = to_state(RunState(method="lanczos"), limited)
    assert from_state(saved, limited, None)[0].method == "lanczos"
    run, warning = from_state(saved, free, None)
    assert run.method is None
    assert "max_seconds: None (was 10)" in warning


@pytest.fixture(scope="module")
def first_epoch(tmp_path_factory):
    """A checkpoint after the first epoch of two, whose samples nothing but the checkpoint remembers."""
    folder = tmp_path_factory.mktemp("first")
    return saved(folder, small_monitor())


def saved(folder, monitor):
    """The checkpoint of a fit of one epoch."""
    fit(folder, monitor, max_epochs=1).save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def go_on(folder, checkpoint, monitor, **arguments):
    """The second epoch, with other held-out samples; returns its record."""
    held_out = arguments.pop("held_out", digits(300, 332))
    fit(folder, monitor, held_out=held_out, ckpt_path=checkpoint, **arguments)
    return load_records(folder)[-1]


def test_the_sanity_check_of_a_resumed_run_does_not_replace_the_samples(tmp_path, first_epoch):
    record = go_on(tmp_path, first_epoch, small_monitor())
    assert np.array_equal(record.x, digits(64, 66).tensors[0].numpy())
    assert np.isfinite(record.top_subspace_overlap).all()  # compared with the last measurement before
    assert [r.step for r in load_records(tmp_path)] == [8]


@pytest.mark.parametrize(
    ("arguments", "sentence", "start"),
    [
        ({"classes": [4]}, r"classes: \[4\] \(was \[2, 3\]\)", 64),
        ({"target": "prob"}, r"target: prob \(was auto\)", 64),
        ({"samples": X, "num_samples": 2}, r"samples: given samples \(was the first validation batch\)", 200),
        ({"num_samples": 3}, r"num_samples: 3 \(was 2\)", 300),
        (
            {"classes": (2, 3), "num_samples": 2, "sample_indices": [0, 1]},
            r"sample_indices: \[0, 1\] \(was None\)",
            300,
        ),
    ],
)
def test_other_settings_apply_and_warn_once(tmp_path, first_epoch, arguments, sentence, start):
    with pytest.warns(UserWarning, match=f"resumed with other settings.*{sentence}") as caught:
        record = go_on(tmp_path, first_epoch, small_monitor(**arguments))
    assert sum("other settings" in str(w.message) for w in caught) == 1
    x, _ = digits(start, start + len(record.x)).tensors
    assert np.array_equal(record.x, x.numpy())
    assert len(record.x) == arguments.get("num_samples", 2)
    assert record.class_ids == ((4,) if arguments.get("classes") == [4] else (2, 3))
    assert record.target == arguments.get("target", "logit")
    assert np.isnan(record.top_subspace_overlap).all()


def test_other_given_samples_warn(tmp_path):
    checkpoint = saved(tmp_path, small_monitor(samples=X))
    go_on(tmp_path / "same", checkpoint, small_monitor(samples=X))
    with pytest.warns(UserWarning, match="samples: other samples"):
        record = go_on(tmp_path / "other", checkpoint, small_monitor(samples=X + 1))
    assert np.array_equal(record.x, X[:2].numpy() + 1)


def test_samples_that_lack_what_is_needed_now_are_replaced_with_a_warning(tmp_path):
    unlabeled = saved(tmp_path, small_monitor(input_fn=lambda batch: batch[0]))
    with pytest.warns(UserWarning, match="new samples, since the checkpoint's cannot be used.*needs integer labels"):
        record = go_on(tmp_path / "other", unlabeled, small_monitor(classes="label"))
    assert np.array_equal(record.x, digits(300, 302).tensors[0].numpy())


class Wider(Classifier):
    """Takes nothing but images of 8x8 that have been doubled in width."""

    def forward(self, x):
        return super().forward(x.unflatten(-1, (8, 2)).mean(-1))


def test_samples_that_no_longer_fit_the_model_warn(tmp_path, first_epoch):
    wide = [TensorDataset(x.repeat_interleave(2, -1), y) for x, y in (digits().tensors, (X, Y))]
    reason = r".*samples from the checkpoint.*shape \[2, 1, 8, 8\].*other samples"
    with (
        pytest.warns(UserWarning, match="ended without a single record" + reason),
        pytest.warns(UserWarning, match="no measurement at step 8" + reason),
    ):
        fit(
            tmp_path,
            small_monitor(on_error="warn"),
            model=Wider(),
            train=wide[0],
            held_out=wide[1],
            ckpt_path=first_epoch,
        )


def test_a_checkpoint_holds_the_path_of_the_last_record_and_not_its_arrays(tmp_path):
    checkpoint = saved(tmp_path / "run", small_monitor())
    state = torch.load(checkpoint, weights_only=True)["callbacks"][KEY]
    assert state["last_record"] == str(tmp_path / "run" / "input_hessian" / "step_000000004.safetensors")
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
    of_checks = 2 * (4 + 1 + 1)  # for each sample a step in float32 and two flags
    assert sum(t.nbytes for t in tensors) == sum(t.nbytes for t in digits(64, 66).tensors) + of_checks


@pytest.mark.parametrize("fate", ["removed", "damaged", "replaced"])
def test_without_the_file_of_the_last_record_the_comparison_starts_anew(tmp_path, fate):
    checkpoint = saved(tmp_path / "run", small_monitor())
    last = tmp_path / "run" / "input_hessian" / "step_000000004.safetensors"
    if fate == "removed":
        last.unlink()
    elif fate == "damaged":
        last.write_bytes(last.read_bytes()[:1000])
    else:
        fit(tmp_path / "other", small_monitor(), max_epochs=1)
        shutil.copy(tmp_path / "other" / "input_hessian" / last.name, last)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "InputHessianMonitor")
        record = go_on(tmp_path / "on", checkpoint, small_monitor())
    assert np.isnan(record.top_subspace_overlap).all()
    assert np.array_equal(record.x, digits(64, 66).tensors[0].numpy())


def two_monitors():
    return small_monitor(name="logits"), small_monitor(name="probs", classes=[1], target="prob", every_n_epochs=2)


def test_two_monitors_do_not_mix(tmp_path):
    trainer = fit(tmp_path, *two_monitors(), max_epochs=4)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert [(r.name, r.step) for r in load_records(tmp_path, "logits")] == [("logits", s) for s in (0, 4, 8, 12, 16)]
    assert [(r.name, r.step) for r in load_records(tmp_path, "probs")] == [("probs", s) for s in (0, 8, 16)]
    with pytest.raises(FileNotFoundError, match="give name='logits' or 'probs'"):
        load_records(tmp_path)
    seen = events(tmp_path)
    tags = seen.Tags()
    assert {"hessian/logits_logit_class_2", "hessian/probs_prob_class_1"} < set(tags["images"])
    for name, suffix in (("logits", "logits_logit_class_2"), ("probs", "probs_prob_class_1")):
        assert len(scalar(tmp_path, f"hessian_trace/{suffix}")) == len(load_records(tmp_path, name))
        assert f"hessian_trace/{suffix}" in trainer.callback_metrics
        assert {f"hessian_cost/{name}_seconds", f"hessian_spread/trace_{suffix}_p10"} < set(tags["scalars"])
        assert f"hessian_diagnosis/{name}/text_summary" in tags["tensors"]
    shown = seen.Tensors("custom_scalars__config__")[-1]  # TensorBoard looks at the last one
    layout = layout_pb2.Layout.FromString(shown.tensor_proto.string_val[0])
    assert [category.title.split(":")[0] for category in layout.category] == [
        "Input Hessian logits",
        "Input Hessian probs",
    ]
    states = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert {k for k in states if "Hessian" in k} == {
        "InputHessianMonitor{'name': 'logits'}",
        "InputHessianMonitor{'name': 'probs'}",
    }


def test_two_monitors_leave_training_as_it_is(tmp_path):
    case = Case(lambda: Learner(cnn()))
    without = run(case, tmp_path / "without")
    assert differing(without, run(case, tmp_path / "with", *two_monitors())) == []


@pytest.mark.parametrize("names", [(None, None), ("a", "a"), ("a", "A"), (None, "b", None)])
def test_monitors_of_the_same_name_raise(tmp_path, names):
    with pytest.raises(
        MisconfigurationException, match=r"2 monitors of this Trainer have name=.*name='a' and name='b'"
    ):
        fit(tmp_path, *(small_monitor(name=name) for name in names))


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", 3])
def test_a_name_that_is_no_folders(name):
    with pytest.raises(MisconfigurationException, match=r"name=.*use letters, digits"):
        small_monitor(name=name)


def test_each_monitors_warnings_bear_its_name(tmp_path):
    with pytest.warns(UserWarning, match="no measurement") as caught:
        fit(tmp_path, *(small_monitor(name=name, on_error="warn") for name in ("a", "b")), model=TurnsNaN())
    messages = [str(w.message) for w in caught if "no measurement" in str(w.message)]
    assert [words.split(":")[0] for words in messages] == ["InputHessianMonitor 'a'", "InputHessianMonitor 'b'"]
    for name in ("a", "b"):
        text = events(tmp_path).Tensors(f"hessian_diagnosis/{name}/text_summary")[-1].tensor_proto.string_val[0]
        assert "No measurement here" in text.decode()


def test_a_state_that_is_loaded_before_setup_is_used_by_the_next_run_only(tmp_path, first_epoch):
    monitor = small_monitor()
    assert monitor.state_dict() == {}
    monitor.load_state_dict(torch.load(first_epoch, weights_only=True)["callbacks"][KEY])
    for folder, expected in ((tmp_path / "one", digits(64, 66)), (tmp_path / "two", digits(300, 302))):
        fit(folder, monitor, held_out=digits(300, 332), max_epochs=1)
        assert np.array_equal(load_records(folder)[-1].x, expected.tensors[0].numpy())


def test_a_pickled_monitor_keeps_its_settings_and_starts_a_run_of_its_own(tmp_path):
    monitor = small_monitor(name="a", classes=[4])
    fit(tmp_path / "one", monitor, max_epochs=1)
    again = pickle.loads(pickle.dumps(monitor))
    assert again.state_dict() == {}
    fit(tmp_path / "two", again, held_out=digits(300, 332), max_epochs=1)
    records = load_records(tmp_path / "two", "a")
    assert [(r.step, r.class_ids) for r in records] == [(0, (4,)), (4, (4,))]
    assert np.array_equal(records[0].x, digits(300, 302).tensors[0].numpy())


class Interrupted(Classifier):
    """Its user presses Ctrl+C when it is measured after the first epoch."""

    def forward(self, x):
        if self.trainer.global_step == 4 and not self.trainer.validating and len(x) <= 2:
            raise KeyboardInterrupt
        return super().forward(x)


def test_a_measurement_that_was_interrupted_is_not_called_done(tmp_path):
    monitor = small_monitor()
    with pytest.raises(SystemExit):
        fit(tmp_path, monitor, model=Interrupted())
    assert monitor.state_dict()["measured_step"] == 0
    assert monitor.state_dict()["position"] == {"step": 4, "logged_step": 3, "epoch": 0, "ends_epoch": True}
