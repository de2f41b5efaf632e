"""What is found out about a batch before a method is chosen: gradients, costs, and what kind of function it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hessian.curvature.checks.diagnosis import Diagnosis, diagnose
from lightning_hessian.curvature.cost_model import Facts
from lightning_hessian.curvature.memory import in_groups
from lightning_hessian.curvature.methods.plan import Options
from lightning_hessian.curvature.operators.autodiff import gradients
from lightning_hessian.curvature.operators.target_batch import TargetBatch
from lightning_hessian.errors import MeasurementError


@dataclass(frozen=True)
class Analysis:
    """What is known of a batch before its Hessians are.

    Attributes:
        costs: what derivatives of the model take.
        gradient: ``[N, K, D]``, finite.
        diagnosis: what kind of function of its input every target is.
    """

    costs: Facts
    gradient: Tensor
    diagnosis: Diagnosis


def analyze(batch: TargetBatch, options: Options, same_network: Diagnosis | None = None) -> Analysis:
    """Gradients, costs and diagnosis of a batch.

    Args:
        batch: what is differentiated.
        options: how to measure.
        same_network: the diagnosis of another target of the same outputs at the same samples: what it says of the
            network is not examined again.

    Raises:
        MeasurementError: inputs, values or gradients are not finite.
    """
    costs = Facts(batch, options.seed)
    gradient = finite_gradients(batch, costs, options)
    # In float64, and by both autodiff modes: four times the memory of one product.
    group_size = _fitting(costs, options, 4)
    return Analysis(costs, gradient, diagnose(batch, options.generator(), group_size, same_network))


def finite_gradients(batch: TargetBatch, costs: Facts, options: Options) -> Tensor:
    """The gradients ``[N, K, D]``, as many samples at a time as fit the memory.

    Raises:
        MeasurementError: inputs, values or gradients are not finite.
    """

    def work(samples: slice) -> tuple[Tensor, Tensor]:
        group = batch.select(samples)
        with torch.no_grad():
            values = group.values(group.x)
        return values, gradients(group)

    _check_finite("inputs", batch.x)
    groups = in_groups(batch.num_samples, _fitting(costs, options, 1), work)
    values, gradient = (torch.cat(parts) for parts in zip(*(result for _, result in groups), strict=True))
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


def _fitting(costs: Facts, options: Options, num_matvecs: int) -> int:
    """For how many samples the memory of ``num_matvecs`` products may be taken; at least one."""
    return max(1, options.memory(costs.batch.x.device) // (num_matvecs * costs.product_bytes))
