"""Input gradients, HVPs, Hessians and spectra of any model, without a Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_hessian.curvature.dense import ChunkSize, symmetric_part
from lightning_hessian.curvature.derivatives import ReverseOverReverse, gradients
from lightning_hessian.curvature.diagnosis import Diagnosis
from lightning_hessian.curvature.measure import Options, diagnose_finite, measure, whole_hessians
from lightning_hessian.curvature.memory import readable
from lightning_hessian.curvature.problems import Problems
from lightning_hessian.curvature.spectrum import MethodName, Spectrum
from lightning_hessian.errors import ConfigurationError
from lightning_hessian.isolation import isolated
from lightning_hessian.model_function import ForwardFunction, ModelFunction, OutputFunction
from lightning_hessian.targets import TargetFunction, TargetName, resolve_target, target_name

Classes = int | Sequence[int] | Tensor | Literal["predicted", "all"]
Target = TargetName | TargetFunction
Model = Callable[[Tensor], Any]


def input_gradient(
    model: Model,
    x: Tensor,
    classes: Classes,
    target: Target = "logit",
    *,
    dtype: torch.dtype | None = None,
    forward_fn: ForwardFunction | None = None,
    output_fn: OutputFunction | None = None,
) -> Tensor:
    """Gradient of each sample's target with respect to that sample: ∇ₓ t(x[n], k).

    Differentiated is the scalar ``target`` of the model's output for one class, with respect to the input;
    nothing is summed or averaged over the batch.

    Args:
        model: an ``nn.Module``, a ``LightningModule`` or a callable, from ``[N, *shape]`` to ``[N, C]`` or ``[N]``.
        x: floating-point samples ``[N, *shape]``; D is the number of entries of one.
        classes: which outputs: an int, K ints, a tensor ``[N]`` or ``[N, K]``, ``"predicted"`` or ``"all"``.
        target: ``"logit"``, ``"log_prob"``, ``"prob"``, ``"loss"``, ``"margin"``, or a callable
            ``(outputs [N, C], classes [N, K]) -> [N, K]``.
        dtype: float32 or float64; by default that of x. Parameters are cast to it, not the model's own.
        forward_fn: ``(model, x) -> output``, in place of ``model(x)``.
        output_fn: ``output -> [N, C]``, where the model returns something else.

    Returns:
        ``[N, K, D]``, in target units per input unit.

    Raises:
        ConfigurationError: an argument does not fit the model; the message says what does.

    Cost: one forward and K backward passes. Memory: their activations.

    Example:
        >>> import torch
        >>> from lightning_hessian import input_gradient
        >>> def model(x): return x * x * torch.tensor([0.0, 1.0, 2.0, 3.0])
        >>> input_gradient(model, torch.full((1, 4), 2.0), classes=2)
        tensor([[[0., 0., 8., 0.]]])
    """
    with prepared(model, x, classes, target, dtype=dtype, forward_fn=forward_fn, output_fn=output_fn) as task:
        return gradients(task.problems)


def input_hvp(
    model: Model,
    x: Tensor,
    v: Tensor,
    classes: Classes,
    target: Target = "logit",
    *,
    dtype: torch.dtype | None = None,
    forward_fn: ForwardFunction | None = None,
    output_fn: OutputFunction | None = None,
) -> Tensor:
    """Hessian of each sample's target times a vector: ∇²ₓ t(x[n], k) · v.

    Args:
        model: as for ``input_gradient``.
        x: samples ``[N, *shape]``.
        v: one vector for all problems ``[D]``, one per sample (``[N, D]`` or the shape of x), or one per problem
            ``[N, K, D]``.
        classes: as for ``input_gradient``.
        target: as for ``input_gradient``.
        dtype: float32 or float64; by default that of x.
        forward_fn: as for ``input_gradient``.
        output_fn: as for ``input_gradient``.

    Returns:
        ``[N, K, D]``.

    Raises:
        ConfigurationError: an argument does not fit the model, or v does not fit x.

    Cost: two forward-and-backward passes per class (Pearlmutter 1994, by double backward).

    Example:
        >>> import torch
        >>> from lightning_hessian import input_hvp
        >>> def model(x): return x * x * torch.tensor([0.0, 1.0, 2.0, 3.0])
        >>> input_hvp(model, torch.full((1, 4), 2.0), torch.ones(4), classes=2)
        tensor([[[0., 0., 4., 0.]]])
    """
    with prepared(model, x, classes, target, dtype=dtype, forward_fn=forward_fn, output_fn=output_fn) as task:
        return ReverseOverReverse(task.problems).hvp(_per_problem(v, task.problems))


def input_hessian(
    model: Model,
    x: Tensor,
    classes: Classes,
    target: Target = "logit",
    *,
    dtype: torch.dtype | None = None,
    chunk_size: ChunkSize = "auto",
    max_memory: int | None = None,
    seed: int = 0,
    forward_fn: ForwardFunction | None = None,
    output_fn: OutputFunction | None = None,
) -> Tensor:
    """Whole Hessian of each sample's target with respect to that sample: H[n, k] = ∇²ₓ t(x[n], k).

    Computed in blocks of columns by ``vmap``-batched forward-over-reverse differentiation, shared by all
    classes, where that engine agrees with double backward on this model, and by double backward elsewhere.
    A target that does not depend on x, or only linearly, gives exact zeros.

    Args:
        model: as for ``input_gradient``.
        x: samples ``[N, *shape]``.
        classes: as for ``input_gradient``.
        target: as for ``input_gradient``.
        dtype: float32 or float64; by default that of x.
        chunk_size: columns computed at once; by default the fastest number, found while working.
        max_memory: bytes that may be used; by default half of what is free on the device.
        seed: of the random directions along which the engines are compared.
        forward_fn: as for ``input_gradient``.
        output_fn: as for ``input_gradient``.

    Returns:
        ``[N, K, D, D]``, symmetric, flattened from the input's shape in row-major order.

    Warns:
        UserWarning: the numbers cannot be trusted; the message says why (see ``Diagnosis``).

    Raises:
        ConfigurationError: an argument does not fit the model, or the result does not fit ``max_memory``.
        MeasurementError: the values, gradients or Hessians are not finite.

    Cost: D columns, each a little more than (1 + K)/2 gradients of the batch; memory N·K·D² numbers.

    Example:
        >>> import torch
        >>> from lightning_hessian import input_hessian
        >>> def model(x): return x * x * torch.tensor([0.0, 1.0, 2.0])
        >>> input_hessian(model, torch.full((1, 3), 2.0), classes=2)
        tensor([[[[0., 0., 0.],
                  [0., 0., 0.],
                  [0., 0., 4.]]]])
    """
    options = make_options(chunk_size=chunk_size, max_memory=max_memory, seed=seed)
    with prepared(model, x, classes, target, dtype=dtype, forward_fn=forward_fn, output_fn=output_fn) as task:
        problems = task.problems
        shape = (*problems.shape, problems.num_inputs)
        result_bytes = torch.Size(shape).numel() * problems.x.element_size()
        memory = options.memory(problems.x.device)
        if result_bytes > memory:
            fewer = (
                "Ask for fewer samples or classes" if len(problems.x) * problems.num_classes > 1 else "Use input_hvp"
            )
            raise ConfigurationError(
                f"The Hessians {list(shape)} take {readable(result_bytes)}, more than the {readable(memory)} that "
                f"may be used. {fewer}, or raise max_memory (in bytes)."
            )
        diagnosis = diagnose_finite(problems, options)
        _warn_if_untrusted(diagnosis)
        if diagnosis.zero:
            return problems.x.new_zeros(shape)
        result = problems.x.new_empty(shape)
        left = replace(options, max_memory=memory - result_bytes)
        for samples, matrices, _ in whole_hessians(problems, left):
            result[samples] = symmetric_part(matrices)[0]
        return result


def input_spectrum(
    model: Model,
    x: Tensor,
    classes: Classes,
    target: Target = "logit",
    *,
    method: Literal["auto"] | MethodName = "auto",
    num_eigenvalues: int = 10,
    dtype: torch.dtype | None = None,
    chunk_size: ChunkSize = "auto",
    max_memory: int | None = None,
    seed: int = 0,
    forward_fn: ForwardFunction | None = None,
    output_fn: OutputFunction | None = None,
) -> Spectrum:
    """Eigenvalues of each sample's input-Hessian, with residuals and everything derived from them.

    Args:
        model: as for ``input_gradient``.
        x: samples ``[N, *shape]``.
        classes: as for ``input_gradient``.
        target: as for ``input_gradient``.
        method: ``"dense"`` (or ``"auto"``): all D eigenvalues from the whole matrix.
        num_eigenvalues: for how many eigenvalues, those of largest magnitude, eigenvectors are kept.
        dtype: float32 or float64; by default that of x.
        chunk_size: as for ``input_hessian``.
        max_memory: as for ``input_hessian``.
        seed: as for ``input_hessian``.
        forward_fn: as for ``input_gradient``.
        output_fn: as for ``input_gradient``.

    Returns:
        A ``Spectrum``; its ``diagnosis`` says why the Hessian is what it is.

    Warns:
        UserWarning: the numbers cannot be trusted; the message says why.

    Raises:
        ConfigurationError: an argument does not fit the model.
        MeasurementError: numbers are not finite, or one sample's matrices do not fit ``max_memory``.

    Cost: as ``input_hessian``, and D³ per problem for the eigenvalues; whole matrices are held for as many
    samples at a time as fit ``max_memory``.

    Example:
        >>> import torch
        >>> from lightning_hessian import input_spectrum
        >>> spectrum = input_spectrum(torch.nn.Linear(3, 2), torch.zeros(1, 3), classes=1)
        >>> spectrum.diagnosis.kind
        'linear'
    """
    if method not in ("auto", "dense"):
        raise ConfigurationError(f"method={method!r} is not known. Choose 'auto' or 'dense'.")
    options = make_options(num_eigenvalues, chunk_size=chunk_size, max_memory=max_memory, seed=seed)
    with prepared(model, x, classes, target, dtype=dtype, forward_fn=forward_fn, output_fn=output_fn) as task:
        spectrum = measure(task.problems, task.target_name, options).spectrum
    _warn_if_untrusted(spectrum.diagnosis)
    return spectrum


@dataclass(frozen=True)
class Task:
    """Problems made of a model and arguments, with what was found on the way."""

    problems: Problems
    target_name: str
    predicted: Tensor
    num_outputs: int


@contextmanager
def prepared(
    model: Model,
    x: Tensor,
    classes: Classes,
    target: Target,
    *,
    dtype: torch.dtype | None = None,
    forward_fn: ForwardFunction | None = None,
    output_fn: OutputFunction | None = None,
) -> Iterator[Task]:
    """The problems of a model, inside the isolation in which they may be differentiated.

    Raises:
        ConfigurationError: an argument does not fit the model.
    """
    network = ModelFunction(model, forward_fn, output_fn)
    check_input(x)
    device = network.device or x.device
    dtype = _possible_dtype(_resolve_dtype(dtype, x), model, network, x, device)
    with isolated(model, device, dtype):
        x = x.detach().to(device, dtype, copy=True)
        with torch.no_grad():
            outputs = network(x)
        predicted = outputs.argmax(dim=1)
        resolved = _resolve_classes(classes, predicted, outputs.shape[1])
        function = resolve_target(target, outputs.shape[1])
        problems = Problems(network, function, x, resolved)
        with torch.no_grad():
            function(outputs, resolved)  # a callable target that gives another shape is told about here
        yield Task(problems, target_name(target), predicted, outputs.shape[1])


def make_options(
    num_eigenvalues: int = 10,
    *,
    chunk_size: ChunkSize = "auto",
    max_memory: int | None = None,
    seed: int = 0,
) -> Options:
    """Checked options of a measurement.

    Raises:
        ConfigurationError: a number is not positive.
    """
    for name, value in {
        "num_eigenvalues": num_eigenvalues,
        "chunk_size": chunk_size,
        "max_memory": max_memory,
    }.items():
        if value not in (None, "auto") and (not isinstance(value, int) or value < 1):
            raise ConfigurationError(f"{name}={value!r} must be a whole number of at least 1.")
    return Options(num_eigenvalues, chunk_size, max_memory, seed)


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
            f"first (x.float() / 255), or, for tokens, measure a function of their embeddings."
        )


def _resolve_dtype(dtype: torch.dtype | None, x: Tensor) -> torch.dtype:
    if dtype is None:
        return x.dtype if x.dtype == torch.float64 else torch.float32
    if dtype not in (torch.float32, torch.float64):
        raise ConfigurationError(f"dtype={dtype} is not possible. Choose torch.float32 or torch.float64.")
    return dtype


def _possible_dtype(
    dtype: torch.dtype, model: Model, network: ModelFunction, x: Tensor, device: torch.device
) -> torch.dtype:
    """float64 where the model can be evaluated in it, and float32, with a warning, where it cannot."""
    if dtype == torch.float32:
        return dtype
    try:
        with isolated(model, device, dtype), torch.no_grad():
            if network(x[:2].detach().to(device, dtype)).dtype == dtype:
                return dtype
        reason = "its outputs are not float64"
    except ConfigurationError:
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


def _per_problem(v: Tensor, problems: Problems) -> Tensor:
    num_samples, _, num_inputs = problems.shape
    v = v.to(problems.x)
    if v.shape == (num_inputs,):
        v = v.expand(problems.shape)
    elif v.shape in ((num_samples, num_inputs), problems.x.shape):
        v = v.reshape(num_samples, 1, num_inputs).expand(problems.shape)
    if v.shape != problems.shape:
        raise ConfigurationError(
            f"v has shape {tuple(v.shape)}; it must be [D], [N, D], [N, K, D] or the shape of x, with (N, K, D) = "
            f"{problems.shape}."
        )
    return v


def _warn_if_untrusted(diagnosis: Diagnosis) -> None:
    if not diagnosis.trusted:
        warnings.warn(f"This input-Hessian is not to be trusted. {diagnosis.message}", UserWarning, stacklevel=3)
