"""The density of eigenvalues, by stochastic Lanczos quadrature with a band over starting vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hessian.curvature.lanczos import KrylovBasis
from lightning_hessian.curvature.operator import Operator


@dataclass(frozen=True)
class Density:
    """Quadrature rules of the spectral measure, one for each operator and starting vector.

    Attributes:
        nodes: ``[P, S, m]``, ascending.
        weights: ``[P, S, m]``, summing to 1 over m.
        num_products: products with a vector that were made for each operator.
    """

    nodes: Tensor
    weights: Tensor
    num_products: int

    def moment(self, degree: int) -> Tensor:
        """vᵀ Aᵈ v of every starting vector v, ``[P, S]``; exact for degrees up to 2m − 1."""
        return (self.weights * self.nodes**degree).sum(dim=-1)

    def cumulative(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Share of eigenvalues at most ``at [B]``: mean over starting vectors and its standard error, ``[P, B]``."""
        below = (self.nodes.unsqueeze(-1) <= at).to(self.weights)
        return _mean((self.weights.unsqueeze(-1) * below).sum(dim=2))

    def smoothed(self, at: Tensor, width: float) -> tuple[Tensor, Tensor]:
        """Density at ``at [B]``, each node a Gaussian of ``width``: mean and standard error, ``[P, B]``.

        The error is that of the random starting vectors. It knows nothing of the rule's own resolution, about the
        spectrum's range without outliers over m: for a ``width`` below twice that, the truth lies outside of the
        band too often (``benchmarks/statistics.py``).
        """
        distance = (self.nodes.unsqueeze(-1) - at) / width
        bumps = torch.exp(-distance.square() / 2) / (width * (2 * torch.pi) ** 0.5)
        return _mean((self.weights.unsqueeze(-1) * bumps).sum(dim=2))


def density(operator: Operator, num_steps: int, num_vectors: int, *, generator: torch.Generator) -> Density:
    """Stochastic Lanczos quadrature: nodes and weights of the measure Σ_i (vᵀu_i)² δ(λ − λ_i), v random.

    For each of S random unit vectors, m Lanczos steps give a tridiagonal T; its eigenvalues are the nodes and
    the squared first entries of its eigenvectors the weights. In the mean over v the measure is the density
    (1/D) Σ δ(λ − λ_i); the spread over v gives the band.

    Args:
        operator: P symmetric operators on D-vectors.
        num_steps: m, at most D.
        num_vectors: S, at least 2.
        generator: of the starting vectors, which are the same for every operator.

    Cost: S·m products; P·m·D numbers of memory.

    Source: Golub and Meurant (1994); Ubaru, Chen and Saad (2017), section 3.
    """
    num_steps = min(num_steps, operator.like.shape[1])
    nodes, weights = [], []
    for _ in range(num_vectors):
        basis = KrylovBasis(operator, 1, num_steps + 1, generator)
        for _ in range(num_steps):
            basis.grow()
        values, vectors = torch.linalg.eigh(basis.projection())
        nodes.append(values)
        weights.append(vectors[:, 0].square())
    like = operator.like
    return Density(torch.stack(nodes, dim=1).to(like), torch.stack(weights, dim=1).to(like), num_steps * num_vectors)


def _mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over axis 1, the starting vectors, and its standard error."""
    return values.mean(dim=1), values.std(dim=1) / values.shape[1] ** 0.5
