"""Every reason for a zero or wrong Hessian is named, and the numbers behind it are right or not trusted."""

import warnings

import pytest
import torch
from support.counting import Notes
from support.networks import custom_function, mlp
from torch import nn

from lightning_hessian import input_gradient, input_hessian, input_spectrum
from lightning_hessian.curvature.checks.diagnosis import Diagnosis, Finding
from lightning_hessian.curvature.cost_model import ModelCosts
from lightning_hessian.curvature.operators import autodiff

X = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def spectrum_of(model, target="logit", x=X, classes=0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return input_spectrum(model, x, classes, target)


def diagnosis_of(*arguments, **named):
    return spectrum_of(*arguments, **named).diagnosis


@pytest.mark.parametrize("activation", [nn.GELU, nn.Tanh, nn.Softplus, nn.SiLU, nn.ELU])
def test_curved(activation):
    assert diagnosis_of(mlp(activation)).kind == "curved"


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.PReLU])
@pytest.mark.parametrize("target", ["logit", "margin"])
def test_piecewise_linear_is_zero_and_says_what_to_choose(activation, target):
    net = mlp(activation)
    diagnosis = diagnosis_of(net, target)
    assert (diagnosis.kind, diagnosis.network) == ("piecewise_linear", "piecewise_linear")
    assert "'prob'" in diagnosis.message
    assert not input_hessian(net, X, 0, target).any()


def test_a_curved_target_over_a_piecewise_linear_network_is_curved():
    diagnosis = diagnosis_of(mlp(nn.ReLU), "prob")
    assert (diagnosis.kind, diagnosis.network) == ("curved", "piecewise_linear")


def test_linear_although_written_with_a_mask():
    assert diagnosis_of(lambda x: x[:, :3].clamp(-1000, 1000)).kind == "linear"
    assert diagnosis_of(nn.Linear(6, 3).double(), "margin").kind == "piecewise_linear"


def test_almost_zero_is_not_zero():
    diagnosis = diagnosis_of(lambda x: x + 1e-30 * x**3)
    assert diagnosis.kind == "curved"


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (lambda x: x.detach() ** 2, "disconnected"),
        (lambda x: x.round(), "disconnected"),
        (lambda x: x.sign() * 3, "disconnected"),
        (lambda x: x.argmax(1, keepdim=True).to(x), "disconnected"),
        (lambda x: 0 * x + 1, "linear"),
    ],
    ids=["detached", "rounded", "sign", "argmax", "constant"],
)
def test_no_gradient_is_zero_without_an_exception(model, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spectrum = input_spectrum(model, X, 0)
    assert not spectrum.gradient.any()
    assert not spectrum.eigenvalues.any()
    assert spectrum.diagnosis.kind == kind


def test_underflow_is_not_called_linear():
    spectrum = spectrum_of(lambda x: torch.sigmoid(-120 - x.sum(1)), x=X.float())  # 1e-52: zero in float32
    assert spectrum.diagnosis.kind == "curved"
    assert not spectrum.valid.any()
    assert "underflows in float32: measure in float64" in spectrum.diagnosis.message


def test_a_detached_function_that_does_depend_on_its_input_is_not_trusted():
    spectrum = spectrum_of(lambda x: x.detach() ** 2)
    assert spectrum.diagnosis.kind == "disconnected"
    assert not spectrum.valid.any()
    assert "detach" in spectrum.diagnosis.message


class CachedDerivative(torch.autograd.Function):
    """sin(x) whose backward is not differentiable: cos(x) was computed in advance."""

    @staticmethod
    def forward(ctx, x):
        ctx.cosine = x.detach().cos()
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.cosine


half_the_derivative = custom_function(torch.sin, lambda x: 0.5 * x.cos())


@pytest.mark.parametrize(
    "model",
    [
        lambda x: x * x.detach() ** 2,
        lambda x: x**2 + x.detach() ** 2,
        lambda x: CachedDerivative.apply(x) * x,
        lambda x: half_the_derivative(x),
    ],
    ids=["factor_detached", "summand_detached", "cached_derivative", "wrong_backward"],
)
def test_inconsistent_is_warned_about(model):
    with pytest.warns(UserWarning, match="3 of 3 samples cannot be trusted.*Finite differences contradict"):
        input_hessian(model, X + X.sign(), 0)
    spectrum = spectrum_of(model, x=X + X.sign())
    assert spectrum.diagnosis.kind == "inconsistent"
    assert not spectrum.valid.any()


def test_a_random_forward():
    diagnosis = diagnosis_of(lambda x: nn.functional.dropout(x**2, 0.5, training=True))
    assert not diagnosis.trusted
    assert "random" in diagnosis.message


@pytest.mark.parametrize(
    "model",
    [
        lambda x: x**2 - (x**2).mean(0),
        nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.GELU()).double(),
    ],
    ids=["mean_over_batch", "batch_norm_without_statistics"],
)
def test_samples_coupled_through_the_batch(model):
    diagnosis = diagnosis_of(model)
    assert not diagnosis.trusted
    assert "other samples in the batch" in diagnosis.message


