"""A model as a pure function of its input: parameters cast and detached, buffers cloned on every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_hessian.errors import ConfigurationError

ForwardFunction = Callable[[Any, Tensor], Any]
OutputFunction = Callable[[Any], Tensor]


class ModelFunction:
    """x ``[N, *shape]`` -> outputs ``[N, C]``, in the dtype of x, leaving the model as it was.

    Floating-point parameters and buffers are cast to the dtype of x (bfloat16 weights are measured in
    float32, for example). Parameters are copied once and detached: a forward that writes to them (a max-norm
    constraint) writes to the copy, and nothing is ever accumulated into ``.grad``. Buffers are copied inside
    each call, since a forward may write a tensor of the differentiation into them.

    Args:
        model: an ``nn.Module`` (a ``LightningModule`` is one) or a callable.
        forward_fn: ``(model, x) -> output``, in place of ``model(x)``.
        output_fn: ``output -> [N, C]``, for models that do not give that themselves.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        forward_fn: ForwardFunction | None = None,
        output_fn: OutputFunction | None = None,
    ) -> None:
        self._forward_fn = forward_fn or (lambda model, x: model(x))
        self._output_fn = output_fn
        self._model = model
        self._caller = _Caller(model, self._forward_fn) if isinstance(model, nn.Module) else None
        self._tensors: dict[torch.dtype, dict[str, Tensor]] = {}

    @property
    def device(self) -> torch.device | None:
        """Where the model's parameters are, or None for a callable or a module without any."""
        tensors = [] if self._caller is None else [*self._caller.parameters(), *self._caller.buffers()]
        return tensors[0].device if tensors else None

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs ``[N, C]`` at ``x``."""
        if self._caller is None:
            output = self._forward_fn(self._model, x)
        else:
            output = functional_call(self._caller, self._cast_tensors(x.dtype), (x,))
        if self._output_fn is not None:
            output = self._output_fn(output)
        return _as_matrix(output, len(x))

    def _cast_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        assert self._caller is not None
        if dtype not in self._tensors:
            self._tensors[dtype] = {name: _copy(p, dtype) for name, p in self._caller.named_parameters()}
        buffers = {name: _copy(b, dtype) for name, b in self._caller.named_buffers()}
        return {**self._tensors[dtype], **buffers}


class _Caller(nn.Module):
    """Lets ``functional_call`` swap a module's tensors around any function that calls the module."""

    def __init__(self, module: nn.Module, call: ForwardFunction) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.module, x)


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


def _as_matrix(output: Any, num_samples: int) -> Tensor:
    if isinstance(output, Tensor) and output.shape == (num_samples,):
        return output.unsqueeze(1)
    if isinstance(output, Tensor) and output.dim() == 2 and len(output) == num_samples:
        return output
    got = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    raise ConfigurationError(
        f"The model gave {got} for {num_samples} samples; outputs must be [N, C] or [N]. Give output_fn, which "
        f"takes what the model returns and gives [N, C], for example output_fn=lambda output: output.logits."
    )
