"""Targets against their textbook formulas, also where those lose their digits."""

import pytest
import torch

from lightning_hessian import ConfigurationError, input_gradient, input_hessian
from lightning_hessian.model.targets import TARGETS

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


# p ≈ 1 − 1e-13: no difference of such values shows its curvature
@pytest.mark.filterwarnings("ignore:Differences of values could not confirm")
@pytest.mark.parametrize("name", ["prob", "log_prob", "loss"])
@pytest.mark.parametrize("gap", [3.0, 10.0, 20.0, 30.0])
def test_a_confident_network_keeps_its_digits_in_float32(name, gap):
    """Gradient and Hessian of a curved network in float32."""
    weights = torch.randn(3, 4, dtype=torch.float64)
    x = torch.randn(1, 4, dtype=torch.float64)

    def network(x):
        return torch.tanh(x @ weights.T.to(x)) + torch.tensor([gap, 0.0, 0.5]).to(x)

    for k in range(3):
        for function in (input_gradient, input_hessian):
            exact, single = (function(network, v, k, name).double() for v in (x, x.float()))
            assert (single - exact).norm() < 1e-4 * exact.norm(), (k, function.__name__)


def test_the_exact_values_behind_it():
    """In float64 the derivatives of a moderately confident network are the textbook's."""
    x = torch.tensor([[9.0, 0.3, -0.7]], dtype=torch.float64)
    for k in range(3):
        expected = torch.func.hessian(lambda v, k=k: v.log_softmax(0)[k])(x[0])
        torch.testing.assert_close(input_hessian(lambda x: x, x, k, "log_prob")[0, 0], expected, rtol=1e-9, atol=1e-14)


def test_softmax_regression_at_extreme_confidence():
    """∇ log p_top = Σ_{j≠top} p_j (w_top − w_j), in float32, where 1 − p_top is below eps."""
    w = torch.eye(3)
    x = torch.tensor([[25.0, 0.0, 0.0]])
    p = torch.exp(torch.tensor(-25.0, dtype=torch.float64))
    gradient = input_gradient(lambda x: x @ w.to(x), x, 0, "log_prob")[0, 0].double()
    torch.testing.assert_close(gradient, torch.stack([2 * p, -p, -p]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("target", "raised"),
    [
        (lambda z, classes: torch.nn.functional.cross_entropy(z, classes, reduction="none"), "RuntimeError: 0D or 1D"),
        (lambda z: z.sigmoid(), "TypeError: .* takes 1 positional argument but 2 were given"),
    ],
    ids=["loss_of_labels", "one_argument"],
)
@pytest.mark.parametrize("function", [input_gradient, input_hessian])
def test_what_a_target_raised_is_told_with_how_it_is_called(function, target, raised):
    called = r"called with outputs \[N, C\], here \[2, 3\], and integer classes \[N, K\], here \[2, 1\]"
    with pytest.raises(ConfigurationError, match=f"The target 'lambda' raised {raised}.*{called}, and must return"):
        function(lambda x: x**3, OUTPUTS, 0, target)


def test_the_loss_that_is_advised_works():
    def target(z, classes):
        return torch.nn.functional.cross_entropy(z, classes[:, 0], reduction="none")[:, None]

    expected = input_hessian(lambda x: x, OUTPUTS[:1], 2, "loss")
    torch.testing.assert_close(input_hessian(lambda x: x, OUTPUTS[:1], 2, target), expected, rtol=1e-9, atol=1e-12)
