"""Ground truths in closed form, against the public functions."""

import pytest
import torch
from support.counting import Notes
from support.networks import mlp
from torch import nn

from lightning_hessian import (
    ConfigurationError,
    MeasurementError,
    input_gradient,
    input_hessian,
    input_hvp,
    input_spectrum,
)
from lightning_hessian.curvature.cost_model import ModelCosts
from lightning_hessian.curvature.options import Options

F64 = torch.float64


def squares(x):
    return x * x * torch.arange(4, dtype=x.dtype)


def test_weighted_squares_class_2():
    x = torch.full((1, 4), 2.0, dtype=F64)
    assert input_gradient(squares, x, 2).tolist() == [[[0, 0, 8, 0]]]
    assert torch.equal(input_hessian(squares, x, 2)[0, 0], torch.diag(torch.tensor([0, 0, 4, 0], dtype=F64)))


def half_linear() -> nn.Linear:
    layer = nn.Linear(3, 1)
    nn.init.constant_(layer.weight, 0.5)
    nn.init.constant_(layer.bias, 0.5)
    return layer


def test_squared_loss_of_one_linear_layer_is_half_everywhere():
    hessian = input_hessian(half_linear(), torch.ones(1, 3), 0, target=lambda z, classes: (1 - z) ** 2)
    assert torch.equal(hessian, torch.full((1, 1, 3, 3), 0.5))


def test_prediction_of_one_linear_layer_is_zero_and_linear():
    spectrum = input_spectrum(half_linear(), torch.ones(1, 3), 0)
    assert torch.equal(input_hessian(half_linear(), torch.ones(1, 3), 0), torch.zeros(1, 1, 3, 3))
    assert torch.equal(spectrum.eigenvalues, torch.zeros(1, 1, 3))
    assert torch.equal(spectrum.gradient, torch.full((1, 1, 3), 0.5))
    assert spectrum.diagnosis.kind == "linear"
    assert spectrum.cost.num_matvecs == 0


@pytest.mark.parametrize("k", [0, 1, 2])
def test_softmax_regression_log_prob(k):
    layer = nn.Linear(5, 3).double()
    x = torch.randn(2, 5, dtype=F64)
    w, p = layer.weight.detach(), layer(x).softmax(1).detach()
    for n in range(2):
        expected = -w.T @ (torch.diag(p[n]) - torch.outer(p[n], p[n])) @ w
        torch.testing.assert_close(input_hessian(layer, x, k, "log_prob")[n, 0], expected, rtol=0, atol=1e-10)


def test_softmax_regression_prob():
    layer = nn.Linear(5, 3).double()
    x = torch.randn(1, 5, dtype=F64)
    w, p = layer.weight.detach(), layer(x).softmax(1).detach()[0]
    e = torch.eye(3, dtype=F64)
    for k in range(3):
        a = p[k] * (torch.outer(e[k] - p, e[k] - p) - (torch.diag(p) - torch.outer(p, p)))
        torch.testing.assert_close(input_hessian(layer, x, k, "prob")[0, 0], w.T @ a @ w, rtol=0, atol=1e-10)


def test_two_layer_tanh():
    w, b, v = torch.randn(7, 4, dtype=F64), torch.randn(7, dtype=F64), torch.randn(7, dtype=F64)
    x = torch.randn(3, 4, dtype=F64)
    hessian = input_hessian(lambda x: torch.tanh(x @ w.T + b) @ v, x, 0)
    t = torch.tanh(x @ w.T + b)
    for n in range(3):
        expected = w.T @ torch.diag(v * (-2 * t[n] * (1 - t[n] ** 2))) @ w
        torch.testing.assert_close(hessian[n, 0], expected, rtol=0, atol=1e-10)


def test_radial_basis_unit():
    c, gamma = torch.randn(5, dtype=F64), 0.3
    x = torch.randn(2, 5, dtype=F64)
    hessian = input_hessian(lambda x: torch.exp(-gamma * (x - c).square().sum(1)), x, 0)
    for n in range(2):
        d = x[n] - c
        value = torch.exp(-gamma * d @ d)
        expected = (4 * gamma**2 * torch.outer(d, d) - 2 * gamma * torch.eye(5, dtype=F64)) * value
        torch.testing.assert_close(hessian[n, 0], expected, rtol=0, atol=1e-10)


