"""The Gauss-Newton term JᵀAJ of a Hessian: as an operator, as factors J and A, as a matrix, and its norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vjp, vmap

from lightning_hessian.curvature.batching import out_of_memory
from lightning_hessian.curvature.operators.autodiff import ReverseOverReverse, pull_back, relative_difference
from lightning_hessian.curvature.operators.hessian import BatchOperator
from lightning_hessian.curvature.target_batch import TargetBatch

VMAPPED_OUTPUTS = 16  # backward passes batched at once: most of the speed, and no C-fold activations at C = 1000
NUM_DRAWS = 3  # random vectors that A must all take to exactly 0.0 before it is called zero
OUTPUT_HVP_TENSORS = 16  # tensors [K, C] that a product A v makes on the way: softmax, its gradients, and their graphs


class GaussNewtonOperator(BatchOperator):
    """v ↦ Jᵀ(A(J v)): the Hessian without the curvature of the network itself, for any number of outputs.

    The whole Hessian where the network is piecewise linear. Cost: one forward- and one backward-mode
    product, both from one retained graph of Jᵀu.
    """

    def __init__(self, batch: TargetBatch) -> None:
        super().__init__(batch)
        self._x = self.batch.x.detach().clone().requires_grad_()
        self._outputs = self.batch.outputs(self._x)
        self._weights = torch.zeros_like(self._outputs, requires_grad=True)
        (self._pulled_back,) = torch.autograd.grad(
            self._outputs, self._x, self._weights, create_graph=True, materialize_grads=True
        )
        self._z = self._outputs.detach().clone().requires_grad_()
        value = self.batch.target(self._z, self.batch.classes).sum()
        (self._slope,) = torch.autograd.grad(value, self._z, create_graph=True, materialize_grads=True)

    @property
    def num_outputs(self) -> int:
        """C."""
        return self._outputs.shape[1]

    def matvec(self, v: Tensor) -> Tensor:
        """Jᵀ A J v."""
        jv = pull_back(self._pulled_back, self._weights, v)
        ajv = pull_back(self._slope, self._z, jv)
        return pull_back(self._outputs, self._x, ajv).flatten(1)


def jacobian(batch: TargetBatch) -> Tensor:
    """J, the gradients of all C outputs with respect to the input, ``[N, C, D]``; see ``outputs_with_jacobian``."""
    return outputs_with_jacobian(batch)[1]


def outputs_with_jacobian(batch: TargetBatch) -> tuple[Tensor, Tensor]:
    """The outputs z ``[N, C]`` and their Jacobian J ``[N, C, D]``.

    The backward passes are ``vmap``-batched where that gives what a plain backward pass gives along one weighting of
    the outputs, and done one after another elsewhere.

    Cost: one forward pass, at most C + 1 backward passes.
    """
    try:
        pullback = vjp(batch.outputs, batch.x.detach())
        outputs, back = pullback[0], pullback[1]
        weights = _weighting(outputs)
        expected = back(weights)[0].flatten(1)
        rows = vmap(lambda c: back(_one_hot(outputs, c))[0], chunk_size=VMAPPED_OUTPUTS)(_numbers(outputs))
        batched = rows.flatten(2).transpose(0, 1)
        combined = (weights.unsqueeze(1) @ batched).squeeze(1)
        if relative_difference(combined, expected) <= torch.finfo(batch.x.dtype).eps ** 0.5:
            return outputs.detach(), batched
    except Exception as error:  # every kind of module that lacks a rule for vjp or vmap
        if out_of_memory(error):
            raise
    x = batch.x.detach().clone().requires_grad_()
    outputs = batch.outputs(x)
    rows = torch.stack([pull_back(outputs, x, _one_hot(outputs, c)).flatten(1) for c in _numbers(outputs)], dim=1)
    return outputs.detach(), rows


def _weighting(outputs: Tensor) -> Tensor:
    """Weights of the outputs ``[N, C]`` that tell them apart."""
    return torch.linspace(1, 2, outputs.shape[1]).to(outputs).expand_as(outputs)


def _numbers(outputs: Tensor) -> Tensor:
    return torch.arange(outputs.shape[1], device=outputs.device)


def _one_hot(outputs: Tensor, c: Tensor) -> Tensor:
    """One output's cotangent ``[N, C]``; made one at a time: all of them are C² numbers."""
    return (_numbers(outputs) == c).to(outputs.dtype).expand_as(outputs)


