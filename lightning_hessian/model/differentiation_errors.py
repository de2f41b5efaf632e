"""Sentences for what PyTorch raises where a model can be evaluated, but not differentiated."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_hessian.curvature.batching import out_of_memory
from lightning_hessian.errors import ConfigurationError, MeasurementError
from lightning_hessian.model.function import ModelFunction

PACKAGE = __name__.partition(".")[0]
AUTOGRAD = ("torch.autograd", "torch._functorch", "torch.func")
BACKWARD = "torch.autograd.function"  # calls the backward of custom functions
REFUSALS = (RuntimeError, ValueError, AssertionError)  # PyTorch's, and those of a forward that checks its input
# For up to 25 rows, torch.cdist by default chooses an algorithm without a second derivative.
REPLACEMENTS = {"cdist": "Pass compute_mode='use_mm_for_euclid_dist' to torch.cdist"}
REMEDY = "or name a layer behind it with wrt."


@contextmanager
def explained_derivatives() -> Iterator[None]:
    """Raises a MeasurementError in place of what PyTorch raises while a model that can be evaluated is differentiated.

    PyTorch knows three ways to refuse: no formula for an operation, a formula that raises, and an operation that does
    not accept tensors that require gradients, which raises in the forward pass. Errors of other code pass.
    """
    try:
        yield
    except REFUSALS as error:
        if isinstance(error, (MeasurementError, ConfigurationError)) or out_of_memory(error):
            raise
        sentence = _sentence(error)
        if not sentence:
            raise
        raise MeasurementError(sentence) from _without_context_managers(error)


def _sentence(error: Exception) -> str:
    """Empty where the error does not come from a derivative that this package takes."""
    modules = _modules(error)
    is_ours = modules[-1].startswith(f"{PACKAGE}.")
    if is_ours or not any(name.startswith(f"{PACKAGE}.curvature.") for name in modules):
        return ""
    message = str(error).partition("\n")[0].rstrip(".")
    no_formula = re.search(r"derivative for '?(?:aten::)?(\w+)(?:: \w+)?'? is not implemented", message)
    if no_formula is not None:
        name = no_formula[1].strip("_")
        operation = name.removesuffix("_backward")
        twice = (
            "twice, which the model or the target uses" if operation != name else "as the model or the target uses it"
        )
        remedy = REPLACEMENTS.get(operation, "Replace it by an operation that can be")
        return f"PyTorch cannot differentiate {operation} {twice}. {remedy}, {REMEDY}"
    no_kernel = isinstance(error, NotImplementedError) and any(name.startswith(AUTOGRAD) for name in modules)
    if no_kernel or modules[-1].startswith(AUTOGRAD):
        return (
            f"PyTorch cannot differentiate the model or the target at these samples: {message}. Replace the operation "
            f"by one that can be differentiated twice, {REMEDY}"
        )
    if BACKWARD in modules and ModelFunction.__module__ not in modules:
        where = _line_of_others(error, modules.index(BACKWARD), modules)
        return (
            f"The backward of a custom autograd.Function raised an error{where and f', {where}'}: {message}. If it "
            f"evaluates modules of the model, as that of odeint_adjoint does, it finds their parameters in their own "
            f"dtype: measure in that dtype, or with a forward that does without this function."
        )
    if ModelFunction.__module__ in modules:
        where = line_of_forward(error)
        return (
            f"The model can be evaluated, but raised an error while it was differentiated{where and f', {where}'}: "
            f"{message}. Its forward pass must also accept tensors that require gradients, other numbers of "
            f"samples and equal samples."
        )
    return ""


def line_of_forward(error: Exception) -> str:
    """The last line of a user's or library's own code in a forward that failed, in words; empty where there is none."""
    modules = _modules(error)
    if ModelFunction.__module__ not in modules:
        return ""
    return _line_of_others(error, modules.index(ModelFunction.__module__), modules)


def _modules(error: Exception) -> list[str]:
    """Those of the frames from the first to the one that raised."""
    return [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]


def _line_of_others(error: Exception, after: int, modules: list[str]) -> str:
    """The last line, after a frame, that is neither of this package nor of torch."""
    theirs = [i for i, name in enumerate(modules) if not name.startswith((f"{PACKAGE}.", "torch."))]
    if not theirs or theirs[-1] < after:
        return ""
    place = traceback.extract_tb(error.__traceback__)[theirs[-1]]
    return f"at {place.line!r} in line {place.lineno} of {place.filename}"


def _without_context_managers(error: Exception) -> Exception:
    """The error, without the frames of context managers at the beginning of its traceback.

    From Python 3.12 on, the frame of a generator refers to its caller's, which refers to the error: what a forward had
    computed before it failed would wait for the garbage collector.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_flags & inspect.CO_GENERATOR:
        trace = trace.tb_next
    return error.with_traceback(trace)
