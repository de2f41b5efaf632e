"""Whether the two autodiff modes give the same derivatives of a model."""

import torch

from lightning_hessian.curvature.operators.autodiff import (
    ForwardOverReverse,
    ReverseOverReverse,
    random_vectors,
    relative_difference,
)
from lightning_hessian.curvature.target_batch import TargetBatch


def modes_agree(batch: TargetBatch) -> tuple[bool, str]:
    """Along two random directions, at two samples, in float64 where the model can; and if not, why."""
    batch = batch.select(slice(0, 2))
    exact = in_float64(batch)
    batch, tolerance = (batch, 1e-2) if exact is None else (exact, 1e-6)
    generator, reverse = torch.Generator().manual_seed(0), ReverseOverReverse(batch)
    for _ in range(2):  # a scripted module goes wrong from its second call on
        v = random_vectors(batch, generator)[0, 0]
        expected = reverse.hvp(v.expand(batch.shape))
        try:
            forward = ForwardOverReverse(batch).columns(v[None]).squeeze(-1)
        except Exception as error:
            return False, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        difference = float(relative_difference(forward, expected))
        if not difference <= tolerance:
            return False, f"it differs from reverse_over_reverse by {difference:.1e} on a random direction"
    return True, ""


def in_float64(batch: TargetBatch) -> TargetBatch | None:
    """The batch in float64, or None where the model cannot be evaluated in it."""
    try:
        exact = batch.to(torch.float64)
        with torch.no_grad():
            return exact if exact.values(exact.x).dtype == torch.float64 else None
    except (RuntimeError, TypeError):  # an operation that takes no float64
        return None
