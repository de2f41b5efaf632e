"""The ends of every problem's spectrum, with estimates of what lies between: the method ``lanczos``."""

from __future__ import annotations

from itertools import count

import torch
from torch import Tensor

from lightning_hessian.curvature.algorithms.hutchinson import Estimates, estimate, estimate_norm
from lightning_hessian.curvature.algorithms.lanczos import lanczos
from lightning_hessian.curvature.algorithms.quadrature import NUM_STEPS, density
from lightning_hessian.curvature.cost_model import Facts
from lightning_hessian.curvature.memory import in_groups, joined
from lightning_hessian.curvature.methods.low_rank import gauss_newton_factors, low_rank_bytes
from lightning_hessian.curvature.operators.autodiff import random_vectors
from lightning_hessian.curvature.operators.hessian import GaussNewtonOperator, HessianOperator, Operator, ToldOperator
from lightning_hessian.curvature.operators.target_batch import TargetBatch
from lightning_hessian.curvature.progress import Progress, silent

NUM_SKEW = 4  # random vectors, of which each pair tells about the asymmetry
NUM_RANDOM = 20  # vectors for trace, Frobenius norm and diagonal: their errors fall like 1/√20


def extreme_parts(
    batch: TargetBatch,
    gradient: Tensor,
    num_eigenvalues: int,
    *,
    block_size: int,
    head_only: bool,
    group_size: int,
    generator: torch.Generator,
    density_vectors: int = 0,
    progress: Progress = silent,
) -> tuple[dict[str, Tensor], int]:
    """Half of ``num_eigenvalues`` from each end, as the parts of a ``Spectrum`` by name, and the HVPs per problem.

    Args:
        batch: what to differentiate.
        gradient: of every problem, ``[N, K, D]``.
        num_eigenvalues: M.
        block_size: start vectors of Lanczos, at least the multiplicity that is to be seen.
        head_only: the network is piecewise linear, so v ↦ Jᵀ(A(Jv)) is the whole Hessian.
        group_size: samples worked on at a time (see ``lanczos_bytes``).
        generator: of random vectors; each group gets the same ones.
        density_vectors: S; from 2 on there are also the parts ``density_nodes`` and ``density_weights``, unless all
            D eigenvalues are found.
        progress: is told after every product of a group how many there were.
    """
    state = generator.get_state()
    counter = count(1)

    def work(samples: slice) -> tuple[dict[str, Tensor], int]:
        group = batch.select(samples)
        generator.set_state(state)
        operator = ToldOperator(GaussNewtonOperator(group) if head_only else HessianOperator(group), progress, counter)
        along = gradient[samples]
        found, used = _parts_of(operator, group, along, num_eigenvalues, block_size, generator)
        if density_vectors and found["eigenvalues"].shape[-1] < batch.num_inputs:
            generator.set_state(state)  # the starts do not hang on how many vectors Lanczos drew
            rule = density(operator, NUM_STEPS, density_vectors, generator=generator)
            laid_out = (group.num_samples, group.num_classes, *rule.nodes.shape[1:])
            found |= {"density_nodes": rule.nodes.reshape(laid_out), "density_weights": rule.weights.reshape(laid_out)}
            used += rule.nodes[0].numel()
        return found, used

    parts, num_matvecs = zip(*(result for _, result in in_groups(batch.num_samples, group_size, work)), strict=True)
    return joined(parts), max(num_matvecs)


def lanczos_bytes(facts: Facts, num_eigenvalues: int, block_size: int) -> int:
    """The memory that ``extreme_parts`` takes per sample.

    Two graphs of the Hessian (a smaller one is built when some problems have converged) and one of the head; the
    basis and a copy of it, or what the estimates keep of every random vector. With few outputs J and A are formed
    after the basis is gone (``low_rank_bytes``, and their copies for every class).
    """
    _, num_classes, num_inputs = facts.batch.shape
    max_basis = _basis_size(num_eigenvalues, block_size)
    num_rows = 4 * max(2, num_eigenvalues) + 10
    while_iterating = num_classes * 2 * max(min(max_basis, num_inputs), NUM_RANDOM) * facts.row_bytes
    if facts.num_outputs <= max_basis:
        while_iterating = max(while_iterating, low_rank_bytes(facts))
    graphs = 2 * facts.flat_product_bytes + facts.head_product_bytes
    return while_iterating + num_classes * (graphs + num_rows * facts.row_bytes)


def expected_products(num_inputs: int, num_eigenvalues: int, block_size: int, density_vectors: int) -> int:
    """The products that ``extreme_parts`` is expected to make: a basis filled once, the estimates, the density."""
    basis = min(_basis_size(num_eigenvalues, block_size), num_inputs)
    norms = num_eigenvalues + 2 * NUM_RANDOM  # of trace and Frobenius norm, and of the network's part
    return basis + norms + 1 + NUM_SKEW + density_vectors * min(NUM_STEPS, num_inputs)


