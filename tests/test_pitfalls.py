"""What goes wrong when a live model is differentiated twice: one test for each way that has been seen."""

import contextlib
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule
from support.finite_differences import finite_differences
from support.mode_agreement import modes_agree
from support.networks import mlp
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_hessian import input_gradient, input_hessian, input_hvp, input_spectrum
from lightning_hessian.curvature.operators.autodiff import ForwardOverReverse, ReverseOverReverse
from lightning_hessian.model.function import ModelFunction
from lightning_hessian.model.prepare import prepare

F64 = torch.float64
X = torch.randn(3, 6, dtype=F64, generator=torch.Generator().manual_seed(4))


def assert_true(model, x=X, k=1):
    """The Hessian is that of finite differences, and trusted."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
        hessian = input_hessian(model, x, k)[:, 0]
    expected = finite_differences(model, x, k)
    assert expected.any()
    torch.testing.assert_close(hessian, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


# Autodiff modes that give something else than the derivative


@pytest.mark.parametrize(
    ("groups", "shape"),
    [
        (groups, shape) for groups in (1, 2, 3, 6) for shape in ((), (5,), (3, 4)) if groups < 6 or shape
    ],  # else constant
)
def test_group_norm_of_every_shape(groups, shape):
    spatial = nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (6, *[1] * len(shape))))
    width = 6 * torch.Size(shape).numel()

    class Spread(nn.Module):
        def forward(self, h):
            ramp = torch.linspace(0.5, 2, torch.Size(shape).numel(), dtype=h.dtype).reshape(shape)
            return torch.sin(h * ramp)

    norm = nn.GroupNorm(groups, 6)
    nn.init.normal_(norm.weight)
    net = nn.Sequential(spatial, Spread(), norm, nn.GELU(), nn.Flatten(), nn.Linear(width, 3)).double()
    assert_true(net)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
def test_a_scripted_function_inside_a_model():
    @torch.jit.script
    def curved(x):
        return torch.tanh(x) * x

    net = mlp()
    for _ in range(3):
        assert_true(lambda x: net(curved(x)))


class Rebinding(nn.Module):
    """Replaces its buffer by a new tensor, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.register_buffer("mu", torch.ones(6, dtype=F64))

    def forward(self, x):
        y = self.net(x * self.mu)
        self.mu = self.mu + 0.1 * x.mean(0)
        return y


@pytest.mark.parametrize("autodiff", [ForwardOverReverse, ReverseOverReverse])
def test_a_forward_that_rebinds_a_buffer(autodiff):
    model = Rebinding()
    mu = model.mu
    expected = finite_differences(model.net, X, 1)
    for _ in range(3):
        with prepare(ModelFunction(model), X, 1, "logit") as prepared:
            columns = autodiff(prepared.batch).columns(torch.eye(6, dtype=F64))
        torch.testing.assert_close(columns[:, 0], expected, rtol=0, atol=1e-6)
        assert model.mu is mu
        assert torch.equal(mu, torch.ones(6, dtype=F64))
    model(X)  # and can still be run, and trained
    model(X).sum().backward()


# Custom functions


class Sine(torch.autograd.Function):
    """sin(x) in the old form, without ``setup_context``, and right."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class OnceSine(Sine):
    """The same, and says itself that it cannot be differentiated twice."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class DetachedSave(Sine):
    """The same with a copy saved that has no history."""

    @staticmethod
    def forward(ctx, x):
        ctx.copy = x.detach().clone()
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.copy.cos()


def test_a_legacy_function_goes_by_double_backward():
    net = mlp()
    assert_true(lambda x: net(Sine.apply(x)))
    assert input_spectrum(lambda x: net(Sine.apply(x)), X, 1).autodiff_mode == "reverse_over_reverse"


@pytest.mark.parametrize("function", [OnceSine, DetachedSave])
@pytest.mark.parametrize("measure", [input_hessian, input_spectrum])
def test_a_function_that_is_differentiable_once_is_not_trusted(function, measure):
    net = mlp()
    with pytest.warns(UserWarning, match=r"cannot be trusted.*autograd\.Function"):
        measure(lambda x: net(function.apply(x)), X, 1)


# Operations of a forward that autograd does not see


def partly_hidden(x):
    with torch.no_grad():
        weight = torch.sigmoid(x.sum(1, keepdim=True))
    return x**3 * weight


def test_no_grad_over_part_of_the_forward_is_not_trusted():
    with prepare(ModelFunction(partly_hidden), X, 1, "logit") as prepared:
        forward, reverse = (
            autodiff(prepared.batch).columns(torch.eye(6, dtype=F64))
            for autodiff in (ForwardOverReverse, ReverseOverReverse)
        )
        assert not torch.allclose(forward, forward.mT)
        assert torch.allclose(reverse, reverse.mT)
        assert not modes_agree(prepared.batch)[0]
    with pytest.warns(UserWarning, match=r"cannot be trusted.*torch\.no_grad\(\) over part of the forward"):
        spectrum = input_spectrum(partly_hidden, X, 1)
    assert spectrum.diagnosis.kind == "inconsistent"


class Quantised(nn.Module):
    """Integer arithmetic: 8 bits."""

    def forward(self, x):
        return (x * 16).to(torch.int8).to(x.dtype) / 16


