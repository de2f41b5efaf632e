"""The exact spectrum of JᵀAJ from C gradients, the whole Hessian of piecewise linear networks: method ``low_rank``."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import concatenate, in_groups
from lightning_hessian.curvature.checks.prediction import predict
from lightning_hessian.curvature.cost_model import group_size, low_rank_bytes, vector_bytes
from lightning_hessian.curvature.methods.interface import MethodInput, MethodResult
from lightning_hessian.curvature.operators.gauss_newton import output_hessian, outputs_with_jacobian
from lightning_hessian.curvature.spectrum import eigenpairs, exact_decomposition
from lightning_hessian.curvature.target_batch import TargetBatch

ALL_VECTORS = 64  # outputs up to which all eigenvectors are returned: with them the spectrum is the matrix


def low_rank_spectrum(given: MethodInput) -> MethodResult:
    """The complete spectrum of every problem, from the gradients of all outputs."""
    batch, memory_budget = given.batch, given.memory_budget
    per_sample = low_rank_bytes(given.costs)
    num_vectors = given.options.num_eigenvalues
    num_listed = min(given.costs.num_outputs, batch.num_inputs)
    more = vector_bytes(batch, batch.num_samples * (num_listed - num_vectors))
    if num_vectors < num_listed <= ALL_VECTORS and per_sample + more <= memory_budget:
        num_vectors, memory_budget = num_listed, memory_budget - more

    def work(samples: slice) -> MethodResult:
        generator = given.options.generator()
        return low_rank_decomposition(batch.select(samples), given.gradient[samples], num_vectors, generator)

    size = group_size(batch, per_sample, memory_budget, "The gradients of all outputs")
    groups = []
    for samples, found in in_groups(batch.num_samples, size, work):
        groups.append(found)
        given.progress("samples", samples.stop, batch.num_samples)
    return concatenate(groups)


def low_rank_decomposition(
    batch: TargetBatch, gradient: Tensor, num_vectors: int, generator: torch.Generator
) -> MethodResult:
    """The complete eigendecomposition of JᵀAJ, and its prediction along a direction drawn from ``generator``.

    With Jᵀ = Q R reduced, H = JᵀAJ = Q (R A Rᵀ) Qᵀ: the eigenvalues are those of the small matrix R A Rᵀ, the
    eigenvectors Q times its own, and the D − min(C, D) eigenvalues not listed are zero. Nothing is
    approximated. Residuals are those of the small problem: Q is orthonormal.

    Cost: C gradients and a QR decomposition of D×C per sample.
    """
    outputs, j = outputs_with_jacobian(batch)
    a = output_hessian(batch, outputs)
    q, r = torch.linalg.qr(j.mT)
    num_classes = batch.num_classes
    small = (r.unsqueeze(1) @ a).flatten(1, 2) @ r.mT  # [N, K·C, C]: one product per sample, without copies of R
    small = small.unflatten(1, (num_classes, -1))
    small = (small + small.mT) / 2
    pairs, vectors = eigenpairs(small, num_vectors)
    eigenvalues, index = pairs["eigenvalues"], pairs["vector_index"]
    chosen = vectors.gather(-1, index.unsqueeze(-2).expand(*vectors.shape[:-1], -1))
    along = ((gradient @ q).unsqueeze(-2) @ vectors).squeeze(-2)  # the gradient's component along each eigenvector
    norm = eigenvalues.square().sum(-1).sqrt()
    eigenvectors = (chosen.mT.flatten(1, 2) @ q.mT).unflatten(1, (num_classes, -1))
    rows = (small.flatten(1, 2) @ q.mT).unflatten(1, (num_classes, -1))  # of R A Rᵀ Qᵀ, [N, K, C, D]

    def curvature(w: Tensor) -> Tensor:
        components = ((w.unsqueeze(1) @ q).unsqueeze(1) @ vectors).squeeze(-2)
        return (eigenvalues * components.square()).sum(-1)

    decomposition = exact_decomposition(
        **pairs,
        eigenvectors=eigenvectors,
        trace=eigenvalues.sum(-1),
        frobenius_norm=norm,
        gauss_newton_norm=norm.clone(),
        functional_norm=torch.zeros_like(norm),
        diagonal=rows.mul_(q.mT.unsqueeze(1)).sum(-2),
        gradient_curvature=(eigenvalues * along.square()).sum(-1) / gradient.square().sum(-1),
        asymmetry=torch.zeros_like(norm),
    )
    return MethodResult(
        decomposition, predict(gradient, eigenvectors[:, :, 0], eigenvalues.abs().amax(-1), curvature, generator)
    )
