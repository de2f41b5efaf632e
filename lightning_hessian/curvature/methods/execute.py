"""Runs a measurement by the method that was planned for it, and checks what it gave against values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_hessian.curvature.analysis import Analysis, differentiate
from lightning_hessian.curvature.batching import combine
from lightning_hessian.curvature.checks.diagnosis import Finding
from lightning_hessian.curvature.checks.prediction import Prediction, predict
from lightning_hessian.curvature.checks.result_check import CheckSettings, checked
from lightning_hessian.curvature.checks.verdict import PreviousChecks, Verdict, unchecked
from lightning_hessian.curvature.cost_model import ModelCosts, check_group
from lightning_hessian.curvature.meter import UNLIMITED, Meter, Progress, TimeLimit, duration, silent
from lightning_hessian.curvature.methods.conclusion import conclude
from lightning_hessian.curvature.methods.dense import dense_spectrum, whole_hessians
from lightning_hessian.curvature.methods.duration import NO_HEATMAPS, about_dropped
from lightning_hessian.curvature.methods.interface import MethodInput, MethodResult, Share
from lightning_hessian.curvature.methods.lanczos import lanczos_spectrum
from lightning_hessian.curvature.methods.low_rank import low_rank_spectrum
from lightning_hessian.curvature.methods.plan import Plan, remaining_memory
from lightning_hessian.curvature.options import MethodName, Options
from lightning_hessian.curvature.spectrum import Spectrum, zero_decomposition
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.errors import TimeLimitError

METHODS: dict[MethodName, Callable[[MethodInput], MethodResult]] = {
    "dense": dense_spectrum,
    "low_rank": low_rank_spectrum,
    "lanczos": lanczos_spectrum,
}

TOO_LATE = 0.1  # share of ``max_seconds`` by which a measurement may be late before it is said


@dataclass(frozen=True)
class Measurement:
    """What a measurement gave.

    Attributes:
        spectrum: of all samples.
        hessian: the whole matrices ``[S, K, D, D]`` of the first S samples where asked for.
        plan: what was planned.
        checks: for the next measurement of the same samples.
    """

    spectrum: Spectrum
    hessian: Tensor | None
    plan: Plan
    checks: PreviousChecks


@dataclass(frozen=True)
class _Results:
    gradient: Tensor
    of_method: MethodResult

    @property
    def prediction(self) -> Prediction:
        return self.of_method.prediction


def execute(
    batch: TargetBatch,
    plan: Plan,
    options: Options,
    *,
    target: str,
    analysis: Analysis | None = None,
    share: Share | None = None,
    meter: Meter | None = None,
    progress: Progress = silent,
) -> Measurement:
    """The spectra of a batch, and the whole matrices of its first samples, by the method that was planned.

    Results are compared with differences of values; what does not agree is explained, and measured again beside copies
    of the samples where that is the cure.

    Args:
        batch: what to differentiate: all samples the plan was made for, or some of them; with
            ``Analysis.stand_ins`` for those without finite derivatives.
        plan: from ``make_plan``; ``num_matrices`` counts samples of this batch.
        options: those the plan was made with.
        target: name of the target, for the result.
        analysis: of this batch, with the costs of one that contains it; otherwise both are determined here.
        share: of the measurement; None: this batch is the whole, and the first.
        meter: started when the measurement began.
        progress: called with the number of finished columns (``dense``), samples (``low_rank``) or matrix-vector
            products (``lanczos``).

    Raises:
        MeasurementError: no Hessian is finite, or one sample does not fit the memory.
        TimeLimitError: complete spectra will not be done within ``max_seconds``.
    """
    meter = meter or Meter(batch.x.device)
    options = plan.applied_to(options)
    share = share or Share(range(batch.num_samples), batch.num_samples)
    memory = options.memory(batch.x.device)
    costs = analysis.costs if analysis else ModelCosts(batch, memory)
    gradient = analysis.gradient if analysis else differentiate(batch, costs, memory).gradient
    diagnosis = plan.diagnosis
    given = MethodInput(
        batch,
        costs,
        gradient,
        diagnosis.network_is_piecewise_linear,
        options,
        memory if diagnosis.zero else remaining_memory(plan, batch, costs, options, memory),
        num_matrices=plan.num_matrices,
        limit=meter.limit(options.max_seconds),
        progress=progress,
    )
    results, verdict = _Results(gradient, _run(given, plan)), unchecked(batch)
    if options.check:
        dependence = analysis.dependence if analysis else ""
        results, verdict = _checked(given, plan, results, share, dependence)
    result = results.of_method
    conclusion = conclude(given, plan, result.decomposition, verdict, share)
    error = verdict.error
    if share.finite is not None and not share.finite.all():
        results, error = _without_stand_ins(results, error, share.finite.to(batch.x.device))
        result = results.of_method
    findings = _about_time(given.limit, options, (*plan.dropped, *result.dropped))
    spectrum = Spectrum(
        **vars(result.decomposition),
        gradient=results.gradient,
        method=plan.method,
        reason=plan.reason,
        autodiff_mode=result.autodiff_mode,
        target=target,
        finite_difference_error=error,
        valid=conclusion.valid,
        diagnosis=conclusion.diagnosis.with_findings(findings),
        cost=meter.cost(result.num_matvecs),
    )
    checks = verdict.passed_on(share.checks, _circumstances(plan, result), share.finite)
    return Measurement(spectrum, result.matrices if plan.num_matrices else None, plan, checks)


def _run(given: MethodInput, plan: Plan) -> MethodResult:
    """What the planned method gives, with the whole matrices that are wanted."""
    if plan.diagnosis.zero:
        return _zero_spectrum(given.gradient, given.options, given.num_matrices)
    result = METHODS[plan.method](given)
    if given.num_matrices and result.matrices is None:
        first = replace(given, batch=given.batch.select(slice(0, given.num_matrices)))
        try:
            result = replace(result, matrices=whole_hessians(first).matrices)
        except TimeLimitError:
            result = replace(result, dropped=(NO_HEATMAPS, *result.dropped))
    return result


def _without_stand_ins(results: _Results, error: Tensor, finite: Tensor) -> tuple[_Results, Tensor]:
    """The results and their errors, with NaN where another sample was computed in place of one that is not finite."""

    def own(tensors: list[Tensor]) -> Tensor:
        (values,) = tensors
        rows = finite[: len(values)].reshape(-1, *[1] * (values.dim() - 1))
        if values.dtype == torch.bool:
            return values & rows
        return values.where(rows, torch.nan) if values.is_floating_point() else values

    return combine([results], own), error.where(finite.unsqueeze(1), torch.nan)


def _about_time(limit: TimeLimit, options: Options, dropped: tuple[str, ...]) -> list[Finding]:
    """What was dropped to stay within ``max_seconds``, and by how much that did not help, in words."""
    findings = [Finding(about_dropped(options, dropped))] if dropped else []
    if limit.max_seconds is not None and limit.seconds_left < -TOO_LATE * limit.max_seconds:
        seconds = limit.max_seconds - limit.seconds_left
        sentence = (
            f"The measurement took {duration(seconds)}, more than max_seconds={limit.max_seconds:g}, and nothing more "
            f"could be left out. Measure fewer samples, classes or eigenvalues."
        )
        findings.append(Finding(sentence))
    return findings


def _zero_spectrum(gradient: Tensor, options: Options, num_matrices: int) -> MethodResult:
    """That of Hessians that are exactly zero."""
    num_inputs = gradient.shape[-1]
    num_listed = min(options.num_eigenvalues, num_inputs)
    matrices = gradient.new_zeros(num_matrices, *gradient.shape[1:], num_inputs)
    found = zero_decomposition(gradient, num_listed, num_listed)
    zero = torch.zeros_like(found.trace)
    prediction = predict(gradient, found.eigenvectors[:, :, 0], zero, lambda w: zero, options.generator())
    return MethodResult(found, prediction, matrices=matrices)


def _checked(
    given: MethodInput, plan: Plan, results: _Results, share: Share, dependence: str
) -> tuple[_Results, Verdict]:
    """Results, some of them computed again, and what the checks say about them."""
    due = None
    if share.checks is not None and share.checks.circumstances == _circumstances(plan, results.of_method):
        due = share.checks.due(share.numbers, share.num_samples)

    def again(few: TargetBatch, which: Tensor) -> _Results:
        half = given.memory_budget // 2  # every sample is computed twice
        new = replace(
            given,
            batch=few,
            gradient=differentiate(few, given.costs, half).gradient,
            memory_budget=half,
            num_matrices=int((which < given.num_matrices).sum()) if results.of_method.matrices is not None else 0,
            modes=("reverse_over_reverse",),
            limit=UNLIMITED,  # what is wrong is not shown in time
        )
        return _Results(new.gradient, _run(new, plan))

    return checked(
        given.batch,
        results,
        again,
        numbers=share.numbers,
        computed_by=results.of_method.autodiff_mode,
        settings=CheckSettings(
            check_group(given.costs, given.memory_budget), given.options.seed, given.piecewise_linear, dependence
        ),
        previous=share.checks,
        due=due,
    )


def _circumstances(plan: Plan, result: MethodResult) -> tuple[str, ...]:
    return plan.method, result.autodiff_mode, plan.diagnosis.kind, plan.diagnosis.network
