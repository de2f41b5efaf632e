"""One measurement: a model and samples in, a record out, by one process or several. Knows no Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_hessian.curvature.checks.verdict import PreviousChecks
from lightning_hessian.curvature.meter import Progress, silent
from lightning_hessian.curvature.methods.duration import ends_only
from lightning_hessian.curvature.methods.execute import Measurement, execute
from lightning_hessian.curvature.methods.interface import Share
from lightning_hessian.curvature.methods.merge import merged, on_cpu
from lightning_hessian.curvature.options import Options
from lightning_hessian.errors import ConfigurationError, MeasurementError, TimeLimitError, warn
from lightning_hessian.model.arguments import Model
from lightning_hessian.model.differentiation_errors import line_of_forward
from lightning_hessian.model.function import ModelFunction
from lightning_hessian.model.prepare import PreparedModel, prepare, usable_dtype
from lightning_hessian.records.record import Record, Stage
from lightning_hessian.training.decision import Decision, Expect, decide, first_target
from lightning_hessian.training.distributed import SINGLE_PROCESS, ProcessGroup
from lightning_hessian.training.forward_checks import check_forward, check_initialized
from lightning_hessian.training.recording import make_record
from lightning_hessian.training.run_state import RunState
from lightning_hessian.training.samples import Samples
from lightning_hessian.training.schedule import START, TrainingPosition
from lightning_hessian.training.settings import MeasurementSettings


@dataclass(frozen=True)
class _Share:
    """What a rank has measured.

    Attributes:
        prepared: the model as rank 0 decided.
        measurement: of its samples; None where there are fewer samples than ranks, or it is late.
        late: whether complete spectra would not have been done in time.
    """

    prepared: PreparedModel
    measurement: Measurement | None = None
    late: bool = False


def measure(
    model: Model,
    samples: Samples,
    settings: MeasurementSettings,
    state: RunState | None = None,
    *,
    position: TrainingPosition = START,
    stage: Stage = "fit",
    group: ProcessGroup = SINGLE_PROCESS,
    progress: Progress = silent,
    expect: Expect = lambda expected: None,
) -> Record | None:
    """Measures ``model`` as it is now, by all processes of ``group`` together.

    Every rank calls the same collectives in this order, a group of one rank too; a step that fails on any rank raises
    the same error on all of them, and the steps after it do not happen:

    1. ``tensors``: sharded parameters are gathered, and buffers broadcast from rank 0;
    2. ``on_first``: rank 0 finds the dtype in which the model can be evaluated;
    3. ``on_all``: every rank prepares the model;
    4. ``on_first``: rank 0 analyzes all samples, chooses the target and plans;
    5. ``on_all``: every rank measures its share of the samples; where that may turn out to take too long,
       ``any``: whether it did on some rank; then ``on_all`` again, for the ends of the spectra only;
    6. ``on_all``: every rank puts the model back as it was;
    7. ``gather``: rank 0 receives the shares;
    8. ``on_all``: rank 0 makes the record.

    Args:
        model: what is measured; in a group of several ranks a module.
        samples: the same on all ranks.
        settings: what is measured, and how.
        state: of the run; it is updated. None: this measurement stands alone.
        position: where training is.
        stage: what the Trainer is doing.
        group: the processes.
        progress: is called with the number of finished columns, samples or matrix-vector products.
        expect: is called on rank 0, before most of the work, with what the measurement will be.

    Returns:
        The record, on rank 0; None on the others.

    Raises:
        ConfigurationError: the settings do not fit the model.
        MeasurementError: there is no number that may be shown; the message says why.
    """
    state = RunState() if state is None else state
    with _explained(samples), ExitStack() as stack:
        if isinstance(model, nn.Module):
            check_initialized(model)
            check_forward(model, samples.inputs, settings)
        tensors = group.tensors(model) if isinstance(model, nn.Module) else {}
        network = ModelFunction(model, settings.forward_fn, settings.output_fn, settings.wrt, tensors)
        dtype = group.on_first(lambda: usable_dtype(network, samples.inputs, getattr(torch, settings.dtype)))

        def start() -> tuple[PreparedModel, Options]:
            prepared = stack.enter_context(_prepared(network, samples, settings, state, dtype))
            return prepared, group.options(settings.options, prepared.batch.x.device)

        prepared, options = group.on_all(start)
        decision = group.on_first(lambda: decide(prepared, samples, settings, state, options, group, expect))

        def share() -> _Share:
            return _measure_share(prepared, decision, settings, state, options, group, progress)

        own = group.on_all(share)
        may_be_late = options.max_seconds is not None and options.method == "auto" and decision.plan.method == "dense"
        if may_be_late and group.any(own.late):
            decision = replace(decision, plan=ends_only(decision.plan, options))
            own = group.on_all(share)
        agreed = own.prepared
        group.on_all(stack.close)
    shares = group.gather(own.measurement)

    def record() -> Record | None:
        if shares is None:
            return None
        measurement = merged([s for s in shares if s is not None], agreed.meter)
        when = {"step": position.step, "logged_step": position.logged_step, "epoch": position.epoch, "stage": stage}
        _check_valid(measurement, settings, state.checks)
        made = make_record(agreed, measurement, samples, settings, state.previous, **when)
        state.previous, state.checks = replace(made, hessian=None), measurement.checks
        if decision.plan.reuse_for_run:
            state.method = decision.plan.method
        return made

    return group.on_all(record)


@contextmanager
def _prepared(
    network: ModelFunction, samples: Samples, settings: MeasurementSettings, state: RunState, dtype: torch.dtype
) -> Iterator[PreparedModel]:
    """The model inside its isolation, with the target that is known so far."""
    classes: Any = settings.classes
    target, max_memory = first_target(settings, state), settings.options.max_memory
    with prepare(
        network, samples.inputs, classes, target, labels=samples.labels, dtype=dtype, max_memory=max_memory
    ) as prepared:
        names = settings.class_names
        if names and len(names) != prepared.num_outputs:
            raise ConfigurationError(
                f"class_names has {len(names)} names, and the model has {prepared.num_outputs} outputs."
            )
        yield prepared


def _follow(
    decision: Decision, prepared: PreparedModel, settings: MeasurementSettings, state: RunState
) -> PreparedModel:
    """The model as rank 0 decided; the run remembers the target."""
    first = first_target(settings, state)
    target: Any = first if decision.target is None else decision.target
    state.target = target
    if target != first:
        prepared = prepared.with_target(target)
    return replace(prepared, batch=replace(prepared.batch, classes=decision.classes.to(prepared.batch.x.device)))


def _measure_share(
    prepared: PreparedModel,
    decision: Decision,
    settings: MeasurementSettings,
    state: RunState,
    options: Options,
    group: ProcessGroup,
    progress: Progress,
) -> _Share:
    """The model as rank 0 decided, and this rank's samples."""
    prepared = _follow(decision, prepared, settings, state)
    share = group.share(prepared.batch.num_samples)
    if share.start == share.stop:
        return _Share(prepared)
    plan, analysis = decision.plan, decision.analysis
    if plan.num_matrices:
        plan = replace(plan, num_matrices=max(0, min(settings.heatmap_samples, share.stop) - share.start))
    stand_ins = decision.stand_ins[share]
    numbers = range(share.start, share.stop)
    run = partial(
        execute,
        prepared.batch.select(stand_ins.to(prepared.batch.x.device)),
        plan,
        options,
        target=prepared.target_name,
        analysis=None if analysis is None else analysis.select(stand_ins.to(analysis.finite.device)),
        share=Share(
            numbers,
            prepared.batch.num_samples,
            finite=stand_ins == torch.tensor(numbers),
            checks=None if decision.checks is None else decision.checks.select(share),
        ),
        meter=prepared.meter,
        progress=progress,
    )
    try:
        return _Share(prepared, on_cpu(run()))
    except TimeLimitError:
        if options.method != "auto":
            raise
        return _Share(prepared, late=True)


