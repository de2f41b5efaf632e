"""In which precision a forward computes, whatever that of its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_hessian.curvature.batching import attempted
from lightning_hessian.curvature.target_batch import TargetBatch


class _ComputedDtypes(TorchFunctionMode):
    """Notes the dtypes of all results that depend on the input: how constants are rounded does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.dtypes |= {t.dtype for t in tree_leaves(found) if isinstance(t, Tensor) and t.requires_grad}
        return found


def coarsest_dtype(batch: TargetBatch) -> torch.dtype:
    """The least precise floating-point dtype in a forward pass of the first sample, or that of the samples."""
    first = batch.select(slice(0, 1))
    with _ComputedDtypes() as computed, torch.enable_grad():
        attempted(lambda: first.outputs(first.x.detach().requires_grad_()))
    return max({batch.x.dtype, *(d.to_real() for d in computed.dtypes)}, key=lambda dtype: torch.finfo(dtype).eps)
