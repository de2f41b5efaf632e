"""Central differences of values at the reported samples: a check that needs no autograd."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import on_few, out_of_memory
from lightning_hessian.curvature.checks.differences import OFFSETS, SECOND, Differences, differences_at
from lightning_hessian.curvature.checks.prediction import Prediction
from lightning_hessian.curvature.checks.zero import root_mean_square
from lightning_hessian.curvature.target_batch import TargetBatch

Outcome = Literal["certified", "contradicted", "kink", "noise", "unverifiable"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
CERTIFIED = OUTCOMES.index("certified")

LARGEST_ERROR = 1e-2  # relative, whatever the noise: wrong derivatives have been seen off by 5 % and more
BLUR = 3e-2  # relative, of differences that are sharp enough to tell
FIRST_STEP = 1e-2  # along a unit vector, in root mean squares of the sample's entries
FACTOR = 10.0  # between two steps
# Exponents of the factor after the first step: shorter ones down to 1e-6, where values hold no second difference any
# more; where the values are as noisy as float32, one that is short enough for most kinks, and two longer ones.
SHORTER, LONGER = (-1, -2, -3, -4, -5), (-2, 1, 2, -1, -3)
MARGIN = 4  # standard deviations by which noise may explain a difference
STEADY = 0.3  # relative change of a difference quotient from one step to the next, of one that has settled
LOW_PRECISION = 1e-6  # relative to the value: noise up to here may come from a forward that computes in float32


@dataclass(frozen=True)
class Certificate:
    """How far derivatives agree with central differences of values at their own samples.

    Attributes:
        outcome: ``[N, K]``, positions in ``OUTCOMES``.
        error: ``[N, K]``, |wᵀHw − Δ²t/h²| relative to the spectral norm of H, at the step with the sharpest
            difference; NaN where nothing could be compared. Where H is zero, relative to ‖g‖ (where that is zero too,
            to |t|) per root mean square of the input.
        difference: ``[N, K]``, the same, relative to nothing.
        slope_error: ``[N, K]``, |gᵀw − Δt/2h| relative to ‖g‖, at the same step.
        size: ``[N, K]``, the largest |t| seen.
        noise: ``[N, K]``, standard deviation of the noise in the values that the differences show, at most.
        step: ``[N]``, h of the last comparison.
        num_values: values computed per sample, on average.
    """

    outcome: Tensor
    error: Tensor
    difference: Tensor
    slope_error: Tensor
    size: Tensor
    noise: Tensor
    step: Tensor
    num_values: float

    def is_outcome(self, outcome: Outcome) -> Tensor:
        """``[N, K]``, which entries ended so."""
        return self.outcome == OUTCOMES.index(outcome)


def certify(
    batch: TargetBatch, prediction: Prediction, group_size: int, first_step: Tensor | None = None
) -> Certificate:
    """Compares derivatives with differences of values in float64, or in the precision of ``batch`` where none exist.

    Args:
        batch: as it was differentiated.
        prediction, group_size, first_step: as for ``compare``.
    """
    try:
        exact = batch.to(torch.float64)
    except TypeError:  # MPS has no float64
        exact = batch
    found = compare(exact, prediction, group_size, first_step)
    if exact.x.dtype != batch.x.dtype and found.is_outcome("unverifiable").all():
        found = compare(batch, prediction, group_size, first_step)
    return found


def compare(
    batch: TargetBatch, prediction: Prediction, group_size: int, first_step: Tensor | None = None
) -> Certificate:
    """Compares derivatives with central differences of the values, at every sample of a batch.

    With values at x + j h w for j = −2 … 2,

        slope      (t₁ − t₋₁) / 2h                 against  gᵀw
        curvature  (t₁ − 2 t₀ + t₋₁) / h²          against  wᵀHw

    and the fourth difference t₋₂ − 4 t₋₁ + 6 t₀ − 4 t₁ + t₂ measures the noise of the values, or what the step is too
    long for: the quotients at h and 2h differ by it. A sample is certified where derivatives and differences agree to
    their tolerance and the differences are sharp enough to tell. Else the step shrinks tenfold; where noise as small as
    float32's blurs the first step, a longer one is tried first. What never agrees is told apart by how Δ²t/h²
    changes with the step: it settles at another value (the derivatives are wrong), grows like 1/h (a kink) or
    like 1/h² (noise).

    Args:
        batch: in the precision of the values.
        prediction: of the same samples.
        group_size: samples whose five values are computed at a time. The five points of a sample make up a batch of
            another size than that of the derivatives, so that kernels that err at one batch size, and samples that
            influence each other, show themselves.
        first_step: ``[N]``, h to begin with.

    Entries whose prediction is not finite are passed over, as if they were certified.

    Cost: 5 values per sample and step, usually one step; no backward pass.

    Source: Moré and Wild, "Estimating computational noise" (2011), for noise from differences.
    """
    p, tolerance = prediction.to(batch.x), prediction.tolerance * prediction.share
    first = FIRST_STEP * root_mean_square(batch.x) if first_step is None else first_step.to(batch.x)
    steps = [differences_at(batch, p, torch.arange(batch.num_samples, device=batch.x.device), first, group_size)]
    ignored = ~(p.spectral_norm.isfinite() & p.slope.isfinite())
    size = root_mean_square(batch.x).unsqueeze(1)
    agreed = _agrees(steps[0], p, tolerance, size, torch.full_like(p.slope, torch.inf)) | ignored
    if steps[0].size.isnan().all() and not _evaluates(batch):
        return _certificate(steps, agreed, p, tolerance, size, first, len(OFFSETS))
    is_low_precision = ((steps[0].noise <= LOW_PRECISION * steps[0].size) | agreed).all(dim=1)
    last, num_values = first, len(OFFSETS) * batch.num_samples
    for shorter, longer in zip(SHORTER, LONGER, strict=True):
        active = (~agreed.all(dim=1)).nonzero().flatten()
        if len(active) == 0:
            break
        step = first[active] * FACTOR ** torch.where(is_low_precision[active], longer, shorter).to(first)
        last = last.index_copy(0, active, step)
        steps.append(differences_at(batch, p, active, step, group_size))
        num_values += len(OFFSETS) * len(active)
        seen = torch.stack([_beyond_noise(step) for step in steps]).amin(dim=0)
        agreed |= _agrees(steps[-1], p, tolerance, size, seen) & ~_slope_is_refuted(steps, p, tolerance)
    return _certificate(steps, agreed, p, tolerance, size, last, num_values / batch.num_samples)


def _evaluates(batch: TargetBatch) -> bool:
    """Whether there is a finite value at the samples themselves."""
    try:
        with torch.no_grad():
            return bool(on_few(batch, 1, lambda few: few.values(few.x)).isfinite().any())
    except Exception as error:  # a forward that fails in this precision
        if out_of_memory(error):
            raise
        return False


def _beyond_noise(found: Differences) -> Tensor:
    """The error where noise does not explain it, else infinity."""
    return found.error.where(found.error > MARGIN * found.blur, torch.inf)


def _agrees(found: Differences, p: Prediction, tolerance: float, size: Tensor, seen: Tensor) -> Tensor:
    """Where derivatives and differences agree, and the differences are sharp enough to tell.

    ``size [N, 1]`` is that of the input. ``seen [N, K]`` is the smallest error beyond noise of any step: where the
    Hessian is zero, and there is no norm to compare with, differences must be sharp enough to show it.
    """
    norm, scale = p.spectral_norm, _slope_scale(found, p)
    slope = found.slope_error <= tolerance * scale + MARGIN * found.slope_blur
    if p.slope_only:
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


def _slope_is_refuted(steps: list[Differences], p: Prediction, tolerance: float) -> Tensor:
    """Where the last step is longer than another that has a sharper slope, which is not the gradient's."""
    refuted = torch.zeros_like(p.slope, dtype=torch.bool)
    for each in steps[:-1]:
        blur = each.slope_blur + each.noise / each.step
        sharper = (each.step < steps[-1].step) & (blur < steps[-1].slope_blur)
        refuted |= sharper & (each.slope_error > tolerance * _slope_scale(each, p) + MARGIN * blur)
    return refuted


