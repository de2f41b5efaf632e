"""Runs that are interrupted, and measurements that cannot be made: training ends as it would have."""

import numpy as np
import pytest
import torch
from support.networks import custom_function
from support.training import Classifier, Stream, digits, fit, small_monitor
from support.training import quick_monitor as quick
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_hessian import load_records
from lightning_hessian.training.samples import first_batch

HELD_OUT = digits(64, 96)


class Interrupted(Classifier):
    """Something happens in the third training step, or while the measurement after the second is made."""

    def __init__(self, error, measuring):
        super().__init__()
        self.error, self.measuring = error, measuring

    def training_step(self, batch, batch_idx):
        if batch_idx == 2 and not self.measuring:
            raise self.error
        return super().training_step(batch, batch_idx)

    def forward(self, x):
        if self.measuring and self.trainer.training and not self.training and self.trainer.global_step == 2:
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize("measuring", [False, True])
@pytest.mark.parametrize(("error", "seen"), [(KeyboardInterrupt(), SystemExit), (RuntimeError("no"), Exception)])
def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch, error, seen, measuring):
    monkeypatch.setattr("signal.signal", lambda *handler: None)  # Lightning would go on ignoring Ctrl+C
    monitor, model = quick(every_n_train_steps=2), Interrupted(error, measuring)
    around = torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    with pytest.raises(seen):
        fit(tmp_path / "broken", monitor, model=model)
    assert (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == around
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert [r.step for r in load_records(tmp_path / "broken")] == ([0] if measuring else [0, 2])
    assert all(path.name.startswith("step_") for path in (tmp_path / "broken" / "input_hessian").iterdir())
    assert [r.step for r in load_records(fit(tmp_path / "again", monitor).log_dir)] == [0, 2, 4, 6, 8]


def test_samples_of_another_shape_in_the_next_run(tmp_path):
    class Flat(Classifier):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.GELU(), nn.Linear(4, 10))

    monitor = quick()
    fit(tmp_path / "image", monitor, max_epochs=1)
    flat = TensorDataset(HELD_OUT.tensors[0].flatten(1), HELD_OUT.tensors[1])
    fit(tmp_path / "flat", monitor, model=Flat(), held_out=flat, max_epochs=1)
    assert [r.x.shape for r in load_records(tmp_path / "flat")] == [(2, 64), (2, 64)]


def failing(folder, sentence, monitor, steps, **arguments):
    """A fit that warns once, ends normally, and measures at the steps where that was possible."""
    with pytest.warns(UserWarning, match=sentence) as caught:
        trainer = fit(folder, monitor, **arguments)
    assert trainer.state.finished
    assert sum("no measurement" in str(w.message) for w in caught) == 1
    assert [r.step for r in load_records(folder)] == steps if steps else not list(folder.glob("input_hessian/*"))


def test_samples_that_the_model_does_not_accept(tmp_path):
    wrong = torch.zeros(2, 1, 5, 5)
    sentence = r"RuntimeError: .*shape \[2, 1, 5, 5\].*give input_fn, forward_fn or other samples"
    failing(tmp_path, sentence, quick(samples=wrong, on_error="warn"), [])
    with pytest.raises(RuntimeError, match=sentence):
        fit(tmp_path / "raise", quick(samples=wrong))


def test_nan_in_the_inputs(tmp_path):
    x = HELD_OUT.tensors[0][:2].clone()
    x[1, 0, 3, 3] = float("nan")
    with pytest.warns(UserWarning, match=r"1 of 2 samples are not valid.*Inputs are not finite at sample 1"):
        fit(tmp_path, quick(samples=x, on_error="warn"))
    record = load_records(tmp_path)[-1]
    assert record.valid.all(axis=1).tolist() == [True, False]
    assert np.isfinite(record.lambda_max[0]).all()
    assert np.isnan(record.lambda_max[1]).all()
    sentence = "There is no Hessian to measure. Inputs are not finite at sample 0"
    failing(tmp_path / "all", sentence, quick(samples=x[1:], num_samples=1, on_error="warn"), [])


cube = custom_function(lambda x: x**3, lambda x: 3 * x**2, once=True)


class Once(Classifier):
    """Cannot be differentiated twice during the first epoch."""

    def forward(self, x):
        z = super().forward(x)
        return z**3 if self._trainer is None or self.trainer.global_step >= 4 else cube(z)


def test_a_derivative_that_is_not_there(tmp_path):
    sentence = "(?s)no measurement at step 0.*(twice|second|custom)"
    failing(tmp_path, sentence, quick(on_error="warn"), [4, 8], model=Once())
    with pytest.raises(RuntimeError):
        fit(tmp_path / "raise", quick(), model=Once())


class ForbiddenUpdate(dict):
    """Refuses to be updated, as transformers' ModelOutput does."""

    def update(self, *args, **kwargs):
        raise TypeError("no update")


class KeepsItsOutput(Classifier):
    def forward(self, x):
        self.last = ForbiddenUpdate(logits=super().forward(x))
        return self.last["logits"]


def test_a_container_that_forbids_writing_is_put_back_all_the_same(tmp_path):
    model = KeepsItsOutput()
    fit(tmp_path, small_monitor(), model=model, max_epochs=1)
    assert all(p.requires_grad for p in model.parameters())
    assert [r.step for r in load_records(tmp_path)] == [0, 4]


class OpensInAWorker(Dataset):
    """Its file is open only after ``worker_init_fn`` has run."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        raise TypeError("no file is open")


def test_a_dataset_that_cannot_be_read_ahead_is_left_alone():
    assert first_batch(DataLoader(OpensInAWorker(), batch_size=2)) is None


def test_an_input_fn_that_fails_after_training_has_begun_does_not_end_it(tmp_path):
    def broken(batch):
        raise KeyError("image")

    with pytest.warns(UserWarning, match=r"(No measurement before training|KeyError: 'image')"):
        trainer = fit(
            tmp_path,
            small_monitor(on_error="warn", input_fn=broken),
            held_out=Stream(),
            num_sanity_val_steps=0,
        )
    assert trainer.current_epoch == 2


def test_an_unusable_batch_is_replaced_by_a_later_one(tmp_path):
    fails = iter([True])  # a list would be put back as it was

    def second_time_lucky(batch):
        if next(fails, False):
            raise KeyError("image")
        return batch

    monitor = small_monitor(on_error="warn", input_fn=second_time_lucky)
    with pytest.warns(UserWarning, match="No measurement before training"):
        fit(tmp_path, monitor, held_out=Stream(), num_sanity_val_steps=0)
    assert [r.step for r in load_records(tmp_path)] == [4, 8]
