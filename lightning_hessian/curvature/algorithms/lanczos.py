"""Extreme eigenpairs of many symmetric operators at once, from products with vectors only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_hessian.curvature.algorithms.krylov import End, KnownProducts, KrylovBasis, Ritz, rounding
from lightning_hessian.curvature.operators.hessian import Operator

# Iterations between two looks at convergence, at most; a look is a small eigendecomposition. The last looks come
# closer: residuals of networks have been seen to need 3 to 8 iterations to fall tenfold.
CHECK_EVERY = 4
ITERATIONS_PER_DECADE = 2


@dataclass(frozen=True)
class RitzPairs:
    """Eigenpairs of P operators; an operator with a product that is not finite has NaN in all its rows.

    Attributes:
        eigenvalues: ``[P, M]``, descending and algebraic.
        eigenvectors: ``[P, M, D]``, orthonormal.
        residuals: ``[P, M]``, ‖A v − λ v‖: an eigenvalue of A lies within this of λ.
        converged: ``[P, M]``, whether the residual is below the tolerance, which is never taken below what rounding
            leaves, 2·eps·√D of the largest |λ|.
        known: the whole space that was searched, with its products: what they tell costs no further product.
        num_matvecs: products with a vector per operator, at most.
        ended_early: whether it ended as ``is_late`` said, with pairs that have not converged.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    converged: Tensor
    known: KnownProducts
    num_matvecs: int
    ended_early: bool = False


def basis_size(num_eigenvalues: int, block_size: int) -> int:
    """How many Lanczos vectors are stored per operator: so many steps are taken before each restart.

    Trained networks have needed 30 to 50 steps for ten eigenvalues, random weights 60 to 100.
    """
    return max(8 * num_eigenvalues, 80, 3 * block_size) + block_size