def _slope_scale(found: Differences, p: Prediction) -> Tensor:
    """What errors of a slope are relative to: ‖g‖, or its change over one step where that is more."""
    return torch.maximum(p.gradient_norm, p.spectral_norm * found.step)


def _certificate(
    steps: list[Differences],
    agreed: Tensor,
    p: Prediction,
    tolerance: float,
    size: Tensor,
    last: Tensor,
    num_values: float,
) -> Certificate:
    every = Differences(*(torch.stack([getattr(d, f.name) for d in steps]) for f in fields(Differences)))
    every = _by_step(every)
    # The sharpest differences, among those that agree where some do: a long step may cross a kink.
    close = every.error <= LARGEST_ERROR * p.spectral_norm
    blur = every.blur.where(close | ~agreed, torch.inf)
    blur = blur.where(p.spectral_norm > 0, every.error + MARGIN * every.blur)
    sharpest = blur.nan_to_num(torch.inf).argmin(dim=0, keepdim=True)
    at = Differences(*(getattr(every, f.name).gather(0, sharpest)[0] for f in fields(every)))
    outcome = torch.full_like(agreed, OUTCOMES.index("unverifiable"), dtype=torch.long)
    for name, chosen in (
        ("noise", every.second.isfinite().any(dim=0)),
        ("contradicted", _contradicted(every, p, tolerance)),
        ("kink", _grows_like_kink(every)),
        ("certified", agreed),
    ):
        outcome = outcome.where(~chosen, OUTCOMES.index(name))
    slope_scale = _slope_scale(at, p)
    # A curvature that is zero is compared with one that would change the slope by its own size over that of the input.
    scale = p.spectral_norm.where(p.spectral_norm > 0, p.gradient_norm / size)
    scale = scale.where(scale > 0, at.size / size**2)
    return Certificate(
        outcome,
        error=at.error / scale.where(scale > 0, 1),
        difference=at.error,
        slope_error=at.slope_error / slope_scale.where(slope_scale > 0, 1),
        size=every.size.nan_to_num(0).amax(dim=0),
        noise=every.noise.nan_to_num(torch.inf).amin(dim=0),
        step=last,
        num_values=num_values,
    )


