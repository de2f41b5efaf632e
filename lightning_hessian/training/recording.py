"""From a measurement to its record, which is compared with the previous one of the run."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lightning_hessian._version import __version__
from lightning_hessian.curvature.methods.execute import Measurement
from lightning_hessian.model.prepare import PreparedModel
from lightning_hessian.records.color_scale import run_scale
from lightning_hessian.records.metrics import METRICS
from lightning_hessian.records.record import ClassId, Record
from lightning_hessian.records.subspace import subspace_overlap
from lightning_hessian.records.validity import without_invalid
from lightning_hessian.training.samples import Samples
from lightning_hessian.training.settings import MeasurementSettings

OF_SPECTRUM = (
    *("eigenvalues", "eigenvectors", "vector_index", "residuals", "converged", "complete"),
    *("gradient", "diagonal", "diagonal_error", "target", "method", "reason", "autodiff_mode"),
    *("finite_difference_error", "valid"),
)


def make_record(
    prepared: PreparedModel,
    measurement: Measurement,
    samples: Samples,
    settings: MeasurementSettings,
    previous: Record | None,
    **when: Any,
) -> Record:
    """The record of ``measurement``, with its color scale and how directions turned since ``previous``.

    Where a Hessian is not valid, all its numbers are NaN.

    Args:
        prepared: what was measured.
        measurement: its numbers.
        samples: where it was measured.
        settings: as given to the monitor.
        previous: the record before this one.
        **when: ``step``, ``logged_step``, ``epoch`` and ``stage``.
    """
    record = _converted(
        measurement,
        name=settings.name,
        **when,
        x=prepared.batch.x,
        labels=samples.labels,
        predicted=prepared.predicted,
        classes=prepared.batch.classes,
        class_ids=_class_ids(prepared, settings),
        class_names=settings.class_names,
        made_with=_made_with(prepared, settings),
    )
    record = without_invalid(record)
    shared = subspace_overlap(previous, record)
    record = record.with_metrics(top_eigenvector_cosine=shared.cosine, top_subspace_overlap=shared.overlap)
    return replace(record, color_scale=run_scale(None if previous is None else previous.color_scale, record.hessian))


def _converted(measurement: Measurement, **context: Any) -> Record:
    """The numbers of ``measurement`` as numpy arrays; ``context`` gives the fields that a measurement does not know."""
    spectrum = measurement.spectrum
    diagnosis, cost = spectrum.diagnosis, spectrum.cost
    undefined = np.full(tuple(spectrum.trace.shape), np.nan)
    values = {
        **{name: getattr(spectrum, name) for name in OF_SPECTRUM},
        "density_nodes": spectrum.density and spectrum.density.nodes,
        "density_weights": spectrum.density and spectrum.density.weights,
        "hessian": measurement.hessian,
        **context,
    }
    return Record(
        **{name: _to_numpy(value) for name, value in values.items()},
        metrics={m.name: undefined if m.is_comparison else _to_numpy(getattr(spectrum, m.name)) for m in METRICS},
        measured_at=time.time(),
        diagnosis=diagnosis.kind,
        network=diagnosis.network,
        message=diagnosis.message,
        seconds=cost.seconds,
        num_matvecs=cost.num_matvecs,
        memory=cost.memory,
        memory_exact=cost.memory_exact,
    )


def _to_numpy(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value


def _class_ids(prepared: PreparedModel, settings: MeasurementSettings) -> tuple[ClassId, ...]:
    if settings.classes in ("label", "predicted"):
        return (str(settings.classes),)
    return tuple(prepared.batch.classes[0].tolist())


def _made_with(prepared: PreparedModel, settings: MeasurementSettings) -> dict[str, Any]:
    return {
        "lightning_hessian": __version__,
        "torch": torch.__version__,
        "dtype": settings.dtype,
        "device": str(prepared.batch.x.device),
        "num_outputs": prepared.num_outputs,
        **vars(settings.options),
    }
