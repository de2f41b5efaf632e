"""Every way through the hooks of a real Trainer: when a measurement is made, and at which samples."""

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support.training import Classifier, digits, events, fit, scalar, small_monitor, trainer_of
from support.training import quick_monitor as quick
from torch.utils.data import DataLoader, IterableDataset

from lightning_hessian import load_records

TRAIN, HELD_OUT, OTHER = digits(), digits(64, 96), digits(300, 332)


def steps_of(folder, **trainer_arguments):
    """The steps at which a fit of two epochs of four batches measured."""
    fit(folder, quick(**trainer_arguments.pop("monitor", {})), **trainer_arguments)
    return [r.step for r in load_records(folder)]


def measured_at(folder, dataset, indices=(0, 1)):
    """Whether every record of a run was made at these samples of a dataset."""
    expected = dataset.tensors[0][list(indices)].numpy()
    return all(np.array_equal(r.x, expected) for r in load_records(folder))


class Stream(IterableDataset):
    """Can be read once an epoch."""

    def __init__(self, inner):
        self.inner = inner

    def __iter__(self):
        yield from self.inner

    def __repr__(self):
        return "Stream"  # the same in every process, as ids of tests must be


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({}, [0, 4, 8]),
        ({"val_check_interval": 0.25}, [0, 4, 8]),
        ({"val_check_interval": 3}, [0, 4, 8]),
        ({"val_check_interval": 5, "check_val_every_n_epoch": None}, [0, 4, 8]),
        ({"check_val_every_n_epoch": 2}, [0, 4, 8]),
        ({"num_sanity_val_steps": 0}, [0, 4, 8]),
        ({"num_sanity_val_steps": -1}, [0, 4, 8]),
        ({"reload_dataloaders_every_n_epochs": 1}, [0, 4, 8]),
        ({"train": Stream(TRAIN)}, [0, 4, 8]),
        ({"held_out": Stream(HELD_OUT)}, [0, 4, 8]),
        ({"train": Stream(TRAIN), "val_check_interval": 2}, [0, 4, 8]),
        ({"limit_train_batches": 3}, [0, 3, 6]),
        ({"max_epochs": -1, "max_steps": 6}, [0, 4, 6]),
        ({"monitor": {"every_n_epochs": 2}, "max_steps": 6}, [0, 6]),
        ({"monitor": {"epochs": [1]}, "max_epochs": 3}, [0, 8, 12]),
        ({"monitor": {"epochs": []}}, [0, 8]),
        ({"accumulate_grad_batches": 4, "monitor": {"every_n_train_steps": 1}}, [0, 1, 2]),
    ],
    ids=str,
)
def test_a_fit_with_validation(tmp_path, arguments, steps):
    arguments = {"train": TRAIN, "held_out": HELD_OUT, **arguments}
    if isinstance(arguments["train"], IterableDataset):
        arguments["shuffle"] = False
    assert steps_of(tmp_path, **arguments) == steps
    assert measured_at(tmp_path, HELD_OUT)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log.*|You requested to overfit")
def test_overfitting_a_few_batches(tmp_path):
    assert steps_of(tmp_path, overfit_batches=2, shuffle=False) == [0, 2, 4]
    assert measured_at(tmp_path, HELD_OUT)


NO_LOADER = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


@NO_LOADER
@pytest.mark.parametrize("arguments", [{"held_out": False}, {"limit_val_batches": 0}], ids=str)
def test_a_fit_without_validation_needs_given_samples(tmp_path, arguments):
    assert steps_of(tmp_path, monitor={"samples": OTHER}, **arguments) == [0, 4, 8]
    assert measured_at(tmp_path, OTHER)


def test_steps_are_not_batches_while_gradients_are_gathered(tmp_path):
    """The first validation brings the samples after the first of three batches that make a step."""
    with pytest.warns(UserWarning, match="No measurement before training"):
        steps = steps_of(
            tmp_path,
            monitor={"every_n_train_steps": 2},
            held_out=Stream(HELD_OUT),
            num_sanity_val_steps=0,
            accumulate_grad_batches=3,
            val_check_interval=1,
        )
    assert steps == [0, 2, 4]
    assert load_records(tmp_path)[0].when == "before training"


def test_a_late_first_validation(tmp_path):
    with pytest.warns(UserWarning, match="No measurement before training"):
        steps = steps_of(tmp_path, num_sanity_val_steps=0, check_val_every_n_epoch=2, max_epochs=3)
    assert steps == [8, 12]


@pytest.mark.filterwarnings("ignore:.*`max_epochs=0`|.*limit_train_batches")
@pytest.mark.parametrize("arguments", [{"max_epochs": 0}, {"limit_train_batches": 0}, {"max_steps": 0}], ids=str)
def test_where_nothing_is_trained_nothing_is_measured(tmp_path, arguments):
    trainer = fit(tmp_path, quick(), **arguments)
    assert trainer.state.finished
    assert not (tmp_path / "input_hessian").exists()


