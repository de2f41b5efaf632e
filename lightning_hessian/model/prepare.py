"""From a model and arguments to problems, inside the isolation in which they may be differentiated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_hessian.curvature.memory import allocated_per_sample, in_groups, on_few
from lightning_hessian.curvature.meter import Meter
from lightning_hessian.curvature.methods.dense import ChunkSize
from lightning_hessian.curvature.methods.plan import METHODS, MethodChoice, Options
from lightning_hessian.curvature.operators.target_batch import TargetBatch
from lightning_hessian.errors import ConfigurationError, MeasurementError
from lightning_hessian.model.function import ForwardFunction, Inputs, ModelFunction, OutputFunction
from lightning_hessian.model.isolation import isolated
from lightning_hessian.model.targets import TargetFunction, TargetName, resolve_target, target_name

Classes = int | Sequence[int] | Tensor | Literal["predicted", "all"]
Target = TargetName | TargetFunction
Model = Callable[..., Any]


@dataclass(frozen=True)
class Task:
    """TargetBatch made of a model and arguments, with what was found on the way, and what that has cost so far."""

    batch: TargetBatch
    target_name: str
    predicted: Tensor
    num_outputs: int
    meter: Meter

    def with_target(self, target: Target) -> Task:
        """The same with another target of the same outputs."""
        function = resolve_target(target, self.num_outputs)
        return replace(self, batch=replace(self.batch, target=function), target_name=target_name(target))


@contextmanager
def prepared(
    model: Model,
    inputs: Inputs,
    classes: Classes,
    target: Target,
    *,
    dtype: torch.dtype | None = None,
    wrt: str | int | None = None,
    forward_fn: ForwardFunction | None = None,
    output_fn: OutputFunction | None = None,
    max_memory: int | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Iterator[Task]:
    """The problems of a model, inside the isolation in which they may be differentiated.

    Raises:
        ConfigurationError: an argument does not fit the model.
    """
    network = ModelFunction(model, forward_fn, output_fn, wrt, tensors)
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    check_lengths(leaves)
    if wrt is None and isinstance(inputs, Tensor):
        check_input(inputs)
    device = network.device or leaves[0].device
    meter = Meter(device)
    dtype = _possible_dtype(_resolve_dtype(dtype, leaves), model, network, inputs, device)
    with isolated(model, device, dtype):
        x, fixed = network.split(_moved(inputs, device, dtype), dtype)
        check_input(x)
        outputs = _outputs(network, x, fixed, max_memory)
        predicted = outputs.argmax(dim=1)
        resolved = _resolve_classes(classes, predicted, outputs.shape[1])
        function = resolve_target(target, outputs.shape[1])
        with torch.no_grad():
            function(outputs, resolved)  # a callable target that gives another shape is told about here
        batch = TargetBatch(network, function, x, resolved, fixed)
        yield Task(batch, target_name(target), predicted, outputs.shape[1], meter)


def _outputs(network: ModelFunction, x: Tensor, fixed: Any, max_memory: int | None) -> Tensor:
    """The outputs ``[N, C]``, from as many samples at a time as fit the memory."""
    batch = TargetBatch(network, lambda z, classes: z, x, torch.zeros(len(x), 1, dtype=torch.long), fixed)

    def work(samples: slice) -> Tensor:
        few = batch.select(samples)
        return few.outputs(few.x)

    with torch.no_grad():
        on_few(batch, 2, lambda few: few.outputs(few.x))  # copies the parameters, which are no sample's
        per_sample = allocated_per_sample(batch, lambda few: few.outputs(few.x))
        size = max(1, Options(max_memory=max_memory).memory(x.device) // per_sample)
        return torch.cat([outputs for _, outputs in in_groups(len(x), size, work)])


def _moved(inputs: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Copies of all tensors on the device, floating-point ones in ``dtype``."""
    return tree_map_only(
        Tensor, lambda t: t.detach().to(device, dtype if t.is_floating_point() else t.dtype, copy=True), inputs
    )


def check_lengths(tensors: list[Tensor]) -> None:
    """Tells whether all inputs have one row per sample.

    Raises:
        ConfigurationError: they do not.
    """
    lengths = {len(t) if t.dim() else 0 for t in tensors}
    if len(lengths) != 1:
        raise ConfigurationError(
            f"Every input must be a tensor with one row per sample; their first dimensions are {sorted(lengths)}. "
            f"Give what does not go with the samples through forward_fn."
        )


