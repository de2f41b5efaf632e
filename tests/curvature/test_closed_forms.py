"""Functions whose Hessians are known in closed form, by every method that applies, in float64 to 1e-10."""

import pytest
import torch
from torch import nn

from lightning_hessian import input_hessian, input_hvp, input_spectrum

F64 = torch.float64


def weighted_squares():
    """x·x·[0, 1, 2, 3], class 2, at x = 2."""
    x = torch.full((1, 4), 2.0, dtype=F64)
    gradient = torch.tensor([[0, 0, 8, 0]], dtype=F64)
    matrix = torch.diag(torch.tensor([0, 0, 4, 0], dtype=F64))
    return lambda x: x * x * torch.arange(4, dtype=x.dtype), x, 2, "logit", gradient, matrix[None]


def squared_residual():
    """(y − wᵀx − b)² for w = b = 0.5, x = 1, y = 1: 2wwᵀ, all 0.5."""
    layer = nn.Linear(3, 1).double()
    nn.init.constant_(layer.weight, 0.5)
    nn.init.constant_(layer.bias, 0.5)
    x = torch.ones(1, 3, dtype=F64)
    # y − wᵀx − b = 1 − 1.5 − 0.5 = −1, so the gradient is −2 · (−1) · 0.5
    return layer, x, 0, lambda z, k: (1 - z) ** 2, torch.ones(1, 3, dtype=F64), torch.full((1, 3, 3), 0.5, dtype=F64)


def softmax_regression(k, target):
    """Log p_k: −Wᵀ(diag p − ppᵀ)W for every k; p_k: p_k Wᵀ((e_k − p)(e_k − p)ᵀ − (diag p − ppᵀ))W."""

    def make():
        layer, x = nn.Linear(6, 4).double(), torch.randn(3, 6, dtype=F64)
        w, p = layer.weight.detach(), layer(x).softmax(1).detach()
        away = torch.eye(4, dtype=F64)[k] - p
        spread = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        a, slope = -spread, away
        if target == "prob":
            a = p[:, k, None, None] * (away.unsqueeze(2) * away.unsqueeze(1) - spread)
            slope = p[:, [k]] * away
        sign = -1 if target == "loss" else 1
        return layer, x, k, target, sign * slope @ w, sign * (w.T @ a @ w)

    return make


def linear_logit():
    """wᵀx + b: exactly zero."""
    layer, x = nn.Linear(5, 3).double(), torch.randn(2, 5, dtype=F64)
    return layer, x, 1, "logit", layer.weight.detach()[1].expand(2, -1), torch.zeros(2, 5, 5, dtype=F64)


def radial_basis():
    """exp(−γ‖x − c‖²): (4γ²(x − c)(x − c)ᵀ − 2γI) times the value; −2γ repeats D − 1 times."""
    c, gamma, x = torch.randn(7, dtype=F64), 0.2, torch.randn(2, 7, dtype=F64)
    d = x - c
    value = torch.exp(-gamma * d.square().sum(1))
    matrix = 4 * gamma**2 * d.unsqueeze(2) * d.unsqueeze(1) - 2 * gamma * torch.eye(7, dtype=F64)
    return (
        lambda x: torch.exp(-gamma * (x - c).square().sum(1)),
        x,
        0,
        "logit",
        -2 * gamma * d * value[:, None],
        matrix * value[:, None, None],
    )


def quadratic():
    """½ xᵀQx: Q."""
    q = torch.randn(8, 8, dtype=F64)
    q, x = q + q.T, torch.randn(2, 8, dtype=F64)
    return lambda x: 0.5 * ((x @ q) * x).sum(1), x, 0, "logit", x @ q, q.expand(2, -1, -1)


def two_layer_tanh():
    """vᵀ tanh(Wx + b): Wᵀ diag(v ∘ tanh″(Wx + b)) W."""
    w, b, v = torch.randn(9, 5, dtype=F64), torch.randn(9, dtype=F64), torch.randn(9, dtype=F64)
    x = torch.randn(3, 5, dtype=F64)
    t = torch.tanh(x @ w.T + b)
    matrix = w.T @ torch.diag_embed(v * -2 * t * (1 - t**2)) @ w
    return lambda x: torch.tanh(x @ w.T + b) @ v, x, 0, "logit", (v * (1 - t**2)) @ w, matrix