LOADERS = {
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"first": a, "second": b},
    "sequential": lambda a, b: CombinedLoader([a, b], "sequential"),
    "max_size": lambda a, b: CombinedLoader({"first": a, "second": b}, "max_size"),
    "max_size_cycle": lambda a, b: CombinedLoader({"first": a, "inner": [b]}, "max_size_cycle"),
}


class Several(Classifier):
    """Its validation loaders are several: one after another, or side by side."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass


@pytest.mark.parametrize("wanted", [0, 1])
@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("kind", LOADERS)
def test_several_validation_loaders(tmp_path, kind, sanity, wanted):
    loaders = LOADERS[kind](DataLoader(HELD_OUT, 16), DataLoader(OTHER, 8))
    monitor = quick(val_dataloader_idx=wanted)
    fit(tmp_path, monitor, model=Several(), loaders=loaders, num_sanity_val_steps=sanity, max_epochs=1)
    assert [r.step for r in load_records(tmp_path)] == [0, 4]
    assert measured_at(tmp_path, [HELD_OUT, OTHER][wanted])


@pytest.mark.parametrize("sanity", [0, 2])
def test_a_loader_that_is_not_there(tmp_path, sanity):
    with pytest.raises(MisconfigurationException, match=r"val_dataloader_idx=1 is out of range: .* is 1"):
        fit(tmp_path, quick(val_dataloader_idx=1), num_sanity_val_steps=sanity)
    with pytest.raises(MisconfigurationException, match="val_dataloader_idx=-1 must be a whole number"):
        quick(val_dataloader_idx=-1)


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TRAIN, 16)

    def val_dataloader(self):
        return DataLoader(HELD_OUT, 16)

    def test_dataloader(self):
        return [DataLoader(HELD_OUT, 16), DataLoader(OTHER, 16)]


class EveryStage(Classifier):
    def test_step(self, batch, batch_idx, dataloader_idx=0):
        pass


def test_a_data_module_in_every_stage(tmp_path):
    trainer, model = trainer_of(tmp_path, quick(val_dataloader_idx=0)), EveryStage()
    trainer.fit(model, datamodule=Data())
    trainer.validate(model, datamodule=Data(), verbose=False)
    trainer.test(model, datamodule=Data(), verbose=False)
    records = load_records(tmp_path)
    assert [(r.step, r.stage) for r in records] == [
        (0, "fit"), (4, "fit"), (8, "fit"), (8, "test"), (8, "validate"),
    ]  # fmt: skip
    assert measured_at(tmp_path, HELD_OUT)
    np.testing.assert_array_equal(records[2].eigenvalues, records[4].eigenvalues)  # the weights are the same
    assert records[3].when == "test, after 8 optimizer steps"
    assert list(scalar(tmp_path, "hessian_trace/logit_class_3")) == [0, 3, 7]
    assert list(scalar(tmp_path, "hessian_trace/test_logit_class_3")) == [8]


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("classes", ["label", 3])
def test_one_measurement_ends_a_validation_or_test(tmp_path, stage, classes, inference_mode):
    model = EveryStage()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monitor = small_monitor(classes=classes, val_dataloader_idx=1 if stage == "test" else 0)
    trainer = trainer_of(tmp_path, monitor, inference_mode=inference_mode)
    getattr(trainer, stage)(model, datamodule=Data(), verbose=False)
    (record,) = load_records(tmp_path)
    assert (record.step, record.logged_step, record.stage) == (0, 0, stage)
    assert measured_at(tmp_path, OTHER if stage == "test" else HELD_OUT)
    column = "label" if classes == "label" else "class_3"
    tag = f"hessian_lambda_max/{stage}_logit_{column}"
    assert tag in events(tmp_path).Tags()["scalars"]
    assert trainer.callback_metrics[tag] == pytest.approx(record.lambda_max.mean())
    assert f"hessian/{stage}_logit_{column}" in events(tmp_path).Tags()["images"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_validation_at_given_samples(tmp_path):
    trainer_of(tmp_path, quick(samples=OTHER)).validate(Classifier(), DataLoader(HELD_OUT, 16), verbose=False)
    assert measured_at(tmp_path, OTHER)


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero")
def test_what_a_validation_cannot_measure_warns_or_raises(tmp_path):
    with pytest.raises(MisconfigurationException, match="classes=99 is out of range"):
        trainer_of(tmp_path, quick(classes=99, on_error="warn")).validate(
            Classifier(), DataLoader(HELD_OUT, 16), verbose=False
        )
    with pytest.warns(UserWarning, match="No measurement: no batch came"):
        trainer_of(tmp_path, quick(val_dataloader_idx=1), limit_val_batches=1).validate(
            Several(), [DataLoader(HELD_OUT, 16), DataLoader([])], verbose=False
        )


def test_predicting_measures_nothing(tmp_path):
    trainer_of(tmp_path, quick()).predict(Classifier(), DataLoader(HELD_OUT.tensors[0], 16))
    assert not (tmp_path / "input_hessian").exists()
