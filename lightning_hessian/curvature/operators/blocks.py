"""Products of many vectors with the matrices of a batch, as many at a time as fit memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import in_groups
from lightning_hessian.curvature.operators.hessian import BatchOperator
from lightning_hessian.curvature.target_batch import TargetBatch


class ProblemBlocks:
    """P = N·K matrices, each applied to any number of vectors; the graph of the last block is kept for the next call.

    A block is a batch in which a sample stands once for each of its classes and vectors. Where an algorithm asks for
    one product after another and all fit one block, the network runs forward once. Matrices of different kinds take
    turns: a block may fill the memory.

    Args:
        batch: the targets.
        rows_at_once: gives the vectors of a block at most, by the kind of operator.
    """

    def __init__(self, batch: TargetBatch, rows_at_once: Callable[[type[BatchOperator]], int]) -> None:
        self.whole = batch
        self._rows_at_once = rows_at_once
        self._rows: Tensor | None = None
        self._operator: BatchOperator | None = None

    @cached_property
    def batch(self) -> TargetBatch:
        """The targets, a sample for each class."""
        return self.whole.split_classes()

    def products(self, kind: type[BatchOperator], vectors: Tensor, problems: Tensor) -> Tensor:
        """Products ``[p, M, D]`` of the matrices ``problems [p]`` of a kind with M vectors each, ``[p, M, D]``."""
        if vectors.numel() == 0:
            return vectors.clone()
        rows = problems.repeat_interleave(vectors.shape[1])
        flat = vectors.reshape(len(rows), -1)

        def work(some: slice) -> Tensor:
            return self._on(kind, rows[some]).matvec(flat[some])

        blocks = in_groups(len(rows), self._rows_at_once(kind), work)
        return torch.cat([found for _, found in blocks]).reshape(vectors.shape)

    def free(self) -> None:
        """Frees the graph."""
        self._rows = self._operator = None

    def _on(self, kind: type[BatchOperator], rows: Tensor) -> BatchOperator:
        if not isinstance(self._operator, kind) or self._rows is None or not torch.equal(rows, self._rows):
            self.free()  # before the next is built
            self._operator, self._rows = kind(self.batch.select(rows)), rows
        return self._operator
