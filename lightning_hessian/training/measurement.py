"""What is measured at every visit: a model and a samples in, a record out. Knows no Trainer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

import lightning_hessian
from lightning_hessian.curvature.analysis import Analysis, analyze
from lightning_hessian.curvature.checks.diagnosis import Diagnosis
from lightning_hessian.curvature.methods.execute import Measurement, execute
from lightning_hessian.curvature.methods.merge import merged, on_cpu
from lightning_hessian.curvature.methods.plan import Options, Plan, make_plan
from lightning_hessian.curvature.progress import Progress, silent
from lightning_hessian.curvature.spectrum import MethodName
from lightning_hessian.errors import ConfigurationError, MeasurementError
from lightning_hessian.model.function import ForwardFunction, OutputFunction, differentiated
from lightning_hessian.model.prepare import Model, Target, Task, check_input, prepared
from lightning_hessian.model.targets import TARGET_NAMES
from lightning_hessian.records.color_scale import run_scale
from lightning_hessian.records.record import ClassId, Record, Stage, make_record
from lightning_hessian.records.subspace import subspace_overlap
from lightning_hessian.training.distributed import SINGLE_PROCESS, ProcessGroup
from lightning_hessian.training.samples import Samples

DTYPES = {"float32": torch.float32, "float64": torch.float64}
CLASS_CHOICES = ("label", "predicted", "all")


@dataclass
class RunState:
    """What the measurements of one run hand on, so that its curves are of one kind; a checkpoint keeps it.

    Attributes:
        target: what ``"auto"`` chose.
        method: what ``"auto"`` chose by clock or memory, where the choice might otherwise change during the run.
        previous: the last record, without whole matrices.
    """

    target: Target | None = None
    method: MethodName | None = None
    previous: Record | None = None


@dataclass(frozen=True)
class Decision:
    """What must be one and the same on all ranks, decided on rank 0 from all samples; ``target`` None: a callable."""

    target: str | None
    classes: Tensor
    plan: Plan


@dataclass
class Monitor:
    """Measures the same problems again and again, as a network changes.

    Args:
        classes: ``"label"``, ``"predicted"``, ``"all"``, an int or ints.
        target: a target, or ``"auto"``: chosen at the first measurement and kept.
        dtype: ``"float32"`` or ``"float64"``.
        options: how to measure.
        heatmap_samples: for how many samples whole matrices are kept in the record.
        class_names: names of all classes.
        forward_fn: ``(model, x) -> output``.
        output_fn: ``output -> [N, C]``.
        wrt: one of several inputs, or the name of the submodule whose output is the variable.
        name: tells this monitor's records and warnings from those of others.

    Raises:
        ConfigurationError: an argument is not one of those allowed.
    """

    classes: int | Sequence[int] | str
    target: Target | Literal["auto"]
    dtype: str
    options: Options
    heatmap_samples: int = 1
    class_names: tuple[str, ...] | None = None
    forward_fn: ForwardFunction | None = None
    output_fn: OutputFunction | None = None
    wrt: str | int | None = None
    name: str | None = None
    state: RunState = field(default_factory=RunState, init=False)

    def __post_init__(self) -> None:
        if not callable(self.target):
            check_choice("target", self.target, ("auto", *TARGET_NAMES))
        if isinstance(self.classes, str):
            check_choice("classes", self.classes, CLASS_CHOICES)
        check_choice("dtype", self.dtype, tuple(DTYPES))
        check_at_least("heatmap_samples", self.heatmap_samples, 0)
        if self.name is not None and not (isinstance(self.name, str) and re.fullmatch("[A-Za-z0-9_-]+", self.name)):
            raise ConfigurationError(
                f"name={self.name!r} goes into tags and names a folder: use letters, digits, '-' and '_', at least one."
            )

    @property
    def title(self) -> str:
        """How this monitor calls itself in warnings."""
        return "InputHessianMonitor" if self.name is None else f"InputHessianMonitor '{self.name}'"

    def check(self, samples: Samples) -> None:
        """Tells at once whether the samples has what is needed.

        Raises:
            ConfigurationError: labels are wanted and missing, or the input is not floating point.
        """
        x = differentiated(samples.inputs, self.wrt)
        if x is not None:
            check_input(x)
        if self.classes == "label" and samples.labels is None:
            raise ConfigurationError(
                "classes='label' needs integer labels [N], and the samples have none. Give classes as ints (0 for an "
                "only output), 'predicted' or 'all', or an input_fn that gives (x, labels)."
            )

    def measure(
        self,
        model: Model,
        samples: Samples,
        *,
        step: int,
        logged_step: int,
        epoch: int,
        stage: Stage = "fit",
        group: ProcessGroup = SINGLE_PROCESS,
        progress: Progress = silent,
    ) -> Record | None:
        """One measurement of ``model`` as it is now.

        Args:
            model: what is measured; with several ranks a module.
            samples: the samples, the same on all ranks.
            step: optimizer steps so far.
            logged_step: the loggers' step.
            epoch: whose training made these weights.
            stage: what the Trainer is doing.
            group: the processes that measure together, all of which must call.
            progress: is told how far it is.

        Returns:
            The record, on rank 0; None on the others.

        Raises:
            ConfigurationError: the options do not fit the model.
            MeasurementError: no number was found that may be shown; the message says why, the same on all ranks.
        """
        when = {"step": step, "logged_step": logged_step, "epoch": epoch, "stage": stage}
        tensors = group.tensors(model) if isinstance(model, nn.Module) else {}
        with ExitStack() as stack:
            task = group.together(lambda: stack.enter_context(self._prepared(model, samples, tensors)))
            analysis: Analysis | None = None

            def decide() -> Decision:
                nonlocal analysis
                decision, analysis = self._decide(task, samples, group)
                return decision

            decision = group.first(decide)
            task = self._agreed(task, decision)
            mine = group.share(task.batch.num_samples)
            here = None if analysis is None else replace(analysis, gradient=analysis.gradient[mine])
            part = group.together(lambda: self._measure_share(task, samples, mine, group, decision, here, progress))
            parts = group.gather(part)

            def finish() -> Record | None:
                if parts is None:
                    return None
                some = [part for part in parts if part is not None]
                return self._record(samples, task, merged(some, decision.plan.diagnosis, task.meter), when)

            return group.together(finish)

    def _decide(self, task: Task, samples: Samples, group: ProcessGroup) -> tuple[Decision, Analysis]:
        """Target and plan, from all samples; on rank 0."""
        options = group.options(self.options, task.batch.x.device)
        with _in_words(samples):
            analysis = analyze(task.batch, options)
            _check_trusted(analysis.diagnosis)
            target = self.state.target or self._choose_target(task, analysis.diagnosis)
            if target != self._first_target:
                task = task.with_target(target)
                analysis = analyze(task.batch, options, analysis.diagnosis)
            plan = make_plan(
                task.batch,
                analysis.costs,
                analysis.diagnosis,
                options,
                previous_method=self.state.method,
                num_matrices=min(self.heatmap_samples, len(samples)),
            )
        return Decision(None if callable(target) else target, task.batch.classes.cpu(), plan), analysis

    def _agreed(self, task: Task, decision: Decision) -> Task:
        """The task as rank 0 decided; what it chose is kept for the run."""
        target: Any = self._first_target if decision.target is None else decision.target
        if target != self._first_target:
            task = task.with_target(target)
        self.state.target = target
        if decision.plan.lasts:
            self.state.method = decision.plan.method
        return replace(task, batch=replace(task.batch, classes=decision.classes.to(task.batch.x.device)))

    @property
    def _first_target(self) -> Any:
        """The target with which a measurement begins."""
        return self.state.target or ("logit" if self.target == "auto" else self.target)

    def _measure_share(
        self,
        task: Task,
        samples: Samples,
        mine: slice,
        group: ProcessGroup,
        decision: Decision,
        analysis: Analysis | None,
        progress: Progress,
    ) -> Measurement | None:
        """This rank's samples; None where there are fewer samples than ranks."""
        if mine.start == mine.stop:
            return None
        plan = decision.plan
        if plan.num_matrices:
            plan = replace(plan, num_matrices=max(0, min(self.heatmap_samples, mine.stop) - mine.start))
        with _in_words(samples):
            return on_cpu(
                execute(
                    task.batch.select(mine),
                    plan,
                    group.options(self.options, task.batch.x.device),
                    target=task.target_name,
                    analysis=analysis,
                    meter=task.meter,
                    progress=progress,
                )
            )

    def _record(self, samples: Samples, task: Task, measurement: Measurement, when: Mapping[str, Any]) -> Record:
        _check_trusted(measurement.spectrum.diagnosis)
        if measurement.plan.lasts:
            self.state.method = measurement.plan.method
        record = make_record(
            measurement,
            name=self.name,
            **when,
            x=task.batch.x,
            labels=samples.labels,
            predicted=task.predicted,
            classes=task.batch.classes,
            class_ids=self._class_ids(task),
            class_names=self.class_names,
            made_with=self._made_with(task, measurement),
        )
        previous = self.state.previous
        overlap = subspace_overlap(previous, record)
        record = record.with_metrics(top_eigenvector_cosine=overlap.cosine, top_subspace_overlap=overlap.overlap)
        record = replace(
            record, color_scale=run_scale(None if previous is None else previous.color_scale, record.hessian)
        )
        self.state.previous = replace(record, hessian=None)
        return record

    @contextmanager
    def _prepared(self, model: Model, samples: Samples, tensors: Mapping[str, Tensor]) -> Iterator[Task]:
        classes: Any = samples.labels if self.classes == "label" else self.classes
        with (
            _in_words(samples),
            prepared(
                model,
                samples.inputs,
                classes,
                self._first_target,
                dtype=DTYPES[self.dtype],
                wrt=self.wrt,
                forward_fn=self.forward_fn,
                output_fn=self.output_fn,
                max_memory=self.options.max_memory,
                tensors=tensors,
            ) as task,
        ):
            if self.class_names and len(self.class_names) != task.num_outputs:
                raise ConfigurationError(
                    f"class_names has {len(self.class_names)} names, and the model has {task.num_outputs} outputs."
                )
            yield task

    def _choose_target(self, task: Task, diagnosis: Diagnosis) -> Target:
        """``"logit"``, unless the network is piecewise linear and has several outputs: then ``"prob"``."""
        if self.target != "auto":
            return self.target
        network = diagnosis.network
        if network not in ("linear", "piecewise_linear") or task.num_outputs == 1:
            return "logit"
        warnings.warn(
            f"{self.title}: the network is {network.replace('_', ' ')} in its input (as ReLU networks are), so the "
            f"Hessian of its outputs is zero everywhere. target='auto' measures 'prob' instead; give target=... to "
            f"choose.",
            stacklevel=2,
        )
        return "prob"

    def _class_ids(self, task: Task) -> tuple[ClassId, ...]:
        if self.classes in ("label", "predicted"):
            return (str(self.classes),)
        return tuple(task.batch.classes[0].tolist())

    def _made_with(self, task: Task, measurement: Measurement) -> dict[str, Any]:
        return {
            "lightning_hessian": lightning_hessian.__version__,
            "torch": torch.__version__,
            "dtype": self.dtype,
            "device": str(task.batch.x.device),
            "seconds_per_hvp": measurement.plan.seconds_per_hvp,
            "expected_seconds": dict(measurement.plan.expected_seconds),
            **vars(self.options),
        }


