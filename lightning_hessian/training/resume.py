"""What of a run travels in its checkpoints, as tensors and plain values, and how a run goes on from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_hessian.errors import ConfigurationError, MeasurementError
from lightning_hessian.model.targets import target_name
from lightning_hessian.training.measurement import Monitor, RunState
from lightning_hessian.training.samples import Samples
from lightning_hessian.training.schedule import Place, Schedule

VERSION = 1


@dataclass(frozen=True)
class Settings:
    """What decides whether a run measures the same as the one whose checkpoint it goes on from, in words."""

    classes: str
    target: str
    dtype: str
    wrt: str
    method: str
    samples: str
    num_samples: str
    sample_indices: str
    val_dataloader_idx: str
    num_eigenvalues: str


OF_SAMPLES = ("samples", "num_samples", "sample_indices", "val_dataloader_idx")


def settings(
    monitor: Monitor, given_samples: Any, num_samples: int, sample_indices: Any, val_dataloader_idx: int
) -> Settings:
    """The settings of a monitor; lists, tuples and tensors of the same numbers are the same."""
    return Settings(
        classes=_numbers(monitor.classes),
        target=target_name(monitor.target) if callable(monitor.target) else monitor.target,
        dtype=monitor.dtype,
        wrt=repr(monitor.wrt),
        method=monitor.options.method,
        samples="the first validation batch" if given_samples is None else "given samples",
        num_samples=str(num_samples),
        sample_indices=_numbers(sample_indices),
        val_dataloader_idx=str(val_dataloader_idx),
        num_eigenvalues=str(monitor.options.num_eigenvalues),
    )


def _numbers(values: Any) -> str:
    if hasattr(values, "tolist"):
        return repr(values.tolist())
    return repr(list(values) if isinstance(values, Iterable) and not isinstance(values, str) else values)


def to_state(samples: Samples | None, run: RunState, schedule: Schedule, now: Settings) -> dict[str, Any]:
    """Tensors and plain values only, so that ``torch.load(weights_only=True)`` reads them.

    Its size is that of the samples, and of N·K·V·D eigenvectors where they take no more than ``LARGEST_VECTORS``.
    """
    return {
        "version": VERSION,
        "settings": asdict(now),
        "samples": None if samples is None else {"inputs": samples.inputs, "labels": samples.labels},
        "target": run.target if isinstance(run.target, str) else None,
        "method": run.method,
        "last_step": schedule.last_step,
        "place": asdict(schedule.place),
    }


@dataclass(frozen=True)
class Resumed:
    """How a run goes on: its samples, or None to take a new one; its state; and what the user is told."""

    samples: Samples | None
    run: RunState
    told: str | None


def from_state(
    state: Mapping[str, Any], monitor: Monitor, schedule: Schedule, now: Settings, given: Samples | None
) -> Resumed:
    """How ``monitor`` goes on from a checkpoint's ``state``: with its own settings, where they are others.

    Args:
        state: from ``to_state``.
        monitor: of the new run.
        schedule: of the new run; it is put where the checkpoint's was.
        now: its settings.
        given: the samples that it was given, if any; they count.
    """
    if state.get("version") != VERSION:
        return Resumed(
            given, RunState(), "the checkpoint is from another version of lightning-hessian. All begins anew."
        )
    schedule.last_step, schedule.place = state["last_step"], Place(**state["place"])
    before, present = state["settings"], asdict(now)
    changed = [
        f"{name}: {present[name]} (was {before.get(name)})" for name in present if present[name] != before.get(name)
    ]
    kept, problem = _samples(state, monitor, given, renewed=any(present[k] != before.get(k) for k in OF_SAMPLES))
    if given is not None and now.samples == before.get("samples") and not _same(given, kept):
        changed.append("samples: other samples")
    changed += [] if problem is None else [problem]
    if not changed:
        return Resumed(given or kept, _run_state(state, monitor), None)
    told = (
        f"resumed with other settings than the checkpoint's: {'; '.join(changed)}. The new ones count from here on, "
        f"and curves may jump."
    )
    return Resumed(given or kept, RunState(), told)


def _samples(
    state: Mapping[str, Any], monitor: Monitor, given: Samples | None, *, renewed: bool
) -> tuple[Samples | None, str | None]:
    """The checkpoint's samples, unless another one was asked for or it does not do; then why not."""
    if state["samples"] is None or (renewed and given is None):
        return None, None
    samples = Samples(**state["samples"])
    if given is not None:
        return samples, None
    try:
        monitor.check(samples)
    except ConfigurationError as error:
        return None, f"samples: new samples, since those of the checkpoint do not do ({error})"
    return samples, None


def _same(a: Samples, b: Samples | None) -> bool:
    def equal(s: Any, t: Any) -> bool:
        return s is t or (isinstance(s, Tensor) and isinstance(t, Tensor) and s.dtype == t.dtype and torch.equal(s, t))

    if b is None:
        return False
    (ours, form), (theirs, other) = (tree_flatten((samples.inputs, samples.labels)) for samples in (a, b))
    return form == other and all(map(equal, ours, theirs))


def _run_state(state: Mapping[str, Any], monitor: Monitor) -> RunState:
    target = state["target"] if monitor.target == "auto" else None  # a callable comes from the new run
    return RunState(target, state["method"])


def at_restored(error: Exception) -> Exception:
    """A model's own failure at the samples of a checkpoint, with a word on where they are from."""
    if not isinstance(error, MeasurementError) or error.__cause__ is None:
        return error
    told = MeasurementError(f"At the samples that came with the checkpoint: {error}")
    told.__cause__ = error.__cause__
    return told
