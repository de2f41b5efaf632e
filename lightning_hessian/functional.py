"""Input gradients, HVPs, Hessians and spectra of any model, without a Trainer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from lightning_hessian.curvature.analysis import Analysis, analyze, curved, differentiate, finite_samples
from lightning_hessian.curvature.batching import concatenate, in_groups
from lightning_hessian.curvature.checks.derivatives import CheckableDerivatives, about_invalid, check_derivatives
from lightning_hessian.curvature.checks.diagnosis import Diagnosis
from lightning_hessian.curvature.checks.prediction import predict_along, predict_of_matrices, predict_slope
from lightning_hessian.curvature.checks.verdict import CheckSettings
from lightning_hessian.curvature.cost_model import ModelCosts, check_group, fitting_samples
from lightning_hessian.curvature.memory import readable
from lightning_hessian.curvature.meter import UNLIMITED, TimeLimit
from lightning_hessian.curvature.methods.columns import WholeHessians
from lightning_hessian.curvature.methods.dense import whole_hessians
from lightning_hessian.curvature.methods.duration import ends_only, within_limit
from lightning_hessian.curvature.methods.execute import Share, execute
from lightning_hessian.curvature.methods.interface import MethodInput
from lightning_hessian.curvature.methods.plan import make_plan
from lightning_hessian.curvature.operators.autodiff import AutodiffMode, ReverseOverReverse, gradients
from lightning_hessian.curvature.options import ChunkSize, MethodChoice, Options
from lightning_hessian.curvature.spectrum import Spectrum
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.errors import ConfigurationError, TimeLimitError, warn
from lightning_hessian.model.arguments import Classes, Model, Target
from lightning_hessian.model.function import ForwardFunction, Inputs, ModelFunction
from lightning_hessian.model.outputs import OutputFunction
from lightning_hessian.model.prepare import PreparedModel, prepare, usable_dtype

FEW_INPUTS = 32  # up to which all columns are computed at once, without a look at the kind of network


def input_gradient(
    model: Model,
    x: Inputs,
    classes: Classes,
    target: Target = "logit",
    *,
    dtype: torch.dtype | None = None,
    wrt: str | int | None = None,
    check: bool = True,
    forward_fn: ForwardFunction | None = None,
    output_fn: OutputFunction | None = None,
) -> Tensor:
    """Gradient of each sample's target with respect to that sample: ∇ₓ t(x[n], k).

    Differentiated is the scalar ``target`` of the model's output for one class, with respect to the input;
    nothing is summed or averaged over the batch.

    Args:
        model: an ``nn.Module``, a ``LightningModule`` or a callable, from ``[N, *shape]`` to ``[N, C]`` or ``[N]``,
            or to an object or dict that has those as ``logits``.
        x: floating-point samples ``[N, *shape]``; D is the number of entries of one. For several inputs a dict
            (``model(**x)``) or a tuple (``model(*x)``).
        classes: which outputs: an int, K ints, a tensor ``[N]`` or ``[N, K]``, ``"predicted"`` or ``"all"``.
        target: ``"logit"``, ``"log_prob"``, ``"prob"``, ``"loss"``, ``"margin"``, or a callable
            ``(outputs [N, C], classes [N, K]) -> [N, K]``.
        dtype: float32 or float64; by default that of x. Parameters are cast to it, not the model's own.
        wrt: what is differentiated: a key or position of ``x``, or the name of a submodule, whose output then
            is the variable (``wrt="embedding"`` for tokens); all other inputs stay fixed.
        check: whether the result is compared with differences of values, in float64 where the model can be evaluated in
            it: five values per sample, more where a kink or rounding is near.
        forward_fn: ``(model, x) -> output``, in place of ``model(x)``.
        output_fn: ``output -> [N, C]``, for models that return something else.

    Returns:
        ``[N, K, D]``, in target units per input unit.

    Warns:
        UserWarning: the gradients of some samples are not finite (NaN), contradicted by values, or could not be
            compared with them; the message says which and why.

    Raises:
        ConfigurationError: an argument does not fit the model; the message says what does.
        MeasurementError: not one gradient is finite.

    Cost: one forward and K backward passes, and the check. Memory: their activations.

    Example:
        >>> import torch
        >>> from lightning_hessian import input_gradient
        >>> def model(x): return x * x * torch.tensor([0.0, 1.0, 2.0, 3.0])
        >>> input_gradient(model, torch.full((1, 4), 2.0), classes=2)
        tensor([[[0., 0., 8., 0.]]])
    """
    network = ModelFunction(model, forward_fn, output_fn, wrt)
    with _prepared(network, x, classes, target, dtype, None) as prepared:
        batch, options = prepared.batch, Options()
        if not check:
            return gradients(batch)
        memory = options.memory(batch.x.device)
        costs = ModelCosts(batch, memory, prepared.forward)
        first = differentiate(batch, costs, memory)
        finite, findings = finite_samples(batch, first.values, first.gradient)

        def checkable(gradient: Tensor) -> CheckableDerivatives:
            return CheckableDerivatives(gradient, predict_slope(gradient, options.generator()))

        found = check_derivatives(
            "gradient",
            batch,
            checkable(first.gradient),
            lambda few, _: checkable(gradients(few)),
            _settings(costs, options),
            finite=finite,
            findings=findings,
        )
    _warn(found.warning("gradient"))
    return found.numbers


def input_hvp(
    model: Model,
    x: Inputs,
    v: Tensor,
    classes: Classes,
    target: Target = "logit",
    *,
    dtype: torch.dtype | None = None,
    wrt: str | int | None = None,
    check: bool = True,
    forward_fn: ForwardFunction | None = None,
    output_fn: OutputFunction | None = None,
) -> Tensor:
    """Hessian-vector product (HVP) of each sample's target: ∇²ₓ t(x[n], k) · v.

    Args:
        model, x, classes, target, dtype, wrt, check, forward_fn, output_fn: as for ``input_gradient``.
        v: one vector for all samples and classes ``[D]``, one per sample (``[N, D]`` or the shape of x), or one per
            sample and class ``[N, K, D]``.

    Returns:
        ``[N, K, D]``.

    Warns:
        UserWarning: some products are not finite, contradicted by values, or could not be compared with them; the
            message says which and why. Where values or gradients of a sample are not finite, its products are NaN.

    Raises:
        ConfigurationError: an argument does not fit the model, or v does not fit x.
        MeasurementError: not one product is finite, or an operation has no second derivative.

    Cost: a forward pass, two backward passes per class (Pearlmutter 1994, by double backward), and the check: five
    values along v per sample, or per sample and class where each class has a vector of its own. Memory: the graph of as
    many samples at a time as fit half of what is free on the device.

    Example:
        >>> import torch
        >>> from lightning_hessian import input_hvp
        >>> def model(x): return x * x * torch.tensor([0.0, 1.0, 2.0, 3.0])
        >>> input_hvp(model, torch.full((1, 4), 2.0), torch.ones(4), classes=2)
        tensor([[[0., 0., 4., 0.]]])
    """
    network = ModelFunction(model, forward_fn, output_fn, wrt)
    with _prepared(network, x, classes, target, dtype, None) as prepared:
        batch, v, options = prepared.batch, _per_problem(v, prepared.batch), Options()
        memory = options.memory(v.device)
        costs = ModelCosts(batch, memory, prepared.forward)
        size = fitting_samples(memory, costs.matvec_bytes)

        def products(of: TargetBatch, v: Tensor) -> _Products:
            def work(samples: slice) -> _Products:
                autodiff = ReverseOverReverse(of.select(samples))
                return _Products(autodiff.hvp(v[samples]), autodiff.gradient(), autodiff.values.detach())

            return concatenate([found for _, found in in_groups(of.num_samples, size, work)])

        first = products(batch, v)
        if not check:
            return first.product
        finite, findings = finite_samples(batch, first.values, first.gradient)
        # Values are compared along one direction of every sample: a class with one of its own is a sample for that.
        problems = batch if (v == v[:, :1]).all() else batch.split_classes()
        each = batch.num_classes // problems.num_classes
        vectors = v.reshape(problems.shape)

        def checkable(which: Tensor, found: _Products) -> CheckableDerivatives:
            gradient, product = (
                found.gradient.reshape(vectors[which].shape),
                found.product.reshape(vectors[which].shape),
            )
            return CheckableDerivatives(product, predict_along(vectors[which, 0], gradient, product))

        found = check_derivatives(
            "HVP",
            problems,
            checkable(torch.arange(problems.num_samples, device=v.device), first),
            lambda few, which: checkable(which, products(few, vectors[which])),
            _settings(costs, options),
            finite=finite.repeat_interleave(each),
            findings=findings,
            numbers=[n // each for n in range(problems.num_samples)],
            along=vectors,
        )
    _warn(found.warning("HVP"))
    return found.numbers.reshape(v.shape)


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
    max_seconds: float | None = None,
    seed: int = 0,
    check: bool = True,
    forward_fn: ForwardFunction | None = None,
    output_fn: OutputFunction | None = None,
) -> Tensor:
    """Whole Hessian of each sample's target with respect to that sample: H[n, k] = ∇²ₓ t(x[n], k).

    Computed in few large blocks of columns: forward over reverse, ``vmap``-batched and shared by all classes, or
    reverse over reverse where the model has no forward mode or a wrong one. For a network that is piecewise linear in
    its input, as JᵀAJ from the gradients of its C outputs. A target that does not depend on x, or only linearly, gives
    exact zeros.

    Args:
        model, x, classes, target, dtype, wrt, check, forward_fn, output_fn: as for ``input_gradient``.
        chunk_size: columns computed at once; by default as many as memory allows and as pays.
        max_memory: bytes that may be used; by default half of what is free on the device.
        max_seconds: within which the Hessians are to be computed. Where the first blocks show that they will not be,
            the error says how long they are expected to take, and what would fit.
        seed: of the random directions along which the autodiff modes are compared.

    Returns:
        ``[N, K, D, D]``, symmetric, flattened from the input's shape in row-major order.

    Warns:
        UserWarning: the Hessians of some samples are not finite (NaN), contradicted by values, or could not be compared
            with them; the message says which and why.

    Raises:
        ConfigurationError: an argument does not fit the model, or the result does not fit ``max_memory``.
        MeasurementError: not one sample has finite values, gradients and Hessians, or they do not fit ``max_seconds``.

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
    options = Options(chunk_size=chunk_size, max_memory=max_memory, max_seconds=max_seconds, seed=seed)
    network = ModelFunction(model, forward_fn, output_fn, wrt)
    with _prepared(network, x, classes, target, dtype, max_memory) as prepared:
        batch = prepared.batch
        shape = (*batch.shape, batch.num_inputs)
        result_bytes = torch.Size(shape).numel() * batch.x.element_size()
        memory = prepared.memory
        options = replace(options, max_memory=memory)
        if result_bytes > memory:
            fewer = "Ask for fewer samples or classes" if len(batch.x) * batch.num_classes > 1 else "Use input_hvp"
            raise ConfigurationError(
                f"The Hessians {list(shape)} take {readable(result_bytes)}, more than the {readable(memory)} that "
                f"may be used. {fewer}, or raise max_memory (in bytes)."
            )
        limit = prepared.meter.limit(max_seconds)
        budget = memory - result_bytes
        costs = ModelCosts(batch, budget, prepared.forward)
        whole = partial(_whole_hessians, costs=costs, options=options, memory_budget=budget, limit=limit)
        if not check:
            return whole(batch).matrices
        analysis = None
        if batch.num_inputs <= FEW_INPUTS or prepared.forward.is_curved:
            found = whole(batch)
            assert found.first_derivatives is not None
            analysis = curved(batch, costs, *found.first_derivatives)
        if analysis is None:
            analysis = analyze(
                batch, options, "curved" if batch.num_inputs <= FEW_INPUTS else None, forward=prepared.forward
            )
            batch = batch.select(analysis.stand_ins)
            found = whole(batch, analysis)
        gradient, hessians = analysis.gradient[analysis.stand_ins], found.matrices

        def checkable(gradient: Tensor, hessians: Tensor) -> CheckableDerivatives:
            return CheckableDerivatives(hessians, predict_of_matrices(gradient, hessians, options.generator()))

        def again(few: TargetBatch, _: Tensor) -> CheckableDerivatives:
            return checkable(gradients(few), whole(few, analysis, ("reverse_over_reverse",), limit=UNLIMITED).matrices)

        result = check_derivatives(
            "Hessian",
            batch,
            checkable(gradient, hessians),
            again,
            _settings(analysis.costs, options, analysis.diagnosis),
            finite=analysis.finite,
            findings=analysis.diagnosis.findings,
            computed_by=found.mode,
            kind=analysis.diagnosis,
        )
    _warn(result.warning("Hessian"))
    return result.numbers


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
    max_seconds: float | None = None,
    seed: int = 0,
    density_vectors: int = 0,
    check: bool = True,
    forward_fn: ForwardFunction | None = None,
    output_fn: OutputFunction | None = None,
) -> Spectrum:
    """Eigenvalues of each sample's input-Hessian, with residuals and everything derived from them.

    Args:
        model, x, classes, target, dtype, wrt, check, forward_fn, output_fn: as for ``input_gradient``.
        chunk_size, max_memory, seed: as for ``input_hessian``.
        max_seconds: within which the spectra are to be computed; what is given up for it depends on the machine, and
            is said in the diagnosis. Complete spectra give way to ``"lanczos"``, unless their method was asked for.
            There, first random vectors are left out (errors grow), then steps (residuals grow, and what has not
            converged is marked). By default there is no limit, and nothing depends on a clock.
        method: ``"dense"``: all D eigenvalues, from the whole matrix. ``"low_rank"``: the complete spectrum of a
            piecewise linear network, from C gradients. ``"lanczos"``: the ends of the spectrum, with residuals.
            ``"auto"``: the cheapest of these that is exact or has an error estimate.
        num_eigenvalues: how many eigenvectors are returned, those of largest magnitude; with ``"lanczos"`` how many
            eigenvalues are found, half of them (at least one) at each end. ``"low_rank"`` returns all of up to 64.
        block_size: start vectors of ``"lanczos"``. A single one cannot see how often an eigenvalue repeats: copies
            are missing, though all that is listed has converged. With b, up to b copies are found, for more HVPs.
            The other methods find every copy.
        density_vectors: with ``"lanczos"``, random starting vectors from which the density of eigenvalues is
            estimated, with a standard error; at least 2, or 0 for none. Elsewhere it is exact and needs none.

    Returns:
        A ``Spectrum``; its ``diagnosis`` says why the Hessian is what it is.

    Warns:
        UserWarning: the spectra of some samples cannot be trusted; the message says which and why. What could not be
            compared with values is said in the diagnosis.

    Raises:
        ConfigurationError: an argument does not fit the model.
        MeasurementError: not one Hessian is finite, one sample's matrices do not fit ``max_memory``, or
            ``method="dense"`` does not fit ``max_seconds``.

    Cost: ``dense`` as ``input_hessian``, and D³ per problem for the eigenvalues; ``low_rank`` C gradients;
    ``lanczos`` four to ten HVPs per eigenvalue, twelve for trace and norms, C gradients for the norms of the two terms,
    40 HVPs for each of the ``density_vectors``, and about six for the checks. As many samples are worked on at a time
    as fit ``max_memory``.

    Example:
        >>> import torch
        >>> from lightning_hessian import input_spectrum
        >>> spectrum = input_spectrum(torch.nn.Linear(3, 2), torch.zeros(1, 3), classes=1)
        >>> spectrum.diagnosis.kind
        'linear'
    """
    options = Options(
        method=method,
        num_eigenvalues=num_eigenvalues,
        chunk_size=chunk_size,
        max_memory=max_memory,
        seed=seed,
        block_size=block_size,
        density_vectors=density_vectors,
        check=check,
        max_seconds=max_seconds,
    )
    network = ModelFunction(model, forward_fn, output_fn, wrt)
    with _prepared(network, x, classes, target, dtype, max_memory) as prepared:
        batch = prepared.batch
        options = replace(options, max_memory=prepared.memory)  # read once: the plan counts on it
        analysis = analyze(batch, options, forward=prepared.forward)
        plan = make_plan(batch, analysis.costs, analysis.diagnosis, options)
        plan = within_limit(
            plan,
            batch,
            analysis.costs,
            options,
            seconds_per_matvec=analysis.seconds_per_matvec,
            seconds_left=prepared.meter.limit(max_seconds).seconds_left,
        )
        run = partial(
            execute,
            batch.select(analysis.stand_ins),
            options=options,
            target=prepared.target_name,
            analysis=analysis.select(analysis.stand_ins),
            share=Share(range(len(batch.x)), len(batch.x), finite=analysis.finite),
            meter=prepared.meter,
        )
        try:
            measurement = run(plan)
        except TimeLimitError:
            if method != "auto":
                raise
            measurement = run(ends_only(plan, options))
    spectrum = measurement.spectrum
    if not spectrum.diagnosis.trusted:
        spectrum = replace(spectrum, valid=torch.zeros_like(spectrum.valid))
    if not spectrum.valid.all():
        _warn(about_invalid("spectrum", spectrum.valid, spectrum.diagnosis.message))
    return spectrum