@contextmanager
def _in_words(samples: Samples) -> Iterator[None]:
    """A user's model may fail in any way: it is told with the shape of the samples."""
    try:
        yield
    except (ConfigurationError, MeasurementError):
        raise
    except Exception as error:
        raise MeasurementError(
            f"Measuring failed ({type(error).__name__}: {error}). The samples has the shape {samples.shapes}: if the "
            f"model does not take it as it is, give input_fn, forward_fn or another samples."
        ) from error


def _check_trusted(diagnosis: Diagnosis) -> None:
    if not diagnosis.trusted:
        raise MeasurementError(f"The input-Hessian is not to be trusted. {diagnosis.message}")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises a sentence if ``value`` is not one of ``allowed``."""
    if value not in allowed:
        raise ConfigurationError(f"{name}={value!r} is not known. Choose one of {', '.join(map(repr, allowed))}.")


def check_names(names: Sequence[str | None]) -> None:
    """Raises a sentence if two monitors of one Trainer have one name."""
    folders = ["" if name is None else name.lower() for name in names]  # some file systems know no case
    for name, folder in zip(names, folders, strict=True):
        if folders.count(folder) > 1:
            raise ConfigurationError(
                f"{folders.count(folder)} monitors of this Trainer have name={name!r} and would write to the same tags "
                f"and files. Give each a name of its own, for example name='a' and name='b'."
            )


def check_at_least(name: str, value: object, least: int) -> None:
    """Raises a sentence if ``value`` is not a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigurationError(f"{name}={value!r} must be a whole number of at least {least}.")
