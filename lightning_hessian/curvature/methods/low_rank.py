"""The exact spectrum of JᵀAJ from C gradients: the whole Hessian where the network is piecewise linear."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import vjp, vmap

from lightning_hessian.curvature.cost_model import Facts
from lightning_hessian.curvature.memory import out_of_memory
from lightning_hessian.curvature.operators.autodiff import ReverseOverReverse, relative_difference
from lightning_hessian.curvature.operators.target_batch import TargetBatch

VMAPPED_OUTPUTS = 16  # backward passes batched at once: most of the speed, and no C-fold activations at C = 1000


def jacobian(batch: TargetBatch) -> Tensor:
    """Gradients of all C outputs with respect to the input, ``[N, C, D]``.

    The backward passes are ``vmap``-batched where that gives what a plain backward pass gives along a random
    weighting of the outputs, and done one after another elsewhere. Cost: at most C gradients.
    """
    x = batch.x.detach().clone().requires_grad_()
    outputs = batch.outputs(x)
    num_outputs = outputs.shape[1]
    if not outputs.requires_grad:
        return x.new_zeros(len(x), num_outputs, batch.num_inputs)

    def row(weights: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(outputs, x, weights, retain_graph=True, materialize_grads=True)
        return gradient.flatten(1)

    numbers = torch.arange(num_outputs, device=x.device)

    def one_hot(c: Tensor) -> Tensor:  # one at a time: all of them are C² numbers
        return (numbers == c).to(x.dtype).expand(len(x), -1)

    try:
        pull_back = vjp(batch.outputs, x.detach())[1]
        rows = vmap(lambda c: pull_back(one_hot(c))[0], chunk_size=VMAPPED_OUTPUTS)(numbers)
        batched = rows.flatten(2).transpose(0, 1)
    except Exception as error:  # every kind of module that lacks a vmap rule
        if out_of_memory(error):
            raise
        batched = None
    weights = torch.linspace(1, 2, num_outputs, dtype=x.dtype, device=x.device)
    expected = row(weights.expand(len(x), -1))
    tolerance = torch.finfo(x.dtype).eps ** 0.5
    if batched is not None and relative_difference(weights @ batched, expected) <= tolerance:
        return batched
    return torch.stack([row(one_hot(c)) for c in numbers], dim=1)


def output_hessian(batch: TargetBatch) -> Tensor:
    """A = ∂²τ/∂z² of every problem, ``[N, K, C, C]``; exactly zero for a target linear in the outputs."""
    with torch.no_grad():
        outputs = batch.outputs(batch.x)
    on_outputs = TargetBatch(lambda z: z, batch.target, outputs, batch.classes)
    return ReverseOverReverse(on_outputs).columns(torch.eye(outputs.shape[1]).to(outputs))


def gauss_newton_factors(batch: TargetBatch) -> tuple[Tensor, Tensor, Tensor]:
    """J ``[P, C, D]`` and A ``[P, C, C]`` of every problem, and the Frobenius norms ``[P]`` of JᵀAJ, exactly.

    Cost: C gradients.
    """
    rows, bend = jacobian(batch), output_hessian(batch)
    r = torch.linalg.qr(rows.mT, mode="r").R.unsqueeze(1)
    norms = torch.linalg.matrix_norm(r @ bend @ r.mT)
    return rows.repeat_interleave(batch.num_classes, dim=0), bend.flatten(0, 1), norms.flatten()


def low_rank_parts(batch: TargetBatch, gradient: Tensor, num_vectors: int) -> dict[str, Tensor]:
    """The complete eigendecomposition of JᵀAJ, as the parts of a ``Spectrum`` by name.

    With Jᵀ = Q R reduced, H = JᵀAJ = Q (R A Rᵀ) Qᵀ: the eigenvalues are those of the small matrix R A Rᵀ, the
    eigenvectors Q times its own, and the D − min(C, D) eigenvalues not listed are zero. Nothing is
    approximated. Residuals are those of the small problem: Q is orthonormal.

    Cost: C gradients and a QR decomposition of D×C per sample.
    """
    rows, bend = jacobian(batch), output_hessian(batch)
    q, r = torch.linalg.qr(rows.mT)
    small = r.unsqueeze(1) @ bend @ r.mT.unsqueeze(1)
    small = (small + small.mT) / 2
    eigenvalues, vectors = torch.linalg.eigh(small)
    residuals = (small @ vectors - vectors * eigenvalues.unsqueeze(-2)).norm(dim=-2)
    eigenvalues, residuals, vectors = eigenvalues.flip(-1), residuals.flip(-1), vectors.flip(-1)
    index = eigenvalues.abs().topk(min(num_vectors, eigenvalues.shape[-1]), dim=-1).indices
    chosen = vectors.gather(-1, index.unsqueeze(-2).expand(*vectors.shape[:-1], -1))
    inside = ((gradient @ q).unsqueeze(-2) @ vectors).squeeze(-2)  # the gradient's part along each eigenvector
    rounding = torch.finfo(q.dtype).eps * (10 + small.shape[-1]) * eigenvalues.abs().amax(-1, keepdim=True)
    return {
        "eigenvalues": eigenvalues,
        "eigenvectors": (q.unsqueeze(1) @ chosen).mT,
        "vector_index": index,
        "residuals": residuals,
        "converged": residuals <= rounding,
        "trace": eigenvalues.sum(-1),
        "frobenius_norm": eigenvalues.square().sum(-1).sqrt(),
        "gradient_curvature": (eigenvalues * inside.square()).sum(-1) / gradient.square().sum(-1),
        "diagonal": (small @ q.mT.unsqueeze(1)).mul(q.mT.unsqueeze(1)).sum(-2),
        "gauss_newton_norm": eigenvalues.square().sum(-1).sqrt(),
        "functional_norm": torch.zeros_like(eigenvalues[..., 0]),
        "asymmetry": torch.zeros_like(eigenvalues[..., 0]),
    }


def low_rank_bytes(facts: Facts) -> int:
    """The memory that ``low_rank_parts`` takes per sample: C gradients, their QR, and products with it."""
    _, num_classes, num_inputs = facts.batch.shape
    num_outputs = facts.num_outputs
    numbers = num_inputs * num_outputs * (6 + 4 * num_classes) + 12 * (num_classes + 1) * num_outputs**2
    backward = min(num_outputs, VMAPPED_OUTPUTS) * facts.gradient_bytes
    return numbers * facts.batch.x.element_size() + backward


def gauss_newton_hessians(batch: TargetBatch) -> Tensor:
    """JᵀAJ of every problem, ``[N, K, D, D]``."""
    rows, bend = jacobian(batch), output_hessian(batch)
    return rows.mT.unsqueeze(1) @ bend @ rows.unsqueeze(1)
