"""Training with the monitor is training without it, bit for bit."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from training import Augmented, Classifier, digits, fit, small_monitor


def outcome(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Everything that a run leaves behind: weights, buffers, optimizer state, flags, metrics, random streams."""
    model = trainer.lightning_module
    result = {f"model.{k}": v for k, v in model.state_dict().items()}
    for i, state in trainer.optimizers[0].state_dict()["state"].items():
        result |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    result["flags"] = torch.tensor(model.flags)
    result["val_loss"] = trainer.callback_metrics["val_loss"]
    result["torch"] = torch.get_rng_state()
    result["numpy"] = torch.tensor(np.random.get_state()[1].astype(np.int64))  # noqa: NPY002
    result["python"] = torch.tensor(random.getstate()[1])
    return result


def run(folder, *callbacks, **arguments) -> dict[str, torch.Tensor]:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    model = Classifier(arguments.pop("activation", nn.GELU), frozen=True)
    data = {"train": Augmented(digits()), "held_out": Augmented(digits(64, 96))}
    return outcome(fit(folder, *callbacks, model=model, **data, **arguments))


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [k for k in a if not torch.equal(a[k], b[k])]


@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU])
@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_nothing_is_different(tmp_path, activation, sanity, precision):
    arguments = {"activation": activation, "num_sanity_val_steps": sanity, "precision": precision}
    monitor = small_monitor(every_n_train_steps=2, target="prob")
    without = run(tmp_path / "without", **arguments)
    assert differing(without, run(tmp_path / "with", monitor, **arguments)) == []
    assert len(list((tmp_path / "with" / "input_hessian").iterdir())) == 5  # steps 0, 2, 4, 6, 8


class Dirty(Callback):
    """Does what the monitor must not do."""

    def __init__(self, deed) -> None:
        self.deed = deed

    def on_train_start(self, trainer, pl_module):
        self.deed(pl_module)


@pytest.mark.parametrize(
    ("deed", "noticed"),
    [
        (lambda m: torch.rand(1), "torch"),
        (lambda m: np.random.rand(), "numpy"),  # noqa: NPY002
        (lambda m: random.random(), "python"),
        (lambda m: m.eval(), "flags"),
        (lambda m: m.net[5](torch.randn(4, 36)), "model.net.5.running_mean"),
    ],
)
def test_a_dirty_monitor_is_noticed(tmp_path, deed, noticed):
    clean = run(tmp_path / "clean")
    assert noticed in differing(clean, run(tmp_path / "dirty", Dirty(deed)))


def test_gradients_and_plain_attributes_come_back():
    model, monitor_input = Classifier(), torch.rand(2, 1, 8, 8)
    model(monitor_input).sum().backward()
    grads = [p.grad for p in model.parameters()]
    values = [g.clone() for g in grads]
    before = model.last_input
    from lightning_hessian import input_spectrum

    input_spectrum(model, torch.rand(1, 1, 8, 8), 0)
    assert model.last_input is before
    assert all(p.grad is g and torch.equal(g, v) for p, g, v in zip(model.parameters(), grads, values, strict=True))
