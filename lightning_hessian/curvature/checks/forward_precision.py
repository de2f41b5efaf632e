"""In which precision a forward computes, whatever that of its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_hessian.curvature.batching import attempted
from lightning_hessian.curvature.target_batch import TargetBatch


class _ComputedDtypes(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's own class
    """Notes the floating-point dtypes of all results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's own class
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.dtypes |= {t.dtype for t in tree_leaves(found) if isinstance(t, Tensor) and t.is_floating_point()}
        return found


def coarsest_dtype(batch: TargetBatch) -> torch.dtype:
    """The least precise floating-point dtype in a forward pass of the first sample, or that of the samples."""
    first = batch.select(slice(0, 1))
    with _ComputedDtypes() as computed, torch.no_grad():
        attempted(lambda: first.outputs(first.x))
    return max({batch.x.dtype, *computed.dtypes}, key=lambda dtype: torch.finfo(dtype).eps)
