"""Gradients, HVPs, whole Hessians and spectra of one batch of targets, compared with values unless asked not to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from lightning_hessian.curvature.analysis import Analysis, analyze, curved, differentiate, finite_samples
from lightning_hessian.curvature.batching import concatenate, in_groups
from lightning_hessian.curvature.checks.derivatives import (
    CheckableDerivatives,
    CheckedDerivatives,
    check_derivatives,
    unchecked_derivatives,
)
from lightning_hessian.curvature.checks.explanation import find_dependence
from lightning_hessian.curvature.checks.prediction import predict_along, predict_of_matrices, predict_slope
from lightning_hessian.curvature.checks.result_check import CheckSettings
from lightning_hessian.curvature.cost_model import ForwardPass, ModelCosts, check_group, fitting_samples
from lightning_hessian.curvature.memory import readable
from lightning_hessian.curvature.meter import UNLIMITED, Meter, TimeLimit
from lightning_hessian.curvature.methods.columns import WholeHessians
from lightning_hessian.curvature.methods.dense import whole_hessians
from lightning_hessian.curvature.methods.duration import ends_only, within_limit
from lightning_hessian.curvature.methods.execute import execute
from lightning_hessian.curvature.methods.interface import MethodInput, Share
from lightning_hessian.curvature.methods.plan import make_plan
from lightning_hessian.curvature.operators.autodiff import AutodiffMode, ReverseOverReverse, gradients
from lightning_hessian.curvature.options import Options
from lightning_hessian.curvature.spectrum import Spectrum
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.errors import ConfigurationError, TimeLimitError

FEW_INPUTS = 32  # up to which all columns are computed at once, without a look at the kind of network


def gradient(batch: TargetBatch, options: Options, forward: ForwardPass) -> CheckedDerivatives:
    """∇t, ``[N, K, D]``.

    Args:
        batch: what is differentiated.
        options: how.
        forward: what a forward pass has shown already.

    Raises:
        MeasurementError: not one gradient is finite.
    """
    if not options.check:
        return unchecked_derivatives(gradients(batch))
    memory = options.memory(batch.x.device)
    costs = ModelCosts(batch, memory, forward)
    first = differentiate(batch, costs, memory)
    finite, findings = finite_samples(batch, first.values, first.gradient)

    def checkable(gradient: Tensor) -> CheckableDerivatives:
        return CheckableDerivatives(gradient, predict_slope(gradient, options.generator()))

    return check_derivatives(
        "gradient",
        batch,
        checkable(first.gradient),
        lambda few, _: checkable(gradients(few)),
        _settings(costs, options, forward, first.values),
        finite=finite,
        findings=findings,
    )


def hvp(batch: TargetBatch, v: Tensor, options: Options, forward: ForwardPass) -> CheckedDerivatives:
    """H v, ``[N, K, D]``, with an own vector for every problem.

    Args:
        batch, options, forward: as for ``gradient``.
        v: ``[N, K, D]``.

    Raises:
        MeasurementError: not one product is finite.
    """
    memory = options.memory(v.device)
    costs = ModelCosts(batch, memory, forward)
    size = fitting_samples(memory, costs.matvec_bytes, batch.x.device)

    def products(of: TargetBatch, v: Tensor) -> _Products:
        def work(samples: slice) -> _Products:
            autodiff = ReverseOverReverse(of.select(samples))
            return _Products(autodiff.hvp(v[samples]), autodiff.gradient(), autodiff.values.detach())

        return concatenate([found for _, found in in_groups(of.num_samples, size, work)])

    first = products(batch, v)
    if not options.check:
        return unchecked_derivatives(first.product)
    finite, findings = finite_samples(batch, first.values, first.gradient)
    # Values are compared along one direction of every sample: a class with one of its own is a sample for that.
    problems = batch if (v == v[:, :1]).all() else batch.split_classes()
    each = batch.num_classes // problems.num_classes
    vectors = v.reshape(problems.shape)

    def checkable(which: Tensor, found: _Products) -> CheckableDerivatives:
        shape = vectors[which].shape
        product = found.product.reshape(shape)
        return CheckableDerivatives(product, predict_along(vectors[which, 0], found.gradient.reshape(shape), product))

    found = check_derivatives(
        "HVP",
        problems,
        checkable(torch.arange(problems.num_samples, device=v.device), first),
        lambda few, which: checkable(which, products(few, vectors[which])),
        _settings(costs, options, forward, first.values),
        finite=finite.repeat_interleave(each),
        findings=findings,
        numbers=[n // each for n in range(problems.num_samples)],
        along=vectors,
    )
    return replace(found, numbers=found.numbers.reshape(v.shape), valid=found.valid.reshape(v.shape[:2]))


def hessian(batch: TargetBatch, options: Options, forward: ForwardPass, meter: Meter) -> CheckedDerivatives:
    """H, ``[N, K, D, D]``.

    Args:
        batch, options, forward: as for ``gradient``.
        meter: from whose start ``max_seconds`` count.

    Raises:
        ConfigurationError: the Hessians do not fit ``max_memory``.
        MeasurementError: not one sample has finite values, gradients and Hessians, or they do not fit ``max_seconds``.
    """
    memory = options.memory(batch.x.device)
    options = replace(options, max_memory=memory)
    shape = (*batch.shape, batch.num_inputs)
    result_bytes = torch.Size(shape).numel() * batch.x.element_size()
    if result_bytes > memory:
        fewer = "Ask for fewer samples or classes" if len(batch.x) * batch.num_classes > 1 else "Use input_hvp"
        raise ConfigurationError(
            f"The Hessians {list(shape)} take {readable(result_bytes)}, more than the {readable(memory)} that "
            f"may be used. {fewer}, or raise max_memory (in bytes)."
        )
    budget = memory - result_bytes
    costs = ModelCosts(batch, budget, forward)
    whole = partial(
        _whole_hessians,
        costs=costs,
        options=options,
        memory_budget=budget,
        limit=meter.limit(options.max_seconds),
    )
    if not options.check:
        return unchecked_derivatives(whole(batch).matrices)
    analysis = None
    if batch.num_inputs <= FEW_INPUTS or forward.is_curved:
        found = whole(batch)
        assert found.first_derivatives is not None
        analysis = curved(batch, costs, forward, *found.first_derivatives)
    if analysis is None:
        analysis = analyze(batch, options, "curved" if batch.num_inputs <= FEW_INPUTS else None, forward=forward)
        batch = batch.select(analysis.stand_ins)
        found = whole(batch, analysis)

    def checkable(gradient: Tensor, hessians: Tensor) -> CheckableDerivatives:
        return CheckableDerivatives(hessians, predict_of_matrices(gradient, hessians, options.generator()))

    def again(few: TargetBatch, _: Tensor) -> CheckableDerivatives:
        return checkable(gradients(few), whole(few, analysis, ("reverse_over_reverse",), limit=UNLIMITED).matrices)

    return check_derivatives(
        "Hessian",
        batch,
        checkable(analysis.gradient[analysis.stand_ins], found.matrices),
        again,
        CheckSettings(
            check_group(analysis.costs, memory),
            options.seed,
            analysis.diagnosis.network_is_piecewise_linear,
            analysis.dependence,
        ),
        finite=analysis.finite,
        findings=analysis.diagnosis.findings,
        computed_by=found.mode,
        kind=analysis.diagnosis,
    )


def spectrum(batch: TargetBatch, target: str, options: Options, forward: ForwardPass, meter: Meter) -> Spectrum:
    """Eigenvalues, with residuals and what follows from them.

    Args:
        batch, options, forward, meter: as for ``hessian``.
        target: name of the target.

    Raises:
        MeasurementError: not one Hessian is finite, one sample's matrices do not fit ``max_memory``, or the method that
            was asked for does not fit ``max_seconds``.
    """
    options = replace(options, max_memory=options.memory(batch.x.device))  # read once: the plan counts on it
    analysis = analyze(batch, options, forward=forward)
    plan = within_limit(
        make_plan(batch, analysis.costs, analysis.diagnosis, options),
        batch,
        analysis.costs,
        options,
        seconds_per_matvec=analysis.seconds_per_matvec,
        seconds_left=meter.limit(options.max_seconds).seconds_left,
    )
    run = partial(
        execute,
        batch.select(analysis.stand_ins),
        options=options,
        target=target,
        analysis=analysis.select(analysis.stand_ins),
        share=Share(range(len(batch.x)), len(batch.x), finite=analysis.finite),
        meter=meter,
    )
    try:
        found = run(plan).spectrum
    except TimeLimitError:
        if options.method != "auto":
            raise
        found = run(ends_only(plan, options)).spectrum
    return found if found.diagnosis.trusted else replace(found, valid=torch.zeros_like(found.valid))


@dataclass(frozen=True)
class _Products:
    """Hessians times vectors, ``[N, K, D]``, and what their graph gives besides."""

    product: Tensor
    gradient: Tensor
    values: Tensor


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


def _settings(costs: ModelCosts, options: Options, first: ForwardPass, values: Tensor) -> CheckSettings:
    """How to check derivatives at ``values``, which should be those of the ``first`` pass."""
    group_size = check_group(costs, options.memory(values.device))
    dependence = find_dependence(costs.batch, values, first.outputs, group_size)
    return CheckSettings(group_size, options.seed, dependence=dependence)
