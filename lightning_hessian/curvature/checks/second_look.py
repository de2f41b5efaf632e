"""Derivatives taken once more, along one direction: beside copies of the samples, and beside kinks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_hessian.curvature.batching import attempted, concatenate, in_groups
from lightning_hessian.curvature.checks.certificate import OUTCOMES, Certificate, certify
from lightning_hessian.curvature.checks.differences import differences_at
from lightning_hessian.curvature.checks.prediction import LARGEST_ERROR, Prediction, predict_along, unit
from lightning_hessian.curvature.checks.zero import root_mean_square
from lightning_hessian.curvature.operators.autodiff import ReverseOverReverse
from lightning_hessian.curvature.target_batch import TargetBatch

# How far from a kink derivatives are checked, in root mean squares of the sample's entries; the shorter distances where
# the forward accepts no longer one.
NEIGHBORS = (0.1, 1e-2, 1e-3)
NEIGHBOR_STEP = 1e-3  # h there, in distances: below that to the kink
VANISHES = 1e-6  # relative: what is left in float64 of nothing but rounding in float32


def in_company(batch: TargetBatch) -> TargetBatch:
    """The same targets, computed beside copies of the samples: never a batch of one."""

    def network(*inputs: Any) -> Tensor:
        return batch.network(*tree_map_only(Tensor, lambda t: t.repeat_interleave(2, dim=0), inputs))[::2]

    return replace(batch, network=network)


def compare_along(
    batch: TargetBatch,
    direction: Tensor,
    group_size: int,
    first_step: Tensor | None = None,
    *,
    slope_only: bool = False,
    precision: float = 0.0,
) -> Certificate | None:
    """How derivatives by reverse_over_reverse along ``direction [N, D]`` compare with values.

    None where the forward fails: it may not accept inputs in another precision, or beside the samples.
    """
    moved = direction.any(dim=1, keepdim=True)
    direction = unit(direction)

    def work(few: slice) -> Certificate:
        group = batch.select(few)
        predicted = predicted_along(group, direction[few].to(group.x), slope_only)
        steps = None if first_step is None else first_step[few]
        return certify(group, predicted, group_size, steps, precision=precision)

    found = attempted(lambda: concatenate([found for _, found in in_groups(batch.num_samples, group_size, work)]))
    if found is None:
        return None
    return replace(found, outcome=found.outcome.where(moved, OUTCOMES.index("unverifiable")))


def compare_beside(
    batch: TargetBatch,
    prediction: Prediction,
    group_size: int,
    generator: torch.Generator,
    *,
    precision: float = 0.0,
) -> tuple[Certificate | None, Tensor]:
    """How derivatives at neighbors of the samples, beside their kinks, compare with values.

    Neighbors stay inside the range of the data, outside of which a forward may refuse them. None where it does anyway.

    Returns:
        And where ``prediction`` is what reverse_over_reverse gives at the samples themselves, ``[N, K]``.
    """
    direction, same = prediction.direction, gives(batch, prediction, group_size)
    size = root_mean_square(batch.x)
    noise = torch.randn(direction.shape, generator=generator, dtype=torch.float64).to(direction)
    low, high = batch.x.min(), batch.x.max()
    for distance in NEIGHBORS:
        x = batch.x + (distance * size.unsqueeze(1) * noise).reshape(batch.x.shape)
        if low < high:  # reflected at the ends of the range
            x = high - (high - low - (x - low).abs()).abs()
        steps = NEIGHBOR_STEP * distance * size
        moved, slope_only = replace(batch, x=x), prediction.slope_only
        found = compare_along(moved, direction, group_size, steps, slope_only=slope_only, precision=precision)
        if found is not None:
            return found, same
    return None, same


def gives(batch: TargetBatch, reported: Prediction, group_size: int) -> Tensor:
    """Where reverse_over_reverse gives what is reported, up to the tolerance of its precision, ``[N, K]``."""
    other = predicted_in_groups(batch, reported, group_size)

    def close(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return (a - b).abs() <= reported.tolerance * torch.maximum(scale, torch.maximum(a.abs(), b.abs()))

    same = close(reported.slope, other.slope, reported.gradient_norm)
    if reported.slope_only:
        return same
    return same & close(reported.curvature, other.curvature, reported.spectral_norm)


def is_rounding_alone(exact: TargetBatch, reported: Prediction, group_size: int) -> Tensor:
    """Where next to nothing is left in float64 of what is ``reported`` in float32, ``[N, K]``.

    Neither of derivatives nor of differences of values, whose step is as long as the input is large. Where the
    curvature is nothing but rounding, the slope may be right.

    Cost: a gradient, an HVP and five values.
    """
    p, size = reported.to(exact.x), root_mean_square(exact.x)
    left = predicted_in_groups(exact, p, group_size)
    values = differences_at(exact, left, torch.arange(len(size), device=size.device), size, group_size)
    size = size.unsqueeze(1)
    norm = p.spectral_norm.where(p.spectral_norm > 0, p.gradient_norm / size)
    slope = torch.maximum(p.gradient_norm, norm * size)

    def found(norm: Tensor, slope: Tensor) -> Tensor:
        no_slope = (left.gradient_norm <= VANISHES * slope) & (values.slope_error <= LARGEST_ERROR * slope)
        if p.slope_only:
            return no_slope
        no_curvature = (left.spectral_norm <= VANISHES * norm) & (values.second.abs() <= LARGEST_ERROR * norm)
        # Beside a slope that is right, a Hessian that is exactly zero may be wrong.
        right_slope = (p.slope - left.slope).abs() <= reported.tolerance * p.gradient_norm
        right_slope &= values.slope_error <= reported.tolerance * p.gradient_norm
        return no_curvature & (no_slope | (right_slope & (p.spectral_norm > 0)))

    rounding = found(norm, slope)
    # At some samples, terms cancel exactly: there, rounding is what it is at others.
    is_zero = (p.spectral_norm == 0) & (p.gradient_norm == 0)
    at_others = [numbers.where(rounding, 0).amax(dim=0).expand_as(norm) for numbers in (norm, slope)]
    return rounding | (is_zero & found(*at_others))


def predicted_in_groups(batch: TargetBatch, reported: Prediction, group_size: int) -> Prediction:
    """What reverse_over_reverse says along the same directions."""

    def work(few: slice) -> Prediction:
        return predicted_along(batch.select(few), reported.direction[few], reported.slope_only)

    return concatenate([found for _, found in in_groups(batch.num_samples, group_size, work)])


def predicted_along(batch: TargetBatch, direction: Tensor, slope_only: bool) -> Prediction:
    """What reverse_over_reverse says along one direction ``[N, D]`` of every sample."""
    autodiff = ReverseOverReverse(batch)
    gradient = autodiff.gradient()
    if slope_only:
        return replace(predict_along(direction, gradient, torch.zeros_like(gradient)), slope_only=True)
    return predict_along(direction, gradient, autodiff.hvp(direction.unsqueeze(1).expand(batch.shape).contiguous()))
