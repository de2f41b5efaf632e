"""Derivatives taken once more, along one direction: beside copies of the samples, and beside kinks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_hessian.curvature.batching import in_groups
from lightning_hessian.curvature.checks.certificate import OUTCOMES, certify
from lightning_hessian.curvature.checks.prediction import Prediction, predict_along, unit
from lightning_hessian.curvature.checks.zero import root_mean_square
from lightning_hessian.curvature.operators.autodiff import ReverseOverReverse
from lightning_hessian.curvature.target_batch import TargetBatch

NEIGHBOR = 0.1  # how far from a kink derivatives are checked, in root mean squares of the sample's entries
NEIGHBOR_STEP = 1e-4  # h there, in the same unit: below the distance to the kink


def in_company(batch: TargetBatch) -> TargetBatch:
    """The same targets, computed beside copies of the samples: never a batch of one."""

    def network(*inputs: Any) -> Tensor:
        doubled = tree_map_only(Tensor, lambda t: t.repeat_interleave(2, dim=0), inputs)
        return batch.network(*doubled)[::2]

    return replace(batch, network=network)


def outcome_along(
    batch: TargetBatch,
    direction: Tensor,
    group_size: int,
    first_step: Tensor | None = None,
    *,
    slope_only: bool = False,
) -> Tensor:
    """How derivatives by reverse_over_reverse along ``direction [N, D]`` compare with values, ``[N, K]``."""
    moved = direction.any(dim=1, keepdim=True)
    direction = unit(direction)

    def work(few: slice) -> Tensor:
        group = batch.select(few)
        predicted = _predicted(group, direction[few].to(group.x), slope_only)
        return certify(group, predicted, group_size, None if first_step is None else first_step[few]).outcome

    found = torch.cat([outcome for _, outcome in in_groups(batch.num_samples, group_size, work)])
    return found.where(moved, OUTCOMES.index("unverifiable"))


def outcome_beside(
    batch: TargetBatch, direction: Tensor, group_size: int, generator: torch.Generator, *, slope_only: bool = False
) -> Tensor:
    """The same at neighbors of the samples, beside their kinks."""
    size = root_mean_square(batch.x)
    noise = torch.randn(direction.shape, generator=generator, dtype=torch.float64).to(direction)
    moved = batch.x + (NEIGHBOR * size.unsqueeze(1) * noise).reshape(batch.x.shape)
    steps = NEIGHBOR_STEP * size
    return outcome_along(replace(batch, x=moved), direction, group_size, steps, slope_only=slope_only)


def _predicted(batch: TargetBatch, direction: Tensor, slope_only: bool) -> Prediction:
    """What reverse_over_reverse says along one direction ``[N, D]`` of every sample."""
    autodiff = ReverseOverReverse(batch)
    gradient = autodiff.gradient()
    if slope_only:
        found = predict_along(direction, gradient, torch.zeros_like(gradient))
        return replace(found, curvature=torch.full_like(found.curvature, torch.nan))
    return predict_along(direction, gradient, autodiff.hvp(direction.unsqueeze(1).expand(batch.shape).contiguous()))
