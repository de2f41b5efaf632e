"""What a user may give with a model, checked: inputs, dtype and classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_hessian.errors import ConfigurationError
from lightning_hessian.model.targets import TargetFunction, TargetName

Classes = int | Sequence[int] | Tensor | Literal["predicted", "all"]
Target = TargetName | TargetFunction
Model = Callable[..., Any]


def check_input(x: Tensor) -> None:
    """Raises a ConfigurationError unless ``x`` is a batch of samples that can be differentiated."""
    if not isinstance(x, Tensor) or x.dim() < 2 or len(x) == 0:
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ConfigurationError(
            f"The input must be a tensor of samples [N, *shape] with N of at least 1; got {got}. "
            f"For a single sample, give x.unsqueeze(0)."
        )
    if x.numel() == 0:
        raise ConfigurationError(
            f"The input has shape {tuple(x.shape)}: its samples have no entries, so there is nothing to differentiate. "
            f"Every dimension must be at least 1."
        )
    if not x.is_floating_point():
        raise ConfigurationError(
            f"The input has dtype {x.dtype}, and a derivative needs floating point. {_floating_point_of(x)}"
        )


def _floating_point_of(x: Tensor) -> str:
    """What to give instead of other numbers."""
    if x.is_complex():
        return (
            "Give its real and imaginary parts, torch.view_as_real(x) [N, *shape, 2], with "
            "forward_fn=lambda module, x: module(torch.view_as_complex(x))."
        )
    if x.dtype == torch.bool:
        return "Give x.float()."
    return (
        "Give images as x.float() / 255, or x.float() if the model scales them itself; for tokens, name the layer that "
        "embeds them: wrt='embedding'."
    )


def check_lengths(tensors: list[Tensor]) -> None:
    """Raises a ConfigurationError unless all inputs have one row per sample."""
    if not tensors:
        raise ConfigurationError(
            "The input holds no tensor: give x as a tensor [N, *shape], such as torch.as_tensor(x)."
        )
    lengths = {len(t) if t.dim() else 0 for t in tensors}
    if len(lengths) != 1:
        raise ConfigurationError(
            f"Every input must be a tensor with one row per sample; their first dimensions are {sorted(lengths)}. "
            f"Pass what is the same for all samples through forward_fn."
        )


def resolve_dtype(dtype: torch.dtype | None, tensors: list[Tensor]) -> torch.dtype:
    """The dtype to measure in: the given one, or that of the inputs.

    Raises:
        ConfigurationError: it is neither float32 nor float64.
    """
    if dtype is None:
        return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    if dtype not in (torch.float32, torch.float64):
        raise ConfigurationError(f"dtype={dtype} is not possible. Choose torch.float32 or torch.float64.")
    return dtype


def resolve_classes(
    classes: Classes | Literal["label"], predicted: Tensor, num_outputs: int, labels: Tensor | None = None
) -> Tensor:
    """The classes as integers ``[N, K]`` on the outputs' device.

    Raises:
        ConfigurationError: they are not classes of this model.
    """
    num_samples = len(predicted)
    if isinstance(classes, str):
        if classes == "label" and labels is not None:
            return _labels_as_classes(labels, num_outputs).to(predicted.device)
        if classes == "predicted":
            return predicted.unsqueeze(1)
        if classes == "all":
            return torch.arange(num_outputs, device=predicted.device).expand(num_samples, -1)
        raise ConfigurationError(
            f"classes={classes!r} is not known. Give an int, ints, a tensor [N] or [N, K], 'predicted' or 'all'."
        )
    wanted = torch.as_tensor(classes, device=predicted.device)
    if wanted.is_floating_point() or wanted.is_complex() or wanted.dtype == torch.bool or wanted.numel() == 0:
        raise ConfigurationError(f"classes={classes!r} must contain at least one integer, and only integers.")
    if isinstance(classes, Tensor) and wanted.dim() > 0:
        wanted = wanted.unsqueeze(1) if wanted.dim() == 1 else wanted
        if wanted.dim() != 2 or len(wanted) != num_samples:
            raise ConfigurationError(
                f"A tensor of classes must be [N] or [N, K] with N = {num_samples}; got {tuple(classes.shape)}. "
                f"For the same classes at every sample, give a list of ints."
            )
    else:
        wanted = wanted.reshape(1, -1).expand(num_samples, -1)
        check_distinct(wanted[0].tolist())
    if wanted.min() < 0 or wanted.max() >= num_outputs:
        given = f"classes={classes!r}"
        if isinstance(classes, Tensor):
            given = f"classes, which has values from {int(wanted.min())} to {int(wanted.max())},"
        raise ConfigurationError(
            f"{given} is out of range: the model has {_in_words(num_outputs)} per sample, so "
            f"{f'classes go from 0 to {num_outputs - 1}' if num_outputs > 1 else 'the only class is 0'}."
        )
    return wanted.long()


def check_distinct(classes: Sequence[int]) -> None:
    """Raises a ConfigurationError if a class is listed more than once: its results would stand there twice."""
    twice = sorted({each for each in classes if classes.count(each) > 1})
    if twice:
        raise ConfigurationError(
            f"classes={[*classes]} lists {', '.join(map(str, twice))} more than once. The list holds for every sample: "
            f"name each class once."
        )


def _labels_as_classes(labels: Tensor, num_outputs: int) -> Tensor:
    least, largest = int(labels.min()), int(labels.max())
    if least < 0 or largest >= num_outputs:
        instead = f"ints from 0 to {num_outputs - 1}, 'predicted' or 'all'"
        raise ConfigurationError(
            f"classes='label' is not possible: the samples have labels from {least} to {largest}, and the model has "
            f"{_in_words(num_outputs)} per sample. "
            f"Give classes={'0' if num_outputs == 1 else f'... ({instead})'}."
        )
    return labels.long().unsqueeze(1)


def _in_words(num_outputs: int) -> str:
    return f"{num_outputs} outputs" if num_outputs > 1 else "a single output"
