"""What of a run its checkpoints hold, as tensors and plain values, and how a run continues from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_hessian.errors import ConfigurationError, MeasurementError
from lightning_hessian.model.targets import target_name
from lightning_hessian.records.files import load_record
from lightning_hessian.records.record import Record
from lightning_hessian.training.measurement import RunState
from lightning_hessian.training.samples import Samples
from lightning_hessian.training.schedule import START, TrainingPosition
from lightning_hessian.training.settings import MonitorSettings

VERSION = 2
OF_SAMPLES = ("samples", "num_samples", "sample_indices", "val_dataloader_idx")


@dataclass(frozen=True)
class Checkpointed:
    """What a checkpoint holds of a run.

    Attributes:
        samples: at which it measures, where they are known.
        state: what its measurements pass on.
        position: where training was.
        measured_step: optimizer steps before its last measurement; None where there was none.
        record_path: where the last record was saved, or None.
    """

    samples: Samples | None
    state: RunState
    position: TrainingPosition
    measured_step: int | None
    record_path: Path | None


def to_state(run: Checkpointed, settings: MonitorSettings) -> dict[str, Any]:
    """Tensors and plain values only, so that ``torch.load(weights_only=True)`` reads them; the size of the samples."""
    samples, previous = run.samples, run.state.previous
    return {
        "version": VERSION,
        "settings": _described(settings),
        "samples": None if samples is None else {"inputs": samples.inputs, "labels": samples.labels},
        "target": run.state.target if isinstance(run.state.target, str) else None,
        "method": run.state.method,
        "last_record": None if run.record_path is None else str(run.record_path),
        "last_record_measured_at": None if previous is None else previous.measured_at,
        "measured_step": run.measured_step,
        "position": asdict(run.position),
    }


def from_state(
    saved: Mapping[str, Any], settings: MonitorSettings, given: Samples | None
) -> tuple[Checkpointed, str | None]:
    """How a run continues from a checkpoint: with its own settings, where they have changed.

    The last record is read from its file, for the next one to be compared with; where that is gone, damaged or another
    run's, the comparison starts anew.

    Args:
        saved: from ``to_state``.
        settings: of the new run.
        given: the samples that it was given, if any; they replace those of the checkpoint.

    Returns:
        What the new run starts with, ``samples`` None where it has to find new ones; and a warning, or None.
    """
    if saved.get("version") != VERSION:
        reset = Checkpointed(given, RunState(), START, None, None)
        return reset, "the checkpoint was saved by another version of lightning-hessian: the monitor's state was reset."
    before, now = saved["settings"], _described(settings)
    changed = [f"{name}: {now[name]} (was {before.get(name)})" for name in now if now[name] != before.get(name)]
    renewed = any(now[name] != before.get(name) for name in OF_SAMPLES)
    samples, problem = _samples(saved, settings, given, renewed=renewed)
    if given is not None and now["samples"] == before.get("samples") and not _same(given, samples):
        changed.append("samples: other samples")
    changed += [] if problem is None else [problem]
    path = saved["last_record"] and Path(saved["last_record"])
    state = RunState()
    if not changed:
        target = saved["target"] if settings.measurement.target == "auto" else None  # a callable comes from the new run
        state = RunState(target, saved["method"], _previous(path, saved["last_record_measured_at"]))
    position = TrainingPosition(**saved["position"])
    run = Checkpointed(given or samples, state, position, saved["measured_step"], path if state.previous else None)
    if not changed:
        return run, None
    return run, (
        f"resumed with other settings than the checkpoint's: {'; '.join(changed)}. The new ones apply from here on: "
        f"curves may jump."
    )


def _described(settings: MonitorSettings) -> dict[str, str]:
    """What decides whether two runs measure the same; equal numbers in lists, tuples and tensors read the same."""
    measured, samples = settings.measurement, settings.samples
    return {
        "classes": _numbers(measured.classes),
        "target": target_name(measured.target) if callable(measured.target) else measured.target,
        "dtype": measured.dtype,
        "wrt": repr(measured.wrt),
        "method": measured.options.method,
        "samples": "the first validation batch" if samples.given is None else "given samples",
        "num_samples": str(samples.num_samples),
        "sample_indices": _numbers(samples.sample_indices),
        "val_dataloader_idx": str(samples.val_dataloader_idx),
        "num_eigenvalues": str(measured.options.num_eigenvalues),
    }


def _numbers(values: Any) -> str:
    if hasattr(values, "tolist"):
        return repr(values.tolist())
    return repr(list(values) if isinstance(values, Iterable) and not isinstance(values, str) else values)


def _samples(
    saved: Mapping[str, Any], settings: MonitorSettings, given: Samples | None, *, renewed: bool
) -> tuple[Samples | None, str | None]:
    """The checkpoint's samples, unless others were asked for or they are unusable; then why."""
    if saved["samples"] is None or (renewed and given is None):
        return None, None
    samples = Samples(**saved["samples"])
    if given is not None:
        return samples, None
    try:
        settings.measurement.check_samples(samples)
    except ConfigurationError as error:
        return None, f"samples: new samples, since those of the checkpoint cannot be used ({error})"
    return samples, None


def _same(a: Samples, b: Samples | None) -> bool:
    def equal(s: Any, t: Any) -> bool:
        return s is t or (isinstance(s, Tensor) and isinstance(t, Tensor) and s.dtype == t.dtype and torch.equal(s, t))

    if b is None:
        return False
    (ours, form), (theirs, other) = (tree_flatten((samples.inputs, samples.labels)) for samples in (a, b))
    return form == other and all(map(equal, ours, theirs))


def _previous(path: Path | None, measured_at: float | None) -> Record | None:
    """The record in a file, without whole matrices; None where the file is gone, damaged or from another run."""
    if path is None:
        return None
    try:
        record = load_record(path)
    except (OSError, ValueError):
        return None
    return replace(record, hessian=None) if record.measured_at == measured_at else None


def explain_restored(error: Exception) -> Exception:
    """A model's own failure at the samples of a checkpoint, with a note on where they come from."""
    if not isinstance(error, MeasurementError) or error.__cause__ is None:
        return error
    explained = MeasurementError(f"At the samples from the checkpoint: {error}")
    explained.__cause__ = error.__cause__
    return explained