LINEAR_NETWORKS = {
    "squared_residual": squared_residual,
    "linear_logit": linear_logit,
    **{
        f"softmax_{target}_{k}": softmax_regression(k, target)
        for target in ("log_prob", "prob", "loss")
        for k in range(4)
    },
}
CURVED_NETWORKS = {
    "weighted_squares": weighted_squares,
    "radial_basis": radial_basis,
    "quadratic": quadratic,
    "two_layer_tanh": two_layer_tanh,
}
CASES = [(name, method) for name in {**LINEAR_NETWORKS, **CURVED_NETWORKS} for method in ("dense", "lanczos")]
CASES += [(name, "low_rank") for name in LINEAR_NETWORKS]


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [*LINEAR_NETWORKS, *CURVED_NETWORKS])
def test_matrices_and_products(name):
    model, x, k, target, _, expected = {**LINEAR_NETWORKS, **CURVED_NETWORKS}[name]()
    v = torch.randn(x.shape, dtype=F64)
    assert_equal(input_hessian(model, x, k, target)[:, 0], expected)
    assert_equal(input_hvp(model, x, v, k, target)[:, 0], (expected @ v.unsqueeze(2)).squeeze(2))


@pytest.mark.parametrize(("name", "method"), CASES)
def test_spectra(name, method):
    model, x, k, target, gradient, expected = {**LINEAR_NETWORKS, **CURVED_NETWORKS}[name]()
    num_inputs = x.shape[1]
    spectrum = input_spectrum(model, x, k, target, method=method, num_eigenvalues=num_inputs)
    values, vectors, found = (t[:, 0] for t in (spectrum.eigenvalues, spectrum.eigenvectors, spectrum.vector_index))
    left_out = torch.zeros(len(x), num_inputs - values.shape[1], dtype=F64)
    assert spectrum.complete
    assert spectrum.converged.all()
    everything = torch.cat([values, left_out], dim=1).sort(descending=True).values
    assert_equal(everything, torch.linalg.eigvalsh(expected).flip(1))
    for end, place in ((spectrum.lambda_max, 0), (spectrum.lambda_min, -1)):  # zeros that are left out count
        assert_equal(end[:, 0], torch.linalg.eigvalsh(expected).flip(1)[:, place])
    assert_equal((vectors.mT * values.gather(1, found).unsqueeze(1)) @ vectors, expected)
    assert_equal(spectrum.gradient[:, 0], gradient)
    assert_equal(spectrum.trace[:, 0], expected.diagonal(dim1=1, dim2=2).sum(1))
    assert_equal(spectrum.frobenius_norm[:, 0], torch.linalg.matrix_norm(expected))
    assert_equal(spectrum.diagonal[:, 0], expected.diagonal(dim1=1, dim2=2))
    along = torch.einsum("ni,nij,nj->n", gradient, expected, gradient) / gradient.square().sum(1)
    assert_equal(spectrum.gradient_curvature[:, 0], along)
    if name == "linear_logit":  # exactly, and no error raised
        assert not spectrum.eigenvalues.any()
        assert spectrum.diagnosis.kind == "linear"


def test_the_log_prob_of_every_class_has_the_same_hessian():
    layer, x = nn.Linear(6, 4).double(), torch.randn(2, 6, dtype=F64)
    hessian = input_hessian(layer, x, "all", "log_prob")
    assert_equal(hessian, hessian[:, :1].expand_as(hessian))


@pytest.mark.parametrize("k", range(4))
def test_a_probability_over_a_linear_layer_has_one_positive_eigenvalue_at_most(k):
    spectrum = input_spectrum(nn.Linear(6, 4).double(), torch.randn(20, 6, dtype=F64), k, "prob", method="dense")
    assert (spectrum.eigenvalues[..., 1:] < 1e-12).all()


def test_the_angle_between_gradient_and_top_eigenvector():
    a, x = torch.tensor([3.0, -4.0], dtype=F64), torch.tensor([[1.0, 2.0]], dtype=F64)
    spectrum = input_spectrum(lambda x: 0.5 * (a * x * x).sum(1, keepdim=True), x, 0)
    assert_equal(spectrum.gradient_alignment, torch.tensor([[8 / 73**0.5]], dtype=F64))  # of (3, −8) with (0, 1)
