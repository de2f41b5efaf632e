"""The exceptions and warnings of this package, and the checks of arguments that every module uses."""

import contextlib
import functools
import operator
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# Files whose lines no user called.
_INSIDE = (os.path.dirname(__file__) + os.sep, contextlib.__file__, functools.__file__)


class ConfigurationError(ValueError):
    """The requested measurement is not possible; the message says what to change."""


class RepeatableError(RuntimeError):
    """What may fail again at later steps, and is warned of once.

    Args:
        message: what failed, why, and what to do.
        cause: the same at every step at which the same thing fails in the same way; by default the message.
    """

    def __init__(self, message: str, cause: str | None = None) -> None:
        super().__init__(message, cause)
        self.cause = message if cause is None else cause

    def __str__(self) -> str:
        return str(self.args[0])


class MeasurementError(RepeatableError):
    """A measurement started but produced no trustworthy numbers."""


class TimeLimitError(MeasurementError):
    """Work that cannot be shortened would not be done within ``max_seconds``; the message says what would fit."""


class WritingError(RepeatableError):
    """A measurement was made, but at least one writer failed; the others received it."""


class HessianWarning(UserWarning):
    """What this package warns of."""


def warn(message: str) -> None:
    """Warns in the line that called this package, also inside of ``quiet``."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, HessianWarning, stacklevel=level)


@contextmanager
def quiet() -> Iterator[None]:
    """Ignores warnings, of torch and of a user's model, but for those of this package, which come at the end."""
    own: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as own:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", HessianWarning)
            yield
    finally:
        for each in own:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raises a ConfigurationError unless an argument is one of ``allowed``."""
    if value not in allowed:
        raise ConfigurationError(f"{name}={value!r} is not known. Choose one of {', '.join(map(repr, allowed))}.")


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """An argument as an int: one of Python or NumPy, or a tensor ``[]`` that holds one.

    Raises:
        ConfigurationError: it is none, or less than ``least``.
    """
    try:
        is_other: bool = isinstance(value, bool) or getattr(value, "ndim", 0) > 0
        number = None if is_other else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        limit = "" if least is None else f" of at least {least}"
        raise ConfigurationError(f"{name}={value!r} must be a whole number{limit}.")
    return number


def whole_numbers(name: str, values: Any) -> list[int]:
    """An argument that lists whole numbers, counted from 0.

    Raises:
        ConfigurationError: it does not.
    """
    try:
        return [whole_number(name, each, 0) for each in values]
    except (TypeError, ConfigurationError):
        raise ConfigurationError(f"{name}={values!r} must be whole numbers, counted from 0, such as [0, 3].") from None


def store_whole_numbers(settings: object, **least: int | None) -> None:
    """Replaces fields of a frozen dataclass by ``whole_number`` of them; ``least`` gives the smallest of each."""
    for name, smallest in least.items():
        object.__setattr__(settings, name, whole_number(name, getattr(settings, name), smallest))
