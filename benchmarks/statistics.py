"""How often the truth lies within 1, 2 and 3 standard errors of what is estimated, over many seeds."""

from __future__ import annotations

from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor, nn

from benchmarks.common import save
from benchmarks.models import frozen, problems_of
from lightning_hessian import input_spectrum
from lightning_hessian.curvature.density import density
from lightning_hessian.curvature.derivatives import engines_agree  # noqa: F401
from lightning_hessian.curvature.extremes import NUM_RANDOM, _part_norms
from lightning_hessian.curvature.lanczos import lanczos
from lightning_hessian.curvature.operator import HessianOperator, MatrixOperator, Operator
from lightning_hessian.curvature.trace import estimate

SEEDS = 2000
D = 60
SPECTRA = {
    "even": torch.linspace(-0.3, 0.7, D),
    "alternating, geometric": torch.tensor([(-1.0) ** i * 0.9**i for i in range(D)]),
    "three outliers over a bulk": torch.cat([torch.tensor([30.0, -20.0, 10.0]), torch.linspace(-1, 1, D - 3)]),
}


class Coverage:
    """Counts, for 1, 2 and 3 standard errors, how often the truth was within."""

    def __init__(self) -> None:
        self.inside: dict[str, Tensor] = {}
        self.looked = 0

    def add(self, name, found, error, truth):
        away = (found - truth).abs()
        shares = torch.stack([(away <= k * error).double().reshape(len(away), -1).mean(1) for k in (1, 2, 3)], dim=1)
        self.inside[name] = self.inside.get(name, 0) + shares
