"""A record whose numbers are known in closed form."""

import torch

from lightning_hessian import Record
from lightning_hessian.curvature.options import Options
from lightning_hessian.training.samples import Samples
from support.measuring import Measurer


def quadratic_record(*diagonal: float, shape: tuple[int, ...] | None = None, num_samples: int = 1, **when) -> Record:
    """Of f(x) = ½ Σ aᵢ xᵢ² with a = ``diagonal``: gradient a x, Hessian diag(a), at x = 1, 2, … in each sample."""
    a = torch.tensor(diagonal, dtype=torch.float64)
    x = torch.arange(1, 1 + num_samples * len(a), dtype=torch.float64).reshape(num_samples, *(shape or [len(a)]))
    monitor = Measurer(0, "logit", "float64", Options(), heatmap_samples=num_samples)
    when = {"step": 0, "logged_step": 0, "epoch": 0, **when}
    return monitor.measure(
        lambda x: 0.5 * x.flatten(1) ** 2 @ a, Samples(x, torch.zeros(num_samples, dtype=int)), **when
    )
