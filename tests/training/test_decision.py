"""What is decided and said about a measurement that is about to be made."""

import torch
from support.measuring import Measurer
from support.networks import mlp
from torch import nn

from lightning_hessian.curvature import analysis
from lightning_hessian.curvature.analysis import differentiate
from lightning_hessian.curvature.checks.diagnosis import Diagnosis
from lightning_hessian.curvature.methods.plan import Plan
from lightning_hessian.curvature.options import Options
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.training.decision import what_makes_it_shorter
from lightning_hessian.training.samples import Samples

CURVED = Diagnosis("curved", "curved")


def test_what_makes_a_measurement_shorter():
    classes = torch.zeros(2, 1, dtype=torch.long)
    batch = TargetBatch(mlp(), lambda z, c: z.gather(1, c), torch.randn(2, 6), classes)
    heatmaps, dense = (Plan(method, "", CURVED, num_matrices=2) for method in ("lanczos", "dense"))
    assert what_makes_it_shorter(heatmaps, batch, Options()) == "heatmap_samples=0, fewer num_samples or max_seconds"
    assert what_makes_it_shorter(dense, batch.select(slice(0, 1)), Options(max_seconds=1.0)) == "method='lanczos'"


def test_a_piecewise_linear_network_is_examined_again_at_the_samples_whose_turn_it_is(monkeypatch):
    examined = []

    def recorded(batch, costs, memory, generator=None):
        examined.append((batch.num_samples, generator is not None))
        return differentiate(batch, costs, memory, generator)

    monkeypatch.setattr(analysis, "differentiate", recorded)
    measurer = Measurer(1, "prob", "float64", Options(), heatmap_samples=0)
    samples = Samples(torch.randn(5, 6), None)
    for step in range(2):
        measurer.measure(mlp(nn.ReLU), samples, step=step)
    assert examined == [(5, True), (5, False), (1, True)]