def test_prescribed_spectrum():
    q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=F64))
    eigenvalues = torch.tensor([3.0, 1.0, 1.0, 0.0, -0.5, -7.0], dtype=F64)
    matrix = q @ torch.diag(eigenvalues) @ q.T
    spectrum = input_spectrum(
        lambda x: 0.5 * ((x @ matrix) * x).sum(1), torch.randn(2, 6, dtype=F64), 0, num_eigenvalues=3
    )
    for n in range(2):
        torch.testing.assert_close(spectrum.eigenvalues[n, 0], eigenvalues, rtol=0, atol=1e-10)
        torch.testing.assert_close(spectrum.eigenvectors[n, 0, 0].abs(), q[:, 5].abs(), rtol=0, atol=1e-10)
    assert spectrum.vector_index[0, 0, :2].tolist() == [5, 0]
    assert spectrum.converged.all()
    torch.testing.assert_close(spectrum.trace, torch.full((2, 1), -2.5, dtype=F64))
    torch.testing.assert_close(spectrum.spectral_norm, torch.full((2, 1), 7.0, dtype=F64))
    torch.testing.assert_close(spectrum.negative_share, torch.full((2, 1), 7.5 / 12.5, dtype=F64))


@pytest.mark.parametrize("target", ["logit", "log_prob", "prob", "loss", "margin"])
def test_against_torch_func_hessian(target):
    net, x = mlp(), torch.randn(3, 6, dtype=F64)
    hessian = input_hessian(net, x, "all", target)

    def value(x, k):
        z = net(x)
        others = torch.cat([z[:k], z[k + 1 :]])
        return {
            "logit": z[k],
            "log_prob": z.log_softmax(0)[k],
            "prob": z.softmax(0)[k],
            "loss": -z.log_softmax(0)[k],
            "margin": z[k] - others.max(),
        }[target]

    for n in range(3):
        for k in range(3):
            torch.testing.assert_close(hessian[n, k], torch.func.hessian(value)(x[n], k), rtol=1e-9, atol=1e-12)


def test_hvp_is_matrix_times_vector():
    net, x = mlp(), torch.randn(2, 6, dtype=F64)
    hessian = input_hessian(net, x, [0, 2])
    for v in (torch.randn(6), torch.randn(2, 6), torch.randn(2, 2, 6)):
        v = v.double()
        own = {1: v.expand(2, 2, 6) if v.dim() == 1 else v, 2: v, 3: v}[v.dim()]
        own = v[:, None].expand(2, 2, 6) if v.dim() == 2 else own
        expected = (hessian @ own.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(input_hvp(net, x, v, [0, 2]), expected)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 6, 100, "auto"])
def test_every_chunk_size_gives_the_same(chunk_size):
    net, x = mlp(), torch.randn(3, 6, dtype=F64)
    expected = input_hessian(net, x, "all", chunk_size=3)
    torch.testing.assert_close(input_hessian(net, x, "all", chunk_size=chunk_size), expected, rtol=1e-12, atol=1e-14)


def test_little_memory_gives_the_same_in_groups_of_samples():
    net, x = mlp(inputs=40), torch.randn(5, 40, dtype=F64)
    whole = input_spectrum(net, x, "all")
    grouped = input_spectrum(net, x, "all", max_memory=500_000)
    torch.testing.assert_close(grouped.eigenvalues, whole.eigenvalues, rtol=1e-9, atol=1e-12)


def test_float32_to_rounding():
    net, x = mlp(), torch.randn(3, 6, dtype=F64)
    exact = input_hessian(net, x, "all", "prob")
    single = input_hessian(net, x.float(), "all", "prob")
    assert single.dtype == torch.float32
    assert float((single - exact).abs().max()) < 1e-5 * float(exact.abs().max())
    assert input_hessian(net, x.float(), 0, dtype=F64).dtype == F64