def _basis_size(num_eigenvalues: int, block_size: int) -> int:
    return max(4 * num_eigenvalues, 40, 3 * block_size) + block_size


def _parts_of(
    operator: ToldOperator,
    batch: TargetBatch,
    gradient: Tensor,
    num_eigenvalues: int,
    block_size: int,
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], int]:
    max_basis = _basis_size(num_eigenvalues, block_size)
    # At least one from each end: lambda_max and lambda_min are read off them.
    pairs = lanczos(operator, max(2, num_eigenvalues), generator=generator, block_size=block_size, max_basis=max_basis)
    rest = estimate(operator, pairs, NUM_RANDOM, generator=generator)
    gradient = gradient.flatten(0, 1)
    along = (gradient * operator(gradient)).sum(dim=1) / gradient.square().sum(dim=1)
    skew = _skew_norm(operator, generator)
    order = pairs.eigenvalues.abs().argsort(dim=1, descending=True)
    norm = rest.frobenius_norm
    head, network, used = _part_norms(operator, batch, rest, pairs.eigenvectors, max_basis, generator)
    parts = {
        "eigenvalues": pairs.eigenvalues,
        "eigenvectors": pairs.eigenvectors.gather(1, order.unsqueeze(-1).expand_as(pairs.eigenvectors)),
        "vector_index": order,
        "residuals": pairs.residuals,
        "converged": pairs.converged,
        "trace": rest.trace,
        "trace_error": rest.trace_error,
        "frobenius_norm": rest.frobenius_norm,
        "frobenius_norm_error": rest.frobenius_error,
        "diagonal": rest.diagonal,
        "diagonal_error": rest.diagonal_error,
        "gauss_newton_norm": head[0],
        "gauss_newton_norm_error": head[1],
        "functional_norm": network[0],
        "functional_norm_error": network[1],
        "gradient_curvature": along,
        "asymmetry": skew / norm.where(norm > 0, 1),
    }
    shape = (batch.num_samples, batch.num_classes)
    by_problem = {name: part.reshape(*shape, *part.shape[1:]) for name, part in parts.items()}
    return by_problem, pairs.num_matvecs + rest.num_matvecs + 1 + NUM_SKEW + used


def _skew_norm(operator: Operator, generator: torch.Generator) -> Tensor:
    """An estimate of ‖H − Hᵀ‖ (Frobenius), ``[P]``: E (uᵀHv − vᵀHu)² over random signs u and v is its square."""
    like = operator.like
    signs = [torch.randint(2, like.shape[1:], generator=generator).to(like) * 2 - 1 for _ in range(NUM_SKEW)]
    forms = torch.stack([operator(v.expand_as(like)) @ torch.stack(signs, dim=1) for v in signs], dim=1)  # vᵀHᵀu
    pairs = torch.triu_indices(NUM_SKEW, NUM_SKEW, offset=1, device=like.device)
    return (forms - forms.mT)[:, pairs[0], pairs[1]].square().mean(dim=1).sqrt()


def _part_norms(
    operator: ToldOperator,
    batch: TargetBatch,
    whole: Estimates,
    known: Tensor,
    max_rows: int,
    generator: torch.Generator,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
    """Frobenius norms of JᵀAJ and of what the network bends, each with its standard error, and the HVPs made.

    With up to ``max_rows`` outputs (their gradients fit where the Lanczos basis was) the first is exact.
    """
    norm, error = whole.frobenius_norm, whole.frobenius_error
    nothing = torch.zeros_like(norm), torch.zeros_like(error)
    if isinstance(operator.operator, GaussNewtonOperator):
        return (norm, error), nothing, 0
    product = GaussNewtonOperator(batch)
    if not product(random_vectors(batch, generator).flatten(0, 1)).any():
        return nothing, (norm, error), 0
    if product.num_outputs <= max_rows:
        rows, bends, gauss_newton_norm = gauss_newton_factors(batch)
        of_head = gauss_newton_norm, torch.zeros_like(gauss_newton_norm)

        def head(v: Tensor) -> Tensor:
            return (rows.mT @ (bends @ (rows @ v.unsqueeze(-1)))).squeeze(-1)

    else:
        head = product
        of_head = estimate_norm(head, known, NUM_RANDOM, generator=generator)
    of_network = estimate_norm(lambda v: operator(v) - head(v), known, NUM_RANDOM, generator=generator)
    return of_head, of_network, known.shape[1] + NUM_RANDOM