def test_a_random_target():
    diagnosis = diagnosis_of(lambda x: x**3, lambda z, k: z.gather(1, k) ** 2 + 0.1 * torch.randn(k.shape).to(z))
    assert not diagnosis.trusted
    assert "or the target is" in diagnosis.message


def steep_for_many(x):
    """Half as large again beyond four samples, as values are compared in batches of."""
    return (x**2).sum(1) * (1.5 if len(x) > 4 else 1.0)


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize(
    ("model", "target"),
    [
        (lambda x: (x**3).sum(1) / len(x), "logit"),
        (lambda x: x**3, lambda z, classes: z.gather(1, classes) / len(z)),
        (steep_for_many, "logit"),
    ],
    ids=["forward", "target", "beside_copies"],
)
def test_outputs_that_change_with_the_number_of_samples(model, target, num_samples):
    spectrum = spectrum_of(model, target, x=X[:num_samples])
    assert not spectrum.diagnosis.trusted
    assert not spectrum.valid.any()
    assert "change with the number of samples in the batch" in spectrum.diagnosis.message
    with pytest.warns(UserWarning, match="change with the number of samples in the batch"):
        input_gradient(model, X[:num_samples], 0, target)


def test_a_forward_of_a_fixed_number_of_samples_is_right_and_not_confirmed():
    hessians = torch.diag_embed(6 * X).unsqueeze(1)
    sentence = "refuses other numbers of samples than it was given, .* samples 0, 1 and 2 could not be compared"
    with pytest.warns(UserWarning, match=sentence):
        found = input_hessian(lambda x: (x.reshape(3, 6) ** 3).sum(1), X, 0)
    torch.testing.assert_close(found, hessians, rtol=1e-12, atol=1e-12)
    assert "finite values" not in diagnosis_of(lambda x: (x.reshape(3, 6) ** 3).sum(1)).message


@pytest.mark.parametrize("seed", range(3))
def test_rounding_that_differs_between_batch_sizes_is_no_dependence_on_them(seed):
    """What cancels is 10¹² times as large as what is left, and rounds to other numbers in batches of one and five."""
    weight = torch.randn(6, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    diagnosis = diagnosis_of(lambda x: (1e12 * x @ weight).sum(1) - 1e12 * (x @ weight.sum(1)) + (x**3).sum(1))
    assert diagnosis.trusted
    assert "rounding in the forward hides" in diagnosis.message


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("compile_", [torch.jit.script, lambda f: torch.jit.trace(f, X)], ids=["script", "trace"])
def test_scripted_code_is_right_at_every_call(compile_):
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    expected = input_hessian(net, X, 1)
    scripted = compile_(net)
    for _ in range(4):  # torch's profiling executor changes its mind after the first calls
        torch.testing.assert_close(input_hessian(scripted, X, 1), expected, rtol=1e-9, atol=1e-12)


def test_an_autodiff_mode_that_gives_zeros_is_detected(monkeypatch):
    monkeypatch.setattr(ModelCosts, "calls_dominate", False)  # tensors this small are left to reverse mode
    net = mlp()
    expected = input_spectrum(net, X, "all")
    assert expected.autodiff_mode == "forward_over_reverse"
    broken = lambda self, basis: torch.zeros(*self.batch.shape, len(basis), dtype=basis.dtype)  # noqa: E731
    monkeypatch.setattr(autodiff.ForwardOverReverse, "columns", broken)
    spectrum = input_spectrum(net, X, "all")
    assert spectrum.autodiff_mode == "reverse_over_reverse"
    torch.testing.assert_close(spectrum.eigenvalues, expected.eigenvalues)


def test_group_norm_is_right():
    net = nn.Sequential(nn.Conv1d(1, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(16, 3)).double()
    x = X[:, None]
    hessian = input_hessian(net, x, "all")
    for n in range(3):
        expected = torch.func.hessian(lambda v: net(v.reshape(1, 1, 6))[0])(x[n].flatten())
        torch.testing.assert_close(hessian[n], expected, rtol=1e-9, atol=1e-12)


def test_constant_background_that_ties_in_max_pooling_is_reported():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 2)).double()
    image = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    image[..., 3:5, 3:5] = torch.rand(2, 2)
    spectrum = spectrum_of(net, x=image)
    assert spectrum.valid.all()
    assert "kink at sample 0" in spectrum.diagnosis.message
    assert "kink" not in diagnosis_of(net, x=torch.rand(1, 1, 8, 8, dtype=torch.float64)).message


