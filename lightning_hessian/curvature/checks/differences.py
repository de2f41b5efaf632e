"""Values around samples, along one direction of each: slopes, curvatures, and the noise that they are known to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import in_groups, out_of_memory
from lightning_hessian.curvature.checks.prediction import Prediction
from lightning_hessian.curvature.target_batch import TargetBatch

OFFSETS = (-2, -1, 0, 1, 2)
# Of values with independent errors of standard deviation σ, the fourth difference has √70 σ and the second √6 σ.
FOURTH, SECOND = 70**0.5, 6**0.5
ROUNDING = 2  # multiples of eps that a value is taken to be off by, at least


@dataclass(frozen=True)
class Differences:
    """What one step gave, ``[N, K]`` each, or ``[S, N, K]`` of all steps; NaN where there are no values.

    Attributes:
        step: h.
        size: largest |t|.
        second: Δ²t/h².
        noise: standard deviation of the values, from their fourth difference.
        error: |wᵀHw − Δ²t/h²|.
        blur: how far noise and the length of the step may move Δ²t/h².
        slope_error: |gᵀw − Δt/2h|.
        slope_blur: the same of Δt/2h.
    """

    step: Tensor
    size: Tensor
    second: Tensor
    noise: Tensor
    error: Tensor
    blur: Tensor
    slope_error: Tensor
    slope_blur: Tensor


def differences_at(batch: TargetBatch, p: Prediction, active: Tensor, step: Tensor, group_size: int) -> Differences:
    """Differences of the values at x + j h w, j = −2 … 2, and how far predictions are from them.

    Args:
        batch: in the precision of the values.
        p: what is predicted for each sample.
        active: the samples whose values are computed.
        step: h of those.
        group_size: of them at a time.
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
    rounding_unit = ROUNDING * torch.finfo(t.dtype).eps
    t = t.to(batch.x.dtype)
    h = step.unsqueeze(1)
    second = (t[:, 3] - 2 * t[:, 2] + t[:, 1]) / h**2
    slope = (t[:, 3] - t[:, 1]) / (2 * h)
    third = (t[:, 4] - 2 * t[:, 3] + 2 * t[:, 1] - t[:, 0]).abs()
    fourth = (t[:, 0] - 4 * t[:, 1] + 6 * t[:, 2] - 4 * t[:, 3] + t[:, 4]).abs()
    size = t.abs().amax(dim=1)
    rounding = rounding_unit * size
    noise = torch.maximum(fourth / FOURTH, rounding)
    found = {
        "step": h.expand_as(second),
        "size": size,
        "second": second,
        "noise": noise,
        "error": (second - p.curvature[active]).abs(),
        "blur": SECOND * noise / h**2,
        "slope_error": (slope - p.slope[active]).abs(),
        "slope_blur": torch.maximum(third / 4, rounding) / h,
    }
    nothing = torch.full_like(p.slope, torch.nan)
    return Differences(**{name: nothing.index_copy(0, active, value) for name, value in found.items()})


def _values(batch: TargetBatch) -> Tensor:
    """Values ``[n, K]`` at ``batch.x``; NaN where the forward does not accept an input."""
    try:
        with torch.no_grad():
            return batch.values(batch.x)
    except Exception as error:  # an assertion on the range of the input, for example; a shorter step may pass
        if out_of_memory(error):
            raise
        if batch.num_samples == 1:
            return batch.x.new_full(batch.shape[:2], torch.nan)
        # One sample must not spoil the others; and a forward may take one at a time, such as a graph.
        size = len(OFFSETS) if batch.num_samples > len(OFFSETS) else 1
        rows = range(0, batch.num_samples, size)
        return torch.cat([_values(batch.select(slice(row, row + size))) for row in rows])
