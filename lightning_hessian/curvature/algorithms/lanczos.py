"""Extreme eigenpairs of many symmetric operators at once, from products with vectors only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_hessian.curvature.operators.hessian import Operator

End = Literal["both_ends", "largest_algebraic", "smallest_algebraic", "largest_magnitude"]

CHECK_EVERY = 4  # iterations between two looks at convergence; a look is a small eigendecomposition


@dataclass(frozen=True)
class RitzPairs:
    """Eigenpairs of P operators.

    Attributes:
        eigenvalues: ``[P, M]``, descending and algebraic.
        eigenvectors: ``[P, M, D]``, orthonormal.
        residuals: ``[P, M]``, ‖A v − λ v‖: an eigenvalue of A lies within this of λ.
        converged: ``[P, M]``, residual ≤ tolerance · (largest |λ| of that operator); the tolerance is never
            taken below what rounding leaves, 2·eps·√D.
        num_matvecs: products with a vector per operator, at most.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    converged: Tensor
    num_matvecs: int


def basis_size(num_eigenvalues: int, block_size: int) -> int:
    """How many Lanczos vectors are stored per operator: so many steps are taken before each restart."""
    return max(4 * num_eigenvalues, 40, 3 * block_size) + block_size


def lanczos(
    operator: Operator,
    num_eigenvalues: int,
    *,
    generator: torch.Generator,
    which: End = "both_ends",
    tolerance: float = 1e-5,
    block_size: int = 1,
    max_basis: int | None = None,
    max_matvecs: int | None = None,
) -> RitzPairs:
    """Band Lanczos over all operators at once, with full reorthogonalisation and thick restarts.

    From a start block of b random vectors an orthonormal basis Q grows one vector at a time: A q_j is
    orthogonalised twice against all of Q and appended. With j vectors processed, A Q_j = Q_{j+b} H, and a
    Ritz pair (θ, Q_j s) of H's upper square has the residual ‖H[j:] s‖. When the basis is full, it is
    replaced by its best Ritz vectors and the b unprocessed ones. Where the Krylov space is exhausted
    (an invariant subspace: a success), it is continued by a random vector orthogonal to it. Operators
    whose pairs have all converged leave the batch.

    A Krylov space of b start vectors holds at most b eigenvectors of a repeated eigenvalue: with b = 1 one
    that repeats is listed once, converged, and the next distinct one is listed instead of its copies (rounding may
    bring some of them back, unpredictably). To see a multiplicity of b, set ``block_size`` to at least b.

    Args:
        operator: P symmetric operators on D-vectors.
        num_eigenvalues: M, how many pairs; at most D are given.
        generator: of the start vectors, which are the same for every operator.
        which: ``"both_ends"``: ⌈M/2⌉ largest and ⌊M/2⌋ smallest; or one end; or the largest in magnitude.
        tolerance: on residuals, relative to the operator's largest |λ|. A small residual means that there is such
            an eigenvalue, not that none was missed: at 1e-3 inner ones of the wanted M have been seen missing, at
            1e-5 none.
        block_size: b, start vectors.
        max_basis: vectors stored per operator; by default ``basis_size``. Memory: P · max_basis · D numbers.
        max_matvecs: per operator; by default 20 times the basis. What has not converged by then is marked.

    Returns:
        The pairs, with residuals and convergence.

    Raises:
        ValueError: ``max_basis`` is too small for the wanted pairs.

    Cost: one product and 4·P·|Q|·D multiplications per iteration.

    Source: Ruhe, "Implementation aspects of band Lanczos algorithms" (1979); Wu and Simon, "Thick-restart
    Lanczos" (2000). Other than there, every operator of a batch is restarted at the same iteration.

    Example:
        >>> import torch
        >>> from lightning_hessian.curvature.operators.hessian import MatrixOperator
        >>> matrix = torch.diag(torch.tensor([5.0, 2.0, 1.0, -3.0])).unsqueeze(0)
        >>> lanczos(MatrixOperator(matrix), 2, generator=torch.Generator().manual_seed(0)).eigenvalues.round()
        tensor([[ 5., -3.]])
    """
    num_operators, size = operator.shape
    wanted = min(num_eigenvalues, size)
    block_size = min(block_size, size)
    tolerance = max(tolerance, 2 * _rounding(operator.dtype, size))
    max_basis = min(max_basis or basis_size(wanted, block_size), size + block_size)
    if max_basis < min(wanted + 2 * block_size + 1, size + block_size):
        raise ValueError(
            f"max_basis={max_basis} is too small for {wanted} eigenpairs: it must be at least "
            f"{wanted + 2 * block_size + 1}."
        )
    basis = KrylovBasis(operator, block_size, max_basis, generator)
    pairs = _empty_pairs(operator, wanted)
    active = torch.arange(num_operators, device=operator.device)
    limit = max_matvecs or 20 * max_basis
    for iteration in range(1, limit + 1):
        basis.grow()
        last = basis.num_processed == size or iteration == limit
        if not (last or basis.full or iteration % CHECK_EVERY == 0) or basis.num_processed < wanted:
            continue
        ritz = basis.ritz(which, wanted)
        done = (ritz.residuals <= tolerance * ritz.norm.unsqueeze(1)).all(dim=1) | last
        if 2 * int(done.sum()) >= len(active):
            _store(pairs, active[done], basis, ritz, done, tolerance)
            active = active[~done]
            if len(active) == 0:
                break
            basis.select((~done).nonzero().flatten())
        if basis.full:
            basis.restart(which, wanted)
    return replace(pairs, num_matvecs=iteration)


