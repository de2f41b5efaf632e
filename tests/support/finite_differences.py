"""Hessians by central differences of gradients: no second derivative by autograd."""

from collections.abc import Callable

import torch
from torch import Tensor

STEP = 1e-5


def finite_differences(function: Callable[[Tensor], Tensor], x: Tensor, k: int) -> Tensor:
    """Those of output ``k``, ``[N, D, D]``; all shifts of a sample are one batch. In float64."""
    matrices = []
    for sample in x:
        shifts = STEP * torch.eye(sample.numel(), dtype=torch.float64).reshape(-1, *sample.shape)
        ends = torch.cat([sample + shifts, sample - shifts]).requires_grad_()
        (slopes,) = torch.autograd.grad(function(ends)[:, k].sum(), ends)
        above, below = slopes.flatten(1).chunk(2)
        matrices.append((above - below) / (2 * STEP))
    return torch.stack(matrices)
