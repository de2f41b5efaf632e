"""The ends of every problem's spectrum, with estimates of what lies between: the method ``lanczos``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lightning_hessian.curvature.algorithms.hutchinson import (
    Estimate,
    Estimates,
    estimate,
    estimate_asymmetry,
    estimate_norm,
)
from lightning_hessian.curvature.algorithms.lanczos import basis_size, lanczos
from lightning_hessian.curvature.algorithms.quadrature import NUM_STEPS, Density, density, exact_density
from lightning_hessian.curvature.batching import combine, concatenate, in_groups
from lightning_hessian.curvature.checks.certificate import predict
from lightning_hessian.curvature.cost_model import group_size, lanczos_bytes
from lightning_hessian.curvature.methods.interface import MethodInput, MethodResult
from lightning_hessian.curvature.operators.autodiff import random_vectors
from lightning_hessian.curvature.operators.gauss_newton import GaussNewtonOperator, factored_gauss_newton
from lightning_hessian.curvature.operators.hessian import CountingOperator, HessianOperator, Operator
from lightning_hessian.curvature.options import Options
from lightning_hessian.curvature.spectrum import Decomposition
from lightning_hessian.curvature.target_batch import TargetBatch


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
        found = lanczos_decomposition(
            batch.select(samples),
            given.gradient[samples],
            options,
            piecewise_linear=given.piecewise_linear,
            count=count,
        )
        return found, total - before

    per_sample = lanczos_bytes(given.costs, options)
    size = group_size(batch.num_samples, per_sample, given.memory_budget, "The Lanczos basis")
    groups, num_matvecs = zip(*(result for _, result in in_groups(batch.num_samples, size, work)), strict=True)
    return replace(concatenate(groups), num_matvecs=max(num_matvecs))


def lanczos_decomposition(
    batch: TargetBatch,
    gradient: Tensor,
    options: Options,
    *,
    piecewise_linear: bool = False,
    count: Callable[[], object] = lambda: None,
) -> MethodResult:
    """The ends of every problem's spectrum, all problems at once; every call draws the same vectors.

    Args:
        batch: what to differentiate.
        gradient: of the batch, ``[N, K, D]``.
        options: how many eigenvalues, start vectors and vectors for the density.
        piecewise_linear: the network is, so v ↦ Jᵀ(A(J v)) is the whole Hessian.
        count: called after every product.
    """
    hessian = GaussNewtonOperator(batch) if piecewise_linear else HessianOperator(batch)
    operator = CountingOperator(hessian, count)
    generator = options.generator()
    # At least one from each end: lambda_max and lambda_min are read off them.
    pairs = lanczos(operator, max(2, options.num_eigenvalues), generator=generator, block_size=options.block_size)
    rest = estimate(operator, pairs, generator=generator)
    g = gradient.flatten(0, 1)
    gradient_curvature = (g * operator.matvec(g)).sum(dim=1) / g.square().sum(dim=1)
    asymmetry = estimate_asymmetry(operator, generator=generator)
    gauss_newton, functional = _term_norms(operator, batch, options, rest, pairs.eigenvectors, generator)
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
        gradient_curvature=gradient_curvature,
        asymmetry=asymmetry / norm.where(norm > 0, 1),
    )
    found = combine([by_problem], lambda tensors: tensors[0].reshape(*batch.shape[:2], *tensors[0].shape[1:]))

    def curvature(w: Tensor) -> Tensor:
        v = w.repeat_interleave(batch.num_classes, dim=0)
        return (v * operator.matvec(v)).sum(dim=1).reshape(batch.shape[:2])

    top, norm_of_each = found.eigenvectors[:, :, 0], found.eigenvalues.abs().amax(-1)
    return MethodResult(found, predict(gradient, top, norm_of_each, curvature, options.generator()))


def _density(operator: Operator, eigenvalues: Tensor, options: Options) -> Density | None:
    """Exact where all eigenvalues ``[P, M]`` were found, estimated where vectors were asked for, else None."""
    if eigenvalues.shape == operator.shape:
        return exact_density(eigenvalues, operator.shape[1])
    if not options.density_vectors:
        return None
    # A fresh generator: the starting vectors do not depend on how many vectors Lanczos drew.
    return density(operator, NUM_STEPS, options.density_vectors, generator=options.generator())


def _term_norms(
    operator: CountingOperator,
    batch: TargetBatch,
    options: Options,
    whole: Estimates,
    known: Tensor,
    generator: torch.Generator,
) -> tuple[Estimate, Estimate]:
    """Frobenius norms ``[P]`` of the Gauss-Newton and the functional term.

    If there are no more outputs than Lanczos vectors, their gradients fit in the memory that the basis has freed, and
    the first norm is exact.
    """
    norm = Estimate(whole.frobenius_norm, whole.frobenius_norm_error)
    zero = Estimate(torch.zeros_like(norm.value), torch.zeros_like(norm.error))
    if isinstance(operator.operator, GaussNewtonOperator):
        return norm, zero
    term = GaussNewtonOperator(batch)
    matvec: Callable[[Tensor], Tensor] = term.matvec
    if not matvec(random_vectors(batch, generator).flatten(0, 1)).any():
        return zero, norm
    if term.num_outputs <= basis_size(options.num_eigenvalues, options.block_size):
        matvec, exact = factored_gauss_newton(batch)
        gauss_newton = Estimate(exact, torch.zeros_like(exact))
    else:
        gauss_newton = estimate_norm(matvec, known, generator=generator)
    return gauss_newton, estimate_norm(lambda v: operator.matvec(v) - matvec(v), known, generator=generator)