def output_hessian(batch: TargetBatch, outputs: Tensor | None = None) -> Tensor:
    """A = ∂²τ/∂z² of every problem, ``[N, K, C, C]``; exactly zero for a target linear in the outputs.

    Args:
        batch: the targets.
        outputs: z ``[N, C]`` at the samples, where they are known; otherwise one forward pass.
    """
    targets = targets_of_outputs(batch, outputs)
    return ReverseOverReverse(targets).columns(torch.eye(targets.num_inputs).to(targets.x))


def gauss_newton_hessians(batch: TargetBatch) -> Tensor:
    """JᵀAJ of every problem, ``[N, K, D, D]``. Cost: C gradients."""
    outputs, j = outputs_with_jacobian(batch)
    a = output_hessian(batch, outputs)
    return j.mT.unsqueeze(1) @ a @ j.unsqueeze(1)


@dataclass(frozen=True)
class FactoredGaussNewton:
    """JᵀAJ of P problems from J ``[P, C, D]`` and A ``[P, C, C]``, with its Frobenius norm ``[P]``."""

    j: Tensor
    a: Tensor
    norm: Tensor

    def apply(self, v: Tensor) -> Tensor:
        """JᵀAJ v for M vectors of each problem, ``[P, M, D]``."""
        return (v @ self.j.mT) @ self.a.mT @ self.j


def factored_gauss_newton(batch: TargetBatch) -> FactoredGaussNewton:
    """J and A of every problem, formed once. Cost: C gradients."""
    outputs, j = outputs_with_jacobian(batch)
    a = output_hessian(batch, outputs)
    r = torch.linalg.qr(j.mT, mode="r").R.unsqueeze(1)
    norm = torch.linalg.matrix_norm(r @ a @ r.mT)
    return FactoredGaussNewton(j.repeat_interleave(batch.num_classes, dim=0), a.flatten(0, 1), norm.flatten())


@dataclass(frozen=True)
class TermNorms:
    """Frobenius norms ``[N, K]`` of the two terms of a Hessian: JᵀAJ, and the functional term Σ ∂τ/∂z ∇²z."""

    gauss_newton: Tensor
    functional: Tensor


def term_norms(batch: TargetBatch, matrices: Tensor) -> TermNorms:
    """The norms of both terms of whole Hessians ``[N, K, D, D]``, exactly, and without A ``[C, C]``.

    Jᵀ(A(J e)) is computed for some columns e at a time, as many as keep the intermediate results below the size of one
    matrix ``[D, D]``.

    Cost: C gradients, and D products with A, which do not run the network.
    """
    outputs = targets_of_outputs(batch)
    if has_zero_hessian(outputs):
        norm = torch.linalg.matrix_norm(matrices)
        return TermNorms(torch.zeros_like(norm), norm)
    j = jacobian(batch)
    num_inputs = batch.num_inputs
    size = min(num_inputs, max(1, num_inputs**2 // (OUTPUT_HVP_TENSORS * outputs.num_inputs)))
    gauss_newton, functional = [], []
    for begin in range(0, num_inputs, size):
        columns = slice(begin, begin + size)
        block = j.mT.unsqueeze(1) @ _output_hvps(outputs, j[..., columns])
        gauss_newton.append(torch.linalg.matrix_norm(block))
        functional.append(torch.linalg.matrix_norm(matrices[..., columns] - block))
    return TermNorms(*(torch.linalg.vector_norm(torch.stack(blocks), dim=0) for blocks in (gauss_newton, functional)))


def targets_of_outputs(batch: TargetBatch, outputs: Tensor | None = None) -> TargetBatch:
    """The same targets as functions of the outputs z ``[N, C]``; those are computed if they are not given."""
    if outputs is None:
        with torch.no_grad():
            outputs = batch.outputs(batch.x)
    return TargetBatch(lambda z: z, batch.target, outputs, batch.classes)


def _output_hvps(outputs: TargetBatch, vectors: Tensor) -> Tensor:
    """A v for M vectors of each sample, ``[N, C, M]`` to ``[N, K, C, M]``, on M copies of the outputs."""
    num_samples, num_classes, num_outputs = outputs.shape
    times = vectors.shape[-1]
    v = vectors.mT.reshape(num_samples * times, 1, num_outputs).expand(-1, num_classes, -1)
    products = ReverseOverReverse(outputs.repeat_interleave(times)).hvp(v)
    return products.reshape(num_samples, times, num_classes, num_outputs).permute(0, 2, 3, 1)


def has_zero_hessian(outputs: TargetBatch) -> bool:
    """Whether the target is linear in the outputs: its second derivatives are then exact zeros."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(NUM_DRAWS, outputs.num_inputs, generator=generator, dtype=torch.float64).to(outputs.x)
    autodiff = ReverseOverReverse(outputs)
    return not any(autodiff.hvp(v.expand(outputs.shape)).any() for v in vectors)
