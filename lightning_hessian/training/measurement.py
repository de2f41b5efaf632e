"""What is measured at every visit: a model and a samples in, a record out. Knows no Trainer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

import lightning_hessian
from lightning_hessian.curvature.checks.diagnosis import Diagnosis
from lightning_hessian.curvature.cost_model import Facts
from lightning_hessian.curvature.methods.execute import Measurement, diagnose_finite, measure
from lightning_hessian.curvature.methods.merge import joined, on_cpu
from lightning_hessian.curvature.methods.plan import Options, Plan, make_plan
from lightning_hessian.curvature.progress import Progress, silent
from lightning_hessian.curvature.spectrum import MethodName
from lightning_hessian.errors import ConfigurationError, MeasurementError
from lightning_hessian.model.function import ForwardFunction, OutputFunction, differentiated
from lightning_hessian.model.prepare import Model, Target, Task, check_input, prepared
from lightning_hessian.model.targets import TARGET_NAMES
from lightning_hessian.records.color_scale import run_scale
from lightning_hessian.records.record import Array, ClassId, Record, Stage, make_record
from lightning_hessian.records.subspace import TopVectors, drift, top_vectors
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
        top: the top eigenvectors of the last record, with which the next ones are compared.
        scale: where the colours of the Hessians' pictures end, see ``picture_scale.run_scale``.
    """

    target: Target | None = None
    method: MethodName | None = None
    top: TopVectors | None = None
    scale: Array | None = None


@dataclass(frozen=True)
class Decision:
    """What must be one and the same on all ranks, decided on rank 0 from all samples; ``target`` None: a callable."""

    target: str | None
    dtype: torch.dtype
    classes: Tensor
    diagnosis: Diagnosis
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
        ranks: ProcessGroup = SINGLE_PROCESS,
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
            ranks: the processes that measure together, all of which must call.
            progress: is told how far it is.

        Returns:
            The record, on rank 0; None on the others.

        Raises:
            ConfigurationError: the options do not fit the model.
            MeasurementError: no number was found that may be shown; the message says why, the same on all ranks.
        """
        when = {"step": step, "logged_step": logged_step, "epoch": epoch, "stage": stage}
        tensors = ranks.tensors(model) if isinstance(model, nn.Module) else {}
        if ranks.size == 1:
            with _in_words(samples):
                task, measurement = self._measure_alone(model, samples, tensors, progress)
            return self._record(samples, task, measurement, when)
        decision = ranks.first(lambda: self._decide(model, samples, ranks, tensors))
        self.state.target = self.target if decision.target is None else decision.target  # type: ignore[assignment]
        if decision.plan.lasts:
            self.state.method = decision.plan.method
        task, part = ranks.together(lambda: self._measure_share(model, samples, ranks, tensors, decision, progress))
        parts = ranks.gather(part)

        def finish() -> Record | None:
            if parts is None:
                return None
            some = [part for part in parts if part is not None]
            return self._record(samples, task, joined(some, decision.diagnosis, task.meter), when)

        return ranks.together(finish)

    def _measure_alone(
        self, model: Model, samples: Samples, tensors: Mapping[str, Tensor], progress: Progress
    ) -> tuple[Task, Measurement]:
        self.state.target = self.state.target or self._choose_target(model, samples, tensors)
        with self._prepared(model, samples, self.state.target, tensors) as task:
            num_matrices = min(self.heatmap_samples, len(samples))
            measurement = measure(
                task.batch,
                task.target_name,
                self.options,
                num_matrices=num_matrices,
                kept=self.state.method,
                meter=task.meter,
                progress=progress,
            )
        return task, measurement

    def _decide(self, model: Model, samples: Samples, ranks: ProcessGroup, tensors: Mapping[str, Tensor]) -> Decision:
        target = self.state.target or self._choose_target(model, samples, tensors)
        with self._prepared(model, samples, target, tensors) as task:
            batch = task.batch
            options = ranks.options(self.options, batch.x.device)
            facts = Facts(batch, options.seed)
            diagnosis = diagnose_finite(batch, options, facts)
            num_matrices = min(self.heatmap_samples, len(samples))
            plan = make_plan(batch, facts, diagnosis, options, self.state.method, num_matrices)
            if plan.finding:
                diagnosis = replace(diagnosis, findings=(*diagnosis.findings, plan.finding))
        name = None if callable(target) else target
        return Decision(name, batch.x.dtype, batch.classes.cpu(), diagnosis, plan)

    def _measure_share(
        self,
        model: Model,
        samples: Samples,
        ranks: ProcessGroup,
        tensors: Mapping[str, Tensor],
        decision: Decision,
        progress: Progress,
    ) -> tuple[Task, Measurement | None]:
        """This rank's samples; None where there are fewer samples than ranks."""
        assert self.state.target is not None
        with self._prepared(model, samples, self.state.target, tensors, decision.dtype) as task:
            task = replace(task, batch=replace(task.batch, classes=decision.classes.to(task.batch.x.device)))
            mine = ranks.share(task.batch.num_samples)
            if mine.start == mine.stop:
                return task, None
            part = measure(
                task.batch.select(mine),
                task.target_name,
                ranks.options(self.options, task.batch.x.device),
                diagnosis=decision.diagnosis,
                num_matrices=max(0, min(self.heatmap_samples, mine.stop) - mine.start),
                plan=decision.plan,
                progress=progress,
            )
            return task, on_cpu(part)

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
        before, self.state.top = self.state.top, top_vectors(record)
        turned = drift(before, self.state.top)
        self.state.scale = run_scale(self.state.scale, record.hessian)
        return replace(
            record,
            top_eigenvector_cosine=turned.cosine,
            top_subspace_overlap=turned.overlap,
            picture_scale=self.state.scale,
        )

    @contextmanager
    def _prepared(
        self,
        model: Model,
        samples: Samples,
        target: Target,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
    ) -> Iterator[Task]:
        classes: Any = samples.labels if self.classes == "label" else self.classes
        with prepared(
            model,
            samples.inputs,
            classes,
            target,
            dtype=dtype or DTYPES[self.dtype],
            wrt=self.wrt,
            forward_fn=self.forward_fn,
            output_fn=self.output_fn,
            max_memory=self.options.max_memory,
            tensors=tensors,
        ) as task:
            if self.class_names and len(self.class_names) != task.num_outputs:
                raise ConfigurationError(
                    f"class_names has {len(self.class_names)} names, and the model has {task.num_outputs} outputs."
                )
            yield task

    def _choose_target(self, model: Model, samples: Samples, tensors: Mapping[str, Tensor]) -> Target:
        """``"logit"``, unless the network is piecewise linear and has several outputs: then ``"prob"``."""
        if self.target != "auto":
            return self.target
        with self._prepared(model, samples, "logit", tensors) as task:
            diagnosis = diagnose_finite(task.batch, self.options)
        _check_trusted(diagnosis)
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
