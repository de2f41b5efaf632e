"""The ends of every problem's spectrum, with estimates of what lies between: the method ``lanczos``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lightning_hessian.curvature.algorithms.hutchinson import (
    NUM_VECTORS,
    Estimate,
    Estimates,
    RandomProducts,
    estimate,
    estimate_asymmetry,
    estimate_norm,
    random_products,
)
from lightning_hessian.curvature.algorithms.krylov import KnownProducts
from lightning_hessian.curvature.algorithms.lanczos import RitzPairs, basis_size, lanczos
from lightning_hessian.curvature.algorithms.quadrature import NUM_STEPS, Density, density, exact_density
from lightning_hessian.curvature.batching import combine, concatenate, in_groups
from lightning_hessian.curvature.checks.prediction import Prediction, predict
from lightning_hessian.curvature.cost_model import GRADIENT_IN_MATVECS, group_size, lanczos_bytes
from lightning_hessian.curvature.meter import UNLIMITED, TimeLimit
from lightning_hessian.curvature.methods.interface import MethodInput, MethodResult
from lightning_hessian.curvature.operators.gauss_newton import (
    GaussNewtonOperator,
    factored_gauss_newton,
    has_zero_hessian,
    targets_of_outputs,
)
from lightning_hessian.curvature.operators.hessian import CountingOperator, HessianOperator, Operator
from lightning_hessian.curvature.options import Options
from lightning_hessian.curvature.spectrum import Decomposition
from lightning_hessian.curvature.target_batch import TargetBatch

# A residual of so much of its own |λ| is enough in float32: three digits of λ are certain, and by ‖r‖²/gap about six
# are right. On Hessians of CNNs, MLPs and transformers recorded while they learned to read digits, as many eigenvalues
# were missed as with 1e-5 of the norm alone (3 in 896 problems; 2), after up to a tenth fewer products.
RELATIVE_TOLERANCE = {torch.float32: 3e-4, torch.float64: 0.0}

MIN_VECTORS = 2  # random ones, of which an error can still be estimated
# Of a limit in seconds, the last are left for the checks: as many HVPs of all problems as those take (16 evaluations of
# every sample, most of them in float64).
CHECKS_IN_MATVECS = 6


class _Allowance:
    """How many products fit the time that is left, by what those took that are done."""

    def __init__(self, limit: TimeLimit) -> None:
        self._limit, self._left_at_start = limit, limit.seconds_left
        self.num_products = 0

    def fitting(self, reserved: float = 0.0) -> float:
        """Beside so many ``reserved`` ones; infinite without a limit."""
        left = self._limit.seconds_left
        spent = self._left_at_start - left
        return math.inf if math.isinf(left) or spent <= 0 else left / spent * self.num_products - reserved


def lanczos_spectrum(given: MethodInput) -> MethodResult:
    """Half of ``num_eigenvalues`` from each end of every problem's spectrum, and estimates of what lies between."""
    batch, options = given.batch, given.options
    total = 0

    def count() -> None:
        nonlocal total
        total += 1
        given.progress("products", total, None)

    def work(samples: slice) -> tuple[MethodResult, int]:
        before = total
        num_left = batch.num_samples - samples.start
        found = lanczos_decomposition(
            batch.select(samples),
            given.gradient[samples],
            options,
            piecewise_linear=given.piecewise_linear,
            limit=given.limit.part((samples.stop - samples.start) / num_left),
            count=count,
        )
        return found, total - before

    per_sample = lanczos_bytes(given.costs, options)
    size = group_size(batch, per_sample, given.memory_budget, "The Lanczos basis")
    groups, num_matvecs = zip(*(result for _, result in in_groups(batch.num_samples, size, work)), strict=True)
    dropped = tuple(dict.fromkeys(part for group in groups for part in group.dropped))
    return replace(concatenate(groups), num_matvecs=max(num_matvecs), dropped=dropped)


