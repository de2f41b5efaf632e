"""One symmetric operator per problem, known only by its products with vectors."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from lightning_hessian.curvature.operators.autodiff import ReverseOverReverse
from lightning_hessian.curvature.operators.target_batch import TargetBatch
from lightning_hessian.curvature.progress import Progress


class Operator(Protocol):
    """P symmetric D×D matrices, known by their products."""

    @property
    def like(self) -> Tensor:
        """An empty tensor ``[P, D]`` of the operator's dtype and device."""

    def __call__(self, v: Tensor) -> Tensor:
        """Each matrix times its own vector, ``[P, D]`` to ``[P, D]``."""

    def select(self, index: Tensor) -> Operator:
        """The operators at ``index``."""


class MatrixOperator:
    """Matrices at hand, ``[P, D, D]``."""

    def __init__(self, matrices: Tensor) -> None:
        self.matrices = matrices

    @property
    def like(self) -> Tensor:
        """An empty tensor ``[P, D]``."""
        return self.matrices[..., 0]

    def __call__(self, v: Tensor) -> Tensor:
        """A v."""
        return (self.matrices @ v.unsqueeze(-1)).squeeze(-1)

    def select(self, index: Tensor) -> MatrixOperator:
        """The matrices at ``index``."""
        return MatrixOperator(self.matrices[index])


class HessianOperator:
    """H v for every problem, from one retained graph of the gradient: about one gradient and a half each.

    The problems are laid out as P samples with one class each: the graph holds the activations of P samples.
    """

    def __init__(self, batch: TargetBatch) -> None:
        self.batch = batch.flatten()
        self._engine = ReverseOverReverse(self.batch)

    @property
    def like(self) -> Tensor:
        """An empty tensor ``[P, D]``."""
        return self.batch.x.flatten(1)

    def __call__(self, v: Tensor) -> Tensor:
        """H v."""
        return self._engine.hvp(v.unsqueeze(1)).squeeze(1)

    def select(self, index: Tensor) -> HessianOperator:
        """The problems at ``index``, with a graph of their own."""
        return HessianOperator(self.batch.select(index))


class GaussNewtonOperator:
    """v ↦ Jᵀ(A(J v)): the Hessian without the network's own bending, for any number of outputs.

    The whole Hessian where the network is piecewise linear. Cost: one forward- and one backward-mode
    product, both from one retained graph of Jᵀu.
    """

    def __init__(self, batch: TargetBatch) -> None:
        self.batch = batch.flatten()
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

    @property
    def like(self) -> Tensor:
        """An empty tensor ``[P, D]``."""
        return self.batch.x.flatten(1)

    def __call__(self, v: Tensor) -> Tensor:
        """Jᵀ A J v."""
        pushed = _derivative(self._pulled_back, self._weights, v.reshape(self._x.shape))
        bent = _derivative(self._slope, self._z, pushed)
        return _derivative(self._outputs, self._x, bent).flatten(1)

    def select(self, index: Tensor) -> GaussNewtonOperator:
        """The problems at ``index``, with graphs of their own."""
        return GaussNewtonOperator(self.batch.select(index))


class ToldOperator:
    """Another operator, whose products are counted and told."""

    def __init__(self, operator: Operator, progress: Progress, counter: Iterator[int] | None = None) -> None:
        self.operator = operator
        self._progress = progress
        self._counter = count(1) if counter is None else counter

    @property
    def like(self) -> Tensor:
        """An empty tensor ``[P, D]``."""
        return self.operator.like

    def __call__(self, v: Tensor) -> Tensor:
        """A v."""
        product = self.operator(v)
        self._progress("products", next(self._counter), None)
        return product

    def select(self, index: Tensor) -> ToldOperator:
        """The operators at ``index``, counted on."""
        return ToldOperator(self.operator.select(index), self._progress, self._counter)


def _derivative(of: Tensor, by: Tensor, weights: Tensor) -> Tensor:
    """Gradient of Σ weights·of with respect to ``by``, the graph kept; zero where there is no dependence."""
    if not of.requires_grad:
        return torch.zeros_like(by)
    (result,) = torch.autograd.grad(of, by, weights, retain_graph=True, materialize_grads=True)
    return result
