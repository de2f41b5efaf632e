"""From a model and arguments to a batch of targets, inside the isolation in which it may be differentiated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_hessian.curvature.batching import attempted, in_groups, on_few, out_of_memory
from lightning_hessian.curvature.cost_model import ForwardPass, fitting_samples
from lightning_hessian.curvature.memory import AllocatedBytes, available_memory, kept_pages
from lightning_hessian.curvature.meter import Meter
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.errors import ConfigurationError, MeasurementError, warn
from lightning_hessian.model.arguments import (
    Classes,
    Target,
    check_input,
    check_lengths,
    resolve_classes,
    resolve_dtype,
)
from lightning_hessian.model.differentiation_errors import explained_derivatives
from lightning_hessian.model.function import Inputs, ModelFunction, dtype_like
from lightning_hessian.model.isolation import isolated
from lightning_hessian.model.targets import TargetFunction, resolve_target, target_name

# Names of operations that surely curve what they are applied to.
CURVED = {"tanh", "sigmoid", "gelu", "silu", "mish", "softplus", "_softmax", "exp", "native_layer_norm"}

VISIBLE = 1e-2  # relative, of outputs in another precision: more than rounding leaves in a well-behaved network


@dataclass(frozen=True)
class PreparedModel:
    """What can be measured of a model.

    Attributes:
        batch: the targets to differentiate.
        target_name: name of the target.
        predicted: ``[N]``, the class with the largest output.
        forward: what a forward pass has shown.
        meter: what preparing has cost so far.
        memory: bytes that may be used.
    """

    batch: TargetBatch
    target_name: str
    predicted: Tensor
    forward: ForwardPass
    meter: Meter
    memory: int

    @property
    def num_outputs(self) -> int:
        """C."""
        return self.forward.num_outputs

    def with_target(self, target: Target) -> PreparedModel:
        """The same with another target of the same outputs."""
        function = resolve_target(target, self.num_outputs)
        return replace(self, batch=replace(self.batch, target=function), target_name=target_name(target))


@contextmanager
def prepare(
    network: ModelFunction,
    inputs: Inputs,
    classes: Classes | Literal["label"],
    target: Target,
    *,
    labels: Tensor | None = None,
    dtype: torch.dtype | None = None,
    max_memory: int | None = None,
) -> Iterator[PreparedModel]:
    """Opens the isolation, in which the targets of a model may be differentiated.

    Args:
        network: the model, and how it is called.
        inputs: its inputs.
        classes: which outputs.
        target: the scalar made of them.
        labels: integers ``[N]``, for ``classes="label"``.
        dtype: float32 or float64, as ``usable_dtype`` gives it; None: that of the inputs.
        max_memory: bytes that may be used; None: half of what is free on the device.

    Raises:
        ConfigurationError: an argument does not fit the model.
    """
    leaves = _checked_leaves(inputs, network.wrt)
    device = network.device or leaves[0].device
    meter = Meter(device)
    dtype = resolve_dtype(dtype, leaves)
    with kept_pages(device), isolated([*network.parts, target], device, dtype):
        x, fixed = network.split(_moved(inputs, device, dtype), dtype)
        check_input(x)
        memory = max_memory or available_memory(device)
        outputs, forward = _outputs(network, x, fixed, memory)
        predicted = outputs.argmax(dim=1)
        resolved = resolve_classes(classes, predicted, outputs.shape[1], labels)
        function = resolve_target(target, outputs.shape[1])
        _check_target(function, target_name(target), outputs, resolved)
        batch = TargetBatch(network, function, x, resolved, fixed)
        with explained_derivatives():
            yield PreparedModel(batch, target_name(target), predicted, forward, meter, memory)


class ModelAccess:
    """A prepared model, and the isolation in which it may be differentiated, opened for one piece of work.

    Attributes:
        is_isolated: whether that is open already.
        is_closed: whether nothing may be computed any more.
    """

    def __init__(self, network: ModelFunction, prepared: PreparedModel) -> None:
        self.prepared = prepared
        self.is_isolated, self.is_closed = True, False
        self._network = network

    @contextmanager
    def isolated(self) -> Iterator[PreparedModel]:
        """Opens it, unless it is open."""
        if self.is_closed:
            raise ConfigurationError("The operator is closed: use it inside of its with block.")
        if self.is_isolated:
            yield self.prepared
            return
        x = self.prepared.batch.x
        parts = [*self._network.parts, self.prepared.batch.target]
        with isolated(parts, x.device, x.dtype), explained_derivatives():
            yield replace(self.prepared, meter=Meter(x.device))


def usable_dtype(network: ModelFunction, inputs: Inputs, dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype asked for (None: that of the inputs), but float32 where the model cannot be evaluated in float64.

    Warns:
        UserWarning: float64 was asked for, and float32 is returned; or the model computes something else in float64.

    Raises:
        ConfigurationError: an argument does not fit the model.

    Cost: for float64 one forward pass of two samples (or three of three), and one as the model is used; else none.
    """
    leaves = _checked_leaves(inputs, network.wrt)
    dtype = resolve_dtype(dtype, leaves)
    if dtype == torch.float32:
        return dtype
    network = replace(network)  # with copies of the parameters of its own: those of a measurement count as its cost
    device = network.device or leaves[0].device

    def outputs(samples: slice, dtype: torch.dtype, default: torch.dtype) -> Tensor:
        few = tree_map_only(Tensor, lambda t: t[samples], inputs)
        with isolated(network.parts, device, default), torch.no_grad():
            return network(*network.split(_moved(few, device, dtype), dtype))

    try:
        count = _first_group(len(leaves[0]))
        samples, found = next(in_groups(count, count, lambda few: outputs(few, dtype, dtype)))
    except (ConfigurationError, MeasurementError):  # MeasurementError: a single sample does not fit the memory
        raise
    except Exception as error:  # x.float() in a forward, a device without float64
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    else:
        if found.dtype == dtype:
            own = network.own_dtype(leaves), torch.get_default_dtype()
            if own != (dtype, dtype):
                _compare_outputs(found, attempted(lambda: outputs(samples, *own)))
            return dtype
        reason = "its outputs are not float64"
    warn(f"The model cannot be evaluated in float64 ({reason}): measured in float32.")
    return torch.float32


