"""What is said about a measurement that is about to be made."""

import torch
from support.networks import mlp

from lightning_hessian.curvature.checks.diagnosis import Diagnosis
from lightning_hessian.curvature.methods.plan import Plan
from lightning_hessian.curvature.options import Options
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.training.decision import what_makes_it_shorter

CURVED = Diagnosis("curved", "curved")


def test_what_makes_a_measurement_shorter():
    classes = torch.zeros(2, 1, dtype=torch.long)
    batch = TargetBatch(mlp(), lambda z, c: z.gather(1, c), torch.randn(2, 6), classes)
    heatmaps, dense = (Plan(method, "", CURVED, num_matrices=2) for method in ("lanczos", "dense"))
    assert what_makes_it_shorter(heatmaps, batch, Options()) == "heatmap_samples=0, fewer num_samples or max_seconds"
    assert what_makes_it_shorter(dense, batch.select(slice(0, 1)), Options(max_seconds=1.0)) == "method='lanczos'"
