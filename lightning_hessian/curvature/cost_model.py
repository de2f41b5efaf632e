"""What is found out about a model once, and decides how it is worked on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from lightning_hessian.curvature.memory import allocated_per_sample, on_few
from lightning_hessian.curvature.operators.autodiff import ReverseOverReverse, gradients, modes_agree
from lightning_hessian.curvature.operators.hessian import GaussNewtonOperator
from lightning_hessian.curvature.operators.target_batch import TargetBatch


@dataclass(frozen=True)
class Facts:
    """Facts of a model, each found out when first asked for and kept: they are the same for every sample.

    Bytes are upper bounds, from a count over two samples, or one where the device has no room for two.

    Args:
        batch: what is differentiated.
        seed: of the random directions along which the engines are compared.
    """

    batch: TargetBatch
    seed: int = 0

    @cached_property
    def num_outputs(self) -> int:
        """C, the outputs of the network."""
        with torch.no_grad():
            return on_few(self.batch, 2, lambda few: few.outputs(few.x).shape[1])

    @cached_property
    def agree(self) -> bool:
        """Whether the engines agree on this model."""
        return modes_agree(self.batch, torch.Generator().manual_seed(self.seed))[0]

    @cached_property
    def product_bytes(self) -> int:
        """Memory of one HVP of one sample's K problems, graph included."""
        return allocated_per_sample(self.batch, _product)

    @cached_property
    def flat_product_bytes(self) -> int:
        """Memory of one HVP of one problem, the classes laid out as samples of their own."""
        if self.batch.num_classes == 1:
            return self.product_bytes
        return allocated_per_sample(self._flat, _product)

    @cached_property
    def head_product_bytes(self) -> int:
        """Memory of one product with JᵀAJ of one problem, graphs included."""
        return allocated_per_sample(self._flat, lambda few: GaussNewtonOperator(few)(few.x.flatten(1)))

    @cached_property
    def gradient_bytes(self) -> int:
        """Memory of one gradient of one of one sample's outputs."""
        return allocated_per_sample(replace(self.batch, classes=self.batch.classes[:, :1]), gradients)

    @property
    def row_bytes(self) -> int:
        """Memory of one vector of one problem."""
        return self.batch.num_inputs * self.batch.x.element_size()

    @property
    def matrix_bytes(self) -> int:
        """Memory of the K matrices of one sample."""
        return self.batch.num_classes * self.batch.num_inputs * self.row_bytes

    @property
    def _flat(self) -> TargetBatch:
        return self.batch.select(slice(0, 2)).flatten()


def _product(few: TargetBatch) -> None:
    engine = ReverseOverReverse(few)
    engine.hvp(engine.gradient())
