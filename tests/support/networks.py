"""Small networks and functions that many tests share, and the whole way from a batch to a measurement."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_hessian.curvature.analysis import analyze
from lightning_hessian.curvature.methods.execute import Measurement, execute
from lightning_hessian.curvature.methods.plan import make_plan
from lightning_hessian.curvature.options import Options
from lightning_hessian.curvature.target_batch import TargetBatch


def mlp(activation: type[nn.Module] = nn.GELU, inputs: int = 6, outputs: int = 3, width: int = 8) -> nn.Sequential:
    """A small float64 network with two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, outputs)
    ).double()


def custom_function(
    value: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor], *, once: bool = False
) -> Callable[[Tensor], Tensor]:
    """``value`` of every entry, with this ``derivative``, right or wrong; ``once``: it is not differentiable twice."""

    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient * derivative(*context.saved_tensors)

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Tensor) -> Tensor:
            context.save_for_backward(x)
            return value(x)

    Custom.backward = staticmethod(once_differentiable(backward) if once else backward)
    return Custom.apply


def measure(batch: TargetBatch, target: str, options: Options, num_matrices: int = 0, **how: Any) -> Measurement:
    """Analysis, plan and execution."""
    analysis = analyze(batch, options)
    plan = make_plan(batch, analysis.costs, analysis.diagnosis, options, num_matrices=num_matrices)
    return execute(batch, plan, options, target=target, analysis=analysis, **how)