def test_the_ways_to_name_classes():
    net, x = mlp(), torch.randn(3, 6, dtype=F64)
    everything = input_gradient(net, x, "all")
    predicted = net(x).argmax(1)
    assert torch.equal(input_gradient(net, x, 1), everything[:, [1]])
    assert torch.equal(input_gradient(net, x, [2, 0]), everything[:, [2, 0]])
    assert torch.equal(input_gradient(net, x, "predicted"), everything[torch.arange(3), predicted][:, None])
    assert torch.equal(input_gradient(net, x, torch.tensor([0, 1, 2])), everything[[0, 1, 2], [0, 1, 2]][:, None])
    each = torch.tensor([[0, 1], [1, 2], [2, 2]])
    assert torch.equal(input_gradient(net, x, each)[2], everything[2, [2, 2]])


def test_one_output_per_sample():
    x = torch.randn(4, 3, dtype=F64)
    hessian = input_hessian(lambda x: x.pow(3).sum(1), x, 0)
    torch.testing.assert_close(hessian[:, 0], torch.diag_embed(6 * x))


def test_the_model_is_left_as_it_was():
    net, x = (
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Dropout(), nn.Linear(4, 2)),
        torch.randn(3, 4),
    )
    net[1].eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    rng, flags = torch.get_rng_state(), [m.training for m in net.modules()]
    input_spectrum(net, x, "all", "prob")
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == flags
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def mnist_cnn(activation: type[nn.Module]) -> nn.Sequential:
    """The network that this package was first written for: 1x28x28 in, 10 classes out."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        activation(),
        nn.Conv2d(32, 64, 3),
        activation(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(9216, 128),
        activation(),
        nn.Linear(128, 10),
    )


def test_mnist_cnn_class_2_is_what_autograd_functional_gives():
    net, x = mnist_cnn(nn.GELU), torch.rand(1, 1, 28, 28)
    gradient, hessian = input_gradient(net, x, 2)[0, 0], input_hessian(net, x, 2)[0, 0]
    assert gradient.shape == (784,)
    assert hessian.shape == (784, 784)
    expected = torch.autograd.functional.hessian(lambda x: net(x)[0, 2], x).reshape(784, 784)
    assert float((hessian - expected).norm() / expected.norm()) < 1e-5
    assert torch.equal(hessian, hessian.T)
    slope = torch.autograd.functional.jacobian(lambda x: net(x)[0, 2], x).flatten()
    torch.testing.assert_close(gradient, slope)


def test_mnist_cnn_with_relu_has_exactly_zero_logit_hessians():
    spectrum = input_spectrum(mnist_cnn(nn.ReLU), torch.rand(2, 1, 28, 28), "all")
    assert not spectrum.eigenvalues.any()
    assert spectrum.gradient.any()
    assert spectrum.diagnosis.kind == "piecewise_linear"


class Seen(nn.Module):
    """``squares`` of all samples at once, or of those a forward accepts; notes how large batches with a graph are."""

    sizes = Notes()

    def forward(self, x):
        if x.requires_grad:
            self.sizes.append(len(x))
        return squares(x) * x


def test_an_hvp_along_a_flat_direction_is_zero_and_nothing_underflows():
    found = input_hvp(lambda x: x[:, :1] ** 2 + x[:, 1:], torch.ones(1, 2), torch.tensor([0.0, 1.0]), 0)
    assert not found.any()


class TwiceAsFastForward(torch.autograd.Function):
    """x², whose forward derivative is twice what it should be."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad

    @staticmethod
    def jvp(ctx, tangent):
        return 4 * ctx.saved_tensors[0] * tangent


def test_the_mode_that_was_wrong_is_named(monkeypatch):
    monkeypatch.setattr(ModelCosts, "calls_dominate", False)  # tensors this small are left to reverse mode
    x = torch.tensor([[1.0, 2.0], [torch.nan, 1.0]], dtype=F64)
    with pytest.warns(
        UserWarning, match=r"wrong as they were first computed \(forward_over_reverse, in a batch of 2\)"
    ):
        found = input_hessian(lambda x: TwiceAsFastForward.apply(x).square().sum(1), x, 0)
    torch.testing.assert_close(found[0, 0], torch.diag(12 * x[0] ** 2))