@dataclass(frozen=True)
class _Ritz:
    """Wanted Ritz values ``[P, M]`` in descending order, their coefficients ``[P, j, M]`` in the basis."""

    values: Tensor
    coefficients: Tensor
    residuals: Tensor
    norm: Tensor


class KrylovBasis:
    """Orthonormal vectors ``[P, n, D]``, of which the first j have been multiplied by the operator."""

    def __init__(self, operator: Operator, block_size: int, capacity: int, generator: torch.Generator) -> None:
        self.operator = operator
        self.num_processed = 0
        self.num_vectors = 0
        self._generator = generator
        self._block_size = block_size
        num_operators, self._size = operator.shape
        self._capacity = min(capacity, self._size)
        self._vectors = _zeros(operator, num_operators, self._capacity, self._size)
        self._coefficients = _zeros(operator, num_operators, self._capacity, self._capacity)  # H of the docstring
        self._scale = _zeros(operator, num_operators)
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
        self._scale = torch.maximum(self._scale, product.norm(dim=1))
        rest, coefficients = self._orthogonalised(product)
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

    def ritz(self, which: End, count: int) -> _Ritz:
        """The wanted Ritz pairs of the processed part, with residuals (never below rounding)."""
        j, n = self.num_processed, self.num_vectors
        values, coefficients = torch.linalg.eigh(self.projection())
        norm = values.abs().amax(dim=1)
        index = _wanted(values, which, count)
        coefficients = coefficients.gather(2, index.unsqueeze(1).expand(-1, j, -1))
        tail = (self._coefficients[:, j:n, :j].double() @ coefficients).norm(dim=1)
        rounding = _rounding(self._coefficients.dtype, self._size) * norm
        residuals = torch.hypot(tail, rounding.unsqueeze(1).expand_as(tail))
        dtype = self._coefficients.dtype
        return _Ritz(values.gather(1, index).to(dtype), coefficients.to(dtype), residuals.to(dtype), norm.to(dtype))

    def vectors_of(self, ritz: _Ritz, chosen: Tensor) -> Tensor:
        """Ritz vectors ``[P', M, D]`` of the chosen operators."""
        return ritz.coefficients[chosen].mT @ self._vectors[chosen, : self.num_processed]

    def restart(self, which: End, count: int) -> None:
        """Starts again from the best Ritz vectors, which fill half of the basis, and the vectors not yet multiplied."""
        j, n, b = self.num_processed, self.num_vectors, self._block_size
        m = max(count, min(j - 1, (count + self._capacity - b) // 2))
        ritz = self.ritz(which, m)
        coupling = self._coefficients[:, j:n, :j] @ ritz.coefficients
        everything = torch.ones(len(self._vectors), dtype=torch.bool, device=self._vectors.device)
        best = self.vectors_of(ritz, everything)
        self._vectors[:, m : m + b] = self._vectors[:, j:n].clone()
        self._vectors[:, :m] = best
        self._coefficients.zero_()
        self._coefficients[:, :m, :m] = torch.diag_embed(ritz.values)
        self._coefficients[:, m : m + b, :m] = coupling
        self.num_processed, self.num_vectors = m, m + b

    def select(self, index: Tensor) -> None:
        """Goes on with the operators at ``index`` only."""
        self.operator = self.operator.select(index)
        self._vectors, self._coefficients, self._scale = (
            t[index] for t in (self._vectors, self._coefficients, self._scale)
        )

    def _append(self, vector: Tensor) -> None:
        self._vectors[:, self.num_vectors] = vector / vector.norm(dim=1, keepdim=True)
        self.num_vectors += 1

    def _orthogonalised(self, vector: Tensor) -> tuple[Tensor, Tensor]:
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
        return self._orthogonalised(vector.to(self._vectors).expand(len(self._vectors), -1))[0]


def _rounding(dtype: torch.dtype, size: int) -> float:
    """What rounding alone leaves of a residual, relative to the norm: a heuristic, eps·√D."""
    return float(torch.finfo(dtype).eps * size**0.5)


def _wanted(values: Tensor, which: End, count: int) -> Tensor:
    """Positions in ascending ``values [P, j]`` of the wanted ones, largest value first."""
    num_values = values.shape[1]
    if which == "largest_magnitude":
        return values.abs().topk(count, dim=1).indices.sort(dim=1, descending=True).values
    high = {"both_ends": (count + 1) // 2, "largest_algebraic": count, "smallest_algebraic": 0}[which]
    low = count - high
    positions = [*range(num_values - 1, num_values - 1 - high, -1), *range(low - 1, -1, -1)]
    return torch.tensor(positions, device=values.device).expand(len(values), -1)


def _zeros(operator: Operator, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=operator.dtype, device=operator.device)


def _empty_pairs(operator: Operator, count: int) -> RitzPairs:
    num_operators, size = operator.shape
    return RitzPairs(
        eigenvalues=_zeros(operator, num_operators, count),
        eigenvectors=_zeros(operator, num_operators, count, size),
        residuals=_zeros(operator, num_operators, count),
        converged=torch.zeros(num_operators, count, dtype=torch.bool, device=operator.device),
        num_matvecs=0,
    )


def _store(pairs: RitzPairs, index: Tensor, basis: KrylovBasis, ritz: _Ritz, chosen: Tensor, tolerance: float) -> None:
    """Writes the chosen operators' pairs into rows ``index`` of ``pairs``."""
    pairs.eigenvalues[index] = ritz.values[chosen]
    pairs.eigenvectors[index] = basis.vectors_of(ritz, chosen)
    pairs.residuals[index] = ritz.residuals[chosen]
    pairs.converged[index] = (ritz.residuals <= tolerance * ritz.norm.unsqueeze(1))[chosen]
