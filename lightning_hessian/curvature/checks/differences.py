"""Values around samples, along one direction of each: slopes, curvatures, and the noise that they are known to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import attempted, in_groups
from lightning_hessian.curvature.checks.prediction import Prediction
from lightning_hessian.curvature.target_batch import TargetBatch

OFFSETS = (-2, -1, 0, 1, 2)
# By which values are weighted for the first two derivatives: the errors of both are of order h⁴.
SLOPE = (1 / 12, -8 / 12, 0.0, 8 / 12, -1 / 12)
CURVATURE = (-1 / 12, 16 / 12, -30 / 12, 16 / 12, -1 / 12)
THIRD, FOURTH = (-1.0, 2.0, 0.0, -2.0, 1.0), (1.0, -4.0, 6.0, -4.0, 1.0)
BOTH_SIDES = (0.5, -1.0, 1.0, -1.0, 0.5)
ROUNDING = 2  # multiples of eps that a value is taken to be off by, at least


@dataclass(frozen=True)
class Differences:
    """What one step gave, ``[N, K]`` each, or ``[S, N, K]`` of all steps; NaN where there are no values.

    Attributes:
        step: h.
        value: t₀, at the sample itself.
        size: largest |t|.
        second: t″, the difference quotient.
        one_sided: by how much the second difference quotient ahead of the sample exceeds the one behind it.
        both_sides: the mean of these two, which a kink at the sample does not enter.
        noise: standard deviation of the values, from their fourth difference.
        rounding: that of the values' precision alone.
        error: |wᵀHw − t″|.
        blur: how far noise and the length of the step may move t″.
        slope_error: |gᵀw − t′|.
        slope_blur: the same of t′.
    """

    step: Tensor
    value: Tensor
    size: Tensor
    second: Tensor
    one_sided: Tensor
    both_sides: Tensor
    noise: Tensor
    rounding: Tensor
    error: Tensor
    blur: Tensor
    slope_error: Tensor
    slope_blur: Tensor


def deviation(weights: tuple[float, ...]) -> float:
    """Standard deviation of a weighted sum of values whose independent errors have standard deviation 1."""
    return sum(weight**2 for weight in weights) ** 0.5


def differences_at(
    batch: TargetBatch, p: Prediction, active: Tensor, step: Tensor, group_size: int, precision: float = 0.0
) -> Differences:
    """Differences of the values at x + j h w, j = −2 … 2, and how far predictions are from them.

    Args:
        batch: in the precision of the values.
        p: what is predicted for each sample.
        active: the samples whose values are computed.
        step: h of those.
        group_size: of them at a time.
        precision: relative, in which the forward computes, if it is worse than that of ``batch``.
    """
    num_points = len(OFFSETS)
    which = active.repeat_interleave(num_points)
    shift = (torch.tensor(OFFSETS).to(step) * step.unsqueeze(1)).reshape(-1, 1)

    def work(rows: slice) -> Tensor:
        points = batch.select(which[rows])  # copies, so that x may be moved in place
        points.x.add_(p.direction[which[rows]].mul_(shift[rows]).reshape(points.x.shape))
        return _values(points)

    # The last sample apart from the others: beside them, what all samples have in common would be what it was when they
    # were differentiated (their mean, about which the five points are symmetric).
    split = len(which) - num_points
    values = [found for _, found in in_groups(split, num_points * group_size, work)]
    alone = in_groups(num_points, num_points, lambda rows: work(slice(split + rows.start, split + rows.stop)))
    values += [found for _, found in alone]
    t = torch.cat(values).reshape(len(active), num_points, -1)
    rounding_unit = max(ROUNDING * torch.finfo(t.dtype).eps, precision / 2)
    t = t.to(batch.x.dtype)
    h = step.unsqueeze(1)

    changes = t - t[:, 2:3]

    def weighted(weights: tuple[float, ...]) -> Tensor:
        return (changes * torch.tensor(weights, dtype=t.dtype, device=t.device).unsqueeze(1)).sum(dim=1)

    size = t.abs().amax(dim=1)
    second, third = weighted(CURVATURE) / h**2, weighted(THIRD)
    rounding = rounding_unit * size
    noise = torch.maximum(weighted(FOURTH).abs() / deviation(FOURTH), rounding)
    found = {
        "step": h.expand_as(second),
        "value": t[:, 2],
        "size": size,
        "second": second,
        "one_sided": third / h**2,
        "both_sides": weighted(BOTH_SIDES) / h**2,
        "noise": noise,
        "rounding": rounding,
        "error": (second - p.curvature[active]).abs(),
        "blur": deviation(CURVATURE) * noise / h**2,
        "slope_error": (weighted(SLOPE) / h - p.slope[active]).abs(),
        "slope_blur": torch.maximum(third.abs() / 4, noise) / h,
    }
    nothing = torch.full_like(p.slope, torch.nan)
    return Differences(**{name: nothing.index_copy(0, active, value) for name, value in found.items()})


def _values(batch: TargetBatch) -> Tensor:
    """Values ``[n, K]`` at ``batch.x``; NaN where the forward does not accept an input."""
    with torch.no_grad():
        found = attempted(lambda: batch.values(batch.x))
    if found is not None:
        return found
    if batch.num_samples == 1:  # outside of the forward's domain; a shorter step may stay inside
        return batch.x.new_full(batch.shape[:2], torch.nan)
    # One sample must not spoil the others; and a forward may take one at a time, such as a graph.
    size = len(OFFSETS) if batch.num_samples > len(OFFSETS) else 1
    rows = range(0, batch.num_samples, size)
    return torch.cat([_values(batch.select(slice(row, row + size))) for row in rows])