def _whole_hessians(
    batch: TargetBatch,
    analysis: Analysis | None = None,
    modes: tuple[AutodiffMode, ...] = get_args(AutodiffMode),
    *,
    costs: ModelCosts,
    options: Options,
    memory_budget: int,
    limit: TimeLimit,
) -> WholeHessians:
    """Those of a batch: zeros, JᵀAJ or column by column, as its analysis allows."""
    if analysis is not None and analysis.diagnosis.zero:
        zero = batch.x.new_zeros(*batch.shape, batch.num_inputs)
        return WholeHessians(zero, zero[..., 0, 0], Counter())
    linear = analysis is not None and analysis.diagnosis.network_is_piecewise_linear
    unused = batch.x.new_empty(0)  # whole matrices need no gradient
    return whole_hessians(MethodInput(batch, costs, unused, linear, options, memory_budget, modes=modes, limit=limit))


@dataclass(frozen=True)
class _Products:
    """Hessians times vectors, ``[N, K, D]``, and what their graph gives besides."""

    product: Tensor
    gradient: Tensor
    values: Tensor


def _settings(costs: ModelCosts, options: Options, kind: Diagnosis | None = None) -> CheckSettings:
    group_size = check_group(costs, options.memory(costs.batch.x.device))
    return CheckSettings(group_size, options.seed, kind is not None and kind.network_is_piecewise_linear)


def _warn(message: str | None) -> None:
    """Warns in the line that called a function of this module."""
    if message is not None:
        warn(message, stacklevel=3)


@contextmanager
def _prepared(
    network: ModelFunction, x: Inputs, classes: Classes, target: Target, dtype: torch.dtype | None, memory: int | None
) -> Iterator[PreparedModel]:
    """``prepare`` in a dtype that the model can be evaluated in."""
    dtype = usable_dtype(network, x, dtype)
    with prepare(network, x, classes, target, dtype=dtype, max_memory=memory) as prepared:
        yield prepared


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
