"""What every Trainer gets in a run of ``every_trainer.py``, and the notes that its calls leave.

Lightning loads ``callbacks`` through the entry point group ``lightning.pytorch.callbacks_factory``.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import traceback
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

import lightning_hessian
from lightning_hessian import InputHessianMonitor
from lightning_hessian.errors import ConfigurationError

NOTES, MONITOR = "EVERY_TRAINER_NOTES", "EVERY_TRAINER_MONITOR"  # environment variables: a folder, module:function
PACKAGE = str(Path(lightning_hessian.__file__).parent)
CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, tuple, set, frozenset, deque)

_calls: Counter[str] = Counter()


def callbacks() -> list[Callback]:
    """The monitor, in a run with it, and what notes the state after each call."""
    factory = os.environ.get(MONITOR)
    return [*([_made_obliging(_load(factory)())] if factory else []), StateNotes()]


def default_monitor() -> InputHessianMonitor:
    """Small and frequent: every class of two samples, at every other step."""
    return InputHessianMonitor(classes="predicted", num_samples=2, every_n_train_steps=2)


class StateNotes(Callback):
    """Notes what a call of a Trainer leaves behind, as one digest for each kind of state."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """At the end of a call; behind the monitor's own."""
        self._note(trainer, None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """At the end of a call that failed."""
        self._note(trainer, exception)

    def _note(self, trainer: Trainer, exception: BaseException | None) -> None:
        place = _place()
        frames = traceback.extract_tb(exception.__traceback__) if exception is not None else []
        key = f"{place} {_calls[place]}"
        _calls[place] += 1
        write(
            "calls",
            {
                "key": key,
                "function": None if trainer.state.fn is None else trainer.state.fn.value,
                "measured": any(name.startswith("hessian_") for name in trainer.callback_metrics),
                "error": None if exception is None else f"{type(exception).__name__}: {exception}"[:500],
                "ours": any(frame.filename.startswith(PACKAGE) for frame in frames),
                "state": {part: digest(value) for part, value in state_of(trainer).items()},
            },
        )


def state_of(trainer: Trainer) -> dict[str, Any]:
    """All that a run must not change, by kind."""
    module, states = trainer.lightning_module, {}
    if module is not None:
        states = {
            "weights": dict(module.state_dict()),
            "gradients": {name: parameter.grad for name, parameter in module.named_parameters()},
            "requires_grad": [parameter.requires_grad for parameter in module.parameters()],
            "training flags": [child.training for child in module.modules()],
            **{f"attribute {name}": value for name, value in vars(module).items() if not name.startswith("_")},
        }
    ours = (InputHessianMonitor, StateNotes)
    return {
        **states,
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "counters": [trainer.fit_loop.state_dict(), trainer.validate_loop.state_dict(), trainer.global_step],
        # attributes and no state_dict, which is the user's code; one by one, since some hold a time
        **{
            f"{type(callback).__qualname__} {n} {name}": value
            for n, callback in enumerate(c for c in trainer.callbacks if not isinstance(c, ours))
            for name, value in vars(callback).items()
        },
        "metrics": {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("hessian_")},
        "stream of torch": torch.get_rng_state(),
        "stream of numpy": np.random.get_state(),  # noqa: NPY002
        "stream of Python": random.getstate(),
        "settings": [
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_anomaly_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
        ],
    }


def digest(value: Any) -> str:
    """A short hash of tensors, arrays, numbers, words and containers of them; of other objects, the type counts."""
    found = hashlib.sha256()
    for part in _parts(value, set()):
        found.update(part)
    return found.hexdigest()[:16]


def _parts(value: Any, around: set[int]) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype}{tuple(value.shape) if not _is_lazy(value) else 'lazy'}".encode()
        if not (_is_lazy(value) or value.is_meta):
            plain = value.detach().to_dense() if value.is_sparse else value.detach()
            yield plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield f"{value.dtype}{value.shape}".encode() + value.tobytes()
    elif type(value) in CONTAINERS:
        yield type(value).__name__.encode()
        if id(value) in around:
            return
        items = value.items() if isinstance(value, dict) else value
        for item in sorted(items, key=repr) if isinstance(value, (set, frozenset)) else items:
            yield from _parts(item, around | {id(value)})
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, Path)):
        yield repr(value).encode()
    else:
        yield type(value).__qualname__.encode()


def _is_lazy(value: torch.Tensor) -> bool:
    return torch.nn.parameter.is_lazy(value)


def _standing_aside(hook: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(hook)
    def call(self: Any, trainer: Trainer, *arguments: Any, **more: Any) -> None:
        if self.aside:
            return
        try:
            hook(self, trainer, *arguments, **more)
        except MisconfigurationException as error:
            if not isinstance(error.__cause__, ConfigurationError):
                raise
            self.aside = True
            write("refused", {"place": _place(), "message": str(error)})

    return call


def obliging(kind: type[InputHessianMonitor]) -> type[InputHessianMonitor]:
    """A kind that stands aside for good, and says why, where its settings do not suit a Trainer it was not made for."""
    names = [n for n in vars(InputHessianMonitor) if n in ("setup", "teardown") or n.startswith("on_")]
    return type("Obliging", (kind,), {"aside": False, **{n: _standing_aside(getattr(kind, n)) for n in names}})


Obliging = obliging(InputHessianMonitor)  # by its name, so that it can be pickled for spawned processes


def _made_obliging(monitor: InputHessianMonitor) -> InputHessianMonitor:
    kind = type(monitor)
    monitor.__class__ = Obliging if kind is InputHessianMonitor else obliging(kind)
    return monitor


def _load(name: str) -> Callable[[], InputHessianMonitor]:
    module, function = name.split(":")
    found: Callable[[], InputHessianMonitor] = getattr(importlib.import_module(module), function)
    return found


def _place() -> str:
    """The test that runs, and the process of several that one call may have."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    return f"{test or 'script'} rank {os.environ.get('LOCAL_RANK', 0)}"


def write(kind: str, note: dict[str, Any]) -> None:
    """Appends a line to the notes of this process."""
    with open(Path(os.environ[NOTES]) / f"{kind}-{os.getpid()}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(note) + "\n")