def lanczos_decomposition(
    batch: TargetBatch,
    gradient: Tensor,
    options: Options,
    *,
    piecewise_linear: bool = False,
    limit: TimeLimit = UNLIMITED,
    count: Callable[[], object] = lambda: None,
) -> MethodResult:
    """The ends of every problem's spectrum, all problems at once; every call draws the same vectors.

    Besides the Krylov basis, one product with the gradient and ten with random vectors serve everything: trace, norm,
    diagonal, asymmetry, the functional term, and for one class per sample the prediction.

    Args:
        batch: what to differentiate.
        gradient: of the batch, ``[N, K, D]``.
        options: how many eigenvalues, start vectors and vectors for the density.
        piecewise_linear: the network is, so v ↦ Jᵀ(A(J v)) is the whole Hessian.
        limit: in seconds: first there are fewer random vectors, then fewer Lanczos steps.
        count: called after every product.
    """
    hessian = GaussNewtonOperator(batch) if piecewise_linear else HessianOperator(batch)
    allowance = _Allowance(limit)

    def counted() -> None:
        allowance.num_products += 1
        count()

    operator = CountingOperator(hessian, counted)
    others, each = _cost_of_estimates(hessian, batch, options)
    others += 2 + CHECKS_IN_MATVECS * options.check
    # Signs from a stream of their own: where a Krylov space is exhausted, its basis draws more, and they would change.
    of_signs = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=options.generator())))
    pairs = lanczos(
        operator,
        max(2, options.num_eigenvalues),  # at least one from each end: lambda_max and lambda_min are read off them
        generator=options.generator(),
        relative_tolerance=RELATIVE_TOLERANCE[operator.dtype],
        block_size=options.block_size,
        is_late=lambda: allowance.fitting(others) < MIN_VECTORS * each,
    )
    num_vectors = int(max(MIN_VECTORS, min(NUM_VECTORS, allowance.fitting(others) / each)))
    random = random_products(operator, pairs.known, num_vectors, generator=of_signs)
    rest = estimate(pairs.known, random)
    g = gradient.flatten(0, 1)
    g_product = operator.matvec(g)
    asymmetry = estimate_asymmetry(pairs.known, random)
    gauss_newton, functional = _term_norms(hessian, batch, options, pairs, random, rest)
    order = pairs.eigenvalues.abs().argsort(dim=1, descending=True)
    norm = rest.frobenius_norm
    by_problem = Decomposition(
        eigenvalues=pairs.eigenvalues,
        eigenvectors=pairs.eigenvectors.gather(1, order.unsqueeze(-1).expand_as(pairs.eigenvectors)),
        vector_index=order,
        residuals=pairs.residuals,
        converged=pairs.converged,
        complete=pairs.eigenvalues.shape[1] == batch.num_inputs,
        density=_density(operator, pairs.eigenvalues, options),
        gauss_newton_norm=gauss_newton.value,
        gauss_newton_norm_error=gauss_newton.error,
        functional_norm=functional.value,
        functional_norm_error=functional.error,
        **vars(rest),
        gradient_curvature=(g * g_product).sum(dim=1) / g.square().sum(dim=1),
        asymmetry=asymmetry / norm.where(norm > 0, 1),
    )
    found = combine([by_problem], lambda tensors: tensors[0].reshape(*batch.shape[:2], *tensors[0].shape[1:]))
    prediction = _prediction(operator, gradient, g_product, found, pairs.known, random, options.generator())
    return MethodResult(found, prediction, dropped=_dropped(pairs, num_vectors))


def _dropped(pairs: RitzPairs, num_vectors: int) -> tuple[str, ...]:
    """What was shortened, as parts of a sentence."""
    dropped = []
    if num_vectors < NUM_VECTORS:
        dropped.append(f"trace and norms were estimated from {num_vectors} random vectors")
    if pairs.ended_early:
        dropped.append(f"Lanczos ended after {pairs.num_matvecs} steps (residuals say how far eigenvalues may be off)")
    return tuple(dropped)


def _cost_of_estimates(
    hessian: HessianOperator | GaussNewtonOperator, batch: TargetBatch, options: Options
) -> tuple[float, float]:
    """What random vectors and the norms of both terms cost, in HVPs: once, and for every random vector."""
    if isinstance(hessian, GaussNewtonOperator):
        return 0.0, 1.0
    num_outputs = hessian.outputs.shape[1]
    if num_outputs <= basis_size(options.num_eigenvalues, options.block_size):
        return GRADIENT_IN_MATVECS * num_outputs / batch.num_classes, 1.0
    return float(max(2, options.num_eigenvalues)), 2.0