def test_float64_may_be_impossible():
    net = mlp().float()
    spectrum = spectrum_of(lambda x: net(x.float()), x=X.float())
    assert spectrum.valid.all()
    assert spectrum.finite_difference_error.max() < 1e-2


@pytest.mark.filterwarnings("ignore:The spectrum of 1 of 2 samples cannot be trusted")
@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_a_sample_without_derivatives_has_no_numbers_of_another(method):
    x = torch.tensor([[1.0, 2.0], [-1.0, 2.0]], dtype=torch.float64)
    branches = input_spectrum(
        lambda x: torch.where(x > 0, x.sqrt() ** 3, 0 * x).sum(1), x, 0, method=method, num_eigenvalues=2
    )
    assert branches.valid.tolist() == [[True], [False]]
    assert not branches.converged[1].any()
    for name in ("eigenvalues", "eigenvectors", "gradient", "trace", "diagonal", "finite_difference_error"):
        numbers = getattr(branches, name)
        assert numbers[0].isfinite().all()
        assert numbers[1].isnan().all()
    torch.testing.assert_close(branches.eigenvalues[0, 0], 0.75 / x[0].sqrt())


def test_a_hessian_that_is_not_finite_is_named_beside_another_finding():
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [2.0, 3.0, 4.0]], dtype=torch.float64)
    with pytest.warns(UserWarning, match="kink at sample 1.*Hessian at sample 0 is not finite"):
        hessian = input_hessian(lambda x: x.norm(dim=1) ** 2 + (x - 1).abs().sum(1), x, 0)
    assert hessian.isfinite().flatten(1).all(1).tolist() == [False, True, True]


IN_FLOAT64 = Notes()


