"""What one measurement of a run is to be: its target, method and size, decided by one process for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_hessian.curvature.analysis import Analysis, analyze
from lightning_hessian.curvature.checks.diagnosis import Finding, Kind
from lightning_hessian.curvature.checks.verdict import PreviousChecks
from lightning_hessian.curvature.cost_model import ModelCosts
from lightning_hessian.curvature.memory import readable
from lightning_hessian.curvature.meter import duration
from lightning_hessian.curvature.methods.duration import expected_duration, within_limit
from lightning_hessian.curvature.methods.plan import Plan, make_plan
from lightning_hessian.curvature.options import Options
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.errors import warn
from lightning_hessian.model.arguments import Target
from lightning_hessian.model.prepare import PreparedModel
from lightning_hessian.training.distributed import ProcessGroup
from lightning_hessian.training.run_state import RunState
from lightning_hessian.training.samples import Samples
from lightning_hessian.training.settings import MeasurementSettings

MAX_LISTED = 10  # classes named in a message


@dataclass(frozen=True)
class Decision:
    """What must be the same on all ranks: decided on rank 0, from all samples.

    Attributes:
        target: its name; None where the user gave a callable, which every rank has.
        classes: ``[N, K]``, on the CPU.
        plan: the method.
        stand_ins: ``[N]``, on the CPU; see ``Analysis.stand_ins``.
        checks: of the last measurement, or None.
        analysis: of all samples; it stays on rank 0.
    """

    target: str | None
    classes: Tensor
    plan: Plan
    stand_ins: Tensor
    checks: PreviousChecks | None
    analysis: Analysis | None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "analysis": None}


@dataclass(frozen=True)
class Expectation:
    """What a measurement will be, as far as it is known before most of its work.

    Attributes:
        what: its samples, inputs, classes, target and method, in words.
        seconds: that it is expected to take; None where unknown.
        remedy: the arguments of a monitor that make it shorter, in words.
    """

    what: str
    seconds: float | None
    remedy: str

    @property
    def how_long(self) -> str:
        """The seconds in words."""
        if self.seconds is None or self.seconds < 1:
            return "unknown" if self.seconds is None else "less than 1 s"
        return f"about {duration(self.seconds)}"


Expect = Callable[[Expectation], object]


def first_target(settings: MeasurementSettings, state: RunState) -> Any:
    """The target with which a measurement starts: ``"auto"`` looks at the outputs first."""
    return state.target or ("logit" if settings.target == "auto" else settings.target)


def decide(
    prepared: PreparedModel,
    samples: Samples,
    settings: MeasurementSettings,
    state: RunState,
    options: Options,
    group: ProcessGroup,
    expect: Expect,
) -> Decision:
    """Target and plan, from all samples."""
    known: Any = None if state.checks is None or state.previous is None else state.previous.network
    numbers = range(len(samples))
    examined = None if state.checks is None else state.checks.due(numbers, len(numbers)).to(prepared.batch.x.device)
    is_timed = options.max_seconds is not None and state.seconds_per_matvec is None  # also after a resume
    is_first = state.checks is None
    already: dict[str, Any] = {"forward": prepared.forward, "alone": is_first, "counted": state.counted_bytes}
    analysis = analyze(prepared.batch, options, known, is_timed=is_timed, examined=examined, **already)
    state.seconds_per_matvec = state.seconds_per_matvec or analysis.seconds_per_matvec
    network = analysis.diagnosis.network
    target = state.target or _choose_target(prepared, settings, network)
    if target != first_target(settings, state):
        prepared = prepared.with_target(target)
        again = analyze(prepared.batch, options, network, look_again=False, **{**already, "alone": False})
        analysis = replace(again, dependence=analysis.dependence or again.dependence)
    plan = make_plan(
        prepared.batch,
        analysis.costs,
        analysis.diagnosis,
        options,
        previous_method=state.method,
        num_matrices=min(settings.heatmap_samples, len(samples)),
    )
    if plan.memory_for_matrices is not None:
        finding = Finding(
            f"Whole matrices for heatmaps need {readable(plan.memory_for_matrices)}, and "
            f"{readable(options.memory(prepared.batch.x.device))} may be used, so no heatmap is drawn. Set "
            f"heatmap_samples=0, or max_memory={plan.memory_for_matrices} to make them fit."
        )
        plan = replace(plan, diagnosis=plan.diagnosis.with_findings([finding]))
    plan, seconds = _in_time(plan, prepared, analysis.costs, state, options, group)
    remedy = what_makes_it_shorter(plan, prepared.batch, options)
    expect(Expectation(_in_words(plan, prepared, settings), seconds, remedy))
    return Decision(
        target=None if callable(target) else target,
        classes=prepared.batch.classes.cpu(),
        plan=plan,
        stand_ins=analysis.stand_ins.cpu(),
        checks=state.checks,
        analysis=analysis,
    )


def _in_time(
    plan: Plan,
    prepared: PreparedModel,
    costs: ModelCosts,
    state: RunState,
    options: Options,
    group: ProcessGroup,
) -> tuple[Plan, float | None]:
    """The plan without what surely does not fit ``max_seconds``, and how many seconds it is expected to take."""
    batch = prepared.batch
    seconds = state.seconds_per_matvec
    if seconds is not None:
        seconds *= group.share(batch.num_samples).stop / batch.num_samples  # rank 0 has the most
    left = prepared.meter.limit(options.max_seconds).seconds_left
    plan = within_limit(plan, batch, costs, options, seconds_per_matvec=seconds, seconds_left=left)
    expected = None if state.previous is None else state.previous.seconds
    if expected is None and seconds is not None:
        expected = expected_duration(plan, batch, costs, options, seconds)
        expected = min(expected, options.max_seconds or expected)
    return plan, expected


def _in_words(plan: Plan, prepared: PreparedModel, settings: MeasurementSettings) -> str:
    """What is measured, and how."""
    num_samples, num_classes, num_inputs = prepared.batch.shape
    ids = settings.classes
    if ids == "all":
        classes = f"all {num_classes} classes"
    elif isinstance(ids, str):
        classes = f"class {ids!r}"
    else:
        first = prepared.batch.classes[0, :MAX_LISTED].tolist()
        more = f", … ({num_classes} in all)" if num_classes > MAX_LISTED else ""
        classes = f"{'class' if num_classes == 1 else 'classes'} {', '.join(map(str, first))}{more}"
    samples = "1 sample" if num_samples == 1 else f"{num_samples} samples"
    return f"{samples}, D = {num_inputs}, {classes} of {prepared.target_name}, method {plan.method} ({plan.reason})"


def what_makes_it_shorter(plan: Plan, batch: TargetBatch, options: Options) -> str:
    """The arguments of a monitor that do, in words."""
    found = ["heatmap_samples=0"] if plan.num_matrices and plan.method == "lanczos" else []
    found += ["fewer num_samples"] if batch.num_samples > 1 else []
    found += ["fewer classes"] if batch.num_classes > 1 else []
    found += ["method='lanczos'"] if plan.method == "dense" else []
    found += ["max_seconds"] if options.max_seconds is None else []
    return f"{', '.join(found[:-1])} or {found[-1]}" if len(found) > 1 else "".join(found)


def _choose_target(prepared: PreparedModel, settings: MeasurementSettings, network: Kind) -> Target:
    """For ``"auto"``: ``"logit"``, or ``"prob"`` if the network is piecewise linear and has several outputs."""
    if settings.target != "auto":
        return settings.target
    if network not in ("linear", "piecewise_linear") or prepared.num_outputs == 1:
        return "logit"
    warn(
        f"{settings.title}: the network is {network.replace('_', ' ')} in its input"
        f"{' (as ReLU networks are)' if network == 'piecewise_linear' else ''}, so the Hessian of its outputs is zero. "
        f"target='auto' measures 'prob' instead, a softmax of the {prepared.num_outputs} outputs. If these are not the "
        f"logits of classes, as in a regression, give target='logit', whose Hessian is zero, or a callable such as a "
        f"squared error.",
    )
    return "prob"
