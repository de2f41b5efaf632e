"""Whether the two autodiff modes agree on a model, and whether it can be evaluated in float64."""

from __future__ import annotations

import torch

from lightning_hessian.curvature.batching import on_few, out_of_memory
from lightning_hessian.curvature.operators.autodiff import (
    ForwardOverReverse,
    ReverseOverReverse,
    random_vectors,
    relative_difference,
)
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


def modes_agree(batch: TargetBatch, generator: torch.Generator) -> tuple[bool, str]:
    """Whether forward_over_reverse gives what reverse_over_reverse gives on this model, and if not, why.

    The modes are compared along random directions, in float64 where the model can be evaluated in it (so that
    rounding is not mistaken for disagreement; tolerance 1e-6) and in the dtype of ``x`` otherwise (tolerance
    1e-2). Cost: two HVPs in each mode, at two samples, or one where memory runs out.
    """
    state = generator.get_state()

    def compared(few: TargetBatch) -> tuple[bool, str]:
        generator.set_state(state)
        return _agree(few, generator)

    return on_few(batch, 2, compared)


def _agree(batch: TargetBatch, generator: torch.Generator) -> tuple[bool, str]:
    exact = in_float64(batch)
    batch, tolerance = (batch, 1e-2) if exact is None else (exact, 1e-6)
    reverse = ReverseOverReverse(batch)
    for _ in range(2):  # a scripted module goes wrong from its second call on
        v = random_vectors(batch, generator)[0, 0]
        expected = reverse.hvp(v.expand(batch.shape))
        try:
            forward = ForwardOverReverse(batch).columns(v[None]).squeeze(-1)
        except Exception as error:  # every kind of module that lacks a forward-mode or vmap rule
            if out_of_memory(error):
                raise
            return False, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        difference = float(relative_difference(forward, expected))
        if not difference <= tolerance:
            return False, f"it differs from reverse_over_reverse by {difference:.1e} on a random direction"
    return True, ""
