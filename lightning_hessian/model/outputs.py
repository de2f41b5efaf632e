"""What a model returned, as ``[N, C]``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_hessian.errors import ConfigurationError

OutputFunction = Callable[[Any], Any]  # a tensor; Any, so that a YAML file may name one without annotations


def outputs_of(returned: Any, output_fn: OutputFunction | None, num_samples: int) -> Tensor:
    """The outputs ``[N, C]`` in what a model returned, found by ``output_fn``, or alone or under the name ``logits``.

    Raises:
        ConfigurationError: there are none.
    """
    if output_fn is not None:
        return _as_matrix(output_fn(returned), "output", num_samples)
    return _as_matrix(*_outputs_in(returned), num_samples)


def _outputs_in(returned: Any) -> tuple[Any, str]:
    """What a model returned, or the tensor it holds as ``logits``; and an expression for it."""
    if isinstance(returned, Mapping):
        return (returned["logits"], "output['logits']") if "logits" in returned else (returned, "output")
    if isinstance(getattr(returned, "logits", None), Tensor):
        return returned.logits, "output.logits"
    return returned, "output"


def _as_matrix(output: Any, name: str, num_samples: int) -> Tensor:
    """``output`` as ``[N, C]``; ``name`` is an expression for it.

    Raises:
        ConfigurationError: it has another shape; the message shows an output_fn for it.
    """
    if isinstance(output, Tensor) and output.is_complex():
        raise ConfigurationError(
            f"The model returned complex numbers ({output.dtype}), and what is differentiated is real. Give output_fn, "
            f"for example output_fn=lambda output: {name}.abs()."
        )
    if isinstance(output, Tensor) and not output.is_floating_point():
        raise ConfigurationError(
            f"The model returned {output.dtype}, which has no derivative. Give output_fn, or a forward_fn, that "
            f"returns the scores behind these numbers, for example forward_fn=lambda module, x: module.network(x)."
        )
    if isinstance(output, Tensor) and output.shape == (num_samples,):
        return output.unsqueeze(1)
    if isinstance(output, Tensor) and output.dim() == 2 and len(output) == num_samples:
        return output
    got, example = _describe(output, name)
    raise ConfigurationError(
        f"The model returned {got} for {num_samples} samples; outputs must be [N, C] or [N], alone or under the name "
        f"'logits'. Give output_fn, which takes what the model returns and returns [N, C]"
        f"{example and f', for example output_fn=lambda output: {example}'}."
    )


def _describe(output: Any, name: str) -> tuple[str, str]:
    """What was returned, in words, and an expression that may find ``[N, C]`` in it, or nothing."""
    if isinstance(output, Mapping):
        keys = list(output)
        return f"{type(output).__name__} with the keys {keys}", f"{name}[{keys[0] if keys else 'key'!r}]"
    if isinstance(output, (tuple, list)):
        return f"{type(output).__name__} of {len(output)}", f"{name}[0]"
    if not isinstance(output, Tensor):
        return type(output).__name__, f"{name}.prediction"
    indices = {3: "[:, -1]", 4: "[:, :, row, column]"}  # a sequence [N, T, C], pixels [N, C, H, W]
    got = f"{'a tensor' if name == 'output' else name} of shape {tuple(output.shape)}"
    return got, f"{name}{indices[output.dim()]}" if output.dim() in indices else ""