def all_hidden(x):
    with torch.no_grad():
        return torch.tanh(x)


@pytest.mark.parametrize(("model", "trusted"), [(all_hidden, False), (Quantised(), True)], ids=["no_grad", "int8"])
def test_an_output_that_is_not_connected(model, trusted):
    """Steps have the slope zero that autograd gives, so they are trusted; a hidden tanh has not."""
    with contextlib.nullcontext() if trusted else pytest.warns(UserWarning, match="as far as autograd sees"):
        spectrum = input_spectrum(model, X, 1)
    assert spectrum.diagnosis.kind == "disconnected"
    assert spectrum.valid.all() == trusted
    assert not spectrum.eigenvalues.any()


# Attention


class ChoosesItsKernel(nn.Module):
    """Attention by a kernel that has no second derivative."""

    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, 4)).permute(2, 0, 3, 1, 4)
        with contextlib.nullcontext() if self.kernel is None else sdpa_kernel(self.kernel):
            h = F.scaled_dot_product_attention(q, k, v)
        return self.head(torch.tanh(h.squeeze(1).mean(1)))


@pytest.mark.parametrize(
    "kernel", [None, SDPBackend.FLASH_ATTENTION, [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]]
)
def test_a_kernel_that_the_forward_chooses(kernel):
    net = ChoosesItsKernel(kernel).double()
    assert_true(net, torch.randn(2, 3, 4, dtype=F64))
    before = torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert not torch.backends.cuda.math_sdp_enabled()  # works again
    assert before == (True, True)


# Hooks


def test_full_backward_hooks():
    net, calls = mlp(), []
    expected = input_hessian(net, X, 1)
    net[2].register_full_backward_hook(lambda module, inputs, outputs: calls.append(module))
    torch.testing.assert_close(input_hessian(net, X, 1), expected)
    assert_true(net)


# Compiled modules


def counting_backend(runs):
    def backend(graph, inputs):
        def run(*arguments):
            runs.append(1)
            return graph(*arguments)

        return run

    return backend


@pytest.mark.parametrize("measure", [input_hessian, input_spectrum, input_gradient])
def test_a_compiled_module_keeps_its_graph(measure):
    torch.compiler.reset()
    net, runs = mlp(), []
    compiled = torch.compile(net, backend=counting_backend(runs))
    compiled(X.clone().requires_grad_()).sum().backward()
    assert len(runs) == 1
    measure(compiled, X, 1)
    assert len(runs) == 1  # measured eagerly
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(X.clone().requires_grad_()).sum().backward()
    assert len(runs) == 2  # and trained on with the graph that was there


def test_a_compiled_module_is_measured_with_the_weights_it_has_now():
    torch.compiler.reset()
    net = mlp()
    compiled = torch.compile(net, backend="eager")
    compiled(X)
    input_hessian(compiled, X, 1)
    with torch.no_grad():
        net[0].weight.mul_(2)
    torch.testing.assert_close(input_hessian(compiled, X, 1)[:, 0], finite_differences(net, X, 1), rtol=0, atol=1e-6)


# Surroundings


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize(
    "surroundings",
    [
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.autograd.set_detect_anomaly(True),
        torch.no_grad,
        torch.inference_mode,
    ],
    ids=["autocast", "anomaly", "no_grad", "inference"],
)
def test_the_surroundings_change_no_digit(surroundings):
    net, x = mlp().float(), X.float()
    expected = input_hessian(net, x, 1), input_hvp(net, x, x, 1), input_gradient(net, x, 1)
    with surroundings():
        found = input_hessian(net, x, 1), input_hvp(net, x, x, 1), input_gradient(net, x, 1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_half_precision_weights_are_measured_in_float32():
    net = mlp().to(torch.bfloat16)
    hessian = input_hessian(net, X.float(), 1)
    assert hessian.dtype == torch.float32
    assert net[0].weight.dtype == torch.bfloat16
    expected = finite_differences(net.double(), X.float().double(), 1)
    assert (hessian[:, 0] - expected).norm() < 1e-4 * expected.norm()


class Logs(LightningModule):
    """Logs inside of its forward: without a Trainer, Lightning warns of that."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        y = self.net(x)
        self.log("mean", y.mean())
        self.log_dict({"max": y.max()})
        return y


def test_a_log_in_the_forward_is_silent():
    model = Logs()
    torch.testing.assert_close(input_hessian(model, X, 1), input_hessian(model.net, X, 1))
    assert "log" not in vars(model)


# Numbers at the edge of float32


def test_curvature_lost_in_float32_is_not_trusted():
    """1e8 + x³: float32 loses the curvature of the sum, not of its derivative; one of 1e-60 is lost entirely."""
    assert_true(lambda x: 1e8 + x**3)
    with pytest.warns(UserWarning, match="underflows in float32: measure in float64"):
        hessian = input_hessian(lambda x: x + (1e-20 * x) ** 3, X.float(), 1)
    assert not hessian.any()
    with pytest.warns(UserWarning, match="could not confirm .* rounding in the forward hides second differences"):
        hessian = input_hessian(lambda x: x + (1e-20 * x) ** 3, X, 1)
    assert hessian.any()