class Counting(nn.Module):
    """Notes how many samples it evaluates in float64."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        IN_FLOAT64.extend(x if x.dtype == torch.float64 else ())
        return self.net(x)


def test_whole_hessians_of_piecewise_linear_networks_are_checked_through_their_outputs():
    """By five values; second differences would need several steps, to get between the kinks."""
    net = nn.Sequential(nn.Linear(60, 400), nn.ReLU(), nn.Linear(400, 5))
    IN_FLOAT64.clear()
    input_hessian(Counting(net), torch.randn(3, 60), 1, "prob")
    assert len(IN_FLOAT64) == 3 * 5 + 1  # and what the network is, at one sample


def test_curvature_that_autograd_lacks_is_not_rounding():
    """Its gradient is as small as rounding and its Hessian zero, but the values are those of a parabola."""
    spectrum = spectrum_of(lambda x: 3 + 1e-15 * x + x.detach().square().sum(1, keepdim=True))
    assert not spectrum.valid.any()


# Its derivative is half as large again in float32.
coarse_cube = custom_function(lambda x: x**3, lambda x: x.square() * (4.5 if x.dtype == torch.float32 else 3))


def test_curvature_lost_in_float32_costs_no_other_class_its_numbers():
    spectrum = spectrum_of(lambda x: torch.stack([(x**3).sum(1), coarse_cube(x).sum(1)], 1), x=X.float(), classes="all")
    assert spectrum.valid.tolist() == [[True, False]] * 3
    assert "lost in the rounding of float32" in spectrum.diagnosis.message


def test_the_sample_on_a_kink_of_a_piecewise_linear_network_is_named():
    x = torch.tensor([[0.3, -0.5], [0.7, 0.4], [0.0, 0.2]], dtype=torch.float64)
    slopes = torch.tensor([[1.0, 2.0], [-0.5, 1.5]], dtype=torch.float64)
    spectrum = spectrum_of(lambda x: torch.cat([x, x.relu()], 1) @ torch.cat([slopes, slopes.T]), "prob", x)
    assert spectrum.diagnosis.network == "piecewise_linear"
    assert spectrum.valid.all()
    assert "kink at sample 2," in spectrum.diagnosis.message


def test_coupled_samples_are_found_where_a_forward_accepts_little_more_than_the_data():
    """Moved by noise of 1 % of its scale, the other sample leaves the range; by a hundredth of that, it does not."""
    x = torch.tensor([[0.998, -0.998, 0.5], [-0.998, 0.998, 0.3], [0.1, -0.998, 0.998]], dtype=torch.float64)

    def model(x):
        assert (x.abs() <= 1).all()
        return (x - 0.5 * x.mean(0)).sin()

    assert "changes with the other samples in the batch" in diagnosis_of(model, x=x).message


def test_findings_are_joined_by_their_sentence():
    diagnosis = Diagnosis("curved", "piecewise_linear", (Finding("A jump at {}.", (2,)),))
    more = diagnosis.with_findings([Finding("A jump at {}.", (0,)), Finding("All samples are coupled.")])
    assert more.message.endswith("A jump at samples 0 and 2. All samples are coupled.")
    assert (diagnosis.network_is_piecewise_linear, diagnosis.zero) == (True, False)
    assert not Diagnosis("curved", "curved").network_is_piecewise_linear


@pytest.mark.parametrize("zero", [0, 2])
def test_samples_whose_curvature_underflows_are_named(zero):
    def model(x):
        tiny = torch.where(x[:, :1] > 5, 1e-30, torch.where(x[:, :1] < -5, 0.0, 1.0)).to(x)
        linear_in_float32 = x + tiny**2 * x**2
        return torch.stack([linear_in_float32.sum(1), (x**3).sum(1)], dim=1)

    x = X.float()
    x[zero, 0], x[1, 0] = 10.0, -10.0  # that of sample 1 is exactly zero
    spectrum = spectrum_of(model, x=x, classes=[0, 1])
    assert f"curvature at sample {zero} underflows in float32" in spectrum.diagnosis.message
    assert spectrum.valid.tolist() == [[i != zero, True] for i in range(3)]


class Twisted(torch.autograd.Function):
    """x², whose second derivative has an antisymmetric part, about which no vᵀHv says anything."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum(1)

    @staticmethod
    def backward(ctx, grad):
        return grad.unsqueeze(1) * TwistedGradient.apply(*ctx.saved_tensors)


class TwistedGradient(torch.autograd.Function):
    """2 x."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad + 0.1 * torch.cat([grad[:, 1:2], -grad[:, :1], torch.zeros_like(grad[:, 2:])], dim=1)


def test_an_asymmetric_hessian_is_not_valid():
    spectrum = spectrum_of(lambda x: torch.stack([Twisted.apply(x), x.pow(3).sum(1)], dim=1), classes=[0, 1])
    assert "The Hessian at samples 0, 1 and 2 is asymmetric by up to" in spectrum.diagnosis.message
    assert spectrum.valid.tolist() == [[False, True]] * 3


def test_a_probability_that_underflows_everywhere_is_not_called_linear():
    net = mlp(nn.ReLU).float()
    net[-1].bias.data[0] = -1e4
    message = spectrum_of(net, "prob", X.float()).diagnosis.message
    assert "does not depend on the input as far as autograd sees" in message
    assert "a saturated softmax" in message
    assert "'prob'" not in message
