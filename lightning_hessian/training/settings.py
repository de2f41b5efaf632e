"""What a monitor was asked to do, checked once, when it is constructed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict

from lightning_hessian.curvature.options import ChunkSize, MethodChoice, Options
from lightning_hessian.errors import ConfigurationError, check_choice, store_whole_numbers, whole_number
from lightning_hessian.model.arguments import Target, check_distinct, check_input
from lightning_hessian.model.function import ForwardFunction, differentiated
from lightning_hessian.model.outputs import OutputFunction
from lightning_hessian.model.targets import TARGET_NAMES
from lightning_hessian.records.retention import KeepMatrices, keep_policy
from lightning_hessian.training.batch import InputFunction
from lightning_hessian.training.samples import Samples, SampleSource
from lightning_hessian.training.schedule import Schedule

DTYPES = ("float32", "float64")
CLASS_CHOICES = ("label", "predicted", "all")


@dataclass(frozen=True)
class MeasurementSettings:
    """What is measured at every measurement of a run, and how: arguments of ``InputHessianMonitor``.

    Raises:
        ConfigurationError: an argument is not allowed; the message says what is.
    """

    classes: int | Sequence[int] | str = "label"
    target: Target | Literal["auto"] = "auto"
    dtype: str = "float32"
    options: Options = field(default_factory=Options)
    heatmap_samples: int = 1
    class_names: tuple[str, ...] | None = None
    forward_fn: ForwardFunction | None = None
    output_fn: OutputFunction | None = None
    wrt: str | int | None = None
    name: str | None = None
    owner: str = "InputHessianMonitor"

    def __post_init__(self) -> None:
        if not callable(self.target):
            check_choice("target", self.target, ("auto", *TARGET_NAMES))
        object.__setattr__(self, "classes", _class_choice(self.classes))
        check_choice("dtype", self.dtype, DTYPES)
        store_whole_numbers(self, heatmap_samples=0)
        if self.name is not None and not (isinstance(self.name, str) and re.fullmatch("[A-Za-z0-9_-]+", self.name)):
            raise ConfigurationError(
                f"name={self.name!r} is used in tags and folder names: use letters, digits, '-' and '_', at least one."
            )

    @property
    def title(self) -> str:
        """What the monitor or recorder calls itself in messages."""
        return self.owner if self.name is None else f"{self.owner} '{self.name}'"

    def check_samples(self, samples: Samples) -> None:
        """Checks that the samples hold what these settings need.

        Raises:
            ConfigurationError: labels are needed and missing, or the differentiated input is not floating point.
        """
        x = differentiated(samples.inputs, self.wrt)
        if x is not None:
            check_input(x)
        if self.classes == "label" and samples.labels is None:
            raise ConfigurationError(
                "classes='label' needs integer labels [N], and the samples have none. Give classes as ints (0 for a "
                "single output), 'predicted' or 'all', or an input_fn that returns (x, labels)."
            )


@dataclass(frozen=True)
class MonitorSettings:
    """Everything a monitor was asked to do: arguments of ``InputHessianMonitor``.

    Raises:
        ConfigurationError: an argument is not allowed; the message says what is.
    """

    measurement: MeasurementSettings
    samples: SampleSource
    schedule: Schedule
    max_overhead: float | None = None
    keep_matrices: KeepMatrices | None = None
    on_error: Literal["warn", "raise"] = "warn"

    def __post_init__(self) -> None:
        check_choice("on_error", self.on_error, ("warn", "raise"))
        share = self.max_overhead
        is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if share is not None and not (is_number and 0 < share <= 1):
            raise ConfigurationError(
                f"max_overhead={share!r} must be a number above 0 and up to 1, the share of the training time that "
                f"measuring may take (0.05 for a twentieth), or None for no limit."
            )


class MonitorOptions(TypedDict, total=False):
    """How to measure and what to keep: arguments of ``InputHessianMonitor`` and ``InputHessianRecorder``."""

    sample_indices: Sequence[int] | None
    num_samples: int
    heatmap_samples: int
    method: MethodChoice
    num_eigenvalues: int
    density_vectors: int
    dtype: Literal["float32", "float64"]
    wrt: str | int | None
    input_fn: InputFunction | None
    forward_fn: ForwardFunction | None
    output_fn: OutputFunction | None
    chunk_size: ChunkSize
    max_memory: int | None
    max_seconds: float | None
    max_overhead: float | None
    keep_matrices: bool | int | KeepMatrices
    class_names: Sequence[str] | None
    on_error: Literal["warn", "raise"]
    seed: int
    name: str | None


class RecorderOptions(MonitorOptions, total=False):
    """``MonitorOptions``, with classes and target."""

    classes: int | Sequence[int] | str
    target: Target | Literal["auto"]


class MonitorArguments(RecorderOptions, total=False):
    """All arguments of ``InputHessianMonitor`` but those that say when to measure."""

    samples: Any
    val_dataloader_idx: int


def monitor_settings(owner: str, schedule: Schedule, arguments: Mapping[str, Any]) -> MonitorSettings:
    """What a user's ``MonitorArguments`` mean; those that are left out have the defaults of the settings' fields.

    Raises:
        TypeError: there is no such argument.
        ConfigurationError: an argument is not allowed.
    """
    given: dict[str, Any] = dict(arguments)
    check_known(owner, given, MonitorArguments)

    def of(kind: type[Any]) -> dict[str, Any]:
        return {each.name: given[each.name] for each in fields(kind) if each.name in given}

    keep = keep_policy(given.get("keep_matrices", True))
    names = given.get("class_names")
    measurement = MeasurementSettings(
        **{**of(MeasurementSettings), "class_names": None if names is None else tuple(names)},
        options=Options(**of(Options)),
        owner=owner,
    )
    source = SampleSource(given=given.get("samples"), **of(SampleSource))
    settings = {**of(MonitorSettings), "measurement": measurement, "samples": source, "keep_matrices": keep}
    return MonitorSettings(**settings, schedule=schedule)


def check_known(owner: str, given: Mapping[str, Any], known: type[Any]) -> None:
    """Raises a TypeError where an argument is none of a ``TypedDict``."""
    if unknown := given.keys() - known.__annotations__.keys():
        raise TypeError(f"{owner} has no argument {', '.join(map(repr, sorted(unknown)))}.")


def _class_choice(given: Any) -> int | list[int] | str:
    """The argument ``classes`` in plain values: the same outputs at every sample, or a word."""
    if isinstance(given, str):
        check_choice("classes", given, CLASS_CHOICES)
        return given
    is_list = isinstance(given, Iterable) and getattr(given, "ndim", 1) > 0
    try:
        numbers = [whole_number("classes", each, 0) for each in (given if is_list else [given])]
    except ConfigurationError:
        numbers = []
    if not numbers:
        raise ConfigurationError(
            f"classes={given!r} must be whole numbers, or one of {', '.join(map(repr, CLASS_CHOICES))}: at least one "
            f"class, counted from 0."
        )
    check_distinct(numbers)
    return numbers if is_list else numbers[0]


def check_names(names: Sequence[str | None]) -> None:
    """Raises if two monitors of one Trainer have the same name."""
    folders = ["" if name is None else name.lower() for name in names]  # some file systems ignore case
    for name, folder in zip(names, folders, strict=True):
        if folders.count(folder) > 1:
            raise ConfigurationError(
                f"{folders.count(folder)} monitors of this Trainer have name={name!r} and would write to the same tags "
                f"and files. Give each its own name, for example name='a' and name='b'."
            )
