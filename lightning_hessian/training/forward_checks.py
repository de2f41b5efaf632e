"""Whether a module can be called at all: with parameters that have values, and the inputs that its forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_hessian.errors import ConfigurationError, MeasurementError
from lightning_hessian.model.function import Inputs
from lightning_hessian.training.settings import MeasurementSettings

LIGHTNINGS_FORWARD = ("lightning.pytorch.core.module", "pytorch_lightning.core.module")  # it only raises


def check_initialized(model: nn.Module) -> None:
    """Raises where parameters have no values: a first forward pass would make them, or they are elsewhere."""
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise MeasurementError(
            f"The model's lazy layers have no parameters yet ({_some(lazy)}). The first training step makes them; to "
            f"measure before it, run one forward pass in configure_model or keep the sanity check "
            f"(num_sanity_val_steps)."
        )
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise MeasurementError(
            f"The model's parameters are on the meta device at this point and have no values ({_some(empty)}). Measure "
            f"where they are on a real device: choose epochs, every_n_epochs or every_n_train_steps."
        )


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{', …' if names[3:] else ''}"


def check_forward(model: nn.Module, inputs: Inputs, settings: MeasurementSettings) -> None:
    """Raises where a module has no forward of its own, or one that does not take these inputs."""
    if settings.forward_fn is not None:
        return
    own = type(model).forward
    if own.__name__ == "_forward_unimplemented" or own.__module__ in LIGHTNINGS_FORWARD:
        name = next((name for name, _ in model.named_children()), "network")
        raise ConfigurationError(
            f"{type(model).__name__} has no forward method. Give forward_fn, which calls what computes the outputs, "
            f"for example forward_fn=lambda module, x: module.{name}(x)."
        )
    if not model._forward_pre_hooks:  # which may rearrange the inputs
        _check_signature(model, inputs)


def _check_signature(model: nn.Module, inputs: Inputs) -> None:
    """Raises where a forward takes other inputs than these: fewer, more, or by other names."""
    by_name = inputs if isinstance(inputs, dict) else {}
    by_place = () if by_name else inputs if isinstance(inputs, tuple) else (inputs,)
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # of a compiled extension, for example
        return
    try:
        signature.bind(*by_place, **by_name)
        return
    except TypeError:
        parameters = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    plain = signature.replace(parameters=parameters, return_annotation=signature.empty)
    count = f"{len(by_name)} inputs by name" if by_name else f"{len(by_place)} input{'s' * (len(by_place) > 1)}"
    raise ConfigurationError(
        f"{type(model).__name__}.forward takes {plain}, and is called with {count}. {_remedy(parameters, by_name)}"
    )


def _remedy(parameters: list[inspect.Parameter], by_name: Mapping[str, Any]) -> str:
    """What to give for a forward that takes ``parameters``, and was to be called ``by_name`` or by position."""
    if by_name and len(parameters) == 1:
        return (
            "If it takes all of them in one dict, give forward_fn=lambda module, x: module(x); otherwise give an "
            "input_fn that returns only what it takes."
        )
    named = [each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    required = [each for each in named if each.default is each.empty] or named
    names = ", ".join(f'"{each.name}": ...' for each in required)
    return (
        f"Give an input_fn that returns ({{{names}}}, labels), where labels may be None, and name the input (or layer) "
        f"to differentiate with wrt. Or give a forward_fn, which takes (module, x) and returns the output."
    )
