"""What of a run its checkpoints hold, as tensors and plain values, and how a run continues from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_hessian.curvature.checks.diagnosis import Finding
from lightning_hessian.curvature.checks.verdict import PreviousChecks
from lightning_hessian.errors import ConfigurationError, MeasurementError
from lightning_hessian.model.targets import target_name
from lightning_hessian.records.files import load_record
from lightning_hessian.records.locations import Location, location
from lightning_hessian.records.record import Record
from lightning_hessian.training.run_state import RunState
from lightning_hessian.training.samples import Samples
from lightning_hessian.training.schedule import TrainingPosition
from lightning_hessian.training.settings import MonitorSettings

VERSION = 4
OF_OPTIONS = ("num_eigenvalues", "block_size", "density_vectors", "seed", "max_memory", "max_seconds")
OF_SAMPLES = ("samples", "num_samples", "sample_indices", "val_dataloader_idx")


def to_state(run: RunState, settings: MonitorSettings) -> dict[str, Any]:
    """Tensors and plain values only, so that ``torch.load(weights_only=True)`` reads them; the size of the samples."""
    return {
        "version": VERSION,
        "settings": _described(settings),
        "samples": None if run.samples is None else dict(vars(run.samples)),
        "target": run.target if isinstance(run.target, str) else None,
        "method": run.method,
        "checks": None if run.checks is None else asdict(run.checks),
        "last_record": None if run.record_path is None else str(run.record_path),
        "last_record_measured_at": None if run.previous is None else run.previous.measured_at,
        "measured_step": run.measured_step,
        "position": asdict(run.position),
    }


def from_state(
    saved: Mapping[str, Any], settings: MonitorSettings, given: Samples | None, *, strict: bool = False
) -> tuple[RunState, str | None]:
    """How a run continues from a checkpoint: with its own settings, where they have changed.

    The last record is read from its file, for the next one to be compared with; where that is gone, damaged or another
    run's, the comparison starts anew.

    Args:
        saved: from ``to_state``.
        settings: of the new run.
        given: the samples that it was given, if any; they replace those of the checkpoint.
        strict: whether other settings or samples are an error.

    Returns:
        What the new run starts with, ``samples`` None where it has to find new ones; and a warning, or None.

    Raises:
        ConfigurationError: with ``strict``, the run cannot continue as it was.
    """
    if saved.get("version") != VERSION:
        cause = "the checkpoint was saved by another version of lightning-hessian"
        if strict:
            raise ConfigurationError(f"{cause}.")
        return RunState(given), f"{cause}: the monitor's state was reset."
    run = RunState(given, measured_step=saved["measured_step"], position=TrainingPosition(**saved["position"]))
    before, now = saved["settings"], _described(settings)
    changed = {name: f"{name}: {now[name]} (was {before.get(name)})" for name in now if now[name] != before.get(name)}
    stored = None if saved["samples"] is None else Samples(**saved["samples"])
    if given is not None:
        if "samples" not in changed and not _same(given, stored):
            changed["samples"] = "samples: other samples"
    elif stored is not None and not changed.keys() & OF_SAMPLES:
        try:
            settings.measurement.check_samples(stored)
            run.samples = stored
        except ConfigurationError as error:
            changed["samples"] = f"samples: new samples, since the checkpoint's cannot be used ({error})"
    if changed:
        cause = f"other settings than the checkpoint's: {'; '.join(changed.values())}."
        if strict:
            raise ConfigurationError(cause)
        return run, f"resumed with {cause} The new settings apply from now on, so curves may jump."
    run.target = saved["target"] if settings.measurement.target == "auto" else None  # a callable comes from the new run
    run.method = saved["method"]
    if (checks := saved["checks"]) is not None:
        run.checks = PreviousChecks(**{**checks, "findings": tuple(Finding(**f) for f in checks["findings"])})
    path = location(saved["last_record"]) if saved["last_record"] else None
    run.previous = _previous(path, saved["last_record_measured_at"])
    run.record_path = path if run.previous else None
    return run, None


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
        **{name: str(getattr(measured.options, name)) for name in OF_OPTIONS},
    }


def _numbers(values: Any) -> str:
    if hasattr(values, "tolist"):
        return repr(values.tolist())
    return repr(list(values) if isinstance(values, Iterable) and not isinstance(values, str) else values)


def _same(a: Samples, b: Samples | None) -> bool:
    def equal(s: Any, t: Any) -> bool:
        return s is t or (isinstance(s, Tensor) and isinstance(t, Tensor) and s.dtype == t.dtype and torch.equal(s, t))

    if b is None:
        return False
    (ours, form), (theirs, other) = (tree_flatten((samples.inputs, samples.labels)) for samples in (a, b))
    return form == other and all(map(equal, ours, theirs))


def _previous(path: Location | None, measured_at: float | None) -> Record | None:
    """The record in a file, or where another run set it aside, without whole matrices; None if it is not found."""
    for candidate in () if path is None else (path, *path.parent.glob(f"superseded_*/{path.name}")):
        with suppress(Exception):  # gone, damaged, or on a file system that fails in its own way
            record = load_record(candidate, matrices=False)
            if record.measured_at == measured_at:
                return record
    return None


def explain_restored(error: Exception) -> Exception:
    """A model's own failure at the samples of a checkpoint, with a note on where they come from."""
    if not isinstance(error, MeasurementError) or error.__cause__ is None:
        return error
    explained = MeasurementError(f"At the samples from the checkpoint: {error}")
    explained.__cause__ = error.__cause__
    return explained
