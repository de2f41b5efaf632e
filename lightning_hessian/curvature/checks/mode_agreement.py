"""A batch in float64, where its model can be evaluated in it."""

from __future__ import annotations

import torch

from lightning_hessian.curvature.batching import on_few, out_of_memory
from lightning_hessian.curvature.target_batch import TargetBatch


def in_float64(batch: TargetBatch) -> TargetBatch | None:
    """The batch in float64, or None where the model cannot be evaluated in it."""

    def evaluates(few: TargetBatch) -> bool:
        try:
            exact = few.to(torch.float64)
            with torch.no_grad():
                return exact.values(exact.x).dtype == torch.float64
        except Exception as error:  # no float64 on this device, or a forward that fails in it; float32 is still wanted
            if out_of_memory(error):
                raise
            return False

    return batch.to(torch.float64) if on_few(batch, 2, evaluates) else None
