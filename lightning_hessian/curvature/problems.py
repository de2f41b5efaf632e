"""What is differentiated: the scalars t[n, k] = τ(f(x[n]), classes[n, k])."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problems:
    """P = N·K problems: one scalar for each of N samples and K classes, each a function of its own sample.

    Args:
        network: f, from ``[N, *shape]`` to outputs ``[N, C]``, sample by sample, in the dtype of its argument.
        target: τ, from outputs ``[N, C]`` and classes ``[N, K]`` to one scalar per problem, ``[N, K]``.
        x: the samples, ``[N, *shape]``, floating point.
        classes: the outputs looked at, integer ``[N, K]``.
        mixture: weights ``[K]``; given, the scalars of a sample's classes are summed with them into a single one.
    """

    network: Callable[[Tensor], Tensor]
    target: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    classes: Tensor
    mixture: Tensor | None = None

    @property
    def num_samples(self) -> int:
        """N, the number of samples."""
        return self.x.shape[0]

    @property
    def num_classes(self) -> int:
        """K, the number of classes looked at per sample."""
        return self.classes.shape[1] if self.mixture is None else 1

    @property
    def num_inputs(self) -> int:
        """D, the number of input entries of one sample."""
        return self.x[0].numel()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, K, D), the shape of a gradient or of one vector per problem."""
        return self.num_samples, self.num_classes, self.num_inputs

    def values(self, x: Tensor) -> Tensor:
        """The targets ``[N, K]`` at ``x``, which has the shape of ``self.x``."""
        values = self.target(self.network(x), self.classes)
        return values if self.mixture is None else (values @ self.mixture.to(values)).unsqueeze(1)

    def select(self, samples: slice | Tensor) -> Problems:
        """The problems of some samples."""
        return replace(self, x=self.x[samples], classes=self.classes[samples])

    def flatten(self) -> Problems:
        """The same problems as P = N·K samples with one class each, in the order (sample, class)."""
        x = self.x.repeat_interleave(self.num_classes, dim=0)
        return replace(self, x=x, classes=self.classes.reshape(-1, 1))

    def repeat(self, times: int) -> Problems:
        """The same problems ``times`` times over, the copies one after another: ``[times·N, ...]``."""
        ones = (1,) * (self.x.dim() - 1)
        return replace(self, x=self.x.repeat(times, *ones), classes=self.classes.repeat(times, 1))

    def to(self, dtype: torch.dtype) -> Problems:
        """The same problems with ``x`` in another dtype; the network follows the dtype of its argument."""
        return replace(self, x=self.x.to(dtype))
