"""Gradients, HVPs and Hessian columns of a batch of targets, in two autodiff modes that check each other.

Nothing is summed over the batch: with independent samples, the gradient of Σ_n t[n, k] with respect to x
holds each sample's own gradient in that sample's row. Both modes take a ``TargetBatch`` and give

- ``gradient()``: ∇t, ``[N, K, D]``;
- ``hvp(v)``: H v with an own vector per problem, ``v`` and result ``[N, K, D]``;
- ``columns(basis)``: H e for M vectors shared by all problems, ``basis [M, D]``, result ``[N, K, D, M]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.func import jvp, vjp, vmap

from lightning_hessian.curvature.target_batch import TargetBatch

AutodiffMode = Literal["forward_over_reverse", "reverse_over_reverse"]


class ReverseOverReverse:
    """Differentiates the gradient's own graph, built at the first use and retained: one backward pass per vector.

    Covers almost every module. A target that does not depend on x has zero derivatives; no error is raised.
    Memory: the activations of one forward and K backward passes, times M while columns are computed.
    """

    mode: AutodiffMode = "reverse_over_reverse"

    def __init__(self, batch: TargetBatch) -> None:
        self.batch = batch
        self._x = batch.x.detach().clone().requires_grad_()
        self._copies: ReverseOverReverse | None = None

    @cached_property
    def outputs(self) -> Tensor:
        """The network's outputs ``[N, C]``, with their graph."""
        return self.batch.outputs(self._x)

    @cached_property
    def values(self) -> Tensor:
        """The targets ``[N, K]``, with their graph."""
        return self.batch.targets(self.outputs)

    @cached_property
    def _gradients(self) -> list[Tensor]:
        return _gradients(self.values, self._x, create_graph=True)

    def gradient(self, *, create_graph: bool = True) -> Tensor:
        """The gradients ``[N, K, D]``; with their graph where HVPs of the same targets follow."""
        rows = self._gradients if create_graph else _gradients(self.values, self._x, create_graph=False)
        return torch.stack([g.detach().flatten(1) for g in rows], dim=1)

    def hvp(self, v: Tensor) -> Tensor:
        """Each problem's Hessian times its own vector, ``[N, K, D]`` to ``[N, K, D]``."""
        rows = [pull_back(g, self._x, v[:, k]) for k, g in enumerate(self._gradients)]
        return torch.stack(rows, dim=1).flatten(2)

    def hvp_of_outputs(self, weights: Tensor, v: Tensor) -> Tensor:
        """The HVP along ``v [N, D]`` of one sum of each sample's outputs with ``weights [C]``, ``[N, D]``."""
        (gradient,) = _gradients((self.outputs @ weights).unsqueeze(1), self._x, create_graph=True)
        return pull_back(gradient, self._x, v).flatten(1)

    def prepare(self, num_columns: int) -> None:
        """Builds the graph of that many copies of the batch."""
        if self._copies is None or len(self._copies.batch.x) != num_columns * self.batch.num_samples:
            self._copies = None  # frees the graph of the last block size before the next is built
            self._copies = ReverseOverReverse(self.batch.repeat_interleave(num_columns))

    def columns(self, basis: Tensor) -> Tensor:
        """Every Hessian times the M rows of ``basis [M, D]``: ``[N, K, D, M]``, on M copies of the batch."""
        times = len(basis)
        num_samples, num_classes, num_inputs = self.batch.shape
        self.prepare(times)
        assert self._copies is not None
        vectors = basis[None, :, None, :].expand(num_samples, times, num_classes, num_inputs)
        products = self._copies.hvp(vectors.reshape(num_samples * times, num_classes, num_inputs))
        return products.reshape(num_samples, times, num_classes, num_inputs).permute(0, 2, 3, 1)

    def first_derivatives(self) -> tuple[Tensor, Tensor]:
        """Values ``[N, K]`` and gradients ``[N, K, D]`` with which the last columns were computed."""
        assert self._copies is not None
        times = len(self._copies.batch.x) // self.batch.num_samples
        gradient = torch.stack([g.detach().flatten(1)[::times] for g in self._copies._gradients], dim=1)
        return self._copies.values.detach()[::times], gradient


def has_custom_function(of: Tensor) -> bool:
    """Whether a custom ``autograd.Function`` is in a tensor's graph; its derivative may not be differentiable."""
    return any(isinstance(node, BackwardCFunction) for node in nodes_of(of))


def nodes_of(tensor: Tensor) -> Iterator[Any]:
    """The nodes of a tensor's graph, each once."""
    seen: set[Any] = set()
    waiting: list[Any] = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            yield node


