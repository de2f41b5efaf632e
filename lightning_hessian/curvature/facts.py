"""What is found out about a model once, and decides how it is worked on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from lightning_hessian.curvature.derivatives import ReverseOverReverse, engines_agree, gradients
from lightning_hessian.curvature.memory import allocated_per_sample, on_few
from lightning_hessian.curvature.operator import HeadOperator
from lightning_hessian.curvature.problems import Problems


@dataclass(frozen=True)
class Facts:
    """Facts of a model, each found out when first asked for and kept: they are the same for every sample.

    Bytes are upper bounds, from a count over two samples, or one where the device has no room for two.

    Args:
        problems: what is differentiated.
        seed: of the random directions along which the engines are compared.
    """

    problems: Problems
    seed: int = 0

    @cached_property
    def num_outputs(self) -> int:
        """C, the outputs of the network."""
        with torch.no_grad():
            return on_few(self.problems, 2, lambda few: few.outputs(few.x).shape[1])

    @cached_property
    def agree(self) -> bool:
        """Whether the engines agree on this model."""
        return engines_agree(self.problems, torch.Generator().manual_seed(self.seed))[0]

    @cached_property
    def product_bytes(self) -> int:
        """Memory of one HVP of one sample's K problems, graph included."""
        return allocated_per_sample(self.problems, _product)

    @cached_property
    def flat_product_bytes(self) -> int:
        """Memory of one HVP of one problem, the classes laid out as samples of their own."""
        if self.problems.num_classes == 1:
            return self.product_bytes
        return allocated_per_sample(self._flat, _product)

    @cached_property
    def head_product_bytes(self) -> int:
        """Memory of one product with JᵀAJ of one problem, graphs included."""
        return allocated_per_sample(self._flat, lambda few: HeadOperator(few)(few.x.flatten(1)))

    @cached_property
    def gradient_bytes(self) -> int:
        """Memory of one gradient of one of one sample's outputs."""
        return allocated_per_sample(replace(self.problems, classes=self.problems.classes[:, :1]), gradients)

    @property
    def row_bytes(self) -> int:
        """Memory of one vector of one problem."""
        return self.problems.num_inputs * self.problems.x.element_size()

    @property
    def matrix_bytes(self) -> int:
        """Memory of the K matrices of one sample."""
        return self.problems.num_classes * self.problems.num_inputs * self.row_bytes

    @property
    def _flat(self) -> Problems:
        return self.problems.select(slice(0, 2)).flatten()


def _product(few: Problems) -> None:
    engine = ReverseOverReverse(few)
    engine.hvp(engine.gradient())
