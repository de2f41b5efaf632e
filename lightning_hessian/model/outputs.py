"""What a model returned, as ``[N, C]``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_hessian.errors import ConfigurationError
from lightning_hessian.model.attributes import fields_of

MOST_SHOWN = 12  # entries of what a model returned
OutputFunction = Callable[[Any], Any]  # a tensor; Any, so that a YAML file may name one without annotations


def outputs_of(returned: Any, output_fn: OutputFunction | None, num_samples: int) -> Tensor:
    """The outputs ``[N, C]`` in what a model returned, found by ``output_fn``, or alone or under the name ``logits``.

    Raises:
        ConfigurationError: there are none.
    """
    if output_fn is not None:
        return _as_matrix(_applied(output_fn, returned, num_samples), "output", num_samples, "output_fn")
    return _as_matrix(*_outputs_in(returned), num_samples)


def _applied(output_fn: OutputFunction, returned: Any, num_samples: int) -> Any:
    try:
        return output_fn(returned)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"output_fn failed with {type(error).__name__}: {error}. It is called with what the model returned, here "
            f"{_describe(returned, 'output', num_samples)[0]}, and must return [N, C]."
        ) from error


def _outputs_in(returned: Any) -> tuple[Any, str]:
    """What a model returned, or the tensor it holds as ``logits``; and an expression for it."""
    if isinstance(returned, Mapping):
        return (returned["logits"], "output['logits']") if "logits" in returned else (returned, "output")
    if isinstance(getattr(returned, "logits", None), Tensor):
        return returned.logits, "output.logits"
    return returned, "output"


def _as_matrix(output: Any, name: str, num_samples: int, source: str = "The model") -> Tensor:
    """``output``, which ``source`` returned, as ``[N, C]``; ``name`` is an expression for it.

    Raises:
        ConfigurationError: it has another shape; the message shows an output_fn for it.
    """
    if isinstance(output, Tensor) and output.is_complex():
        raise ConfigurationError(
            f"{source} returned complex numbers ({output.dtype}), and what is differentiated is real. Give output_fn, "
            f"for example output_fn=lambda output: {name}.abs()."
        )
    if isinstance(output, Tensor) and not output.is_floating_point():
        raise ConfigurationError(
            f"{source} returned {output.dtype}, which has no derivative. Give output_fn, or a forward_fn, that "
            f"returns the scores behind these numbers, for example forward_fn=lambda module, x: module.network(x)."
        )
    if isinstance(output, Tensor) and output.shape == (num_samples,):
        return output.unsqueeze(1)
    if isinstance(output, Tensor) and output.dim() == 2 and len(output) == num_samples:
        return output
    got, example = _describe(output, name, num_samples)
    if source == "output_fn":
        raise ConfigurationError(f"output_fn returned {got} for {num_samples} samples; it must return [N, C] or [N].")
    keeps_all = f" {example.partition('[:, ')[0]}.flatten(1) keeps all entries of a sample as outputs."
    raise ConfigurationError(
        f"The model returned {got} for {num_samples} samples; outputs must be [N, C] or [N], alone or under the name "
        f"'logits'. Give output_fn, which takes what the model returns and returns [N, C]"
        f"{example and f', for example output_fn=lambda output: {example}'}."
        f"{keeps_all if '[:, ' in example else ''}"
    )


def _describe(output: Any, name: str, num_samples: int) -> tuple[str, str]:
    """What was returned, in words, and an expression that may find ``[N, C]`` in it, or nothing."""
    if isinstance(output, Tensor):
        got = f"{'a tensor' if name == 'output' else name} of shape {tuple(output.shape)}"
        return got, _matrix_of(output, name, num_samples)
    found = _entries(output, name)
    fits = [(expression, t) for expression, t in found if t.dim() and len(t) == num_samples and t.is_floating_point()]
    example = (
        _matrix_of(fits[0][1], fits[0][0], num_samples) if fits else next((expression for expression, _ in found), "")
    )
    kind = type(output).__name__
    if isinstance(output, Mapping):
        return f"{kind} with the keys {[*output]}", example
    if isinstance(output, (list, tuple)) and not hasattr(output, "_fields"):
        return f"{kind} of {len(output)}", example
    shapes = ", ".join(f"{expression} {[*t.shape]}" for expression, t in found[:MOST_SHOWN])
    return f"{kind} with {shapes}" if shapes else kind, example


def _matrix_of(tensor: Tensor, name: str, num_samples: int) -> str:
    """An expression for ``[N, C]``: the last step of a sequence ``[N, T, C]``, a pixel of a map ``[N, C, H, W]``."""
    if tensor.dim() == 2 and len(tensor) > num_samples and len(tensor) % num_samples == 0:
        return f"{name}.reshape(-1, {len(tensor) // num_samples}, {tensor.shape[1]})[:, -1]"
    if tensor.dim() == 0 or len(tensor) != num_samples:
        return ""
    if tensor.dim() == 3:
        return f"{name}[:, -1]"
    if tensor.dim() == 4:
        return f"{name}[:, :, {tensor.shape[2] // 2}, {tensor.shape[3] // 2}]"
    return f"{name}.flatten(1)" if tensor.dim() > 4 else name


def _entries(output: Any, name: str) -> list[tuple[str, Tensor]]:
    """The tensors in what was returned, with expressions for them; of a distribution its mean."""
    if isinstance(output, torch.distributions.Distribution):
        try:
            return [(f"{name}.mean", output.mean)]
        except NotImplementedError:
            return []
    fields = fields_of(output)
    if fields is None:
        fields = dict(enumerate(output)) if isinstance(output, (list, tuple)) else {}
    by_key = isinstance(output, Mapping) or not all(isinstance(key, str) for key in fields)
    named = [(f"{name}[{key!r}]" if by_key else f"{name}.{key}", value) for key, value in fields.items()]
    return [(expression, value) for expression, value in named if isinstance(value, Tensor)]
