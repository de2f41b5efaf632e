"""Hard inputs: what is right is not called wrong, what is wrong is, and the cause that is named is the true one."""

import pytest
import torch
import torch.nn.functional as F
from support.warned import told
from torch import nn

from lightning_hessian import MeasurementError, input_gradient, input_hessian, input_spectrum

F64, F32 = torch.float64, torch.float32


def random(*shape, dtype=F64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


class Scaled(torch.autograd.Function):
    """x, with a gradient whose derivative is ``1 + error`` times what it should be."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return _ScaledGradient.apply(gradient, ctx.error), None


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient, error):
        ctx.error = error
        return gradient.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 + ctx.error), None


def features(size, error):
    weight, head = random(min(size, 64), size) / size**0.5, random(min(size, 64), seed=1)
    return lambda x: (F.gelu(Scaled.apply(x @ weight.T.to(x), error)) * head.to(x)).sum(1)


@pytest.mark.parametrize("size", [2, 30, 300])
@pytest.mark.parametrize(("dtype", "error"), [(F64, 1e-3), (F64, 1e-2), (F32, 5e-3), (F32, 1e-2)])
def test_second_derivatives_that_are_slightly_wrong_everywhere_are_found(size, dtype, error):
    x = random(2, size, dtype=dtype, seed=2)
    spectrum, message = told(input_spectrum, features(size, error), x, 0)
    assert not spectrum.valid.any()
    assert "contradict the Hessian" in message
    assert told(input_spectrum, features(size, 0.0), x, 0)[0].valid.all()


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("seed", range(3))
def test_entries_in_units_far_apart_are_no_reason_for_doubt(dtype, seed):
    units = torch.tensor([1e-3] * 3 + [1e4] * 3, dtype=F64)
    weight = random(6, 5)

    def model(x):
        return torch.tanh((x / units.to(x)) @ weight.to(x)).sum(1)

    x = (random(1, 6, seed=seed) * units).to(dtype)
    for function in (input_gradient, input_hessian):
        assert told(function, model, x, 0)[1] == ""
    spectrum = told(input_spectrum, model, x, 0)[0]
    assert spectrum.finite_difference_error.max() < 1e-5


@pytest.mark.parametrize("offset", [1e6, 1e9])
def test_inputs_far_from_zero_are_no_reason_for_doubt(offset):
    x = offset + random(2, 3)
    spectrum, message = told(input_spectrum, lambda x: torch.sin(x - offset).sum(1), x, 0)
    assert message == ""
    assert spectrum.finite_difference_error.max() < 1e-3


C1 = {
    "elu": lambda x: F.elu(x).sum(1) + x.pow(2).sum(1),
    "squared relu": lambda x: F.relu(x).pow(2).sum(1),
    "huber": lambda x: F.huber_loss(x, torch.zeros_like(x), reduction="none").sum(1),
}


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("name", C1)
def test_second_derivatives_that_jump_at_the_sample_are_not_called_wrong(name, dtype):
    x = torch.tensor([[0.0, 1.0, -1.0], [0.3, 0.2, -0.5]], dtype=dtype)
    spectrum, message = told(input_spectrum, C1[name], x, 0)
    assert message == ""
    assert "second derivative of the target jumps at sample 0" in spectrum.diagnosis.message
    assert spectrum.finite_difference_error.isfinite().all()


def test_a_wrong_second_derivative_beside_a_jump_of_it_is_found():
    x = torch.tensor([[0.0, 1.0, -1.0]], dtype=F64)
    spectrum, message = told(input_spectrum, lambda x: F.elu(x).sum(1) + Scaled.apply(x, 0.05).pow(2).sum(1), x, 0)
    assert not spectrum.valid.any()
    assert "contradict the Hessian" in message


JUMPS = {
    "step": lambda x: (x > 0).to(x).sum(1) + x.pow(2).sum(1),
    "floor": lambda x: x.floor().sum(1) + x.pow(2).sum(1),
}


@pytest.mark.parametrize("name", JUMPS)
def test_values_that_jump_at_the_sample_are_not_put_down_to_rounding(name):
    x = torch.tensor([[0.0, 1.0, -1.0], [0.3, 0.2, -0.5]], dtype=F64)
    spectrum, message = told(input_spectrum, JUMPS[name], x, 0)
    assert message == ""
    assert "values of the target jump at sample 0" in spectrum.diagnosis.message
    assert "rounding in the forward hides" not in spectrum.diagnosis.message


def test_rounding_in_float32_is_not_taken_for_a_mistake():
    spectrum, message = told(input_spectrum, lambda x: torch.sin(1e5 * x).sum(1), random(2, 3, dtype=F32), 0)
    assert message == ""
    assert "Rounding in float32 is more than a thousandth" in spectrum.diagnosis.message
    assert 1e-4 < spectrum.finite_difference_error.max() < 1e-2


class SkipsAtRandom(nn.Module):
    """A network that skips a block in half of its passes, whichever samples there are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        h = F.gelu(self.first(x))
        return self.last(h + torch.tanh(self.block(h)) if torch.rand(()) < 0.5 else h)


@pytest.mark.parametrize("function", [input_gradient, input_hessian, input_spectrum])
def test_a_branch_taken_at_random_is_noticed_mostly(function):
    """All passes may take the same branch: with four of them, once in eight times."""
    model, x, messages = SkipsAtRandom(), random(3, 4, dtype=F32), []
    for seed in range(16):
        torch.manual_seed(seed)
        messages.append(told(function, model, x, 0)[1])
    assert sum("the forward is random" in message for message in messages) >= 10
    assert all("forward is random" in message for message in messages if message)


@pytest.mark.parametrize("scale", [1e25, 1e-30])
def test_hessians_beyond_the_range_of_float32_are_named_so(scale):
    x = random(2, 30, dtype=F32)
    with pytest.raises(MeasurementError, match="overflows or underflows in float32: measure in float64"):
        input_spectrum(lambda x: x.pow(3).sum(1) * scale, x, 0, method="lanczos")


@pytest.mark.parametrize("scale", [1e25, 1e-30])
def test_norms_of_large_and_small_hessians_do_not_overflow(scale):
    x = random(2, 5, dtype=F32)
    hessian, message = told(input_hessian, lambda x: x.pow(3).sum(1) * scale, x, 0)
    assert message == ""
    torch.testing.assert_close(hessian[:, 0] / scale, torch.diag_embed(6 * x))


def test_values_that_are_not_finite_are_not_blamed_on_the_weights_alone():
    with pytest.raises(MeasurementError, match=r"log\(0\)"):
        input_gradient(lambda x: x.abs().log().sum(1), torch.zeros(1, 2), 0)


def test_units_far_apart_are_no_reason_to_doubt_a_gradient():
    units = torch.tensor([1e6] * 4 + [1e-6] * 4, dtype=F64)
    assert told(input_gradient, lambda x: (x * units.to(x)).sin().sum(1), random(3, 8) / units, 0)[1] == ""


def test_outputs_that_depend_on_the_place_in_the_batch_are_found():
    def model(x):
        return (x.sin() * torch.arange(len(x)).to(x).unsqueeze(1)).sum(1)

    for function in (input_gradient, input_hessian, input_spectrum):
        assert "with its place among them" in told(function, model, random(3, 8), 0)[1]


def test_derivatives_that_are_wrong_at_the_sample_alone_are_not_blamed_on_a_custom_backward():
    _, message = told(input_gradient, lambda x: x.median(1).values.sin(), torch.ones(2, 5, dtype=F64), 0)
    assert "though not beside them: the target is not differentiable there" in message
    assert "custom" not in message


@pytest.mark.parametrize("seed", range(8))
def test_a_term_that_is_missing_everywhere_is_not_said_to_be_missing_at_the_samples_alone(seed):
    """Beside some of these samples, the error is small enough to be tolerated along one direction."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(40, 16), nn.Tanh(), nn.Linear(16, 3))

    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(torch.cat([x[:, :-1], x[:, -1:].detach()], 1))

    _, message = told(input_gradient, Detached(), torch.randn(3, 40), 0)
    assert "Finite differences contradict the gradient" in message
    assert "though not beside" not in message


class CachedTanh(torch.autograd.Function):
    """tanh, whose derivative is right and is not itself differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.derivative = 1 - x.detach().tanh() ** 2
        return x.tanh()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.derivative


@pytest.mark.parametrize("seed", range(3))
def test_a_network_that_seems_piecewise_linear_to_autograd_alone_is_found_for_one_sample(seed):
    """Its second differences of values cross kinks, or drown in rounding, at every step."""
    first, second, head = (random(n, m, seed=seed + m) / m**0.5 for n, m in ((8, 512), (512, 512), (512, 4)))

    def network(activation):
        return lambda x: (activation(x @ first) @ second).relu() @ head

    x = random(1, 8, seed=seed)
    spectrum, message = told(input_spectrum, network(CachedTanh.apply), x, 0, "prob")
    assert not spectrum.valid.any()
    assert "contradict the Hessian" in message
    right = told(input_spectrum, network(F.relu), x, 0, "prob")[0]
    assert right.diagnosis.network == "piecewise_linear"
    assert right.valid.all()


@pytest.mark.parametrize("kink", [1.0, 1e5, 1e8])
def test_a_large_kink_does_not_hide_a_hessian_that_is_wrongly_zero(kink):
    x = torch.tensor([[0.0, 1.0, -1.0]], dtype=F64)
    spectrum, message = told(input_spectrum, lambda x: (kink * x.relu() + CachedTanh.apply(x)).sum(1), x, 0)
    assert not spectrum.valid.any()
    assert "contradict the Hessian" in message
    assert spectrum.diagnosis.kind == "inconsistent"


LARGE_VALUES = {
    "Hessian": lambda x: 2e5 + 10 * CachedTanh.apply(x).sum(1),
    "gradient": lambda x: 1e5 + (x * x.detach()).sum(1) + x.sin().sum(1),
}


@pytest.mark.parametrize("wrong", LARGE_VALUES)
def test_mistakes_that_are_small_beside_the_values_are_not_put_down_to_rounding(wrong):
    x = torch.tensor([[1.0, 0.8, 1.2]])
    function = input_gradient if wrong == "gradient" else input_hessian
    assert f"contradict the {wrong}" in told(function, LARGE_VALUES[wrong], x, 0)[1]
    spectrum, message = told(input_spectrum, LARGE_VALUES[wrong], x, 0)
    assert not spectrum.valid.any()
    assert f"contradict the {wrong}" in message


def test_what_float32_loses_of_a_curvature_is_not_called_zero():
    x = torch.tensor([[1e-3, 2e-3]])
    spectrum, message = told(input_spectrum, lambda x: (x.sin() / x).sum(1), x, 0)  # its Hessian is -1/3 there
    assert not spectrum.valid.any()
    assert "lost in the rounding of float32: measure in float64" in message


@pytest.mark.parametrize("dtype", [F64, F32])
def test_right_numbers_that_values_cannot_confirm_are_not_called_zero(dtype):
    for model, x in (
        (lambda x: (-(x**2)).exp().sum(1), 1e-7 * random(2, 5, dtype=dtype)),
        (lambda x: 1e12 + x.sin().sum(1), random(2, 5, dtype=dtype)),
    ):
        spectrum = told(input_spectrum, model, x, 0)[0]
        assert spectrum.diagnosis.kind == "curved"
        assert spectrum.valid.all()
        assert "could not confirm" in spectrum.diagnosis.message


TIES = {
    "amax": lambda x: x.view(-1, 2, 2).amax(2),
    "maximum": lambda x: torch.maximum(x[:, :2], x[:, 2:]),
    "abs": lambda x: torch.stack([(x[:, 0] - 1).abs(), x[:, 1]], dim=1),
}


@pytest.mark.parametrize("name", TIES)
@pytest.mark.parametrize("target", ["prob", "logit"])
def test_a_mean_of_pieces_is_not_taken_for_one(name, target):
    """At ties, these operations share the gradient: what autograd gives belongs to no piece."""
    head = random(2, 3)
    x = torch.ones(1, 4, dtype=F64)
    spectrum = told(input_spectrum, lambda x: TIES[name](x) @ head, x, 0, target)[0]
    assert "kink at sample 0" in spectrum.diagnosis.message
    assert "or a mean of several" in spectrum.diagnosis.message


def test_the_zero_hessian_of_a_network_without_biases_at_zero_is_no_mistake():
    """Every unit is on its kink, where autograd takes all for inactive; beside it, the target is curved."""
    first, head = random(6, 32), random(32, 3)
    for model in (lambda x: F.gelu((x @ first).relu() @ head), lambda x: F.gelu(x @ first) @ head):
        spectrum, message = told(input_spectrum, model, torch.zeros(1, 6, dtype=F64), 0, "prob")
        assert message == ""
        assert spectrum.valid.all()


LINEAR = {
    "norm of one entry": lambda x: x.view(-1, 1).norm(dim=1).view(x.shape).sum(1),
    "copysign": lambda x: torch.copysign(x, x.detach().flip(1)).sum(1),
    "logcumsumexp of one entry": lambda x: x.view(-1, 1).logcumsumexp(1).view(x.shape).sum(1),
}


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("name", LINEAR)
def test_what_rounding_leaves_of_the_hessian_of_a_linear_function_is_no_mistake(name, dtype):
    """It may be the same when the last digits of the input change."""
    spectrum, message = told(input_spectrum, LINEAR[name], random(3, 5, seed=4, dtype=dtype), 0)
    assert message == ""
    assert spectrum.valid.all()
