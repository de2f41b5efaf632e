"""Targets against their textbook formulas, also where those lose their digits."""

import pytest
import torch

from lightning_hessian import input_hessian
from lightning_hessian.targets import TARGETS

CLASSES = torch.tensor([[0, 2], [1, 1]])
OUTPUTS = torch.tensor([[1.0, -2.0, 0.5], [30.0, 29.0, -30.0]], dtype=torch.float64)


def textbook(name, z):
    probabilities = z.softmax(1)
    return {
        "logit": z,
        "log_prob": probabilities.log(),
        "prob": probabilities,
        "loss": -probabilities.log(),
        "margin": torch.stack([z[:, k] - torch.cat([z[:, :k], z[:, k + 1 :]], 1).amax(1) for k in range(3)], 1),
    }[name].gather(1, CLASSES)


@pytest.mark.parametrize("name", TARGETS)
def test_values(name):
    torch.testing.assert_close(TARGETS[name](OUTPUTS, CLASSES), textbook(name, OUTPUTS), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["prob", "log_prob"])
def test_a_confident_network_keeps_its_digits_in_float32(name):
    x = torch.tensor([[18.0, 0.3, -0.7]], dtype=torch.float64)  # 1 − p₀ = 3e-8, less than eps of float32
    exact = input_hessian(lambda x: x, x, "all", name)
    single = input_hessian(lambda x: x, x.float(), "all", name).double()
    for k in range(3):
        error = (single[0, k] - exact[0, k]).norm() / exact[0, k].norm()
        assert error < 1e-5
    lost = torch.func.hessian(lambda v: v.log_softmax(0)[0])(x[0].float()).double()
    assert (lost - exact[0, 0]).norm() > 0.1 * exact[0, 0].norm() or name == "prob"
