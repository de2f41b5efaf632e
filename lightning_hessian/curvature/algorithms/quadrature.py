"""The density of eigenvalues: exact from a complete spectrum, else by stochastic Lanczos quadrature with a band."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hessian.curvature.algorithms.krylov import KrylovBasis
from lightning_hessian.curvature.operators.hessian import Operator

# Lanczos steps for each starting vector: its first 79 moments are exact, and detail finer than about a 40th of
# the spectrum's width is not resolved. Not more vectors than the basis of ``lanczos`` holds.
NUM_STEPS = 40


@dataclass(frozen=True)
class Density:
    """Quadrature rules of the spectral measure (1/D) Σ δ(λ − λ_i), one for each problem and starting vector.

    Leading dimensions ``...`` are ``[N, K]`` in a ``Spectrum``. S = 1 means that the nodes are the eigenvalues
    themselves: there was no random vector, and every standard error is zero.

    Attributes:
        nodes: ``[..., S, m]``, ascending.
        weights: ``[..., S, m]``, summing to 1 over m.
    """

    nodes: Tensor
    weights: Tensor

    def moment(self, degree: int) -> Tensor:
        """vᵀ Aᵈ v of every starting vector v, ``[..., S]``; exact for degrees up to 2m − 1; tr Aᵈ / D for S = 1."""
        return (self.weights * self.nodes**degree).sum(dim=-1)

    def cumulative(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Share of eigenvalues at most ``at [B]``: mean over starting vectors and its standard error, ``[..., B]``."""
        below = (self.nodes.unsqueeze(-1) <= at).to(self.weights)
        return _mean((self.weights.unsqueeze(-1) * below).sum(dim=-2))

    def smoothed(self, at: Tensor, width: float) -> tuple[Tensor, Tensor]:
        """Density at ``at [B]``, each node a Gaussian of ``width``: mean and standard error, ``[..., B]``.

        The error is that of the random starting vectors only, not of the rule's resolution (about the range of the
        spectrum without outliers, over m): for a ``width`` below twice that, the truth lies outside of the band
        too often (``benchmarks/statistics.py``).
        """
        distance = (self.nodes.unsqueeze(-1) - at) / width
        bumps = torch.exp(-distance.square() / 2) / (width * (2 * torch.pi) ** 0.5)
        return _mean((self.weights.unsqueeze(-1) * bumps).sum(dim=-2))


def exact_density(eigenvalues: Tensor, num_inputs: int) -> Density:
    """The density of a complete spectrum ``[..., M]``; the D − M eigenvalues that are left out are a node at zero."""
    num_zeros = num_inputs - eigenvalues.shape[-1]
    weights = torch.full_like(eigenvalues, 1 / num_inputs)
    if num_zeros:
        zero = torch.zeros_like(eigenvalues[..., :1])
        eigenvalues = torch.cat([eigenvalues, zero], dim=-1)
        weights = torch.cat([weights, zero + num_zeros / num_inputs], dim=-1)
    nodes, order = without_rounding(eigenvalues, num_inputs).sort(dim=-1)
    return Density(nodes.unsqueeze(-2), weights.gather(-1, order).unsqueeze(-2))


def without_rounding(eigenvalues: Tensor, num_inputs: int) -> Tensor:
    """``[..., M]`` with exact zeros for what rounding alone may have made: |λ| ≤ 10·eps·√D·max |λ|, a heuristic."""
    largest = eigenvalues.abs().amax(dim=-1, keepdim=True)
    rounding = 10 * torch.finfo(eigenvalues.dtype).eps * num_inputs**0.5 * largest
    return eigenvalues.where(~(eigenvalues.abs() <= rounding), 0)  # NaN stays NaN


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

    Returns:
        Rules ``[P, S, m]``.

    Raises:
        ValueError: a single vector has no spread.

    Cost: S·m products; P·m·D numbers of memory.

    Source: Golub and Meurant (1994); Ubaru, Chen and Saad (2017), section 3.
    """
    if num_vectors < 2:
        raise ValueError(f"num_vectors={num_vectors} must be at least 2: the standard error comes from their spread.")
    num_inputs, dtype = operator.shape[1], operator.dtype
    num_steps = min(num_steps, num_inputs)
    # Streams of their own: where a Krylov space is exhausted, its basis draws more, and the next start would change.
    seeds = torch.randint(2**62, (num_vectors,), generator=generator).tolist()
    nodes, weights = [], []
    for seed in seeds:
        basis = KrylovBasis(operator, 1, num_steps + 1, torch.Generator().manual_seed(seed))
        for _ in range(num_steps):
            basis.grow()
        values, vectors = torch.linalg.eigh(basis.projection())
        values[basis.failed] = torch.nan
        nodes.append(without_rounding(values.to(dtype), num_inputs))
        weights.append(vectors[:, 0].square())
    return Density(torch.stack(nodes, dim=1), torch.stack(weights, dim=1).to(dtype))


def _mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the starting vectors ``[..., S, B]``, and its standard error."""
    num_vectors, mean = values.shape[-2], values.mean(dim=-2)
    return mean, torch.zeros_like(mean) if num_vectors == 1 else values.std(dim=-2) / num_vectors**0.5
