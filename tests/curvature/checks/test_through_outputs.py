"""Piecewise linear networks are compared with values by slopes of their outputs, by five values of each sample."""

import pytest
import torch
from support.networks import mlp
from torch import nn

from lightning_hessian import input_gradient, input_hessian, input_spectrum
from lightning_hessian.curvature.checks.certificate import Certificate
from lightning_hessian.curvature.checks.prediction import predict
from lightning_hessian.curvature.checks.through_outputs import compare_through_outputs
from lightning_hessian.curvature.target_batch import TargetBatch

F64 = torch.float64
X = torch.randn(3, 6, dtype=F64, generator=torch.Generator().manual_seed(1))
STEP = torch.full((3,), 1e-4, dtype=F64)


def found_at(model, factor: float = 1.0) -> Certificate | None:
    """What values say about autograd's gradients, and its Hessians times ``factor``."""
    batch = TargetBatch(model, lambda z, k: z.softmax(1).gather(1, k), X, torch.zeros(3, 1).long())
    hessian = factor * input_hessian(model, X, 0, "prob", check=False)
    values, vectors = torch.linalg.eigh(hessian)
    prediction = predict(
        input_gradient(model, X, 0, "prob", check=False),
        vectors[..., -1],
        values.abs().amax(-1),
        lambda w: torch.einsum("nd,nkde,ne->nk", w, hessian, w),
        torch.Generator().manual_seed(0),
    )
    return compare_through_outputs(batch, prediction, group_size=2, step=STEP)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU])
def test_what_is_right_is_certified(activation):
    found = found_at(mlp(activation))
    assert found.is_outcome("certified").all()
    assert found.error.max() < 1e-6
    assert torch.equal(found.step, STEP)


@pytest.mark.parametrize("factor", [0.95, 1.05, -1.0])
def test_what_is_wrong_is_contradicted(factor):
    assert found_at(mlp(nn.ReLU), factor).is_outcome("contradicted").all()


def test_outputs_that_are_curved_where_autograd_sees_nothing_are_contradicted():
    net = mlp(nn.ReLU)
    assert found_at(lambda x: net(x) + x[:, :3].detach() ** 2).is_outcome("contradicted").all()


def test_a_forward_that_accepts_nothing_but_the_samples_says_nothing():
    net = mlp(nn.ReLU)

    def model(x):
        assert all((row == X).all(1).any() for row in x)
        return net(x)

    assert found_at(model) is None


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x):
        return x + self.layers(x)


def test_kinks_within_every_step_contradict_nothing():
    """Of a deep and wide network: differences of outputs across them are off by up to a hundredth."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(100, 800), *(Residual(800) for _ in range(30)), nn.ReLU(), nn.Linear(800, 10))
    network.double()
    found = input_spectrum(network, torch.randn(3, 100, dtype=torch.float64), 1, "prob")
    assert found.valid.all()
    assert found.diagnosis.findings == ()
    assert 1e-5 < found.finite_difference_error.max() < 1e-2
