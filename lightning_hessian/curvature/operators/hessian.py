"""Symmetric operators known by their matrix-vector products: given matrices, and the Hessians of a batch of targets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lightning_hessian.curvature.operators.autodiff import ReverseOverReverse
from lightning_hessian.curvature.target_batch import TargetBatch


class Operator(Protocol):
    """P symmetric D×D matrices, known by their products with vectors."""

    @property
    def shape(self) -> tuple[int, int]:
        """(P, D), the shape of one vector per matrix."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors."""

    @property
    def device(self) -> torch.device:
        """Of the vectors."""

    def matvec(self, v: Tensor) -> Tensor:
        """Each matrix times its own vector, ``[P, D]`` to ``[P, D]``."""

    def select(self, index: Tensor) -> Operator:
        """The operators at ``index``."""


class MatrixOperator:
    """Given matrices ``[P, D, D]``."""

    def __init__(self, matrices: Tensor) -> None:
        self.matrices = matrices
        self.shape = (matrices.shape[0], matrices.shape[1])
        self.dtype = matrices.dtype
        self.device = matrices.device

    def matvec(self, v: Tensor) -> Tensor:
        """A v."""
        return (self.matrices @ v.unsqueeze(-1)).squeeze(-1)

    def select(self, index: Tensor) -> MatrixOperator:
        """The matrices at ``index``."""
        return MatrixOperator(self.matrices[index])


class BatchOperator(ABC):
    """What operators on a batch of targets have in common: one matrix for each of P samples with one class each."""

    def __init__(self, batch: TargetBatch) -> None:
        self.batch = batch.split_classes()
        self.shape = (self.batch.num_samples, self.batch.num_inputs)
        self.dtype = self.batch.x.dtype
        self.device = self.batch.x.device

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """Each matrix times its own vector."""

    def select(self, index: Tensor) -> Operator:
        """The problems at ``index``, with graphs of their own."""
        return type(self)(self.batch.select(index))


class HessianOperator(BatchOperator):
    """H v for every problem, from one retained graph of the gradient: about one gradient and a half each.

    The graph holds the activations of P samples: a sample is repeated for each of its classes.
    """

    def __init__(self, batch: TargetBatch) -> None:
        super().__init__(batch)
        self._num_classes = batch.num_classes
        self._autodiff = ReverseOverReverse(self.batch)

    @property
    def outputs(self) -> Tensor:
        """The network's outputs ``[N, C]``, one row for all classes of a sample."""
        return self._autodiff.outputs.detach()[:: self._num_classes]

    def matvec(self, v: Tensor) -> Tensor:
        """H v."""
        return self._autodiff.hvp(v.unsqueeze(1)).squeeze(1)


class CountingOperator:
    """Another operator; ``count`` is called after every product."""

    def __init__(self, operator: Operator, count: Callable[[], object]) -> None:
        self.operator = operator
        self.count = count
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device

    def matvec(self, v: Tensor) -> Tensor:
        """A v."""
        product = self.operator.matvec(v)
        self.count()
        return product

    def select(self, index: Tensor) -> CountingOperator:
        """The operators at ``index``, counted together with these."""
        return CountingOperator(self.operator.select(index), self.count)