def _by_step(every: Differences) -> Differences:
    """Sorted from the longest step to the shortest; samples without values last."""
    order = every.step.nan_to_num(0).argsort(dim=0, descending=True)
    return Differences(*(getattr(every, f.name).gather(0, order) for f in fields(every)))


def _grows_like_kink(every: Differences) -> Tensor:
    """Whether Δ²t/h² is inversely proportional to h over three steps, and more than noise."""
    jump = every.second * every.step
    noise = SECOND * every.noise.nan_to_num(torch.inf).amin(dim=0)
    visible = (jump * every.step).abs() > MARGIN * noise
    steady = ((jump[1:] / jump[:-1] - 1).abs() <= STEADY) & visible[1:] & visible[:-1]
    return (steady[1:] & steady[:-1]).any(dim=0)


def _contradicted(every: Differences, p: Prediction, tolerance: float) -> Tensor:
    """Whether a quotient has settled, over two steps, where the derivatives say something else."""
    wrong = _is_wrong(every.error, every.blur, tolerance * p.spectral_norm)
    wrong_slope = _is_wrong(every.slope_error, every.slope_blur, tolerance * _slope_scale(every, p))
    settled = (every.second[1:] - every.second[:-1]).abs() <= STEADY * every.error[1:]
    return ((wrong[1:] & wrong[:-1] & settled) | (wrong_slope[1:] & wrong_slope[:-1])).any(dim=0)


def _is_wrong(error: Tensor, blur: Tensor, scale: Tensor) -> Tensor:
    """Where an error is more than noise, and no shorter step shows a smaller one: a long step may cross kinks."""
    possible = (error + MARGIN * blur).nan_to_num(torch.inf)
    least = possible.flip(0).cummin(dim=0).values.flip(0)
    return (error > scale + MARGIN * blur) & (blur <= STEADY * error) & (least >= (1 - STEADY) * error)
