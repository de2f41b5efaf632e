"""Measurements of groups of samples as one measurement of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from lightning_hessian.curvature.algorithms.quadrature import Density
from lightning_hessian.curvature.checks.diagnosis import Diagnosis
from lightning_hessian.curvature.meter import Meter
from lightning_hessian.curvature.methods.execute import Measurement, with_asymmetry


def on_cpu(measurement: Measurement) -> Measurement:
    """The same measurement in main memory."""
    return _changed([measurement], lambda tensors: tensors[0].cpu())


def merged(parts: Sequence[Measurement], diagnosis: Diagnosis, meter: Meter) -> Measurement:
    """One measurement of all samples, in the order of ``parts``.

    Args:
        parts: of one method and target, each of some of the samples.
        diagnosis: of all samples.
        meter: of the whole; memory is that of this process.
    """
    whole = _changed(_of_one_number_of_vectors(parts), torch.cat)
    asymmetry, num_matvecs = whole.spectrum.asymmetry, max(part.spectrum.cost.num_matvecs for part in parts)
    return replace(
        whole,
        spectrum=replace(
            whole.spectrum,
            complete=all(part.spectrum.complete for part in parts),
            diagnosis=with_asymmetry(diagnosis, asymmetry, asymmetry.dtype),
            cost=meter.cost(num_matvecs),
        ),
    )


def _of_one_number_of_vectors(parts: Sequence[Measurement]) -> list[Measurement]:
    """``low_rank`` keeps more eigenvectors where memory allows; the largest come first."""
    numbers = [0 if p.spectrum.eigenvectors is None else p.spectrum.eigenvectors.shape[2] for p in parts]
    return [
        part if number == min(numbers) else _cut(part, min(numbers))
        for part, number in zip(parts, numbers, strict=True)
    ]


def _cut(part: Measurement, number: int) -> Measurement:
    vectors, index = part.spectrum.eigenvectors, part.spectrum.vector_index
    assert vectors is not None
    assert index is not None
    spectrum = replace(part.spectrum, eigenvectors=vectors[:, :, :number], vector_index=index[:, :, :number])
    return replace(part, spectrum=spectrum)


def _changed(parts: Sequence[Measurement], change: Callable[[list[Tensor]], Tensor]) -> Measurement:
    """The first of ``parts``, with ``change`` of all their tensors in the place of each of its own."""

    def of(values: list[Any]) -> Any:
        if isinstance(values[0], Density):
            return Density(change([d.nodes for d in values]), change([d.weights for d in values]))
        return change(values) if isinstance(values[0], Tensor) else values[0]

    spectra = [part.spectrum for part in parts]
    names = [f.name for f in fields(spectra[0])]
    spectrum = replace(spectra[0], **{name: of([getattr(spectrum, name) for spectrum in spectra]) for name in names})
    matrices = [part.hessian for part in parts if part.hessian is not None]
    return replace(parts[0], spectrum=spectrum, hessian=change(matrices) if matrices else None)
