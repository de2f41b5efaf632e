"""``lightning-hessian measure`` on real checkpoints: the numbers of the run, and nothing lost whatever happens."""

import os
import re
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
from safetensors.torch import save_file
from support import offline as training
from support.training import Classifier, digits, scalar

from lightning_hessian import load_records
from lightning_hessian.cli import main
from lightning_hessian.offline import STATE
from lightning_hessian.training.checkpoints import Checkpoint, ModelSource

MODEL = "support.training:Classifier"
X, Y = digits(64, 96).tensors
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}  # for processes that import from ``support``


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with a monitor and checkpoints after steps 4 and 8."""
    folder = tmp_path_factory.mktemp("trained")
    training.train(folder)
    torch.save((X, Y), folder / "samples.pt")
    return folder


def measure(folder, log_dir, *more, model=MODEL, checkpoints="checkpoints/*.ckpt", samples="samples.pt"):
    """The command on the checkpoints of ``folder``; its exit status."""
    samples = samples if samples == "checkpoint" else str(folder / samples)
    given = ["--samples", samples, "--log-dir", str(log_dir), "--heatmap-samples", "0", "--num-samples", "2"]
    return main(["measure", model, str(folder / checkpoints), *given, "--classes", "2", "3", *more])


def names(records):
    return [(r.step, r.logged_step, r.epoch, r.stage) for r in records]


def test_the_curves_are_those_of_the_run(trained, tmp_path, capsys):
    assert measure(trained, tmp_path) == 0
    out = capsys.readouterr().out
    assert "epoch=0-step=4.ckpt: epoch 0, after 4 optimizer steps, dense" in out
    assert f"2 measured, 1 already measured. To see the results: tensorboard --logdir {tmp_path}" in out
    ours, theirs = load_records(tmp_path), load_records(trained / "run")[1:]
    assert names(ours) == names(theirs)
    for own, other in zip(ours, theirs, strict=True):
        for field in ("eigenvalues", "gradient", "x", "labels", "predicted"):
            assert np.array_equal(getattr(own, field), getattr(other, field)), field
    for metric in ("lambda_max", "trace", "linear_radius"):
        curves = [scalar(place, f"hessian_{metric}/logit_class_3") for place in (tmp_path, trained / "run")]
        assert curves[0] == {step: value for step, value in curves[1].items() if step > 0}
    cosine = "hessian_top_eigenvector_cosine/logit_class_2"
    assert scalar(tmp_path, cosine)[7] == scalar(trained / "run", cosine)[7]


def test_what_was_measured_is_left_out(trained, tmp_path, capsys):
    measure(trained, tmp_path, checkpoints="checkpoints/*step=4.ckpt")
    before = load_records(tmp_path)[0].measured_at
    assert measure(trained, tmp_path) == 0
    assert "1 measured, 2 already measured" in capsys.readouterr().out
    records = load_records(tmp_path)
    assert [r.step for r in records] == [4, 8]
    assert records[0].measured_at == before
    assert np.isfinite(records[1].metrics["top_eigenvector_cosine"]).all()  # compared across processes


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", "_dict.pt", "checkpoint"])
def test_samples_of_every_kind(trained, tmp_path, suffix):
    np.savez(trained / "samples.npz", x=X.numpy(), labels=Y.numpy())
    save_file({"image": X.contiguous(), "label": Y}, trained / "samples.safetensors")
    torch.save({"x": X, "y": Y}, trained / "samples_dict.pt")
    samples = suffix if suffix == "checkpoint" else f"samples{suffix}"
    assert measure(trained, tmp_path, checkpoints="checkpoints/*step=8.ckpt", samples=samples) == 0
    (ours,), theirs = load_records(tmp_path), load_records(trained / "run")[-1]
    assert np.array_equal(ours.eigenvalues, theirs.eigenvalues)
    assert np.array_equal(ours.labels, theirs.labels)


def test_plain_state_dicts(trained, tmp_path):
    """Of a loop without Lightning, the step from the content or from the name."""
    torch.manual_seed(0)
    states = [training.Tanh().state_dict() for _ in range(3)]
    torch.save({"model_state_dict": states[0], "step": 10, "epoch": 1}, tmp_path / "a.pt")
    torch.save(states[1], tmp_path / "model_step=20.pt")
    save_file(states[2], tmp_path / "step-30.safetensors")
    log_dir = tmp_path / "logs"
    arguments = ["--samples", str(trained / "samples.pt"), "--log-dir", str(log_dir), "--classes", "label"]
    assert main(["measure", "support.offline:Tanh", str(tmp_path), *arguments, "--heatmap-samples", "0"]) == 0
    assert names(load_records(log_dir)) == [(10, 10, 1, "fit"), (20, 20, 0, "fit"), (30, 30, 0, "fit")]


def plain(trained, folder, *more, model="support.offline:Tanh", pattern=""):
    """The command on files of plain PyTorch in ``folder``; its exit status."""
    arguments = ["--samples", str(trained / "samples.pt"), "--log-dir", str(folder / "logs"), "--heatmap-samples", "0"]
    return main(["measure", model, str(folder / pattern), *arguments, "--num-samples", "2", "--classes", "3", *more])


def test_a_buffer_is_no_step(trained, tmp_path):
    """A raw state dict holds whatever the model registers; what stands beside a state dict counts."""
    counting = training.Counting()
    torch.save(counting.state_dict(), tmp_path / "model_step=20.pt")
    save_file(counting.state_dict(), tmp_path / "step-30.safetensors")
    torch.save({"model": counting.state_dict(), "iteration": torch.tensor(40), "epoch": 3}, tmp_path / "c.pt")
    assert plain(trained, tmp_path, model="support.offline:Counting") == 0
    assert names(load_records(tmp_path / "logs")) == [(20, 20, 0, "fit"), (30, 30, 0, "fit"), (40, 40, 3, "fit")]


def test_other_weights_at_a_step_that_was_measured_are_named(trained, tmp_path, capsys):
    """As in another training, or one that was started again; the same weights may stand in several files."""
    states = [training.Tanh().state_dict() for _ in range(2)]
    torch.save(states[0], tmp_path / "a_step=10.pt")
    torch.save({"model": states[0], "optimizer": {}, "step": 10}, tmp_path / "b.pt")
    assert plain(trained, tmp_path) == 0
    assert "1 measured, 1 already measured. To see the results" in capsys.readouterr().out
    torch.save(states[1], tmp_path / "a_step=10.pt")
    assert plain(trained, tmp_path) == 0
    out = capsys.readouterr().out
    assert "a_step=10.pt has other weights or buffers than the checkpoint of step 10 that was measured in" in out
    assert "0 measured, 1 already measured, 1 skipped. To see the results" in out
    assert len(load_records(tmp_path / "logs")) == 1


def test_whole_modules_and_what_wrappers_call_weights(trained, tmp_path):
    torch.manual_seed(0)
    model = training.Tanh()
    torch.save(model, tmp_path / "step=1.pt")
    torch.save({"model": model, "step": 2}, tmp_path / "a.pt")
    names = {f"module._orig_mod.{name}": each for name, each in model.state_dict().items()}
    torch.save({"model": names, "step": 3}, tmp_path / "b.pt")
    partly = {name.replace("net.1", "net.1._orig_mod"): each for name, each in model.state_dict().items()}
    torch.save({"model": partly, "step": 4}, tmp_path / "c.pt")
    assert plain(trained, tmp_path) == 0
    records = load_records(tmp_path / "logs")
    assert [r.step for r in records] == [1, 2, 3, 4]
    assert all(np.array_equal(r.eigenvalues, records[0].eigenvalues) for r in records)


def test_a_lightning_module_is_made_for_a_plain_state_dict(trained, tmp_path):
    torch.manual_seed(0)
    torch.save(Classifier().state_dict(), tmp_path / "step=1.pt")
    assert plain(trained, tmp_path, model=MODEL) == 0
    assert len(load_records(tmp_path / "logs")) == 1


def test_records_are_no_checkpoints(trained, tmp_path, capsys):
    """A pattern may find those of an earlier command."""
    save_file(training.Tanh().state_dict(), tmp_path / "step-30.safetensors")
    assert plain(trained, tmp_path) == 0
    capsys.readouterr()
    assert plain(trained, tmp_path, pattern="**/*.safetensors") == 0
    assert "0 measured, 1 already measured. To see the results" in capsys.readouterr().out


def test_checkpoints_below_a_folder_that_is_named_as_that_of_records(trained, tmp_path):
    """Such as the folder of a whole project; only what looks like a record in it is left out."""
    folder = tmp_path / "input_hessian" / "checkpoints"
    folder.mkdir(parents=True)
    save_file(training.Tanh().state_dict(), folder / "step_30.safetensors")
    assert plain(trained, folder) == 0
    assert names(load_records(folder / "logs")) == [(30, 30, 0, "fit")]


def test_some_of_the_samples_in_a_checkpoint(trained, tmp_path):
    """All of them, unless some are asked for."""
    monitors = load_records(trained / "run")[-1]
    cases = (((), [0, 1]), (("--num-samples", "1"), [0]), (("--sample-indices", "1"), [1]))
    for number, (more, chosen) in enumerate(cases):
        log_dir = tmp_path / str(number)
        arguments = ["--samples", "checkpoint", "--log-dir", str(log_dir), "--classes", "3", "--heatmap-samples", "0"]
        assert main(["measure", MODEL, str(trained / "checkpoints" / "*step=8.ckpt"), *arguments, *more]) == 0
        (record,) = load_records(log_dir)
        assert np.array_equal(record.x, monitors.x[chosen])
        np.testing.assert_allclose(record.lambda_max[:, 0], monitors.lambda_max[chosen, 1], rtol=1e-4)


def test_an_input_by_position_and_a_layer_whose_name_is_a_number(tmp_path):
    first, second = torch.randn(4, 4), torch.randn(4, 2)
    torch.save(((first, second), torch.arange(4) % 3), tmp_path / "both.pt")
    torch.save(first, tmp_path / "one.pt")
    for kind in (training.TwoInputs, training.Sequence):
        (tmp_path / kind.__name__).mkdir()
        torch.save(kind().state_dict(), tmp_path / kind.__name__ / "step=1.pt")
    for kind, samples, wrt, size in (
        (training.TwoInputs, "both.pt", "0", 4),
        (training.TwoInputs, "both.pt", "1", 2),
        (training.Sequence, "one.pt", "0", 8),
    ):
        log_dir = tmp_path / f"{kind.__name__}_{wrt}"
        given = ["--samples", str(tmp_path / samples), "--log-dir", str(log_dir), "--classes", "1", "--wrt", wrt]
        assert main(["measure", f"support.offline:{kind.__name__}", str(tmp_path / kind.__name__), *given]) == 0
        assert load_records(log_dir)[0].gradient.shape[-1] == size


def test_messages_name_what_the_command_has(tmp_path, capsys):
    torch.save(((torch.randn(4, 4), torch.randn(4, 2)), torch.arange(4) % 3), tmp_path / "both.pt")
    torch.save(training.TwoInputs().state_dict(), tmp_path / "step=1.pt")
    given = ["--samples", str(tmp_path / "both.pt"), "--log-dir", str(tmp_path / "logs"), "--classes", "1"]
    assert main(["measure", "support.offline:TwoInputs", str(tmp_path / "step=1.pt"), *given]) == 1
    error = capsys.readouterr().err
    assert "The command has no input_fn: save the samples as the model takes them, with --wrt for one of" in error
    assert main(["measure", "support.offline:TwoInputs", str(tmp_path / "none.pt"), *given, "--wrt", "0"]) == 1
    assert "The command has no" not in capsys.readouterr().err


def test_warnings_are_sentences_of_the_command(tmp_path, capsys):
    torch.save(torch.randn(4, 4), tmp_path / "x.pt")
    torch.save(torch.nn.Linear(4, 3).state_dict(), tmp_path / "step=1.pt")
    given = ["--samples", str(tmp_path / "x.pt"), "--log-dir", str(tmp_path / "logs"), "--classes", "1"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["measure", "support.offline:linear", str(tmp_path / "step=1.pt"), *given]) == 0
    assert capsys.readouterr().err.startswith(
        "lightning-hessian: InputHessianRecorder: the network is linear in its input"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"more": ("--classes", "1", "1")}, r"classes=\[1, 1\] lists 1 more than once"),
        ({"model": "support.training"}, "does not name a model. Give module:Class"),
        ({"model": "no.such:Class"}, "The module 'no.such' cannot be imported: ModuleNotFoundError"),
        ({"model": "support.training:Clasifier"}, r"There is no 'Clasifier' in support.training; it has .*Classifier"),
        ({"model": "support.offline:not_a_model"}, "returned a int, and not an nn.Module"),
        ({"model": "support.offline:Sized"}, r"Call self.save_hyperparameters\(\)"),
        ({"model": "support.offline:Tanh"}, "is not a checkpoint of support.offline:Tanh"),
        ({"checkpoints": "nothing/*.ckpt"}, "There is no checkpoint that matches"),
        ({"checkpoints": "empty"}, "There is no checkpoint that matches"),
        ({"checkpoints": "junk.ckpt"}, "cannot be read"),
        ({"samples": "nothing.pt"}, "No such file"),
        ({"samples": "samples.csv"}, "are read from .pt, .pth, .npz, .safetensors files"),
        ({"samples": "code.pt"}, "Save tensors only"),
        ({"samples": "flat.pt"}, "The samples have the shape"),
        ({"classes": "12"}, "out of range"),
        ({"more": ("--poll", "-1")}, "poll=-1 must be more than 0 seconds"),
        ({"more": ("--device", "gpu")}, "device='gpu' is not available here"),
        ({"more": ("--target", "logits")}, "target='logits' is not known"),
    ],
    ids=lambda value: " ".join(map(str, next(iter(value.items())))) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(trained, tmp_path, capsys, arguments, message):
    (trained / "empty").mkdir(exist_ok=True)
    (trained / "junk.ckpt").write_bytes(b"half of a checkpoint")
    (trained / "samples.csv").write_text("1,2")
    torch.save({"x": X, "code": print}, trained / "code.pt")
    torch.save((X.flatten(1)[:, :50], Y), trained / "flat.pt")
    classes, more = arguments.pop("classes", None), arguments.pop("more", ())
    more = (*more, "--classes", classes) if classes else more
    assert measure(trained, tmp_path / "logs", *more, **arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("lightning-hessian: ")
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not list((tmp_path / "logs").glob("**/step_*"))


def test_a_directory_of_other_measurements_is_refused(trained, tmp_path, capsys):
    assert measure(trained, trained / "run") == 1
    assert "holds the records of another run" in capsys.readouterr().err
    measure(trained, tmp_path)
    assert measure(trained, tmp_path, "--seed", "3") == 1
    assert "other settings than the checkpoint's: seed: 3 (was 0). Give another log_dir" in capsys.readouterr().err
    assert [r.step for r in load_records(tmp_path)] == [4, 8]


def test_a_half_written_checkpoint_is_skipped_and_the_others_measured(trained, tmp_path, capsys):
    folder = tmp_path / "some"
    folder.mkdir()
    for path in (trained / "checkpoints").glob("*step*.ckpt"):
        whole = path.read_bytes()
        (folder / path.name).write_bytes(whole if "step=8" in path.name else whole[: len(whole) // 2])
    torch.save((X, Y), tmp_path / "samples.pt")
    assert measure(tmp_path, tmp_path / "logs", checkpoints="some") == 0
    assert "Skipped epoch=0-step=4.ckpt." in capsys.readouterr().out
    assert [r.step for r in load_records(tmp_path / "logs")] == [8]


def test_a_checkpoint_that_is_replaced_or_removed_while_it_is_read(trained, tmp_path, monkeypatch):
    """As ModelCheckpoint does with last.ckpt: step and weights are of one file."""
    folder, load = tmp_path / "some", ModelSource.load
    folder.mkdir()
    first, second = sorted((trained / "checkpoints").glob("*step*.ckpt"))
    shutil.copy(first, folder / "last.ckpt")

    def replaced(*arguments):
        shutil.copy(second, folder / "new")
        (folder / "new").replace(folder / "last.ckpt")
        return load(*arguments)

    monkeypatch.setattr(ModelSource, "load", replaced)
    torch.save((X, Y), tmp_path / "samples.pt")
    assert measure(tmp_path, tmp_path / "logs", checkpoints="some") == 0
    (ours,), theirs = load_records(tmp_path / "logs"), load_records(trained / "run")[1]
    assert ours.step == theirs.step == 4
    assert np.array_equal(ours.eigenvalues, theirs.eigenvalues)


def test_a_measurement_whose_event_was_not_written_is_made_again(trained, tmp_path):
    """Killed between the record's file and the event file."""
    measure(trained, tmp_path, checkpoints="checkpoints/*step=4.ckpt")
    state = tmp_path / "input_hessian" / STATE
    saved = torch.load(state, weights_only=True)
    torch.save({**saved, "weights": {}}, state)
    before = load_records(tmp_path)[0].measured_at
    measure(trained, tmp_path)
    assert load_records(tmp_path)[0].measured_at > before
    assert [r.step for r in load_records(tmp_path)] == [4, 8]


