"""What is differentiated: the scalars t[n, k] = τ(f(x[n]), classes[n, k])."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class TargetBatch:
    """P = N·K problems: one scalar for each of N samples and K classes, each a function of its own sample.

    Args:
        network: f, from ``[N, *shape]`` to outputs ``[N, C]``, sample by sample, in the dtype of its argument.
        target: τ, from outputs ``[N, C]`` and classes ``[N, K]`` to one scalar per problem, ``[N, K]``.
        x: the samples, ``[N, *shape]``, floating point.
        classes: the outputs looked at, integer ``[N, K]``.
        fixed: further arguments of the network, in any nesting; tensors ``[N, ...]`` that are not differentiated.
        class_weights: ``[K]``; if given, the scalars of a sample's classes are summed with them into a single one.
    """

    network: Callable[..., Tensor]
    target: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    classes: Tensor
    fixed: Any = None
    class_weights: Tensor | None = None

    @property
    def num_samples(self) -> int:
        """N, the number of samples."""
        return self.x.shape[0]

    @property
    def num_classes(self) -> int:
        """K, the number of classes looked at per sample."""
        return self.classes.shape[1] if self.class_weights is None else 1

    @property
    def num_inputs(self) -> int:
        """D, the number of input entries of one sample."""
        return self.x[0].numel()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, K, D), the shape of a gradient or of one vector per problem."""
        return self.num_samples, self.num_classes, self.num_inputs

    def outputs(self, x: Tensor) -> Tensor:
        """The network's outputs ``[N, C]`` at an ``x`` of the same shape as ``self.x``."""
        return self.network(x) if self.fixed is None else self.network(x, self.fixed)

    def values(self, x: Tensor) -> Tensor:
        """The targets ``[N, K]`` at an ``x`` of the same shape as ``self.x``."""
        return self.targets(self.outputs(x))

    def targets(self, outputs: Tensor) -> Tensor:
        """The targets ``[N, K]`` made of the network's outputs ``[N, C]``."""
        values = self.target(outputs, self.classes)
        return values if self.class_weights is None else (values @ self.class_weights.to(values)).unsqueeze(1)

    def select(self, samples: slice | Tensor) -> TargetBatch:
        """The problems of some samples."""
        return self._with(lambda t: t[samples])

    def split_classes(self) -> TargetBatch:
        """The same problems as P = N·K samples with one class each, in the order (sample, class)."""
        return replace(self.repeat_interleave(self.num_classes), classes=self.classes.reshape(-1, 1))

    def repeat_interleave(self, times: int) -> TargetBatch:
        """Every sample ``times`` times, ``[times·N, ...]``: its copies one after another, since order may matter.

        A batch of sequences may have to be sorted by length.
        """
        return self._with(lambda t: t.repeat_interleave(times, dim=0))

    def to(self, dtype: torch.dtype) -> TargetBatch:
        """The same problems with ``x`` in another dtype; the network follows the dtype of its argument."""
        fixed = self._map_fixed(lambda t: t.to(dtype) if t.is_floating_point() else t)
        return replace(self, x=self.x.to(dtype), fixed=fixed)

    def _with(self, change: Callable[[Tensor], Tensor]) -> TargetBatch:
        """The same change to everything that has one row per sample."""
        return replace(self, x=change(self.x), classes=change(self.classes), fixed=self._map_fixed(change))

    def _map_fixed(self, change: Callable[[Tensor], Tensor]) -> Any:
        return None if self.fixed is None else tree_map_only(Tensor, change, self.fixed)
