"""Runs a measurement by the method that was planned for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_hessian.curvature.analysis import Analysis, finite_gradients
from lightning_hessian.curvature.checks.certificate import predict
from lightning_hessian.curvature.checks.diagnosis import Diagnosis
from lightning_hessian.curvature.cost_model import ModelCosts
from lightning_hessian.curvature.meter import Meter, Progress, silent
from lightning_hessian.curvature.methods.dense import dense_spectrum, whole_hessians
from lightning_hessian.curvature.methods.interface import MethodInput, MethodResult
from lightning_hessian.curvature.methods.lanczos import lanczos_spectrum
from lightning_hessian.curvature.methods.low_rank import low_rank_spectrum
from lightning_hessian.curvature.methods.plan import Plan, remaining_memory
from lightning_hessian.curvature.options import MethodName, Options
from lightning_hessian.curvature.spectrum import Spectrum, zero_decomposition
from lightning_hessian.curvature.target_batch import TargetBatch

METHODS: dict[MethodName, Callable[[MethodInput], MethodResult]] = {
    "dense": dense_spectrum,
    "low_rank": low_rank_spectrum,
    "lanczos": lanczos_spectrum,
}

# How asymmetric a Hessian may be before its digits are called rounding.
ASYMMETRY_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}


@dataclass(frozen=True)
class Measurement:
    """A spectrum, the whole matrices ``[S, K, D, D]`` of the first S samples where asked for, and what was planned."""

    spectrum: Spectrum
    hessian: Tensor | None
    plan: Plan


def execute(
    batch: TargetBatch,
    plan: Plan,
    options: Options,
    *,
    target: str,
    analysis: Analysis | None = None,
    meter: Meter | None = None,
    progress: Progress = silent,
) -> Measurement:
    """The spectra of a batch, and the whole matrices of its first samples, by the method that was planned.

    Args:
        batch: what to differentiate: all samples the plan was made for, or some of them.
        plan: from ``make_plan``; ``num_matrices`` counts samples of this batch.
        options: those the plan was made with.
        target: name of the target, for the result.
        analysis: of this batch, with the costs of one that contains it; otherwise both are determined here.
        meter: started when the measurement began.
        progress: called with the number of finished columns (``dense``), samples (``low_rank``) or matrix-vector
            products (``lanczos``).

    Raises:
        MeasurementError: gradients or Hessians are not finite, or one sample does not fit the memory.
    """
    meter = meter or Meter(batch.x.device)
    memory = options.memory(batch.x.device)
    costs = analysis.costs if analysis else ModelCosts(batch, memory)
    gradient = analysis.gradient if analysis else finite_gradients(batch, costs, memory)
    diagnosis = plan.diagnosis
    if diagnosis.zero:
        result = _zero_spectrum(gradient, options, plan.num_matrices)
    else:
        budget = remaining_memory(plan, batch, costs, options, memory)
        given = MethodInput(
            batch,
            costs,
            gradient,
            diagnosis.network_is_piecewise_linear,
            options,
            budget,
            num_matrices=plan.num_matrices,
            progress=progress,
        )
        result = METHODS[plan.method](given)
        if plan.num_matrices and result.matrices is None:
            first = replace(given, batch=batch.select(slice(0, plan.num_matrices)))
            result = replace(result, matrices=whole_hessians(first))
    spectrum = Spectrum(
        **vars(result.decomposition),
        gradient=gradient,
        method=plan.method,
        reason=plan.reason,
        autodiff_mode=result.autodiff_mode,
        target=target,
        finite_difference_error=torch.full_like(gradient[..., 0], torch.nan),
        valid=torch.ones_like(gradient[..., 0], dtype=torch.bool),
        diagnosis=with_asymmetry(diagnosis, result.decomposition.asymmetry, batch.x.dtype),
        cost=meter.cost(result.num_matvecs),
    )
    return Measurement(spectrum, result.matrices if plan.num_matrices else None, plan)


def _zero_spectrum(gradient: Tensor, options: Options, num_matrices: int) -> MethodResult:
    """That of Hessians that are exactly zero."""
    num_inputs = gradient.shape[-1]
    num_listed = min(options.num_eigenvalues, num_inputs)
    matrices = gradient.new_zeros(num_matrices, *gradient.shape[1:], num_inputs)
    found = zero_decomposition(gradient, num_listed, num_listed)
    zero = torch.zeros_like(found.trace)
    prediction = predict(gradient, found.eigenvectors[:, :, 0], zero, lambda w: zero, options.generator())
    return MethodResult(found, prediction, matrices=matrices)


def with_asymmetry(diagnosis: Diagnosis, asymmetry: Tensor, dtype: torch.dtype) -> Diagnosis:
    """The diagnosis, not trusted where a Hessian was far from symmetric."""
    worst = float(asymmetry.max())
    if not diagnosis.trusted or worst <= ASYMMETRY_TOLERANCE[dtype]:
        return diagnosis  # where the cause is known, rounding is not it
    finding = (
        f"A Hessian is asymmetric by {worst:.1e} of its norm: in {str(dtype).removeprefix('torch.')} it is "
        f"lost in rounding. Measure in float64."
    )
    return replace(diagnosis, findings=(*diagnosis.findings, finding), trusted=False)
