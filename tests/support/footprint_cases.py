"""Small training runs of many kinds, and all that such a run leaves behind."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils._pytree import keystr, tree_flatten_with_path
from torch.utils.data import DataLoader

from support.footprint_learners import Augmented, Counts, settings
from support.footprint_networks import STREAM, Careless, Note
from support.training import digits, trainer_of


@dataclass(frozen=True)
class Case:
    """A run: how its module is made, and what is special about its Trainer, loaders, callbacks and monitor."""

    make: Callable[[], nn.Module]
    trainer: dict = field(default_factory=dict)
    loader: dict = field(default_factory=dict)
    callbacks: Callable[[], list[Callback]] = list
    monitor: dict = field(default_factory=dict)
    data: Callable[[], LightningDataModule] | None = None
    several: str | None = None  # how CombinedLoader takes from two validation loaders


def run(case: Case, folder: Path, *callbacks: Callback) -> dict[str, object]:
    """Trains for two epochs of three batches with shuffling and augmentation; everything that is left behind."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    torch.compiler.reset()
    STREAM.bit_generator.state = np.random.default_rng(7).bit_generator.state
    model, others = case.make(), case.callbacks()
    loader = {"batch_size": 8, **case.loader}
    train = DataLoader(Augmented(digits(0, 24)), shuffle=True, **loader)
    held_out = DataLoader(Augmented(digits(64, 72)), **loader)
    if case.several is not None:
        other = DataLoader(Augmented(digits(72, 88)), **loader)
        held_out = CombinedLoader({"first": held_out, "other": [other]}, case.several)
    trainer = trainer_of(folder, *others, *callbacks, **case.trainer)
    if case.data is None:
        trainer.fit(model, train, held_out)
    else:
        trainer.fit(model, datamodule=case.data())
    return outcome(trainer, others)


def outcome(trainer: Trainer, callbacks: list[Callback]) -> dict[str, object]:
    """Weights, buffers, gradients, flags, plain attributes, optimizers, schedulers, metrics, random streams."""
    model = trainer.lightning_module
    careless = [m for m in model.modules() if isinstance(m, Careless)]
    left = {
        "model": dict(model.state_dict()),
        "grad": {name: p.grad for name, p in model.named_parameters()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "journal": model.journal,
        "optimizer": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "scheduler": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "average": [c._average_model.state_dict() for c in callbacks if hasattr(c, "_average_model")],
        "plain": [plain_attributes(m) for m in careless] + [getattr(model, "moved", 0)],
        "data": [] if trainer.datamodule is None else [trainer.datamodule.moved, trainer.datamodule.noise.get_state()],
        "stream": STREAM.bit_generator.state,
        "callbacks": [c.state_dict() for c in callbacks if isinstance(c, Counts)],
        "hidden": [dict(m.hidden[0].state_dict()) for m in careless],
        "compiled": list(getattr(model, "compiled", ())),
        "torch": torch.get_rng_state(),
        "numpy": [*map(str, np.random.get_state()[2:]), np.random.get_state()[1].tolist()],  # noqa: NPY002
        "python": random.getstate(),
        "settings": settings(),
    }
    for kind in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
        metrics = getattr(trainer, kind)
        left[f"metrics.{kind}"] = {k: v for k, v in metrics.items() if not k.startswith("hessian_")}
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(left)[0]}


def plain_attributes(model: Careless) -> list[object]:
    """What a careless forward has written."""
    streams = [model.streams[0].get_state(), model.streams[1].bit_generator.state, model.streams[2].getstate()]
    written = [model.plain, model.array.tolist(), model.count, model.history, list(model.recent), model.nested]
    holders = [getattr(hook, "__self__", None) for hook in model.net._forward_hooks.values()]
    notes = [vars(holder) for holder in [model.note, *holders] if isinstance(holder, Note)]
    return [*written, *streams, notes, model.added, model.last]


def differing(a: dict[str, object], b: dict[str, object]) -> list[str]:
    """The names of what is not the same to the last bit."""
    return sorted(a.keys() ^ b.keys()) + [k for k in a.keys() & b.keys() if not same(a[k], b[k])]


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b
