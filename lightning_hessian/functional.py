"""Input gradients, HVPs, Hessians and spectra of any model, without a Trainer."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from lightning_hessian.curvature.analysis import analyze
from lightning_hessian.curvature.checks.diagnosis import Diagnosis
from lightning_hessian.curvature.memory import readable
from lightning_hessian.curvature.methods.dense import ChunkSize
from lightning_hessian.curvature.methods.execute import execute, whole_hessians
from lightning_hessian.curvature.methods.plan import MethodChoice, make_plan
from lightning_hessian.curvature.operators.autodiff import ReverseOverReverse, gradients
from lightning_hessian.curvature.operators.target_batch import TargetBatch
from lightning_hessian.curvature.spectrum import Spectrum
from lightning_hessian.errors import ConfigurationError
from lightning_hessian.model.function import ForwardFunction, Inputs, OutputFunction
from lightning_hessian.model.prepare import Classes, Model, Target, make_options, prepared


def input_gradient(
    model: Model,
    x: Inputs,
    classes: Classes,
    target: Target = "logit",
    *,
    dtype: torch.dtype | None = None,
    wrt: str | int | None = None,
    forward_fn: ForwardFunction | None = None,
    output_fn: OutputFunction | None = None,
) -> Tensor:
    """Gradient of each sample's target with respect to that sample: ∇ₓ t(x[n], k).

    Differentiated is the scalar ``target`` of the model's output for one class, with respect to the input;
    nothing is summed or averaged over the batch.

    Args:
        model: an ``nn.Module``, a ``LightningModule`` or a callable, from ``[N, *shape]`` to ``[N, C]`` or ``[N]``,
            or to an object or dict that holds those as ``logits``.
        x: floating-point samples ``[N, *shape]``; D is the number of entries of one. For several inputs a dict
            (``model(**x)``) or a tuple (``model(*x)``).
        classes: which outputs: an int, K ints, a tensor ``[N]`` or ``[N, K]``, ``"predicted"`` or ``"all"``.
        target: ``"logit"``, ``"log_prob"``, ``"prob"``, ``"loss"``, ``"margin"``, or a callable
            ``(outputs [N, C], classes [N, K]) -> [N, K]``.
        dtype: float32 or float64; by default that of x. Parameters are cast to it, not the model's own.
        wrt: what is differentiated: a key or position of ``x``, or the name of a submodule, whose output then
            is the variable (``wrt="embedding"`` for tokens); the rest is held.
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
    with prepared(model, x, classes, target, dtype=dtype, wrt=wrt, forward_fn=forward_fn, output_fn=output_fn) as task:
        return gradients(task.batch)