def _compare_outputs(found: Tensor, own: Tensor | None) -> None:
    """Warns where outputs in float64 are not those that the model has by itself, as far as these are known."""
    if own is None:
        return
    finite = found.isfinite() & own.isfinite()
    found, own = found[finite], own[finite]
    if len(own) and (found - own).abs().max() > VISIBLE * torch.maximum(found.abs(), own.abs()).max():
        # Without a number, which would make it another sentence at every measurement.
        warn(
            "In float64, the model's outputs are not those that it has by itself: the forward makes other numbers "
            "where torch's default dtype is float64, as torch.randn does from the same seed, or rounding in float32 is "
            "more than a hundredth of them. The function in float64 is measured."
        )


def _checked_leaves(inputs: Inputs, wrt: str | int | None) -> list[Tensor]:
    """All tensors among the inputs."""
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    check_lengths(leaves)
    if wrt is None and isinstance(inputs, Tensor):
        check_input(inputs)
    return leaves


def _outputs(network: ModelFunction, x: Tensor, fixed: Any, memory_budget: int) -> tuple[Tensor, ForwardPass]:
    """The outputs ``[N, C]``, and what one pass makes; of as many samples at a time as fit ``memory_budget``."""
    batch = TargetBatch(network, lambda z, classes: z, x, torch.zeros(len(x), 1, dtype=torch.long), fixed)

    def outputs(few: TargetBatch) -> Tensor:
        return few.outputs(few.x)

    def counted(few: TargetBatch) -> tuple[Tensor, AllocatedBytes]:
        with AllocatedBytes() as allocated:
            found = outputs(few)
        return found, allocated

    network.copy_parameters(x.dtype)  # before memory is counted: they belong to no sample
    with torch.no_grad():
        first, allocated = on_few(batch, _first_group(len(x)), counted)
        is_curved = any(str(operation).split(".")[1] in CURVED for operation in allocated.operations)
        forward = ForwardPass(first, max(1, allocated.total // len(first)), allocated.count, is_curved)
        rest = batch.select(slice(len(first), None))
        size = fitting_samples(memory_budget, forward.bytes_per_sample, x.device)
        groups = in_groups(rest.num_samples, size, lambda samples: outputs(rest.select(samples)))
        found = torch.cat([first, *(rows for _, rows in groups)])
    return found, replace(forward, outputs=found)


def _check_target(target: TargetFunction, name: str, outputs: Tensor, classes: Tensor) -> None:
    """Raises a ConfigurationError unless a target can be computed from ``outputs [N, C]`` and ``classes [N, K]``."""
    try:
        with torch.no_grad():
            target(outputs, classes)
    except Exception as error:
        if isinstance(error, ConfigurationError) or out_of_memory(error):
            raise
        message = str(error).partition("\n")[0].rstrip(".")
        raise ConfigurationError(
            f"The target {name!r} raised {type(error).__name__}: {message}. It is called with outputs [N, C], here "
            f"{list(outputs.shape)}, and integer classes [N, K], here {list(classes.shape)}, and must return one "
            f"scalar per sample and class, [N, K]. For one class per sample, a loss of PyTorch is lambda z, classes: "
            f"cross_entropy(z, classes[:, 0], reduction='none')[:, None]."
        ) from error


def _first_group(num_samples: int) -> int:
    """How many samples are evaluated first: no group of one if avoidable."""
    return 3 if num_samples == 3 else 2


def _moved(inputs: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Copies of all tensors on the device, floating-point ones in ``dtype``."""
    return tree_map_only(Tensor, lambda t: t.detach().to(device, dtype_like(t, dtype), copy=True), inputs)
