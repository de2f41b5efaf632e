"""Central differences of values at the reported samples: a check that needs no autograd."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import attempted, on_few
from lightning_hessian.curvature.checks.differences import CURVATURE, Differences, deviation, differences_at
from lightning_hessian.curvature.checks.prediction import LARGEST_ERROR, TOLERANCE, Prediction
from lightning_hessian.curvature.checks.step_dependence import (
    MARGIN,
    STEADY,
    at,
    by_step,
    contradicts,
    contradicts_both_sides,
    floored,
    has_curvature_jump,
    has_jump,
    has_kink,
    masked,
    pooled,
    slope_scale,
)
from lightning_hessian.curvature.checks.step_sizes import FIRST_STEP, MOST_STEPS, StepSizes
from lightning_hessian.curvature.checks.zero import root_mean_square
from lightning_hessian.curvature.target_batch import TargetBatch

Outcome = Literal["certified", "contradicted", "kink", "jump", "curvature_jump", "noise", "unverifiable"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

BLUR = 3e-2  # relative, of differences that are sharp enough to tell
KINK_SHOWN = 3  # steps after the first, from which on a sample that shows a kink is left alone
# Relative to the value: noise between these may come from a forward that computes in float32.
FLOAT32, LOW_PRECISION = 3e-8, 1e-6
SINGLE = torch.finfo(torch.float32).eps
FLOAT64 = 1e-12  # more noise than this is not that of float64 alone


@dataclass(frozen=True)
class Certificate:
    """How far derivatives agree with central differences of values at their own samples.

    Attributes:
        outcome: ``[N, K]``, positions in ``OUTCOMES``.
        error: ``[N, K]``, |wᵀHw − t″| relative to the spectral norm of H, at the step with the sharpest
            difference; NaN where nothing could be compared. Where H is zero, relative to ‖g‖ (where that is zero too,
            to |t|) per root mean square of the input.
        difference: ``[N, K]``, the same, relative to nothing.
        curvature: ``[N, K]``, t″, at the same step.
        slope_error: ``[N, K]``, |gᵀw − t′| relative to ‖g‖, at the same step; 0 where a curvature is wrong at a kink.
        slope_difference: ``[N, K]``, the same, relative to nothing.
        size: ``[N, K]``, the largest |t| seen.
        noise: ``[N, K]``, standard deviation of the noise in the values that the differences show, at most.
        step: ``[N]``, h of the last comparison.
    """

    outcome: Tensor
    error: Tensor
    difference: Tensor
    curvature: Tensor
    slope_error: Tensor
    slope_difference: Tensor
    size: Tensor
    noise: Tensor
    step: Tensor

    def is_outcome(self, outcome: Outcome) -> Tensor:
        """``[N, K]``, which entries ended so."""
        return self.outcome == OUTCOMES.index(outcome)


def certify(
    batch: TargetBatch,
    prediction: Prediction,
    group_size: int,
    first_step: Tensor | None = None,
    *,
    precision: float = 0.0,
) -> Certificate:
    """Compares derivatives with differences of values in float64, or in the precision of ``batch`` where none exist.

    Args:
        batch: as it was differentiated.
        prediction, group_size, first_step, precision: as for ``compare``.
    """
    exact = in_float64(batch)
    found = compare(exact, prediction, group_size, first_step, precision=precision)
    if exact.x.dtype != batch.x.dtype and found.is_outcome("unverifiable").all():
        found = compare(batch, prediction, group_size, first_step, precision=precision)
    return found


def in_float64(batch: TargetBatch) -> TargetBatch:
    """The batch in which values are computed: its own precision where the device has no float64."""
    try:
        return batch.to(torch.float64)
    except TypeError:  # MPS
        return batch


def compare(
    batch: TargetBatch,
    prediction: Prediction,
    group_size: int,
    first_step: Tensor | None = None,
    *,
    precision: float = 0.0,
    direction_error: Tensor | None = None,
) -> Certificate:
    """Compares derivatives with central differences of the values, at every sample of a batch.

    With values at x + j h w for j = −2 … 2,

        slope      t′ = (t₋₂ − 8 t₋₁ + 8 t₁ − t₂) / 12h                      against  gᵀw
        curvature  t″ = (−t₋₂ + 16 t₋₁ − 30 t₀ + 16 t₁ − t₂) / 12h²          against  wᵀHw

    and the fourth difference t₋₂ − 4 t₋₁ + 6 t₀ − 4 t₁ + t₂ measures the noise of the values, or what the step is too
    long for. A sample is certified where derivatives and differences agree to their tolerance and the differences are
    sharp enough to tell. At the first step, noise excuses a disagreement only where it is that of float32; else the
    step shrinks tenfold; where noise is that small, a longer one is tried after it. What never agrees is told apart by
    how the quotients change with the step (``step_dependence``).

    Args:
        batch: in the precision of the values.
        prediction: of the same samples.
        group_size: samples whose five values are computed at a time. The five points of a sample make up a batch of
            another size than that of the derivatives, so that kernels that err at one batch size, and samples that
            influence each other, show themselves.
        first_step: ``[N]``, h to begin with.
        precision: relative, in which the forward computes, where it is worse than that of ``batch``.
        direction_error: ``[N]``, how far the directions w may be off, relative to their length, where they were
            measured themselves.

    Entries whose prediction is not finite are passed over, as if they were certified.

    Cost: 5 values per sample and step, usually one step; no backward pass.

    Source: Moré and Wild, "Estimating computational noise" (2011), for noise from differences.
    """
    p, size = prediction.to(batch.x), root_mean_square(batch.x).unsqueeze(1)
    # Without float64 values, rounding in float32 derivatives cannot be told from mistakes.
    exact = batch.x.dtype == torch.float64 and precision <= SINGLE
    least = TOLERANCE[torch.float32] if precision else 0.0
    tolerance = torch.as_tensor(max(prediction.tolerance, least) if exact else LARGEST_ERROR).to(p.slope)
    if direction_error is not None:  # which the curvature sees twice
        tolerance = torch.maximum(tolerance, 2 * direction_error.to(p.slope).unsqueeze(1)).clamp(max=LARGEST_ERROR)
    tolerance = tolerance * prediction.share
    first = FIRST_STEP * size.squeeze(1) if first_step is None else first_step.to(batch.x)

    def differences(active: Tensor, step: Tensor) -> Differences:
        return differences_at(batch, p, active, step, group_size, precision)

    steps, last = [differences(torch.arange(batch.num_samples, device=first.device), first)], first
    ignored = ~(p.spectral_norm.isfinite() & p.slope.isfinite())
    is_noisy = steps[0].noise >= FLOAT32 * steps[0].size
    agreed = _agrees(_sharpened(steps[0], ~is_noisy), p, tolerance, size, torch.full_like(p.slope, torch.inf)) | ignored
    if agreed.all() or (steps[0].size.isnan().all() and not _evaluates(batch)):
        return _certificate(steps, agreed, p, tolerance, size, first)
    looks_noisy = ((steps[0].noise <= max(LOW_PRECISION, MARGIN * precision) * steps[0].size) | agreed).all(dim=1)
    sizes = StepSizes(first, steps[0], p, looks_noisy)
    for i in range(MOST_STEPS):
        left = ~agreed
        if i >= KINK_SHOWN and left.any():
            left &= ~has_kink(by_step(steps))
        is_last = i == MOST_STEPS - 1
        if is_last and left.any():
            left &= _certificate(steps, agreed, p, tolerance, size, last).is_outcome("noise")
        active = left.any(dim=1).nonzero().flatten()
        if len(active) == 0:
            break
        step = sizes.of(active, i)
        last = last.index_copy(0, active, step)
        steps = pooled([*steps, differences(active, step)])
        seen = torch.stack([_beyond_noise(step) for step in steps]).amin(dim=0)
        agreed |= _agrees(steps[-1], p, tolerance, size, seen) & ~_is_refuted(steps, p, tolerance)
        changed = _has_changed(steps, precision, allowed=0 if is_last else MARGIN)
        agreed &= ~changed  # by chance, a random forward may agree
        if is_last:  # nor may much noise be hidden that is random
            steps[-1] = masked(steps[-1], ~changed)
        if i == 0:
            sizes.compare_noise(*steps)
    if precision and len(steps) > 1:
        steps = floored(steps)
    return _certificate(steps, agreed, p, tolerance, size, last)


def _sharpened(found: Differences, where: Tensor) -> Differences:
    """The same with the blur of rounding alone."""
    return replace(
        found,
        blur=(deviation(CURVATURE) * found.rounding / found.step**2).where(where, found.blur),
        slope_blur=(found.rounding / found.step).where(where, found.slope_blur),
    )


def _evaluates(batch: TargetBatch) -> bool:
    """Whether there is a finite value at the samples themselves."""
    with torch.no_grad():
        return bool(attempted(lambda: on_few(batch, 1, lambda few: few.values(few.x)).isfinite().any()))


def _beyond_noise(found: Differences) -> Tensor:
    """The error where noise does not explain it, else infinity."""
    return found.error.where(found.error > MARGIN * found.blur, torch.inf)


def _agrees(found: Differences, p: Prediction, tolerance: Tensor, size: Tensor, seen: Tensor) -> Tensor:
    """Where derivatives and differences agree, and the differences are sharp enough to tell.

    ``size [N, 1]`` is that of the input. ``seen [N, K]`` is the smallest error beyond noise of any step: where the
    Hessian is zero, and there is no norm to compare with, differences must be sharp enough to show it.
    """
    norm, scale = p.spectral_norm, slope_scale(found, p)
    slope = found.slope_error <= tolerance * scale + MARGIN * found.slope_blur
    if p.slope_only:
        slope &= found.slope_error <= LARGEST_ERROR * scale
        return slope & ((found.slope_blur <= BLUR * p.gradient_norm) | (p.gradient_norm == 0))
    allowed = torch.minimum(tolerance * norm + MARGIN * found.blur, LARGEST_ERROR * p.share * norm)
    curvature = (found.error <= allowed) & (found.blur <= BLUR * norm)
    zero = (norm == 0) & (found.error <= MARGIN * found.blur) & (MARGIN * found.blur <= STEADY * seen)
    # Less than would change the gradient over the size of the input; where the gradient is zero too, the values are
    # constant up to rounding. So neither may a step be longer than to the next kink, nor so short that all is noise.
    constant = found.noise <= LOW_PRECISION * found.size
    reach = torch.maximum(found.step, size)
    zero &= torch.where(p.gradient_norm > 0, found.blur * reach <= BLUR * p.gradient_norm, constant)
    return (curvature | zero) & slope


def _is_refuted(steps: list[Differences], p: Prediction, tolerance: Tensor) -> Tensor:
    """Where sharper steps than the last contradict the derivatives: two, or the slope at a shorter one."""
    last, refuted = steps[-1], torch.zeros_like(p.slope, dtype=torch.bool)
    if len(steps) > 2:
        refuted = contradicts(by_step([masked(each, each.blur < last.blur) for each in steps[:-1]]), p, tolerance)
    for each in steps[:-1]:
        sharper = (each.step < last.step) & (each.slope_blur < last.slope_blur)
        refuted |= sharper & (each.slope_error > tolerance * slope_scale(each, p) + MARGIN * each.slope_blur)
    return refuted


def _has_changed(steps: list[Differences], precision: float, allowed: float) -> Tensor:
    """Where the value at the sample itself differs at the last step, by more than ``allowed`` times the noise."""
    first, last = steps[0], steps[-1]
    noise = allowed * torch.maximum(first.noise, last.noise)
    return (last.value - first.value).abs() > noise + max(LOW_PRECISION, MARGIN * precision) * last.size


def _certificate(
    steps: list[Differences], agreed: Tensor, p: Prediction, tolerance: Tensor, size: Tensor, last: Tensor
) -> Certificate:
    every = by_step(steps)
    # The sharpest differences, among those that agree where some do: a long step may cross a kink.
    close = every.error <= LARGEST_ERROR * p.spectral_norm
    blur = every.blur.where(close | ~agreed, torch.inf)
    blur = blur.where(p.spectral_norm > 0, every.error + MARGIN * every.blur)
    sharpest = at(every, blur.nan_to_num(torch.inf).argmin(dim=0, keepdim=True))
    sharpest = Differences(*(getattr(sharpest, f.name)[0] for f in fields(sharpest)))
    scale, noise = slope_scale(sharpest, p), every.noise.nan_to_num(torch.inf).amin(dim=0)
    size_of_values = every.size.nan_to_num(0).amax(dim=0)
    # A forward that computes partly in float32 shows it at the shortest step; its derivatives are no better.
    partly = (noise > FLOAT64 * size_of_values) & noise.isfinite() & (sharpest.blur <= BLUR * p.spectral_norm)
    tolerance32 = TOLERANCE[torch.float32]
    allowed = torch.minimum(tolerance32 * p.spectral_norm + MARGIN * sharpest.blur, LARGEST_ERROR * p.spectral_norm)
    partly &= sharpest.error <= allowed * p.share
    agreed = agreed | (partly & (sharpest.slope_error <= tolerance32 * p.share * scale + MARGIN * sharpest.slope_blur))
    outcome, wrong_at_kink = _outcomes(every, agreed, p, tolerance)
    # A curvature that is zero is compared with one that would change the slope by its own size over that of the input.
    norm = p.spectral_norm.where(p.spectral_norm > 0, p.gradient_norm / size)
    norm = norm.where(norm > 0, sharpest.size / size**2)
    slope_difference = sharpest.slope_error.where(~wrong_at_kink, 0)
    return Certificate(
        outcome,
        error=sharpest.error / norm.where(norm > 0, 1),
        difference=sharpest.error,
        curvature=sharpest.second,
        slope_error=slope_difference / scale.where(scale > 0, 1),
        slope_difference=slope_difference,
        size=size_of_values,
        noise=noise,
        step=last,
    )


def _outcomes(every: Differences, agreed: Tensor, p: Prediction, tolerance: Tensor) -> tuple[Tensor, Tensor]:
    """How all entries ended, and which have a curvature that is wrong at a kink."""
    if agreed.all() and len(every.step) == 1:  # a kink needs three steps
        return torch.full_like(agreed, OUTCOMES.index("certified"), dtype=torch.long), torch.zeros_like(agreed)
    is_kink = has_kink(every)
    wrong_at_kink = is_kink & contradicts_both_sides(every, p)
    outcome = torch.full_like(agreed, OUTCOMES.index("unverifiable"), dtype=torch.long)
    for name, chosen in (
        ("noise", every.second.isfinite().any(dim=0)),
        ("contradicted", contradicts(every, p, tolerance) | wrong_at_kink),
        ("curvature_jump", has_curvature_jump(every)),
        ("jump", has_jump(every)),
        ("kink", is_kink & ~wrong_at_kink),
        ("certified", agreed),
    ):
        outcome = outcome.where(~chosen, OUTCOMES.index(name))
    return outcome, wrong_at_kink
