"""Targets whose terms cancel: rounding is all that is left of their derivatives, and it hides no mistake."""

import pytest
import torch
import torch.nn.functional as F
from support.networks import custom_function
from support.warned import told

from lightning_hessian import input_gradient, input_hessian, input_spectrum

F64, F32 = torch.float64, torch.float32
ONE = {  # of every input, and so with zero derivatives
    "norm": lambda x: F.normalize(x).pow(2).sum(1),
    "sigmoids": lambda x: (torch.sigmoid(x) + torch.sigmoid(-x)).mean(1),
    "softmax": lambda x: x.softmax(1).sum(1),
}


def samples(seed, dtype=F32):
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1e-2, 1.0])
@pytest.mark.parametrize("constant", [0, 1])
@pytest.mark.parametrize("name", ["norm", "sigmoids"])
def test_a_target_that_is_constant_up_to_rounding(name, constant, scale, seed):
    """Also where so little is left of the values that their size says nothing of the terms'."""

    def model(x):
        return ONE[name](x) - constant

    x = scale * samples(seed)
    spectrum, message = told(input_spectrum, model, x, 0)
    assert message == ""
    assert spectrum.valid.all()
    assert spectrum.diagnosis.kind == "rounding"
    for function in (input_gradient, input_hessian):
        assert told(function, model, x, 0)[1] == ""


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("own", [0.0, 3.0])
def test_rounding_of_the_hessian_hides_no_wrong_gradient(own, dtype):
    """The Hessian is zero up to rounding, as it should be; the gradient lacks a term."""

    def model(x):
        return own * x[:, 0] + 2 * x[:, 1].detach() + ONE["softmax"](x)

    spectrum, message = told(input_spectrum, model, samples(0, dtype), 0)
    assert not spectrum.valid.any()
    assert "Finite differences contradict the gradient" in message


@pytest.mark.parametrize("name", ONE)
def test_rounding_hides_no_curvature_that_autograd_lacks(name):
    spectrum, message = told(
        input_spectrum, lambda x: ONE[name](x) - 1 + 1e-3 * x.detach().pow(2).sum(1), samples(0), 0
    )
    assert not spectrum.valid.any()
    assert "Finite differences contradict" in message


@pytest.mark.parametrize("name", ["norm", "sigmoids"])
def test_curvature_that_float64_sees_below_the_rounding_of_float32_is_not_called_zero(name):
    def model(x):
        return ONE[name](x) - 1 + 1e-9 * x.pow(3).sum(1)

    spectrum, message = told(input_spectrum, model, samples(0), 0)
    assert not spectrum.valid.any()
    assert "measure in float64" in message
    assert told(input_spectrum, model, samples(0, F64), 0)[1] == ""


def test_a_hessian_that_is_wrongly_zero_beside_a_steep_slope_is_not_called_rounding():
    """Its curvature is small beside the gradient, which is right."""
    once = custom_function(torch.sin, torch.cos, once=True)
    spectrum, message = told(input_spectrum, lambda x: (100 * x + once(x)).sum(1), samples(0), 0)
    assert not spectrum.valid.any()
    assert "Finite differences contradict the Hessian" in message


class WrongInFloat32(torch.autograd.Function):
    """x, with a second derivative that it does not have; in float32 and in batches of odd size, as a kernel might."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient + (0.3 * (x - x.detach()) if x.dtype == F32 and len(x) % 2 else 0 * x)


def test_a_wrong_number_in_float32_is_not_taken_for_rounding():
    """What is left of it in float64 is nothing, too; but it is no rounding, which would change nearby."""
    found, _ = told(input_spectrum, lambda x: WrongInFloat32.apply(x).sum(1), samples(0)[:3], 0)
    assert (found.eigenvalues.abs().amax(-1)[found.valid] < 1e-6).all()


def test_a_gradient_that_lacks_little_more_than_rounding_is_wrong():
    spectrum, message = told(input_spectrum, lambda x: ONE["softmax"](x) + 1e-4 * x[:, 1].detach(), samples(0), 0)
    assert not spectrum.valid.any()
    assert "Finite differences contradict the gradient" in message