def _prediction(
    operator: Operator,
    gradient: Tensor,
    g_product: Tensor,
    found: Decomposition,
    known: KnownProducts,
    random: RandomProducts,
    generator: torch.Generator,
) -> Prediction:
    """What was found, along a mixture w of top eigenvectors, gradients and a random vector.

    With one class per sample, the products with all three are known. With several, w mixes vectors of every class, and
    takes a product of its own.
    """
    top, num_classes = found.eigenvectors[:, :, 0], gradient.shape[1]

    def curvature(w: Tensor) -> Tensor:
        if num_classes > 1:
            v = w.repeat_interleave(num_classes, dim=0)
            return (v * operator.matvec(v)).sum(dim=1).reshape(gradient.shape[:2])
        z = random.signs[:1].expand_as(random.products[:, :1])
        z_product = random.products[:, :1] + known.apply(z)
        vectors = torch.cat([top, gradient, z], dim=1)
        products = torch.cat([known.apply(top), g_product.unsqueeze(1), z_product], dim=1)
        return _curvature_within(w, vectors, products).unsqueeze(1)

    norm = found.eigenvalues.abs().amax(-1)
    return predict(gradient, top, norm, curvature, generator, random.signs[0])


def _curvature_within(w: Tensor, vectors: Tensor, products: Tensor) -> Tensor:
    """wᵀHw ``[N]`` for w ``[N, D]`` in the span of vectors ``[N, M, D]`` whose products with H are known."""
    norm = vectors.norm(dim=2, keepdim=True)
    scale = norm.where(norm > 0, 1)
    weights = torch.linalg.pinv((vectors / scale).mT.double().nan_to_num()) @ w.double().nan_to_num().unsqueeze(-1)
    product = (weights.to(products).mT @ (products / scale)).squeeze(1)
    return (product * w).sum(dim=1)


def _density(operator: Operator, eigenvalues: Tensor, options: Options) -> Density | None:
    """Exact where all eigenvalues ``[P, M]`` were found, estimated where vectors were asked for, else None."""
    if eigenvalues.shape == operator.shape:
        return exact_density(eigenvalues, operator.shape[1])
    if not options.density_vectors:
        return None
    # A fresh generator: the starting vectors do not depend on how many vectors Lanczos drew.
    return density(operator, NUM_STEPS, options.density_vectors, generator=options.generator())


def _term_norms(
    hessian: HessianOperator | GaussNewtonOperator,
    batch: TargetBatch,
    options: Options,
    pairs: RitzPairs,
    random: RandomProducts,
    whole: Estimates,
) -> tuple[Estimate, Estimate]:
    """Frobenius norms ``[P]`` of the Gauss-Newton and the functional term, without a product with the Hessian.

    If there are no more outputs than Lanczos vectors, J and A are formed, and the first norm is exact.
    """
    norm = Estimate(whole.frobenius_norm, whole.frobenius_norm_error)
    zero = Estimate(torch.zeros_like(norm.value), torch.zeros_like(norm.error))
    if isinstance(hessian, GaussNewtonOperator):
        return norm, zero
    outputs = targets_of_outputs(batch, hessian.outputs)
    if has_zero_hessian(outputs):
        return zero, norm
    known = pairs.known
    if outputs.num_inputs <= basis_size(options.num_eigenvalues, options.block_size):
        term = factored_gauss_newton(batch)
        rest = KnownProducts(known.vectors, known.products - term.apply(known.vectors))
        functional = estimate_norm(rest, random.products - term.apply(random.outside))
        return Estimate(term.norm, torch.zeros_like(term.norm)), functional
    # A product with JᵀAJ is as expensive as an HVP: exact inside of the eigenvectors only, not of the whole basis.
    q = pairs.eigenvectors
    inside = KnownProducts(q, known.apply(q))
    outside = inside.outside(random.signs)
    matvec = GaussNewtonOperator(batch).matvec
    terms = [torch.stack([matvec(v) for v in vectors.unbind(dim=1)], dim=1) for vectors in (q, outside)]
    rest = KnownProducts(q, inside.products - terms[0])
    functional = estimate_norm(rest, random.products + known.apply(outside) - terms[1])
    return estimate_norm(KnownProducts(q, terms[0]), terms[1]), functional
