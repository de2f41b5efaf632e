"""A model as a pure function of one input: parameters cast and detached, buffers cloned on every call."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from lightning_hessian.errors import ConfigurationError
from lightning_hessian.model.isolation import ONE_AT_A_TIME, wrapped_module
from lightning_hessian.model.outputs import OutputFunction, outputs_of
from lightning_hessian.model.state_snapshot import StateSnapshot
from lightning_hessian.model.torch_settings import keeping_graphs

ForwardFunction = Callable[[Any, Any], Any]
Inputs = Tensor | dict[str, Any] | tuple[Any, ...]

# How torch, or what is made of its None, says that a derivative was asked for where gradients are off.
WITHOUT_GRAPH = re.compile(r"grad\b|grad_fn|in the graph|NoneType")


@dataclass
class ModelFunction:
    """x ``[N, *shape]`` -> outputs ``[N, C]``, in the dtype of x, leaving the model as it was.

    A model may return a tensor ``[N, C]`` or ``[N]``, or an object or dict that holds such a tensor as ``logits``.

    Floating-point parameters and buffers are cast to the dtype of x (bfloat16 weights are measured in float32, for
    example), complex ones to the complex dtype of its precision; also those of modules that a callable refers to.
    Parameters are copied once and detached: a forward that writes to them (a max-norm constraint) writes to the copy,
    and nothing is ever accumulated into ``.grad``. Buffers and inputs are copied inside each call, since a forward may
    write to them.

    Without gradients, values are computed without a graph, unless the forward needs one: where it returns the forces
    of an energy, for example. The copies of the parameters require gradients only where the forward asks for theirs.

    Args:
        model: an ``nn.Module`` (a ``LightningModule`` is one) or a callable.
        forward_fn: ``(model, inputs) -> output``, instead of ``model(inputs)``, ``model(*inputs)`` for a tuple
            and ``model(**inputs)`` for a dict.
        output_fn: ``output -> [N, C]``, for models that return something else.
        wrt: what x stands for. None: the only input. A key or position: that one of several inputs. The name of a
            submodule: its output, which x replaces.
        tensors: parameters and buffers by name, instead of the model's own.
    """

    model: Callable[..., Any]
    forward_fn: ForwardFunction | None = None
    output_fn: OutputFunction | None = None
    wrt: str | int | None = None
    tensors: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        self._layer: nn.Module | None = None
        self._call = self.forward_fn or _call
        is_module = isinstance(self.model, nn.Module)
        functions = [function for function in (self.model, self.forward_fn) if function is not None]
        others = _modules_behind(functions[1:] if is_module else functions, self.model)
        self._caller = _Caller(self.model, others, self._call) if is_module or others else None
        self._replacements = {f"module.{name}": tensor for name, tensor in (self.tensors or {}).items()}
        self._cast: dict[torch.dtype, dict[str, Tensor]] = {}
        self._needs_graph = self._parameters_require_grad = False

    @property
    def parts(self) -> list[object]:
        """What may hold modules, and what an evaluation may write to."""
        return [self.model, self.forward_fn, self.output_fn]

    @property
    def device(self) -> torch.device | None:
        """Where the model's parameters are, or None for a callable or a module without any."""
        tensors = [] if self._caller is None else [*self._caller.parameters(), *self._caller.buffers()]
        return tensors[0].device if tensors else None

    def own_dtype(self, inputs: list[Tensor]) -> torch.dtype:
        """That of the model and its inputs by themselves: float32, unless all of them are in float64."""
        tensors = [*inputs, *(() if self._caller is None else self._caller.parameters())]
        dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        return torch.float64 if dtypes == {torch.float64} else torch.float32

    def split(self, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Any]:
        """x, the variable, and the fixed inputs: the others, or all of them where x is a hidden layer's output.

        Raises:
            ConfigurationError: ``wrt`` names neither an input nor a layer, or is needed and missing.
        """
        x = differentiated(inputs, self.wrt)
        if x is not None:
            if isinstance(inputs, Tensor):
                return x, None
            return x, {key: value for key, value in _by_key(inputs).items() if key != self.wrt}
        layers = _layers(self.model) if isinstance(self.model, nn.Module) else {}
        if self.wrt not in layers:
            names = sorted(list(layers)[1:], key=lambda name: str(self.wrt) not in name)  # alike ones first
            known = f"inputs: {_names(inputs)}; layers: {', '.join(names[:11]) or 'none'}"
            raise ConfigurationError(f"wrt={self.wrt!r} is neither an input nor a layer of the model ({known}).")
        layer = self._layer = layers[str(self.wrt)]

        def run() -> list[Any]:
            with _hooked(layer, lambda output: output) as seen:
                self._run(inputs, dtype)
            return seen

        seen = self._without_graph(run)
        if len(seen) != 1 or not isinstance(seen[0], Tensor):
            raise ConfigurationError(
                f"The layer wrt={self.wrt!r} must run once and return a tensor; it ran {len(seen)} times"
                f"{'' if not seen else f' and returned {type(seen[0]).__name__}'}. Name a layer inside or around it."
            )
        return seen[0].detach(), inputs

    def __call__(self, x: Tensor, fixed: Any = None) -> Tensor:
        """The outputs ``[N, C]`` at ``x``, with ``fixed`` from ``split``."""
        if torch.is_grad_enabled():
            return self._outputs(x, fixed)
        x = x.detach()
        return self._without_graph(lambda: self._outputs(x.requires_grad_(torch.is_grad_enabled()), fixed)).detach()

    def _without_graph(self, work: Callable[[], Any]) -> Any:
        """``work`` without a graph, or with one if that is what it takes."""
        if not self._needs_graph:
            try:
                with torch.no_grad():
                    return work()
            except Exception as error:
                if not WITHOUT_GRAPH.search(str(error)):
                    raise
        with torch.enable_grad():
            try:
                result = work()
            except RuntimeError as error:
                if self._parameters_require_grad or not WITHOUT_GRAPH.search(str(error)):
                    raise
                self._parameters_require_grad = True  # an inner loop may differentiate with respect to them
                self._cast.clear()
                result = work()
        self._needs_graph = True
        return result

    def _outputs(self, x: Tensor, fixed: Any) -> Tensor:
        if self._layer is not None:
            with _hooked(self._layer, lambda output: x.clone()):
                output = self._run(fixed, x.dtype)
        else:
            output = self._run(x if fixed is None else _assembled(fixed, self.wrt, x), x.dtype)
        return outputs_of(output, self.output_fn, len(x))

    def _run(self, inputs: Inputs, dtype: torch.dtype) -> Any:
        # Copies, since a forward may write to them.
        inputs = copied(inputs, dtype)
        if self._caller is None:
            with keeping_graphs():
                return self._call(self.model, inputs)
        with _apparent_dtype(self._caller, dtype), keeping_graphs():
            return functional_call(self._caller, self._cast_tensors(dtype), (inputs,), tie_weights=self._caller.is_tied)

    def copy_parameters(self, dtype: torch.dtype) -> None:
        """Makes the copy of the parameters in ``dtype`` that calls in it use."""
        if self._caller is not None:
            self._cast_tensors(dtype)

    def _cast_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        assert self._caller is not None
        if dtype not in self._cast:
            copies = {n: self._copy(n, p, dtype) for n, p in self._caller.named_parameters()}
            for parameter in copies.values() if self._parameters_require_grad else ():
                parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
            self._cast[dtype] = copies
        buffers = {name: self._copy(name, b, dtype) for name, b in self._caller.named_buffers()}
        return {**self._cast[dtype], **buffers}

    def _copy(self, name: str, own: Tensor, dtype: torch.dtype) -> Tensor:
        tensor = self._replacements.get(name, own).detach()
        return tensor.to(own.device, dtype_like(tensor, dtype), copy=True)


