"""No hook of the monitor ends a run but for wrong settings before training; a run without a record says so."""

import warnings

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support.training import Classifier, Stream, digits, fit, trainer_of
from support.training import quick_monitor as quick
from torch import nn
from torch.utils.data import DataLoader

from lightning_hessian import load_records
from lightning_hessian.training.trainer_run import TrainerRun


def told(folder, *monitors, **arguments):
    """The monitors' warnings during a fit that ends normally."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert fit(folder, *monitors, **arguments).state.finished
    return [str(w.message) for w in caught if "InputHessianMonitor" in str(w.message)]


HOOKS = (
    "take_batch",
    "start_fit",
    "is_due_after_batch",
    "is_due_after_epoch",
    "is_new",
    "finish",
    "close",
    "complete_checkpoint",
)


@pytest.mark.parametrize("method", HOOKS)
def test_what_fails_in_a_hook_does_not_end_the_run(tmp_path, monkeypatch, method):
    def fails(*arguments, **more):
        raise ZeroDivisionError("a bug of ours")

    plain = fit(tmp_path / "without", enable_checkpointing=True)
    with monkeypatch.context() as patched:
        patched.setattr(TrainerRun, method, fails)
        messages = told(tmp_path / "with", quick(on_error="warn"), enable_checkpointing=True)
        assert sum("ZeroDivisionError: a bug of ours" in m for m in messages) >= 1
        assert sum("an unexpected failure" in m for m in messages) == 1
    monitored = fit(tmp_path / "again", quick(), enable_checkpointing=True)
    weights = [t.lightning_module.state_dict().values() for t in (plain, monitored)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


class Numbers(Classifier):
    """Validates on numbers."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass


MODES = ("min_size", "max_size", "max_size_cycle", "sequential")


def image(number):
    return torch.full((2, 1, 8, 8), float(number)) / 9


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:.*No measurement before training:UserWarning")
def test_loaders_that_are_lists_of_numbers(tmp_path, mode, sanity):
    for loaders in ([[1, 2, 3], [4, 5]], {"first": [1, 2], "inner": ([4, 5], [6, 7])}):
        monitor = quick(val_dataloader_idx=1, input_fn=image)
        arguments = {"loaders": CombinedLoader(loaders, mode), "num_sanity_val_steps": sanity, "max_epochs": 1}
        fit(tmp_path, monitor, model=Numbers(), **arguments)
        assert load_records(tmp_path)[-1].x[0, 0, 0, 0] == pytest.approx(4 / 9)
        with pytest.raises(MisconfigurationException, match="input was not found in the batch: int"):
            fit(tmp_path / "guess", quick(), model=Numbers(), **{**arguments, "num_sanity_val_steps": 2})


class Rearranged(Numbers):
    """Its hook makes one batch of those of several loaders."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch["a"] if isinstance(batch, dict) else batch


def test_a_combined_batch_that_a_hook_rearranged(tmp_path):
    loaders = CombinedLoader({"a": DataLoader(digits(64, 80), 8), "b": DataLoader(digits(80, 96), 8)}, "min_size")
    fit(tmp_path, quick(val_dataloader_idx=0), model=Rearranged(), loaders=loaders, max_epochs=1)
    assert [r.step for r in load_records(tmp_path)] == [0, 4]


@pytest.mark.parametrize("sanity", [0, 2])
def test_an_input_fn_that_fails_is_refused_before_training(tmp_path, sanity):
    model = Classifier()
    monitor = quick(on_error="warn", input_fn=lambda batch: batch["image"])
    with pytest.raises(
        MisconfigurationException, match=r"input_fn failed with TypeError.*called with a batch, here a list"
    ):
        fit(tmp_path, monitor, model=model, num_sanity_val_steps=sanity)
    assert model.flags == []


class Closed:
    """Samples that cannot be read."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        raise OSError("the file is closed")


@pytest.mark.parametrize(
    ("samples", "why"), [(Closed(), "OSError: the file is closed"), (torch.rand(2, 1, 8, 8, device="meta"), "meta")]
)
def test_given_samples_that_cannot_be_read_are_refused_before_training(tmp_path, samples, why):
    with pytest.raises(MisconfigurationException, match=f"given samples cannot be read: .*{why}"):
        fit(tmp_path, quick(on_error="warn", samples=samples))


# A run without a record


class OnlyTrains(Classifier):
    def forward(self, x):
        if not self.training:
            raise RuntimeError("only for training")
        return super().forward(x)

    def validation_step(self, batch, batch_idx):
        pass


LATE = {"held_out": Stream(), "num_sanity_val_steps": 0, "check_val_every_n_epoch": 3}
END = "this fit ended without a single record. The reason: "


@pytest.mark.parametrize(
    ("arguments", "first", "reason"),
    [
        ({"model": OnlyTrains}, "no measurement at step 0", "RuntimeError: only for training"),
        (LATE, "No measurement before training", "no validation batch came"),
    ],
    ids=["fails", "no_samples"],
)
def test_a_run_without_a_record_says_so_at_its_end(tmp_path, arguments, first, reason):
    model = arguments.get("model", Classifier)()
    begin, end = told(tmp_path, quick(on_error="warn", every_n_train_steps=2), **{**arguments, "model": model})
    assert first in begin
    assert END in end
    assert reason in end


def test_one_record_is_enough(tmp_path):
    messages = told(tmp_path, quick(on_error="warn"), **{**LATE, "check_val_every_n_epoch": 2})
    assert [r.step for r in load_records(tmp_path)] == [8]
    assert not any("single record" in m for m in messages)


def test_a_resumed_run_with_nothing_left_to_measure_says_nothing(tmp_path):
    fit(tmp_path, quick(), max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    assert told(tmp_path, quick(), max_epochs=1, ckpt_path=tmp_path / "one.ckpt") == []


def test_a_damaged_state_in_a_checkpoint_is_reset(tmp_path):
    fit(tmp_path, quick(), max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    (state,) = (s for key, s in checkpoint["callbacks"].items() if "InputHessian" in key)
    del state["settings"], state["position"]
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    (message,) = told(tmp_path, quick(on_error="warn"), ckpt_path=tmp_path / "damaged.ckpt")
    assert "the checkpoint's state cannot be read (KeyError" in message
    assert [r.step for r in load_records(tmp_path)] == [0, 4, 8]


# What is said about the network


class WithTest(Classifier):
    def test_step(self, batch, batch_idx):
        pass


def linear():
    model = WithTest()
    model.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return model


@pytest.mark.parametrize(
    ("make", "kind"),
    [(linear, "linear in its input, so"), (lambda: WithTest(nn.ReLU), "piecewise linear in its input (as ReLU")],
)
def test_the_target_is_explained_once_for_a_fit_and_its_tests(tmp_path, make, kind):
    model, loader = make(), DataLoader(digits(64, 96), 16)
    trainer = trainer_of(tmp_path, quick(), max_epochs=1, logger=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, DataLoader(digits(), 16), loader)
        trainer.test(model, loader, verbose=False)
        trainer.validate(model, loader, verbose=False)
        trainer.test(model, loader, verbose=False)
    messages = [str(w.message) for w in caught if "InputHessianMonitor" in str(w.message)]
    said = [m for m in messages if "measures 'prob' instead, a softmax of the 10 outputs" in m and kind in m]
    assert len(said) == 1
    assert "as in a regression, give target='logit', whose Hessian is zero" in said[0]
    assert sum("No TensorBoard logger" in m for m in messages) == 1
    assert len(messages) == 2
    assert {r.target for r in load_records(trainer.log_dir)} == {"prob"}
