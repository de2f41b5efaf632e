"""In which precision a forward computes, whatever that of its inputs."""

from __future__ import annotations

import torch

from lightning_hessian.curvature.batching import attempted
from lightning_hessian.curvature.operators.autodiff import nodes_of
from lightning_hessian.curvature.target_batch import TargetBatch


def coarsest_dtype(batch: TargetBatch) -> torch.dtype:
    """The least precise floating-point dtype on the way from the first sample to its outputs, or that of the sample.

    How constants are rounded does not matter, nor what the outputs do not depend on. What a custom
    ``autograd.Function`` computes inside is not seen.
    """
    first = batch.select(slice(0, 1))
    with torch.enable_grad():
        outputs = attempted(lambda: first.outputs(first.x.detach().requires_grad_()))
    nodes = [] if outputs is None else nodes_of(outputs)
    # Private, though as old as torch 2.1: what a node of the graph knows of the results of its operation.
    dtypes = {result.dtype.to_real() for node in nodes for result in getattr(node, "_input_metadata", ())}
    return max({batch.x.dtype, *dtypes}, key=lambda dtype: torch.finfo(dtype).eps)
