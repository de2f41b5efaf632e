"""What PyTorch cannot differentiate is a sentence that names the operation; other errors stay what they are."""

import gc
import re
import weakref

import pytest
import torch
from support.counting import Notes
from torch import nn

from lightning_hessian import input_gradient, input_hessian, input_spectrum
from lightning_hessian.errors import MeasurementError
from lightning_hessian.model.function import ModelFunction
from lightning_hessian.model.prepare import prepare

FUNCTIONS = (input_gradient, input_hessian, input_spectrum)


def eigenvectors(x):
    """Their phase is arbitrary, and PyTorch's derivative says so."""
    rotation = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=x.dtype)
    vectors = torch.linalg.eig(x.reshape(-1, 2, 2) + rotation).eigenvectors
    return torch.view_as_real(vectors).flatten(1) @ torch.arange(8.0, dtype=x.dtype).unsqueeze(1)


def resized(x):
    return (x * 1).resize_(len(x), 4)


def overwritten(x):
    powers = x.exp()
    return powers.mul_(2)


def through_numpy(x):
    return x + torch.as_tensor((x * 1).numpy())


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (eigenvectors, "cannot differentiate the model or the target at these samples: linalg_eig_backward"),
        (overwritten, r"has been modified by an inplace operation.*output 0 of Exp"),
        (resized, r"at 'return \(x \* 1\)\.resize_\(len\(x\), 4\)' in line \d+ of .*: cannot resize variables"),
        (through_numpy, r"the model can be evaluated, but raised an error.*Can't call numpy\(\)"),
        (lambda x: torch.igamma(x, x + 1), "cannot differentiate igamma as the model or the target uses it"),
        (lambda x: torch.floor_divide(x, 2), "cannot differentiate floor_divide as the model or the target uses it"),
        (lambda x: torch.heaviside(x, x), "cannot differentiate heaviside as the model or the target uses it"),
    ],
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_cannot_be_differentiated_is_named(function, model, said):
    x = torch.rand(3, 4, dtype=torch.float64)
    with pytest.raises(MeasurementError, match=f"(?i){said}"):
        function(model, x, 0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_failed_is_freed_at_once(function):
    """Without waiting for the garbage collector: nothing lies in a cycle of references."""
    seen = Notes()

    def model(x):
        hidden = x.exp()
        if x.requires_grad:
            seen.append(weakref.ref(hidden))
        return through_numpy(hidden)

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(MeasurementError, match="Can't call numpy"):
            function(model, torch.rand(3, 4), 0)
        assert seen
        assert all(hidden() is None for hidden in seen)
    finally:
        gc.enable()


@pytest.mark.parametrize("function", FUNCTIONS[1:])
def test_what_has_one_derivative_has_no_second(function):
    x = torch.rand(3, 4, dtype=torch.float64)
    with pytest.raises(MeasurementError, match="cannot differentiate hardsigmoid twice"):
        function(torch._C._nn.hardsigmoid, x, 0)
    assert input_gradient(torch._C._nn.hardsigmoid, x, 0)[:, 0, 0].tolist() == pytest.approx([1 / 6] * 3)


@pytest.mark.parametrize("function", FUNCTIONS[1:])
def test_an_operation_that_has_no_second_derivative_in_python(function):
    def nested(x):
        rows = torch.nested.as_nested_tensor(list(x), layout=torch.jagged)
        return rows.values().view(x.shape).pow(3).sum(1)

    with pytest.raises(MeasurementError, match="PyTorch cannot differentiate the model or the target at these samples"):
        function(nested, torch.rand(3, 4, dtype=torch.float64), 0)


def refuses_equal_samples(x):
    if len(torch.unique(x, dim=0)) < len(x):
        raise ValueError("equal samples")
    return torch.stack([(x**3).sum(1), x.prod(1)], 1)


class Solved(torch.autograd.Function):
    """Its backward evaluates a module, as those of adjoint solvers and of deep equilibrium models do."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.save_for_backward(x)
        ctx.module = module
        return module(x)

    @staticmethod
    def backward(ctx, g):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            return torch.autograd.grad(ctx.module(x), x, g)[0], None


class Solver(nn.Module):
    def __init__(self):
        super().__init__()
        self.field = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x):
        return Solved.apply(x, self.field)


def test_a_backward_that_finds_parameters_of_another_dtype_is_named():
    said = (
        r"backward of a custom autograd.Function raised an error, at 'return torch.autograd.grad.*measure in that dtype"
    )
    with pytest.raises(MeasurementError, match=said):
        input_spectrum(Solver(), torch.rand(3, 4, dtype=torch.float64), 0)


def test_a_forward_that_refuses_equal_samples_is_measured_without_copies():
    x = torch.rand(3, 4, dtype=torch.float64)
    for classes in (0, [0, 1]):
        expected = input_hessian(lambda x: torch.stack([(x**3).sum(1), x.prod(1)], 1), x, classes)
        torch.testing.assert_close(input_hessian(refuses_equal_samples, x, classes), expected)
        spectrum = input_spectrum(refuses_equal_samples, x, classes)
        assert spectrum.valid.all()
        torch.testing.assert_close(spectrum.eigenvalues, torch.linalg.eigvalsh(expected).flip(-1))
    with pytest.raises(MeasurementError, match=r"raised an error.*: equal samples. Its forward .* and equal samples"):
        input_spectrum(refuses_equal_samples, x, [0, 1], method="lanczos", num_eigenvalues=2)


def test_errors_of_other_code_pass():
    x = torch.rand(3, 4)
    with (
        pytest.raises(RuntimeError, match="does not require grad") as raised,
        prepare(ModelFunction(torch.sin), x, 0, "logit"),
    ):
        torch.autograd.grad(torch.ones(1), torch.ones(1))
    assert type(raised.value) is RuntimeError
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        input_spectrum(torch.nn.Linear(3, 2), x, 0)
    assert type(raised.value) is RuntimeError


def test_the_advice_on_cdist_works():
    centers, x = torch.randn(5, 4), torch.randn(3, 4)

    def model(x, **mode):
        return torch.exp(-(torch.cdist(x, centers, **mode) ** 2))

    with pytest.raises(MeasurementError, match=r"cdist twice.* Pass compute_mode='(\w+)' to torch\.cdist, or") as error:
        input_hessian(model, x, 0)
    mode = re.search(r"compute_mode='(\w+)'", str(error.value)).group(1)
    found = input_hessian(lambda x: model(x, compute_mode=mode), x, 0)[:, 0]
    away = x - centers[0]
    outer = 4 * away[:, :, None] * away[:, None] - 2 * torch.eye(4)
    torch.testing.assert_close(found, outer * (-away.square().sum(1)).exp()[:, None, None], rtol=1e-3, atol=1e-4)
