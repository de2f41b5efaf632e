"""The cases: PyTorch's own lists of operations and layers with their sample inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from benchmarks.zoo.judge import Case

MOST_INPUTS = 8  # entries that vary; whole Hessians by differences take some hundred values
SCALES = (1.0, 0.98, 1.02)  # of the input, for three samples
F64 = torch.float64
# These return memory as it happens to be: there is no function to differentiate.
UNINITIALIZED = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")


def of_operations(per_operation: int) -> Iterator[tuple[str, Callable[[], Iterator[Case]]]]:
    """Every entry of ``op_db`` by name, and its cases: as many sample inputs as asked for."""
    from torch.testing._internal.common_methods_invocations import op_db

    for op in op_db:
        if torch.float64 in op.supported_dtypes("cpu") and op.name not in UNINITIALIZED:
            name = ".".join(filter(None, ("op_db", op.name, op.variant_test_name)))
            yield name, lambda op=op, name=name: _of_operation(op, name, per_operation)


def _of_operation(op: Any, name: str, most: int) -> Iterator[Case]:
    torch.manual_seed(0)
    samples = [s for _, s in zip(range(40), op.sample_inputs("cpu", F64), strict=False)]
    yield from _spread(((name, i, op.op, (s.input, *s.args), s.kwargs) for i, s in enumerate(samples)), most)


def of_layers(per_layer: int) -> Iterator[tuple[str, Callable[[], Iterator[Case]]]]:
    """Every entry of ``module_db`` by name, and its cases, in eval mode."""
    from torch.testing._internal.common_modules import module_db

    for info in module_db:
        if torch.float64 in info.dtypes:
            name = f"module_db.{info.name.removeprefix('nn.')}"
            yield name, lambda info=info, name=name: _of_layer(info, name, per_layer)


def _of_layer(info: Any, name: str, most: int) -> Iterator[Case]:
    torch.manual_seed(0)
    inputs = info.module_inputs_func(info, device="cpu", dtype=F64, requires_grad=False, training=False)

    def made() -> Iterator[tuple[str, int, Any, tuple[Any, ...], dict[str, Any]]]:
        for i, given in enumerate(inputs):
            made_with, forward = given.constructor_input, given.forward_input
            if forward is not None:
                layer = info.module_cls(*made_with.args, **made_with.kwargs).to(F64).eval()
                yield name, i, layer, tuple(forward.args), forward.kwargs

    yield from _spread(made(), most)


def _spread(found: Iterator[tuple[str, int, Any, tuple[Any, ...], dict[str, Any]]], most: int) -> Iterator[Case]:
    """Up to ``most`` cases that can be made, of different options first, then any."""
    seen: set[str] = set()
    later = []
    for name, i, function, args, options in found:
        made = case_of(f"{name}/{i}", function, args, options)
        if made is None:
            continue
        kind = f"{sorted(options)} {[type(a).__name__ for a in args]}"
        if kind in seen:
            later.append(made)
            continue
        seen.add(kind)
        if most > 0:
            yield made
            most -= 1
    yield from later[:most]


class Sampled(nn.Module):
    """``function`` at every row of ``u [N, d]``, as two random weighted sums of its outputs ``[N, 2]``.

    A row replaces d entries of the first floating-point tensor among the arguments; all else is fixed.
    """

    def __init__(self, function: Callable[..., Any], leaves: list[Any], spec: Any, position: int, at: Tensor) -> None:
        super().__init__()
        self.function = function
        self.leaves, self.spec, self.position, self.at = leaves, spec, position, at

    def forward(self, u: Tensor) -> Tensor:
        """``[N, d]`` to ``[N, 2]``."""
        return torch.stack([self.sums(self.one(row)) for row in u])

    def one(self, row: Tensor) -> Any:
        """What the function returns for one row."""
        leaves = [
            t.to(row.dtype) if isinstance(t, Tensor) and t.dtype == F64 else t.clone() if isinstance(t, Tensor) else t
            for t in self.leaves
        ]
        whole = leaves[self.position]
        leaves[self.position] = whole.flatten().index_put((self.at,), row).reshape(whole.shape)
        args, options = tree_unflatten(leaves, self.spec)
        return self.function(*args, **options)

    def sums(self, output: Any) -> Tensor:
        """Two sums of all floating-point outputs, with weights that are the same for every row."""
        parts = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in _numbers(output)]
        flat = torch.cat([t.reshape(-1) for t in parts])
        weights = torch.randn(len(flat), 2, dtype=F64, generator=torch.Generator().manual_seed(len(flat)))
        return flat @ weights.to(flat.dtype)


def _numbers(output: Any) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]


def case_of(key: str, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Case | None:
    """A case, or None where there is no floating-point input or output, or the function does not work by itself."""
    args, options = tree_map_only(Tensor, lambda t: t.detach(), (args, options))
    leaves, spec = tree_flatten((args, options))
    positions = [
        i
        for i, t in enumerate(leaves)
        if isinstance(t, Tensor) and t.dtype == F64 and t.numel() > 0 and t.layout == torch.strided
    ]
    if not positions:
        return None
    x = leaves[positions[0]]
    chosen = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))[:MOST_INPUTS].sort().values
    model = Sampled(function, leaves, spec, positions[0], chosen)
    samples = torch.stack([scale * x.flatten()[chosen] for scale in SCALES])
    try:
        with torch.no_grad():
            if not _numbers(model.one(samples[0])):
                return None
            model(samples)
    except Exception:  # an operation that does not take what it gives itself
        return None
    shapes = [tuple(t.shape) if isinstance(t, Tensor) else t for t in leaves]
    return Case(key, model.eval(), samples, f"{shapes} {sorted(options)}"[:300])
