"""Operators with a prescribed spectrum."""

import torch

from lightning_hessian.curvature.algorithms.lanczos import lanczos
from lightning_hessian.curvature.operators.hessian import MatrixOperator

F64 = torch.float64
SPREAD = [(-1.0) ** i * 0.9**i for i in range(60)]
EVEN = [i / 60 - 0.3 for i in range(60)]


def prescribed(*spectra, dtype=F64):
    """One matrix per spectrum, with that spectrum and random eigenvectors."""
    generator = torch.Generator().manual_seed(7)
    matrices = []
    for spectrum in spectra:
        values = torch.as_tensor(spectrum, dtype=F64)
        q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=F64))
        matrices.append(q @ torch.diag(values) @ q.T)
    return MatrixOperator(torch.stack(matrices).to(dtype))


def run(operator, count, seed=0, **arguments):
    return lanczos(operator, count, generator=torch.Generator().manual_seed(seed), **arguments)