def make_options(
    num_eigenvalues: int = 10,
    *,
    method: MethodChoice = "auto",
    chunk_size: ChunkSize = "auto",
    max_memory: int | None = None,
    seed: int = 0,
    block_size: int = 1,
    density_vectors: int = 0,
) -> Options:
    """Checked options of a measurement.

    Raises:
        ConfigurationError: a number is not positive, or the method is unknown.
    """
    if method not in METHODS:
        raise ConfigurationError(f"method={method!r} is not known. Choose one of {', '.join(map(repr, METHODS))}.")
    for name, value in {
        "num_eigenvalues": num_eigenvalues,
        "chunk_size": chunk_size,
        "max_memory": max_memory,
        "block_size": block_size,
    }.items():
        if value not in (None, "auto") and (not isinstance(value, int) or value < 1):
            raise ConfigurationError(f"{name}={value!r} must be a whole number of at least 1.")
    whole = isinstance(density_vectors, int) and not isinstance(density_vectors, bool)
    if not whole or density_vectors < 0 or density_vectors == 1:
        raise ConfigurationError(
            f"density_vectors={density_vectors!r} must be 0 (no density) or a whole number of at least 2: the spread "
            f"over starting vectors is what the standard error is made of."
        )
    return Options(method, num_eigenvalues, chunk_size, max_memory, seed, block_size, density_vectors)


def check_input(x: Tensor) -> None:
    """Tells whether ``x`` is a batch of samples that can be differentiated.

    Raises:
        ConfigurationError: it is not.
    """
    if not isinstance(x, Tensor) or x.dim() < 2 or len(x) == 0:
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ConfigurationError(
            f"The input must be a tensor of samples [N, *shape] with N of at least 1; got {got}. "
            f"For a single sample, give x.unsqueeze(0)."
        )
    if not x.is_floating_point():
        raise ConfigurationError(
            f"The input has dtype {x.dtype}, and a derivative needs floating point. Scale images to float "
            f"first (x.float() / 255); for tokens, name the layer to measure at: wrt='embedding'."
        )


def _resolve_dtype(dtype: torch.dtype | None, tensors: list[Tensor]) -> torch.dtype:
    if dtype is None:
        return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    if dtype not in (torch.float32, torch.float64):
        raise ConfigurationError(f"dtype={dtype} is not possible. Choose torch.float32 or torch.float64.")
    return dtype


def _possible_dtype(
    dtype: torch.dtype, model: Model, network: ModelFunction, inputs: Inputs, device: torch.device
) -> torch.dtype:
    """float64 where the model can be evaluated in it, and float32, with a warning, where it cannot."""
    if dtype == torch.float32:
        return dtype

    def evaluates(samples: slice) -> bool:
        few = tree_map_only(Tensor, lambda t: t[samples], inputs)
        with isolated(model, device, dtype), torch.no_grad():
            return network(*network.split(_moved(few, device, dtype), dtype)).dtype == dtype

    try:
        if next(in_groups(2, 2, evaluates))[1]:
            return dtype
        reason = "its outputs are not float64"
    except (ConfigurationError, MeasurementError):  # MeasurementError: no memory for a single sample
        raise
    except Exception as error:  # x.float() in a forward, a device without float64
        reason = str(error).splitlines()[0]
    warnings.warn(f"The model cannot be evaluated in float64 ({reason}): measured in float32.", stacklevel=4)
    return torch.float32


def _resolve_classes(classes: Classes, predicted: Tensor, num_outputs: int) -> Tensor:
    """Integer ``[N, K]`` on the outputs' device."""
    num_samples = len(predicted)
    if isinstance(classes, str):
        if classes == "predicted":
            return predicted.unsqueeze(1)
        if classes == "all":
            return torch.arange(num_outputs, device=predicted.device).expand(num_samples, -1)
        raise ConfigurationError(
            f"classes={classes!r} is not known. Give an int, ints, a tensor [N] or [N, K], 'predicted' or 'all'."
        )
    wanted = torch.as_tensor(classes, device=predicted.device)
    if wanted.is_floating_point() or wanted.is_complex() or wanted.dtype == torch.bool or wanted.numel() == 0:
        raise ConfigurationError(f"classes={classes!r} must be integers, at least one of them.")
    if isinstance(classes, Tensor) and wanted.dim() > 0:
        wanted = wanted.unsqueeze(1) if wanted.dim() == 1 else wanted
        if wanted.dim() != 2 or len(wanted) != num_samples:
            raise ConfigurationError(
                f"A tensor of classes must be [N] or [N, K] with N = {num_samples}; got {tuple(classes.shape)}. "
                f"For the same classes at every sample, give a list of ints."
            )
    else:
        wanted = wanted.reshape(1, -1).expand(num_samples, -1)
    if wanted.min() < 0 or wanted.max() >= num_outputs:
        raise ConfigurationError(
            f"classes={classes!r} is out of range: the model has {num_outputs} outputs per sample, so classes go "
            f"from 0 to {num_outputs - 1}."
        )
    return wanted.long()
