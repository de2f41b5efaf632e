"""Measurements of groups of samples as one measurement of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_hessian.curvature.batching import combine, concatenate
from lightning_hessian.curvature.checks.diagnosis import combined, joined
from lightning_hessian.curvature.meter import Meter
from lightning_hessian.curvature.methods.execute import Measurement


def on_cpu(measurement: Measurement) -> Measurement:
    """The same measurement in main memory."""
    return combine([measurement], lambda tensors: tensors[0].cpu())


def merged(measurements: Sequence[Measurement], meter: Meter) -> Measurement:
    """One measurement of all samples, in the order of ``measurements``; the tensors of a single one are not copied.

    Args:
        measurements: by one method and of one target, each of some of the samples.
        meter: of the whole; memory is that of this process.
    """
    # ``low_rank`` gives more eigenvectors where memory allows; the largest come first.
    num_vectors = min(m.spectrum.eigenvectors.shape[2] for m in measurements)
    whole = concatenate([_with_vectors(m, num_vectors) for m in _with_first_matrices(measurements)])
    diagnosis = combined([m.spectrum.diagnosis for m in measurements])
    num_matvecs = max(m.spectrum.cost.num_matvecs for m in measurements)
    spectrum = replace(
        whole.spectrum,
        complete=all(m.spectrum.complete for m in measurements),
        valid=whole.spectrum.valid & diagnosis.trusted,
        diagnosis=diagnosis,
        cost=meter.cost(num_matvecs),
    )
    findings = joined(finding for m in measurements for finding in m.checks.findings)
    return replace(whole, spectrum=spectrum, checks=replace(whole.checks, findings=findings))


def _with_first_matrices(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The same, with whole matrices only up to the first that has dropped its own: they are those of first samples."""
    complete = True
    kept = []
    for m in measurements:
        complete = complete and (m.hessian is not None or m.plan.num_matrices == 0)
        kept.append(m if complete else replace(m, hessian=None))
    return kept


def _with_vectors(measurement: Measurement, number: int) -> Measurement:
    vectors, index = measurement.spectrum.eigenvectors, measurement.spectrum.vector_index
    if number == vectors.shape[2]:
        return measurement
    spectrum = replace(measurement.spectrum, eigenvectors=vectors[:, :, :number], vector_index=index[:, :, :number])
    return replace(measurement, spectrum=spectrum)