NUMBERS_OF = {
    "gradient": input_gradient,
    "HVP": lambda model, x, k: input_hvp(model, x, torch.ones(4), k),
    "Hessian": input_hessian,
}


@pytest.mark.parametrize("measure", NUMBERS_OF.values(), ids=NUMBERS_OF)
def test_numbers_that_nothing_could_confirm_are_returned_with_a_warning(measure):
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.5, 2.0, 3.0, 4.0]], dtype=F64)

    def whole_numbers_only(x):
        return squares(x).where((x == x.round()) | (x - 0.5).abs().lt(0.25), torch.nan)

    with pytest.warns(UserWarning, match="could not confirm the numbers at sample 0: the model gives no") as caught:
        found = measure(lambda x: whole_numbers_only(x)[:, :1] + squares(x), x, 3)
    assert caught[0].filename == __file__
    assert found.isfinite().all()


def test_an_hvp_at_what_is_not_finite_is_no_number():
    x = torch.tensor([[torch.nan, 1.0], [3.0, 4.0], [0.0, 1.0]], dtype=F64)
    with pytest.warns(UserWarning, match="HVP of 1 of 3 samples cannot be trusted. Inputs are not finite at sample 0"):
        found = input_hvp(lambda x: x**2, x, torch.ones(2), [0, 1])
    assert found.isnan().flatten(1).all(1).tolist() == [True, False, False]
    assert found[1].tolist() == [[2, 0], [0, 2]]
    v = torch.arange(8.0).reshape(2, 2, 2)
    with pytest.warns(UserWarning, match="The values are finite but gradients are not finite at sample 1"):
        each = input_hvp(lambda x: torch.where(x > 0, x.sqrt(), 0 * x), x[1:], v, [0, 1])
    assert each.isnan().flatten(1).all(1).tolist() == [False, True]
    with pytest.raises(MeasurementError, match="Inputs are not finite at sample 0"):
        input_hvp(lambda x: x**2, x[:1], torch.ones(2), 0)


@pytest.mark.parametrize("v", [torch.ones(4), torch.ones(3, 4), torch.arange(24.0).reshape(3, 2, 4)])
def test_hvps_of_all_classes_share_a_forward_and_fit_the_memory(v, monkeypatch):
    x = torch.rand(3, 4, dtype=F64)
    found = {}
    for memory in (2**30, 1):
        monkeypatch.setattr(Options, "memory", lambda *_, memory=memory: memory)
        for check in (False, True):
            Seen.sizes.clear()
            found[memory, check] = input_hvp(Seen(), x, v, [1, 3], check=check)
            assert Seen.sizes[-1] == (3 if memory > 1 else 1)
            assert Seen.sizes.count(Seen.sizes[-1]) <= (2 if memory > 1 else 4)  # one to count bytes
    for each in found.values():
        torch.testing.assert_close(each, found[2**30, False])


@pytest.mark.parametrize(
    ("v", "sentence"),
    [
        ([1, torch.nan, 1, 1], "v must hold finite numbers; some of its entries are NaN or infinite in float32"),
        ([1, torch.inf, 1, 1], "v must hold finite numbers"),
        ([1, 1e200, 1, 1], "infinite in float32"),
        ([1, 1j, 1, 1], r"v has dtype torch\.complex128, .* real vectors"),
    ],
)
def test_vectors_that_no_hessian_is_multiplied_with(v, sentence):
    v = torch.tensor(v, dtype=torch.complex128 if 1j in v else F64)
    with pytest.raises(ConfigurationError, match=sentence):
        input_hvp(squares, torch.ones(1, 4), v, 2)


def test_the_whole_hessians_of_a_wide_linear_layer_are_zeros():
    model = nn.Linear(300, 4)
    hessian = input_hessian(model, torch.randn(3, 300), [0, 2])
    assert hessian.shape == (3, 2, 300, 300)
    assert not hessian.any()