def command(folder, *more):
    """The command in a process of its own, that watches."""
    arguments = [sys.executable, "-m", "lightning_hessian.cli", "measure", MODEL, str(folder / "checkpoints")]
    arguments += ["--samples", str(folder / "samples.pt"), "--log-dir", str(folder / "offline"), "--classes", "3"]
    arguments += ["--heatmap-samples", "0", "--num-samples", "2", "--watch", "--poll", "0.2", *more]
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
        # A shell's background jobs, and so these tests in one, ignore Ctrl-C; what they start would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def measured_steps(folder):
    try:
        return [r.step for r in load_records(folder / "offline")]
    except FileNotFoundError:
        return []


def test_watching_a_training_and_both_sides_killed(tmp_path):
    """Every checkpoint that was written whole is measured, once; the end of the training ends the watch."""
    torch.save((X, Y), tmp_path / "samples.pt")
    watch = command(tmp_path)
    trainer = subprocess.Popen([sys.executable, "-m", "support.offline", str(tmp_path)], env=ENVIRONMENT)
    try:
        wait_for(lambda: measured_steps(tmp_path))
        watch.send_signal(signal.SIGKILL)
        watch.communicate()
        watch = command(tmp_path, "--patience", "3")
        wait_for(lambda: len(list((tmp_path / "checkpoints").glob("*step*.ckpt"))) >= 3)
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
        out, _ = watch.communicate(timeout=120)
    finally:
        for process in (watch, trainer):
            process.kill()
    assert watch.returncode == 0, out
    assert "the training seems to be over" in out
    whole = sorted(int(path.stem.split("step=")[1]) for path in (tmp_path / "checkpoints").glob("*step*.ckpt"))
    assert measured_steps(tmp_path) == whole
    curve = scalar(tmp_path / "offline", "hessian_trace/logit_class_3")
    assert sorted(curve) == [step - 1 for step in whole]


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_watch_is_interrupted(trained, tmp_path, sent):
    torch.save((X, Y), tmp_path / "samples.pt")
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    watch = command(tmp_path)
    try:
        wait_for(lambda: measured_steps(tmp_path) == [4, 8])
        watch.send_signal(sent)
        out, _ = watch.communicate(timeout=60)
    finally:
        watch.kill()
        watch.wait()
    assert watch.returncode == 0, out
    assert "Interrupted." in out
    assert len(scalar(tmp_path / "offline", "hessian_trace/logit_class_3")) == 2
    assert Path(tmp_path / "offline" / "input_hessian" / STATE).exists()


def test_unusual_tensors_have_a_fingerprint_and_a_step():
    """Meta tensors hold no values, and conjugates are views."""
    conjugate = torch.tensor([1 + 2j, 3j]).conj()
    weights = {"a": torch.ones(2, device="meta"), "b": conjugate, "c": torch.tensor(True)}
    checkpoint = Checkpoint(Path("run.pt"), {"state_dict": weights, "step": torch.tensor([10])})
    assert checkpoint.position.step == 10
    other = Checkpoint(Path("run.pt"), {"state_dict": {**weights, "b": conjugate.conj()}, "step": 10})
    assert checkpoint.fingerprint != other.fingerprint