class _Caller(nn.Module):
    """Wraps a function that calls modules, so that ``functional_call`` can swap their tensors."""

    def __init__(self, model: Callable[..., Any], others: Sequence[nn.Module], call: ForwardFunction) -> None:
        super().__init__()
        self.module = model  # registered only if it is one
        self.others = nn.ModuleList(others)
        self.call = call
        self.is_tied = any(
            len(list(named())) < len(list(named(remove_duplicate=False)))
            for named in (self.named_parameters, self.named_buffers)
        )

    def forward(self, inputs: Inputs) -> Any:
        return self.call(self.module, inputs)


def _modules_behind(functions: Sequence[object], model: object) -> list[nn.Module]:
    """The modules that functions refer to, without those inside of others or of ``model``."""
    if not functions:
        return []
    with ONE_AT_A_TIME:  # what another thread has changed for a measurement must not be taken for their state
        snapshot = StateSnapshot.take(*functions)
        snapshot.restore()
    inside = {id(part) for part in model.modules()} if isinstance(model, nn.Module) else set()
    for module in snapshot.modules:
        inside.update(id(part) for part in module.modules() if part is not module)
    return [module for module in snapshot.modules if id(module) not in inside]


def copied(inputs: Any, dtype: torch.dtype) -> Any:
    """Copies of all tensors, floating-point ones in ``dtype``."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.to(dtype_like(tensor, dtype), copy=True)

    return copy(inputs) if isinstance(inputs, Tensor) else tree_map_only(Tensor, copy, inputs)


def dtype_like(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """``dtype`` for floating-point tensors, the complex dtype of its precision for complex ones; else their own."""
    if tensor.is_complex():
        return dtype.to_complex()
    return dtype if tensor.is_floating_point() else tensor.dtype


@contextmanager
def _apparent_dtype(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Sets what ``self.dtype`` of a LightningModule returns, which is an attribute, not the dtype of its parameters."""
    saved = [(module, vars(module)["_dtype"]) for module in model.modules() if "_dtype" in vars(module)]
    for module, _ in saved:
        module.__dict__["_dtype"] = dtype
    try:
        yield
    finally:
        for module, before in saved:
            module.__dict__["_dtype"] = before


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The submodules by name; those of what a wrapper was made of by the names that they have there, too."""
    layers = dict(model.named_modules())
    inner = wrapped_module(model)
    return layers if inner is None else {**_layers(inner), **layers}


def _call(model: Any, inputs: Inputs) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@contextmanager
def _hooked(layer: nn.Module, change: Callable[[Any], Any]) -> Iterator[list[Any]]:
    """Replaces a layer's output by ``change`` of it, and lists the outputs seen."""
    seen: list[Any] = []

    def hook(module: nn.Module, arguments: Any, output: Any) -> Any:
        # A copy: what follows may write to the layer's output.
        seen.append(output.clone() if isinstance(output, Tensor) else output)
        return change(output)

    handle = layer.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def differentiated(inputs: Inputs, wrt: str | int | None) -> Tensor | None:
    """The input to differentiate, or None where ``wrt`` does not name one: then it has to name a layer.

    Raises:
        ConfigurationError: there are several inputs, and no ``wrt``.
    """
    if wrt is None and not isinstance(inputs, Tensor):
        raise ConfigurationError(
            f"There are several inputs ({_names(inputs)}): name the one to differentiate with wrt."
        )
    if isinstance(inputs, Tensor):
        return inputs if wrt is None else None
    return _by_key(inputs).get(wrt)


def _by_key(inputs: Inputs) -> dict[Any, Any]:
    return inputs if isinstance(inputs, dict) else dict(enumerate(inputs))


def _names(inputs: Inputs) -> str:
    return "one tensor" if isinstance(inputs, Tensor) else ", ".join(map(repr, _by_key(inputs)))


def _assembled(fixed: dict[Any, Any], wrt: Any, x: Tensor) -> Inputs:
    """All inputs, x among them: a dict by name, a tuple by position."""
    inputs = {**fixed, wrt: x}
    return inputs if isinstance(wrt, str) else tuple(inputs[i] for i in sorted(inputs))
