"""What is found out about a batch before a method is chosen: gradients, costs, and what kind of function it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import in_groups
from lightning_hessian.curvature.checks.diagnosis import Diagnosis, diagnose
from lightning_hessian.curvature.cost_model import ModelCosts, fitting_samples
from lightning_hessian.curvature.operators.autodiff import gradients
from lightning_hessian.curvature.options import Options
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.errors import MeasurementError


@dataclass(frozen=True)
class Analysis:
    """What is known about a batch before its Hessians are: its gradient is ``[N, K, D]`` and finite."""

    costs: ModelCosts
    gradient: Tensor
    diagnosis: Diagnosis


def analyze(batch: TargetBatch, options: Options, same_network: Diagnosis | None = None) -> Analysis:
    """Gradients, costs and diagnosis of a batch; ``same_network`` as in ``diagnose``.

    Raises:
        MeasurementError: inputs, values or gradients are not finite.
    """
    memory = options.memory(batch.x.device)
    costs = ModelCosts(batch, memory)
    gradient = finite_gradients(batch, costs, memory)
    # In float64, and in both autodiff modes: four times the memory of one HVP.
    group_size = fitting_samples(memory, 4 * costs.matvec_bytes)
    return Analysis(costs, gradient, diagnose(batch, options.generator(), group_size, same_network))


def finite_gradients(batch: TargetBatch, costs: ModelCosts, memory_budget: int) -> Tensor:
    """The gradients ``[N, K, D]``, of as many samples at a time as fit ``memory_budget``.

    Raises:
        MeasurementError: inputs, values or gradients are not finite.
    """

    def work(samples: slice) -> tuple[Tensor, Tensor]:
        group = batch.select(samples)
        with torch.no_grad():
            values = group.values(group.x)
        return values, gradients(group)

    _check_finite("inputs", batch.x)
    groups = in_groups(batch.num_samples, fitting_samples(memory_budget, costs.matvec_bytes), work)
    values, gradient = (torch.cat(group) for group in zip(*(result for _, result in groups), strict=True))
    _check_finite("values of the target", values)
    _check_finite("gradients", gradient)
    return gradient


def _check_finite(name: str, numbers: Tensor) -> None:
    bad = (~numbers.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise MeasurementError(
            f"The {name} are not finite (NaN or infinite) for samples {bad[:10]} of {len(numbers)}, "
            f"so there is no Hessian to measure. Look for NaN in the weights or in the inputs."
        )