def lanczos(
    operator: Operator,
    num_eigenvalues: int,
    *,
    generator: torch.Generator,
    which: End = "both_ends",
    tolerance: float = 1e-5,
    relative_tolerance: float = 0.0,
    block_size: int = 1,
    max_basis: int | None = None,
    max_matvecs: int | None = None,
    is_late: Callable[[], bool] = lambda: False,
) -> RitzPairs:
    """Band Lanczos over all operators at once, with full reorthogonalization and thick restarts.

    From a start block of b random vectors an orthonormal basis Q grows one vector at a time: A q_j is
    orthogonalized twice against all of Q and appended. With j vectors processed, A Q_j = Q_{j+b} H, and a
    Ritz pair (θ, Q_j s) of H's upper square has the residual ‖H[j:] s‖. When the basis is full, it is
    replaced by its best Ritz vectors and the b unprocessed ones. Where the Krylov space is exhausted
    (an invariant subspace: a success), it is continued by a random vector orthogonal to it. Operators
    whose pairs have all converged leave the batch when they are half of it, which costs the others a new graph; none
    is left alone, since kernels have been seen to err in batches of one.

    The start vectors are random at every call, never eigenvectors of a similar operator: such a start saves steps only
    as far as it is blind to what is new (``benchmarks/warm_start.py``).

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
            1e-5 almost none.
        relative_tolerance: on residuals, relative to the eigenvalue's own |λ|; the larger of the two bounds counts.
        block_size: b, start vectors.
        max_basis: vectors stored per operator; by default ``basis_size``. Memory: up to 5 · P · max_basis · D
            numbers, with the products that are returned.
        max_matvecs: per operator; by default ten times the basis. What has not converged by then is marked.
        is_late: whether to end now, asked after every product once there are enough of them for both ends.

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
    tolerance = max(tolerance, 2 * rounding(operator.dtype, size))
    max_basis = min(max_basis or basis_size(wanted, block_size), size + block_size)
    if max_basis < min(wanted + 2 * block_size + 1, size + block_size):
        raise ValueError(
            f"max_basis={max_basis} is too small for {wanted} eigenpairs: it must be at least "
            f"{wanted + 2 * block_size + 1}."
        )
    basis = KrylovBasis(operator, block_size, max_basis, generator)
    active = torch.arange(num_operators, device=operator.device)
    limit = max_matvecs or 10 * max_basis
    found: list[tuple[Tensor, RitzPairs]] = []
    next_look = wanted + CHECK_EVERY  # with fewer Ritz values, those inside would pass for the ends
    for iteration in range(1, limit + 1):
        basis.grow()
        enough = iteration >= wanted + CHECK_EVERY
        late = enough and is_late()
        last = basis.num_processed == size or iteration == limit or late
        if not (last or basis.full or iteration >= next_look):
            continue
        ritz = basis.ritz(which, wanted)
        allowed = torch.maximum(tolerance * ritz.norm.unsqueeze(1), relative_tolerance * ritz.values.abs())
        converged = ritz.residuals <= allowed
        done = converged.all(dim=1) | basis.failed
        if last or bool(done.all()):
            pairs = _pairs(basis, ritz, converged, iteration)
            found.append((active, replace(pairs, ended_early=late and not bool(done.all()))))
            break
        next_look = iteration + _iterations_left(ritz.residuals, allowed, done)
        if 2 * int(done.sum()) >= len(active) > 2:
            stay = _at_least_two(~done)
            found.append((active[~stay], _rows(_pairs(basis, ritz, converged, iteration), ~stay)))
            active = active[stay]
            basis.select(stay.nonzero().flatten())
        if basis.full:
            basis.restart(which, wanted)
    return found[0][1] if len(found) == 1 else _together(found, num_operators)


def _iterations_left(residuals: Tensor, allowed: Tensor, done: Tensor) -> int:
    """Until the next look: few where little is missing."""
    ratio = (residuals / allowed.clamp_min(torch.finfo(allowed.dtype).tiny)).amax(dim=1)[~done].amax()
    return min(CHECK_EVERY, max(1, int(ITERATIONS_PER_DECADE * float(ratio.log10()))))


def _at_least_two(stay: Tensor) -> Tensor:
    """A mask with one more entry where only one was left."""
    if int(stay.sum()) == 1:
        stay[int((~stay).nonzero()[0])] = True
    return stay


def _pairs(basis: KrylovBasis, ritz: Ritz, converged: Tensor, num_matvecs: int) -> RitzPairs:
    """What a basis has found."""
    failed = basis.failed.unsqueeze(1)
    return RitzPairs(
        eigenvalues=ritz.values.where(~failed, torch.nan),
        eigenvectors=basis.vectors_of(ritz).where(~failed.unsqueeze(1), torch.nan),
        residuals=ritz.residuals.where(~failed, torch.nan),
        converged=converged & ~failed,
        known=basis.known(),
        num_matvecs=num_matvecs,
    )


def _rows(pairs: RitzPairs, chosen: Tensor) -> RitzPairs:
    """The pairs of some operators."""
    known = KnownProducts(pairs.known.vectors[chosen], pairs.known.products[chosen])
    names = ("eigenvalues", "eigenvectors", "residuals", "converged")
    return replace(pairs, **{name: getattr(pairs, name)[chosen] for name in names}, known=known)


def _together(found: list[tuple[Tensor, RitzPairs]], num_operators: int) -> RitzPairs:
    """The pairs of all operators from those of groups that left at different iterations."""
    width = max(pairs.known.vectors.shape[1] for _, pairs in found)

    def rows(of: Callable[[RitzPairs], Tensor], width: int | None = None) -> Tensor:
        first = of(found[0][1])
        result = first.new_zeros(num_operators, width or first.shape[1], *first.shape[2:])
        for index, pairs in found:
            result[index, : of(pairs).shape[1]] = of(pairs)
        return result

    return RitzPairs(
        eigenvalues=rows(lambda pairs: pairs.eigenvalues),
        eigenvectors=rows(lambda pairs: pairs.eigenvectors),
        residuals=rows(lambda pairs: pairs.residuals),
        converged=rows(lambda pairs: pairs.converged),
        known=KnownProducts(
            rows(lambda pairs: pairs.known.vectors, width), rows(lambda pairs: pairs.known.products, width)
        ),
        num_matvecs=found[-1][1].num_matvecs,
        ended_early=found[-1][1].ended_early,
    )
