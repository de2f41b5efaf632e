"""How much of a whole Hessian comes from the head (JᵀAJ), and how much from the network itself."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hessian.curvature.cost_model import Facts
from lightning_hessian.curvature.methods.low_rank import VMAPPED_OUTPUTS, jacobian
from lightning_hessian.curvature.operators.autodiff import ReverseOverReverse
from lightning_hessian.curvature.operators.target_batch import TargetBatch

NUM_DRAWS = 3  # random vectors that A must all take to exactly 0.0 before it is called zero
SCRATCH = 16  # tensors [K, C] that a product A v makes on the way: softmax, its gradients, and their graphs


def term_norms(batch: TargetBatch, matrices: Tensor) -> dict[str, Tensor]:
    """Frobenius norms ``[N, K]`` of the two parts of whole Hessians: JᵀAJ, and what the network itself bends.

    Exact, and without A ``[C, C]``: Jᵀ(A(J e)) is formed for some columns e at a time, as many as keep what is made
    on the way below one matrix ``[D, D]``.

    Cost: C gradients, and D products with A, which know nothing of the network.
    """
    with torch.no_grad():
        outputs = batch.outputs(batch.x)
    head = TargetBatch(lambda z: z, batch.target, outputs, batch.classes)
    if _is_zero(head):
        norm = torch.linalg.matrix_norm(matrices)
        return {"gauss_newton_norm": torch.zeros_like(norm), "functional_norm": norm}
    rows = jacobian(batch)
    num_inputs = batch.num_inputs
    size = min(num_inputs, max(1, num_inputs**2 // (SCRATCH * outputs.shape[1])))
    of_head, of_network = [], []
    for begin in range(0, num_inputs, size):
        columns = slice(begin, begin + size)
        part = rows.mT.unsqueeze(1) @ _bent(head, rows[..., columns])
        of_head.append(torch.linalg.matrix_norm(part))
        of_network.append(torch.linalg.matrix_norm(matrices[..., columns] - part))
    norms = {"gauss_newton_norm": of_head, "functional_norm": of_network}
    return {name: torch.linalg.vector_norm(torch.stack(found), dim=0) for name, found in norms.items()}


def head_bytes(facts: Facts) -> int:
    """The memory that ``term_norms`` takes per sample beside a few matrices: gradients of C outputs, and one A v."""
    _, num_classes, num_inputs = facts.batch.shape
    numbers = facts.num_outputs * (3 * num_inputs + SCRATCH * num_classes)
    backward = min(facts.num_outputs, VMAPPED_OUTPUTS) * facts.gradient_bytes
    return numbers * facts.batch.x.element_size() + backward


def _bent(head: TargetBatch, vectors: Tensor) -> Tensor:
    """A v for M vectors of each sample, ``[N, C, M]`` to ``[N, K, C, M]``, on M copies of the outputs."""
    num_samples, num_classes, num_outputs = head.shape
    times = vectors.shape[-1]
    laid_out = vectors.permute(2, 0, 1).reshape(times * num_samples, 1, num_outputs)
    bent = ReverseOverReverse(head.repeat(times)).hvp(laid_out.expand(-1, num_classes, -1))
    return bent.reshape(times, num_samples, num_classes, num_outputs).permute(1, 2, 3, 0)


def _is_zero(head: TargetBatch) -> bool:
    """Whether the target is linear in the outputs: its derivatives are then exact zeros."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(NUM_DRAWS, head.num_inputs, generator=generator, dtype=torch.float64).to(head.x)
    engine = ReverseOverReverse(head)
    return not any(engine.hvp(v.expand(head.shape)).any() for v in vectors)
