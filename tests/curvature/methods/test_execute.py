"""Three methods, one truth: closed form or whole matrices against low rank, Lanczos and SciPy."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from support.networks import mlp
from torch import nn

from lightning_hessian import MeasurementError, input_hessian, input_hvp, input_spectrum
from lightning_hessian.curvature.cost_model import ModelCosts, low_rank_bytes, vector_bytes
from lightning_hessian.curvature.methods.interface import MethodInput
from lightning_hessian.curvature.methods.low_rank import low_rank_spectrum
from lightning_hessian.curvature.operators.autodiff import gradients
from lightning_hessian.curvature.options import Options
from lightning_hessian.curvature.target_batch import TargetBatch

F64 = torch.float64


class Residual(nn.Module):
    """Convolution, batch norm, ReLU, max-pool and a skip connection: piecewise linear."""

    def __init__(self, outputs=5):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2))
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.LeakyReLU(0.1))
        self.head = nn.Linear(6 * 9, outputs)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)

    def forward(self, x):
        h = self.first(x)
        return self.head((h + self.block(h)).flatten(1))


SHARED = [
    "trace",
    "frobenius_norm",
    "gauss_newton_norm",
    "functional_norm",
    "gauss_newton_share",
    "diagonal",
    "gradient",
    "gradient_curvature",
    "lambda_max",
    "lambda_min",
    "spectral_norm",
    "normalized_curvature",
    "linear_radius",
    "negative_share",
    "effective_rank",
    "gradient_alignment",
]


@pytest.mark.parametrize("target", ["prob", "log_prob", "loss"])
@pytest.mark.parametrize("memory", [None, 500_000])
def test_low_rank_is_dense_to_rounding(target, memory):
    net, x = Residual().double(), torch.randn(3, 2, 6, 6, dtype=F64)
    fast = input_spectrum(net, x, [0, 3], target, max_memory=memory)
    whole = input_spectrum(net, x, [0, 3], target, method="dense")
    assert (fast.method, whole.method) == ("low_rank", "dense")
    assert fast.complete
    assert fast.cost.num_matvecs == 0
    assert fast.eigenvalues.shape == (3, 2, 5)
    for name in SHARED:
        torch.testing.assert_close(getattr(fast, name), getattr(whole, name), rtol=1e-7, atol=1e-10, msg=name)
    rebuilt = (fast.eigenvectors.mT * fast.eigenvalues.gather(2, fast.vector_index).unsqueeze(-2)) @ fast.eigenvectors
    torch.testing.assert_close(rebuilt, input_hessian(net, x, [0, 3], target), rtol=0, atol=1e-10)


def test_low_rank_with_more_outputs_than_inputs():
    net, x = mlp(nn.ReLU, inputs=4, outputs=9), torch.randn(2, 4, dtype=F64)
    fast = input_spectrum(net, x, 1, "prob")
    assert fast.method == "low_rank"
    torch.testing.assert_close(fast.eigenvalues, input_spectrum(net, x, 1, "prob", method="dense").eigenvalues)


def test_low_rank_raises_where_it_is_not_exact():
    with pytest.raises(MeasurementError, match="piecewise linear in their input, and this one is curved"):
        input_spectrum(mlp(), torch.randn(2, 6, dtype=F64), 0, method="low_rank")


def test_lanczos_on_the_gauss_newton_operator_where_the_gradients_do_not_fit():
    net, x = Residual(outputs=40).double(), torch.randn(2, 2, 6, 6, dtype=F64)
    exact = input_spectrum(net, x, 3, "prob", method="low_rank")
    found = input_spectrum(net, x, 3, "prob", method="lanczos", num_eigenvalues=4)
    assert found.method == "lanczos"
    assert found.converged.all()
    slack = found.residuals.amax(-1)
    assert ((found.lambda_max - exact.lambda_max).abs() <= slack).all()
    assert ((found.lambda_min - exact.lambda_min).abs() <= slack).all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("memory", [None, 5_000_000])
def test_lanczos_finds_the_ends_of_a_curved_network(dtype, memory):
    net, x = mlp(nn.Tanh, inputs=300, width=40), torch.randn(3, 300, dtype=dtype)
    found = input_spectrum(net, x, [0, 2], method="lanczos", num_eigenvalues=6, max_memory=memory)
    whole = input_spectrum(net, x, [0, 2], method="dense", num_eigenvalues=6)
    assert found.method == "lanczos"
    assert not found.complete
    assert found.converged.all()
    ends = torch.cat([whole.eigenvalues[..., :3], whole.eigenvalues[..., -3:]], dim=-1)
    assert ((found.eigenvalues - ends).abs() <= found.residuals + 1e-6).all()
    assert ((found.trace - whole.trace).abs() <= 4 * found.trace_error).all()
    assert ((found.frobenius_norm - whole.frobenius_norm).abs() <= 4 * found.frobenius_norm_error).all()
    assert ((found.diagonal - whole.diagonal).abs() <= 4 * found.diagonal_error).double().mean() > 0.97
    torch.testing.assert_close(found.gradient_curvature, whole.gradient_curvature, rtol=1e-3, atol=1e-5)
    # the vectors are those of the values
    top = found.eigenvectors[:, :, 0]
    value = found.eigenvalues.gather(2, found.vector_index[..., :1])
    residual = (input_hvp(net, x, top, [0, 2]) - value * top).norm(dim=-1)
    bound = found.residuals.gather(2, found.vector_index[..., :1])[..., 0]
    torch.testing.assert_close(residual, bound, rtol=0.05, atol=1e-5)


def test_lanczos_agrees_with_scipy():
    net, x = mlp(nn.GELU, inputs=300, width=30), torch.randn(1, 300, dtype=F64)
    found = input_spectrum(net, x, 1, method="lanczos", num_eigenvalues=4)
    operator = LinearOperator(
        (300, 300), lambda v: input_hvp(net, x, torch.tensor(v.ravel()), 1)[0, 0].numpy(), dtype=float
    )
    expected = np.sort(eigsh(operator, 4, which="BE", v0=np.ones(300))[0])[::-1]
    assert (np.abs(found.eigenvalues[0, 0].numpy() - expected) <= found.residuals[0, 0].numpy()).all()


@pytest.mark.parametrize(
    ("activation", "inputs", "target", "method"),
    [
        (nn.GELU, 6, "logit", "dense"),
        (nn.ReLU, 300, "prob", "low_rank"),
        (nn.ReLU, 300, "logit", "low_rank"),
    ],
)
def test_auto_takes_the_cheapest_and_says_why(activation, inputs, target, method):
    spectrum = input_spectrum(mlp(activation, inputs=inputs), torch.randn(2, inputs, dtype=F64), 0, target)
    assert spectrum.method == method
    assert len(spectrum.reason.split()) > 3


def test_the_whole_matrices_by_low_rank_are_exact():
    net, x = Residual().double(), torch.randn(2, 2, 6, 6, dtype=F64)
    hessian = input_hessian(net, x, 1, "prob")
    expected = torch.func.hessian(lambda v: net.eval()(v.reshape(1, 2, 6, 6)).softmax(1)[0, 1])(x[0].flatten())
    torch.testing.assert_close(hessian[0, 0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("method", "outputs"), [("dense", 3), ("lanczos", 3), ("lanczos", 100)])
@pytest.mark.parametrize("target", ["prob", "logit"])
def test_gauss_newton_and_functional_terms(method, outputs, target):
    """H = JᵀAJ + Σ ∂τ/∂z_c ∇²z_c, each term by torch.func on one sample; the first is exact up to 81 outputs."""
    net, x = mlp(nn.Tanh, inputs=20, outputs=outputs), torch.randn(2, 20, dtype=F64)
    spectrum = input_spectrum(net, x, 1, target, method=method, num_eigenvalues=4)
    for n in range(2):
        jacobian, z = torch.func.jacrev(net)(x[n]), net(x[n])
        tau = (lambda z: z.softmax(0)[1]) if target == "prob" else (lambda z: z[1])
        gauss_newton = jacobian.T @ torch.func.hessian(tau)(z) @ jacobian
        functional = torch.einsum("c,cij->ij", torch.func.grad(tau)(z), torch.func.hessian(net)(x[n]))
        for name, matrix in (("gauss_newton", gauss_newton), ("functional", functional)):
            found, error = (getattr(spectrum, f"{name}_norm{end}")[n, 0] for end in ("", "_error"))
            assert (found - torch.linalg.matrix_norm(matrix)).abs() <= 4 * error + 1e-9
            estimated = method == "lanczos" and (name == "functional" or outputs > 81)
            assert bool(error > 0) == (estimated and bool(matrix.any()))


def test_one_eigenvalue_still_means_both_ends():
    net, x = mlp(nn.Tanh, inputs=20), torch.randn(2, 20, dtype=F64)
    found = input_spectrum(net, x, 1, method="lanczos", num_eigenvalues=1)
    whole = input_spectrum(net, x, 1, method="dense")
    torch.testing.assert_close(found.lambda_min, whole.lambda_min, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.lambda_max, whole.lambda_max, rtol=1e-6, atol=1e-8)


def test_what_needs_the_whole_spectrum_is_nan_where_only_its_ends_are_known():
    net, x = mlp(nn.Tanh, inputs=20), torch.randn(2, 20, dtype=F64)
    ends, whole = (input_spectrum(net, x, 1, "prob", method=m, num_eigenvalues=4) for m in ("lanczos", "dense"))
    assert ends.negative_share.isnan().all()
    assert ends.effective_rank.isnan().all()
    assert not whole.negative_share.isnan().any()
    assert (ends.gauss_newton_share_error > 0).all()
    assert ((ends.gauss_newton_share - whole.gauss_newton_share).abs() <= 4 * ends.gauss_newton_share_error).all()
    assert not whole.gauss_newton_share_error.any()


def test_a_block_sees_how_often_the_largest_eigenvalue_repeats():
    eigenvalues = torch.tensor(
        [3.0, 3.0, 3.0, *(0.9**i for i in range(150)), *(-(0.9**i) for i in range(147))], dtype=F64
    )

    def quadratic(x):
        return 0.5 * (x.square() * eigenvalues).sum(1)

    x = torch.randn(2, 300, dtype=F64)
    arguments = {"method": "lanczos", "num_eigenvalues": 8}
    single, block = (input_spectrum(quadratic, x, 0, **arguments, block_size=b) for b in (1, 3))
    ordered = eigenvalues.sort(descending=True).values
    expected = torch.cat([ordered[:4], ordered[-4:]]).expand(2, 1, -1)
    assert block.converged.all()
    torch.testing.assert_close(block.eigenvalues, expected, rtol=0, atol=1e-6)
    assert single.converged.all()  # true eigenvalues, of which copies are missing
    assert (single.eigenvalues[..., 2] < 2).all()


def test_a_separable_function_of_equal_terms_repeats_every_eigenvalue():
    """f(x) = Σ_i t(x_i), 4 inputs a term, at equal x_i: the Hessian of t, 75 times over."""
    net = mlp(nn.Tanh, inputs=4, outputs=1)
    x = torch.randn(4, dtype=F64).repeat(75).unsqueeze(0)
    once = torch.linalg.eigvalsh(torch.func.hessian(lambda v: net(v)[0])(x[0, :4]))
    arguments = {"method": "lanczos", "num_eigenvalues": 6, "block_size": 3}
    found = input_spectrum(lambda x: net(x.reshape(-1, 75, 4)).sum(1), x, 0, **arguments)
    expected = torch.cat([once[-1:].repeat(3), once[:1].repeat(3)])
    assert found.converged.all()
    torch.testing.assert_close(found.eigenvalues[0, 0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_a_target_that_is_curved_at_some_samples_only(method):
    """Squared hinge: A = 2 where the output is above the hinge, 0 elsewhere, the first samples among them."""
    net, x = mlp(nn.Tanh, inputs=20), torch.randn(6, 20, dtype=F64)
    z = net(x)[:, 0].detach()
    x, z = x[z.argsort()], z.sort().values
    hinge = float(z[2:4].mean())
    spectrum = input_spectrum(net, x, 0, lambda z, k: (z.gather(1, k) - hinge).relu() ** 2, method=method)
    gradients = torch.stack([torch.func.grad(lambda v: net(v)[0])(v) for v in x])
    expected = torch.where(z > hinge, 2 * gradients.square().sum(1), 0).detach()
    torch.testing.assert_close(spectrum.gauss_newton_norm[:, 0], expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("num_outputs", "spare", "num_vectors"), [(5, 0, 2), (5, 1, 5), (64, 1, 64), (65, 1, 2)])
def test_all_eigenvectors_of_a_low_rank_hessian_are_listed_where_there_is_room(num_outputs, spare, num_vectors):
    classes, options = torch.zeros(2, 1).long(), Options(num_eigenvalues=2)
    net = mlp(nn.ReLU, 80, num_outputs)
    batch = TargetBatch(net, lambda z, c: z.softmax(1).gather(1, c), torch.randn(2, 80, dtype=F64), classes)
    costs = ModelCosts(batch)
    room = low_rank_bytes(costs) + spare * vector_bytes(batch, batch.num_samples * (num_outputs - 2))
    given = MethodInput(batch, costs, gradients(batch), True, options, room)
    assert low_rank_spectrum(given).decomposition.eigenvectors.shape == (2, 1, num_vectors, 80)
