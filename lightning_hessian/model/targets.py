"""From a model's outputs to the scalar that is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lightning_hessian.errors import ConfigurationError

TargetName = Literal["logit", "log_prob", "prob", "loss", "margin"]
TargetFunction = Callable[[Tensor, Tensor], Any]  # as for OutputFunction

TARGET_NAMES: tuple[str, ...] = get_args(TargetName)


def logit(outputs: Tensor, classes: Tensor) -> Tensor:
    """z_k, the output itself."""
    return outputs.gather(1, classes)


def log_prob(outputs: Tensor, classes: Tensor) -> Tensor:
    """The logarithm of softmax(z)_k, written as z_k − z_top − softplus(log Σ_{j≠top} exp z_j − z_top), top = argmax z.

    The same function as ``log_softmax``, whose derivatives contain 1 − p_top as a difference and lose all their digits
    once p_top is near 1. Here that is Σ_{j≠top} p_j, and for k = top the difference z_k − z_top is omitted, not
    computed. So the derivatives of a confident network are accurate in float32, too. The argument of softplus is at
    most log(C − 1), below its threshold, so that it stays smooth.
    """
    top = outputs.argmax(dim=1, keepdim=True)
    best = outputs.gather(1, top)
    others = _others(outputs, top).squeeze(1).logsumexp(dim=-1, keepdim=True)
    behind = (logit(outputs, classes) - best).where(classes != top, 0)
    return behind - softplus(others - best, threshold=40)


def prob(outputs: Tensor, classes: Tensor) -> Tensor:
    """p_k = softmax(z)_k, as exp of ``log_prob``."""
    return log_prob(outputs, classes).exp()


def loss(outputs: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy against class k, −log softmax(z)_k."""
    return -log_prob(outputs, classes)


def margin(outputs: Tensor, classes: Tensor) -> Tensor:
    """z_k − max_{j≠k} z_j."""
    return logit(outputs, classes) - _others(outputs, classes).max(dim=-1).values


TARGETS: dict[str, TargetFunction] = {f.__name__: f for f in (logit, log_prob, prob, loss, margin)}


def _others(outputs: Tensor, classes: Tensor) -> Tensor:
    """``[N, K, C]``: the outputs, with −inf at each class's own."""
    num_outputs = outputs.shape[1]
    own = torch.nn.functional.one_hot(classes, num_outputs).bool()
    return outputs.unsqueeze(1).masked_fill(own, -torch.inf)


def target_name(target: str | TargetFunction) -> str:
    """The name of a target, in tags and messages."""
    return target if isinstance(target, str) else getattr(target, "__name__", "target").strip("<>")


def resolve_target(target: str | TargetFunction, num_outputs: int) -> TargetFunction:
    """The function behind a target's name, or the given callable with its result checked.

    Raises:
        ConfigurationError: the name is unknown, or the target compares outputs and there is only one.
    """
    if callable(target):
        return _checked(target)
    if target not in TARGETS:
        raise ConfigurationError(
            f"target={target!r} is not known. Choose one of {', '.join(map(repr, TARGETS))}, or give a callable "
            f"(outputs [N, C], classes [N, K]) -> [N, K]."
        )
    if num_outputs == 1 and target != "logit":
        raise ConfigurationError(
            f"target={target!r} compares outputs with each other, and this model has one output per sample. "
            f"Use target='logit', or a callable such as lambda z, classes: z.sigmoid()."
        )
    return TARGETS[target]


def _checked(target: TargetFunction) -> TargetFunction:
    def checked(outputs: Tensor, classes: Tensor) -> Tensor:
        values = target(outputs.clone(), classes)  # a target may write to them
        if not isinstance(values, Tensor) or values.shape != classes.shape:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ConfigurationError(
                f"The target {target_name(target)!r} returned {got} for outputs {tuple(outputs.shape)} and classes "
                f"{tuple(classes.shape)}; it must return one scalar per sample and class, in the shape of classes."
            )
        return values

    return checked
