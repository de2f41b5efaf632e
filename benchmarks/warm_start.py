"""What Lanczos gains and loses by starting from the eigenvectors of the last measurement: why it does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.common import save

D, SEEDS, COUNT, TOLERANCE = 1000, 100, 10, 1e-5
# How much heavier each known eigenvector is in the start vector than an average direction of its random part.
WEIGHTS = (1, 3, 10, 30, 100)
KNOWN = torch.tensor([1.8, 1.6, 1.4, 1.3, 1.2, -1.2, -1.3, -1.4, -1.6, -1.8], dtype=torch.float64)
NEW = 1.205  # an eigenvalue that was not there last time, and belongs to the five largest


def lanczos_values(values: Tensor, start: Tensor) -> tuple[Tensor, int]:
    """Five eigenvalues from each end of diag ``values [D]`` as soon as their residuals allow, and the steps taken."""
    basis, diagonal, beside = [start / start.norm()], [], []
    while True:
        product = values * basis[-1]
        diagonal.append(product @ basis[-1])
        q = torch.stack(basis)
        for _ in range(2):
            product = product - (q @ product) @ q
        beside.append(product.norm())
        basis.append(product / beside[-1])
        off = torch.stack(beside[:-1]) if len(beside) > 1 else values.new_zeros(0)
        ritz, vectors = torch.linalg.eigh(torch.diag(torch.stack(diagonal)) + torch.diag(off, 1) + torch.diag(off, -1))
        if len(ritz) < COUNT:
            continue
        ends = [*range(-1, -1 - COUNT // 2, -1), *range(COUNT // 2 - 1, -1, -1)]
        if (beside[-1] * vectors[-1, ends].abs() <= TOLERANCE * ritz.abs().max()).all():
            return ritz[ends], len(ritz)


def steps_and_misses(weight: float) -> dict[str, float]:
    """Mean steps over ``SEEDS`` starts, and how often the new eigenvalue was missed.

    All known eigenvectors still are eigenvectors: the best case for a start from them.
    """
    values = torch.cat([KNOWN, torch.tensor([NEW]).double(), torch.linspace(-1, 1, D - COUNT - 1).double()])
    ordered = values.sort(descending=True).values
    truth = torch.cat([ordered[: COUNT // 2], ordered[-COUNT // 2 :]])
    steps, missed = 0, 0
    for seed in range(SEEDS):
        start = torch.randn(D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        if weight > 1:
            start[:COUNT] = weight * start[:COUNT].sign()
        found, taken = lanczos_values(values, start)
        steps += taken
        missed += int((found - truth).abs().max() > (NEW - 1.2) / 2)
    return {"steps": steps / SEEDS, "missed in": missed / SEEDS}


def main() -> None:
    """Half a minute."""
    report: dict[str, Any] = {
        f"eigenvectors {w} times a random direction" if w > 1 else "random start": steps_and_misses(w) for w in WEIGHTS
    }
    print("warm_start:", report, flush=True)
    save("warm_start", report)


if __name__ == "__main__":
    main()