@contextmanager
def _explained(samples: Samples) -> Iterator[None]:
    """Raises whatever a user's model may raise as a MeasurementError that says what can be done."""
    try:
        yield
    except (ConfigurationError, MeasurementError):
        raise
    except Exception as error:
        message = f"{type(error).__name__}: {error}".rstrip(".")
        where = line_of_forward(error)
        raise MeasurementError(
            f"{message}. The samples have the shape {samples.shapes}: if the model does not take them as they are, "
            f"give input_fn, forward_fn or other samples; if it takes all entries of a dict, name the one to "
            f"differentiate with wrt."
            f"{where and f' The error was raised {where}.'}"
        ) from error


def _check_valid(measurement: Measurement, settings: MeasurementSettings, before: PreviousChecks | None) -> None:
    """Raises unless there is a number to show; warns where some are not valid that were ``before``."""
    spectrum = measurement.spectrum
    if not spectrum.valid.any():
        message = f"No input Hessian can be trusted. {spectrum.diagnosis.message}"
        raise MeasurementError(message, cause=f"not valid: {spectrum.diagnosis.kind}")
    invalid = (~spectrum.valid).any(dim=1)
    num_invalid = int(invalid.sum())
    if num_invalid and (before is None or (invalid & before.valid).any()):
        warn(
            f"{settings.title}: {num_invalid} of {len(spectrum.valid)} samples are not valid and are left out. "
            f"{' '.join(map(str, spectrum.diagnosis.findings))}",
        )