def pull_back(of: Tensor, by: Tensor, weights: Tensor) -> Tensor:
    """Gradient of Σ weights·of with respect to ``by``, the graph retained; zero where there is no dependence."""
    if not of.requires_grad:
        return torch.zeros_like(by)
    pulled = torch.autograd.grad(of, by, weights.reshape(of.shape), retain_graph=True, materialize_grads=True)[0]
    return pulled.detach()  # zeros that torch 2.6 makes require gradients


def _gradients(values: Tensor, x: Tensor, create_graph: bool) -> list[Tensor]:
    """One gradient ``[N, *shape]`` per class of ``values [N, K]``, with its graph if asked for."""
    num_classes = values.shape[1]
    if not values.requires_grad:
        return [torch.zeros_like(x) for _ in range(num_classes)]
    grad = partial(torch.autograd.grad, retain_graph=True, create_graph=create_graph, materialize_grads=True)
    return [grad(values[:, k].sum(), x)[0] for k in range(num_classes)]


class ForwardOverReverse:
    """Forward-mode derivative of the gradient, ``vmap``-batched over vectors and shared by the K classes.

    The primal pass and the forward tangent are computed once for all classes, so a column costs 1 + K
    passes instead of 2K. Not every operation supports it: use it only where the modes agree (``checks/``).
    """

    mode: AutodiffMode = "forward_over_reverse"

    def __init__(self, batch: TargetBatch) -> None:
        self.batch = batch
        self._x = batch.x.detach().clone()
        one_hot = torch.eye(batch.num_classes, dtype=self._x.dtype, device=self._x.device)
        self._cotangents = one_hot[:, None, :].expand(-1, batch.num_samples, -1)  # [K, N, K]
        self._first: tuple[Tensor, Tensor] | None = None

    def prepare(self, num_columns: int) -> None:
        """Nothing is reused."""

    def columns(self, basis: Tensor) -> Tensor:
        """Every Hessian times the M rows of ``basis [M, D]``: ``[N, K, D, M]``."""

        def column(vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            vectors = vector.reshape(self._x[0].shape).expand_as(self._x)
            with_values: Any = jvp(self._gradients, (self._x,), (vectors,), has_aux=True)  # annotated as a pair
            gradient, product, values = with_values
            return values, gradient, product

        values, gradient, product = vmap(column)(basis)  # those that are the same for all vectors are expanded
        self._first = values[0].detach(), gradient[0].flatten(2).transpose(0, 1).detach()
        return product.flatten(3).permute(2, 1, 3, 0).detach()

    def first_derivatives(self) -> tuple[Tensor, Tensor]:
        """Values ``[N, K]`` and gradients ``[N, K, D]`` with which the last columns were computed."""
        assert self._first is not None
        return self._first

    def _gradients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """All classes' gradients ``[K, N, *shape]`` from one forward pass, and the values ``[N, K]``."""
        values, back = vjp(self.batch.values, x)[:2]
        if self.batch.num_classes == 1:
            return back(self._cotangents[0])[0].unsqueeze(0), values
        return vmap(lambda cotangent: back(cotangent)[0])(self._cotangents), values


def gradients(batch: TargetBatch) -> Tensor:
    """∇t of every problem, ``[N, K, D]``. Cost: one forward and K backward passes; memory: their activations."""
    x = batch.x.detach().clone().requires_grad_()
    return torch.stack([g.detach().flatten(1) for g in _gradients(batch.values(x), x, create_graph=False)], dim=1)


AUTODIFF_MODES: dict[AutodiffMode, type[ForwardOverReverse] | type[ReverseOverReverse]] = {
    "forward_over_reverse": ForwardOverReverse,
    "reverse_over_reverse": ReverseOverReverse,
}


def random_vectors(batch: TargetBatch, generator: torch.Generator) -> Tensor:
    """One random unit vector per problem, ``[N, K, D]``, drawn on the CPU from ``generator``."""
    v = torch.randn(batch.shape, generator=generator, dtype=torch.float64)
    return (v / v.norm(dim=-1, keepdim=True)).to(batch.x)


def relative_difference(a: Tensor, b: Tensor) -> Tensor:
    """Max over problems of ‖a − b‖ / max(‖a‖, ‖b‖), for ``[N, K, D]``; 0 where both are exactly zero."""
    size = torch.maximum(a.norm(dim=-1), b.norm(dim=-1))
    difference = (a - b).norm(dim=-1)
    return torch.where(size > 0, difference / size, difference).max()