def input_hvp(
    model: Model,
    x: Inputs,
    v: Tensor,
    classes: Classes,
    target: Target = "logit",
    *,
    dtype: torch.dtype | None = None,
    wrt: str | int | None = None,
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
        wrt: as for ``input_gradient``.
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
    with prepared(model, x, classes, target, dtype=dtype, wrt=wrt, forward_fn=forward_fn, output_fn=output_fn) as task:
        return ReverseOverReverse(task.batch).hvp(_per_problem(v, task.batch))


def input_hessian(
    model: Model,
    x: Inputs,
    classes: Classes,
    target: Target = "logit",
    *,
    dtype: torch.dtype | None = None,
    wrt: str | int | None = None,
    chunk_size: ChunkSize = "auto",
    max_memory: int | None = None,
    seed: int = 0,
    forward_fn: ForwardFunction | None = None,
    output_fn: OutputFunction | None = None,
) -> Tensor:
    """Whole Hessian of each sample's target with respect to that sample: H[n, k] = ∇²ₓ t(x[n], k).

    Computed in blocks of columns, by ``vmap``-batched forward-over-reverse differentiation shared by all classes
    where that engine agrees with double backward on this model, or by double backward, whichever is faster here;
    for a network that is piecewise linear in its input, as JᵀAJ from the gradients of its C outputs. A target
    that does not depend on x, or only linearly, gives exact zeros.

    Args:
        model: as for ``input_gradient``.
        x: samples ``[N, *shape]``.
        classes: as for ``input_gradient``.
        target: as for ``input_gradient``.
        dtype: float32 or float64; by default that of x.
        wrt: as for ``input_gradient``.
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

    Cost: D columns, each about (1 + K)/2 to K gradients of the batch; memory N·K·D² numbers.

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
    how = {"dtype": dtype, "wrt": wrt, "forward_fn": forward_fn, "output_fn": output_fn, "max_memory": max_memory}
    with prepared(model, x, classes, target, **how) as task:  # type: ignore[arg-type]
        batch = task.batch
        shape = (*batch.shape, batch.num_inputs)
        result_bytes = torch.Size(shape).numel() * batch.x.element_size()
        memory = options.memory(batch.x.device)
        if result_bytes > memory:
            fewer = "Ask for fewer samples or classes" if len(batch.x) * batch.num_classes > 1 else "Use input_hvp"
            raise ConfigurationError(
                f"The Hessians {list(shape)} take {readable(result_bytes)}, more than the {readable(memory)} that "
                f"may be used. {fewer}, or raise max_memory (in bytes)."
            )
        analysis = analyze(batch, options)
        facts, diagnosis = analysis.costs, analysis.diagnosis
        _warn_if_untrusted(diagnosis)
        if diagnosis.zero:
            return batch.x.new_zeros(shape)
        left = replace(options, max_memory=memory - result_bytes)
        result = None
        for samples, matrices in whole_hessians(batch, facts, left, diagnosis):
            if len(matrices) == batch.num_samples:
                return matrices
            result = batch.x.new_empty(shape) if result is None else result
            result[samples] = matrices
        assert result is not None
        return result


def input_spectrum(
    model: Model,
    x: Inputs,
    classes: Classes,
    target: Target = "logit",
    *,
    method: MethodChoice = "auto",
    num_eigenvalues: int = 10,
    block_size: int = 1,
    dtype: torch.dtype | None = None,
    wrt: str | int | None = None,
    chunk_size: ChunkSize = "auto",
    max_memory: int | None = None,
    seed: int = 0,
    density_vectors: int = 0,
    forward_fn: ForwardFunction | None = None,
    output_fn: OutputFunction | None = None,
) -> Spectrum:
    """Eigenvalues of each sample's input-Hessian, with residuals and everything derived from them.

    Args:
        model: as for ``input_gradient``.
        x: samples ``[N, *shape]``.
        classes: as for ``input_gradient``.
        target: as for ``input_gradient``.
        method: ``"dense"``: all D eigenvalues, from the whole matrix. ``"low_rank"``: the complete spectrum of a
            piecewise linear network, from C gradients. ``"lanczos"``: the ends of the spectrum, with residuals.
            ``"auto"``: the cheapest of these that is exact or knows its error.
        num_eigenvalues: how many eigenvectors are kept, those of largest magnitude; with ``"lanczos"`` how many
            eigenvalues are found, half of them (at least one) at each end. ``"low_rank"`` keeps all of up to 64.
        block_size: start vectors of ``"lanczos"``. A single one cannot see how often an eigenvalue repeats: copies
            are missing, though all that is listed has converged. With b, up to b copies are seen, at the price of
            more products. The other methods see every copy.
        dtype: float32 or float64; by default that of x.
        wrt: as for ``input_gradient``.
        chunk_size: as for ``input_hessian``.
        max_memory: as for ``input_hessian``.
        seed: as for ``input_hessian``.
        density_vectors: with ``"lanczos"``, random starting vectors from which the density of eigenvalues is
            estimated, with a standard error; at least 2, or 0 for none. Elsewhere it is exact and needs none.
        forward_fn: as for ``input_gradient``.
        output_fn: as for ``input_gradient``.

    Returns:
        A ``Spectrum``; its ``diagnosis`` says why the Hessian is what it is.

    Warns:
        UserWarning: the numbers cannot be trusted; the message says why.

    Raises:
        ConfigurationError: an argument does not fit the model.
        MeasurementError: numbers are not finite, or one sample's matrices do not fit ``max_memory``.

    Cost: ``dense`` as ``input_hessian``, and D³ per problem for the eigenvalues; ``low_rank`` C gradients;
    ``lanczos`` some ten products per eigenvalue, about 55 for trace, norms and checks, and 40 for each of the
    ``density_vectors``. As many samples are worked on at a time as fit ``max_memory``.

    Example:
        >>> import torch
        >>> from lightning_hessian import input_spectrum
        >>> spectrum = input_spectrum(torch.nn.Linear(3, 2), torch.zeros(1, 3), classes=1)
        >>> spectrum.diagnosis.kind
        'linear'
    """
    options = make_options(
        num_eigenvalues,
        method=method,
        chunk_size=chunk_size,
        max_memory=max_memory,
        seed=seed,
        block_size=block_size,
        density_vectors=density_vectors,
    )
    how = {"dtype": dtype, "wrt": wrt, "forward_fn": forward_fn, "output_fn": output_fn, "max_memory": max_memory}
    with prepared(model, x, classes, target, **how) as task:  # type: ignore[arg-type]
        analysis = analyze(task.batch, options)
        plan = make_plan(task.batch, analysis.costs, analysis.diagnosis, options)
        how_to = {"target": task.target_name, "analysis": analysis, "meter": task.meter}
        spectrum = execute(task.batch, plan, options, **how_to).spectrum  # type: ignore[arg-type]
    _warn_if_untrusted(spectrum.diagnosis)
    return spectrum


def _per_problem(v: Tensor, batch: TargetBatch) -> Tensor:
    num_samples, _, num_inputs = batch.shape
    v = v.to(batch.x)
    if v.shape == (num_inputs,):
        v = v.expand(batch.shape)
    elif v.shape in ((num_samples, num_inputs), batch.x.shape):
        v = v.reshape(num_samples, 1, num_inputs).expand(batch.shape)
    if v.shape != batch.shape:
        raise ConfigurationError(
            f"v has shape {tuple(v.shape)}; it must be [D], [N, D], [N, K, D] or the shape of x, with (N, K, D) = "
            f"{batch.shape}."
        )
    return v


def _warn_if_untrusted(diagnosis: Diagnosis) -> None:
    if not diagnosis.trusted:
        warnings.warn(f"This input-Hessian is not to be trusted. {diagnosis.message}", UserWarning, stacklevel=3)
