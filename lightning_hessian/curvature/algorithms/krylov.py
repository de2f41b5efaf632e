"""Krylov bases of many symmetric operators at once, and what they say about the operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_hessian.curvature.operators.hessian import Operator

End = Literal["both_ends", "largest_algebraic", "smallest_algebraic", "largest_magnitude"]


@dataclass(frozen=True)
class KnownProducts:
    """Orthonormal vectors q of P operators A, with their products: A is known inside of the space they span.

    Attributes:
        vectors: q, ``[P, J, D]``; zero where an operator has fewer than J.
        products: A q, ``[P, J, D]``; NaN where an operator has had a product that is not finite.
    """

    vectors: Tensor
    products: Tensor

    def apply(self, v: Tensor) -> Tensor:
        """A Q Qᵀ v for M vectors of each operator, ``[P, M, D]``, without a product."""
        return (v @ self.vectors.mT) @ self.products

    def outside(self, v: Tensor) -> Tensor:
        """(I − Q Qᵀ) v, for ``[..., M, D]`` to ``[P, M, D]``; twice is enough."""
        v = v - (v @ self.vectors.mT) @ self.vectors
        return v - (v @ self.vectors.mT) @ self.vectors


@dataclass(frozen=True)
class Ritz:
    """Wanted Ritz values ``[P, M]`` in descending order, their coefficients ``[P, j, M]`` in the basis."""

    values: Tensor
    coefficients: Tensor
    residuals: Tensor
    norm: Tensor


class KrylovBasis:
    """Orthonormal vectors ``[P, n, D]``, of which the first j have been multiplied by the operator.

    Args:
        operator: P symmetric operators on D-vectors.
        block_size: start vectors.
        capacity: n at most.
        generator: of the start vectors, which are the same for every operator.

    Attributes:
        failed: ``[P]``, operators with a product that was not finite, or whose norm overflowed or underflowed: it was
            taken to be zero, so that the others can go on.
    """

    def __init__(self, operator: Operator, block_size: int, capacity: int, generator: torch.Generator) -> None:
        self.operator = operator
        self.num_processed = 0
        self.num_vectors = 0
        self._generator = generator
        self._block_size = block_size
        num_operators, self._size = operator.shape
        self._capacity = min(capacity, self._size)
        self._vectors = zeros(operator, num_operators, self._capacity, self._size)
        self._coefficients = zeros(operator, num_operators, self._capacity, self._capacity)  # H of ``lanczos``
        self._scale = zeros(operator, num_operators)
        self.failed = torch.zeros(num_operators, dtype=torch.bool, device=operator.device)
        for _ in range(block_size):
            self._append(self._new_direction())

    @property
    def full(self) -> bool:
        """Whether no further vector can be stored, although the space is not exhausted."""
        return self.num_vectors == self._capacity < self._size

    def grow(self) -> None:
        """Multiplies the next vector, and appends what is new in the product."""
        j, n = self.num_processed, self.num_vectors
        product = self.operator.matvec(self._vectors[:, j])
        length = product.norm(dim=1)
        self.failed |= ~length.isfinite() | ((length == 0) & product.any(dim=1))
        product, length = product.where(~self.failed.unsqueeze(1), 0), length.where(~self.failed, 0)
        self._scale = torch.maximum(self._scale, length)
        rest, coefficients = self._orthogonalized(product)
        self._coefficients[:, :n, j] = coefficients
        self.num_processed += 1
        if n == self._size:
            return
        length = rest.norm(dim=1)
        exhausted = length <= 10 * torch.finfo(rest.dtype).eps * self._size**0.5 * self._scale
        if exhausted.any():
            length = length.where(~exhausted, 0)
            rest = rest.where(~exhausted.unsqueeze(1), self._new_direction())
        self._coefficients[:, n, j] = length
        self._append(rest)

    def projection(self) -> Tensor:
        """Qᵀ A Q of the processed part, ``[P, j, j]`` in float64."""
        square = self._coefficients[:, : self.num_processed, : self.num_processed].double()
        return (square + square.mT) / 2

    def ritz(self, which: End, count: int) -> Ritz:
        """The wanted Ritz pairs of the processed part, with residuals (never below rounding)."""
        j, n = self.num_processed, self.num_vectors
        values, coefficients = torch.linalg.eigh(self.projection())
        norm = values.abs().amax(dim=1)
        index = _wanted(values, which, count)
        coefficients = coefficients.gather(2, index.unsqueeze(1).expand(-1, j, -1))
        tail = (self._coefficients[:, j:n, :j].double() @ coefficients).norm(dim=1)
        left = rounding(self._coefficients.dtype, self._size) * norm
        residuals = torch.hypot(tail, left.unsqueeze(1).expand_as(tail))
        dtype = self._coefficients.dtype
        return Ritz(values.gather(1, index).to(dtype), coefficients.to(dtype), residuals.to(dtype), norm.to(dtype))

    def vectors_of(self, ritz: Ritz) -> Tensor:
        """Ritz vectors ``[P, M, D]``."""
        return ritz.coefficients.mT @ self._vectors[:, : self.num_processed]

    def known(self) -> KnownProducts:
        """The processed vectors and their products."""
        j, n = self.num_processed, self.num_vectors
        products = self._coefficients[:, :n, :j].mT @ self._vectors[:, :n]
        products[self.failed] = torch.nan
        return KnownProducts(self._vectors[:, :j], products)

    def restart(self, which: End, count: int) -> None:
        """Starts again from the best Ritz vectors, which fill half of the basis, and the vectors not yet multiplied."""
        j, n, b = self.num_processed, self.num_vectors, self._block_size
        m = max(count, min(j - 1, (count + self._capacity - b) // 2))
        ritz = self.ritz(which, m)
        coupling = self._coefficients[:, j:n, :j] @ ritz.coefficients
        best = self.vectors_of(ritz)
        self._vectors[:, m : m + b] = self._vectors[:, j:n].clone()
        self._vectors[:, :m] = best
        self._coefficients.zero_()
        self._coefficients[:, :m, :m] = torch.diag_embed(ritz.values)
        self._coefficients[:, m : m + b, :m] = coupling
        self.num_processed, self.num_vectors = m, m + b

    def select(self, index: Tensor) -> None:
        """Goes on with the operators at ``index`` only."""
        self.operator = self.operator.select(index)
        self._vectors, self._coefficients, self._scale, self.failed = (
            t[index] for t in (self._vectors, self._coefficients, self._scale, self.failed)
        )

    def _append(self, vector: Tensor) -> None:
        self._vectors[:, self.num_vectors] = vector / vector.norm(dim=1, keepdim=True)
        self.num_vectors += 1

    def _orthogonalized(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """A vector without its part in the basis, and that part's coefficients; twice is enough."""
        basis = self._vectors[:, : self.num_vectors]
        total = vector.new_zeros(basis.shape[:2])
        for _ in range(2):
            coefficients = (basis @ vector.unsqueeze(-1)).squeeze(-1)
            vector = vector - (coefficients.unsqueeze(1) @ basis).squeeze(1)
            total = total + coefficients
        return vector, total

    def _new_direction(self) -> Tensor:
        """A random vector, the same for every operator, without its part in the basis."""
        vector = torch.randn(self._size, generator=self._generator, dtype=torch.float64)
        return self._orthogonalized(vector.to(self._vectors).expand(len(self._vectors), -1))[0]


def rounding(dtype: torch.dtype, size: int) -> float:
    """What rounding alone leaves of a residual, relative to the norm: a heuristic, eps·√D."""
    return float(torch.finfo(dtype).eps * size**0.5)


def zeros(operator: Operator, *shape: int) -> Tensor:
    """Zeros like the operator's vectors."""
    return torch.zeros(shape, dtype=operator.dtype, device=operator.device)


def _wanted(values: Tensor, which: End, count: int) -> Tensor:
    """Positions in ascending ``values [P, j]`` of the wanted ones, largest value first."""
    num_values = values.shape[1]
    if which == "largest_magnitude":
        return values.abs().topk(count, dim=1).indices.sort(dim=1, descending=True).values
    high = {"both_ends": (count + 1) // 2, "largest_algebraic": count, "smallest_algebraic": 0}[which]
    low = count - high
    positions = [*range(num_values - 1, num_values - 1 - high, -1), *range(low - 1, -1, -1)]
    return torch.tensor(positions, device=values.device).expand(len(values), -1)
