"""Real architectures in float64, against finite differences, and against SciPy on products of others' making."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.datasets import load_digits
from support.finite_differences import finite_differences
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hessian import input_hessian, input_spectrum

F64 = torch.float64
TARGETS = {
    "logit": lambda z: z,
    "log_prob": lambda z: z.log_softmax(-1),
    "prob": lambda z: z.softmax(-1),
    "loss": lambda z: -z.log_softmax(-1),
}


class Block(nn.Module):
    """Pre-norm transformer block, with attention by ``nn.MultiheadAttention`` or by the function below it."""

    def __init__(self, width, fused):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = None if fused else nn.MultiheadAttention(width, 2, batch_first=True)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def attend(self, h):
        if self.attention is not None:
            return self.attention(h, h, h, need_weights=False)[0]
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, h):
        h = h + self.attend(self.norms[0](h))
        return h + self.mlp(self.norms[1](h))


class ViT(nn.Module):
    """Patches of 4x4, a class token, two blocks."""

    def __init__(self, fused, width=12):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.Sequential(Block(width, fused), Block(width, fused))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4))

    def forward(self, x):
        patches = self.patches(x).flatten(2).mT
        h = torch.cat([self.token.expand(len(x), -1, -1), patches], dim=1) + self.positions
        return self.head(self.blocks(h)[:, 0])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(3, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.cell(x)[0].mean(1))


def group_norm_cnn():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.GroupNorm(3, 6),
        nn.SiLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 4, 3),
        nn.GroupNorm(1, 4),
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(4, 4),
    )


def layer_norm_mlp():
    layers = [nn.Linear(30, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Softplus()]
    return nn.Sequential(*layers, nn.Linear(16, 4))


ARCHITECTURES = {
    "vit_multihead": (lambda: ViT(fused=False), (1, 8, 8)),
    "vit_fused": (lambda: ViT(fused=True), (1, 8, 8)),
    "lstm": (Recurrent, (5, 3)),
    "group_norm": (group_norm_cnn, (2, 6, 6)),
    "layer_norm": (layer_norm_mlp, (30,)),
}


@pytest.mark.parametrize("target", ["logit", "log_prob"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_against_finite_differences(name, target):
    make, shape = ARCHITECTURES[name]
    net, x = make().double(), torch.randn(2, *shape, dtype=F64)
    net.eval()
    expected = finite_differences(lambda x: TARGETS[target](net(x)), x, 1)
    norm = torch.linalg.matrix_norm(expected)
    hessian = input_hessian(net.train(), x, 1, target)[:, 0]
    assert (torch.linalg.matrix_norm(hessian - expected) < 1e-6 * norm).all()
    spectrum = input_spectrum(net, x, 1, target, method="lanczos", num_eigenvalues=4)
    values = torch.linalg.eigvalsh((expected + expected.mT) / 2)
    ends = torch.cat([values[:, -2:].flip(-1), values[:, :2].flip(-1)], dim=-1)
    assert ((spectrum.eigenvalues[:, 0] - ends).abs() <= spectrum.residuals[:, 0] + 1e-6 * norm.unsqueeze(1)).all()
    assert spectrum.converged.all()


def assert_same_as_scipy(spectrum, product, size: int) -> None:
    """The ends of a first problem's spectrum, by SciPy from ``product`` alone."""
    operator = LinearOperator((size, size), lambda v: product(torch.from_numpy(v.ravel())).numpy(), dtype=float)
    values = eigsh(operator, 4, which="BE", v0=np.cos(np.arange(size)), tol=1e-10, return_eigenvectors=False)
    found = torch.stack([*spectrum.eigenvalues[0, 0, :2], *spectrum.eigenvalues[0, 0, -2:]])
    slack = torch.stack([*spectrum.residuals[0, 0, :2], *spectrum.residuals[0, 0, -2:]])
    expected = torch.from_numpy(np.sort(values)[::-1].copy())
    assert ((found - expected).abs() <= slack + 1e-6 * expected.abs().max()).all()


def differenced(net: nn.Module, x: Tensor, value, k: int, step: float = 1e-5):
    """A product of one sample's Hessian made of two gradients: no second derivative by autograd."""

    def product(v: Tensor) -> Tensor:
        shift = step / v.norm() * v.reshape(x.shape)
        ends = torch.cat([x + shift, x - shift]).requires_grad_()
        above, below = torch.autograd.grad(value(net(ends))[:, k].sum(), ends)[0].flatten(1)
        return (above - below) / (2 * step) * v.norm()

    return product


@pytest.mark.parametrize("target", ["logit", "prob"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_against_scipy_on_finite_differences(name, target):
    make, shape = ARCHITECTURES[name]
    net, x = make().double().eval(), torch.randn(1, *shape, dtype=F64)
    spectrum = input_spectrum(net, x, 1, target, method="lanczos", num_eigenvalues=4)
    assert spectrum.converged.all()
    assert_same_as_scipy(spectrum, differenced(net, x, TARGETS[target], 1), x.numel())


class ResidualReLU(nn.Module):
    """Two basic blocks with batch norm, of which the second halves the image, for 3x32x32."""

    def __init__(self, outputs=6):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.first = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1))
        self.second = nn.Sequential(nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8))
        self.shortcut = nn.Conv2d(6, 8, 1, stride=2)
        self.head = nn.Linear(8 * 16, outputs)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)

    def forward(self, x):
        h = self.stem(x)
        h = F.relu(h + self.first(h))
        return self.head(F.relu(self.shortcut(h) + self.second(h)).flatten(1))


def double_backward(net: nn.Module, x: Tensor, value, k: int):
    """The usual HVP of one sample: the gradient's graph is retained, and its product with v differentiated."""
    x = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(net(x))[0, k], x, create_graph=True)
    return lambda v: torch.autograd.grad(gradient, x, v.reshape(x.shape), retain_graph=True)[0].detach().flatten()


@pytest.mark.parametrize("target", ["prob", "loss"])
def test_residual_relu_network_has_the_low_rank_that_it_claims(target):
    net, x = ResidualReLU().double(), torch.randn(2, 3, 32, 32, dtype=F64)
    classes = [1, 4]
    spectrum = input_spectrum(net, x, classes, target)
    assert (spectrum.method, spectrum.complete) == ("low_rank", True)
    assert spectrum.eigenvalues.shape == (2, 2, 6)
    assert net.training
    net.eval()
    values = spectrum.eigenvalues.gather(2, spectrum.vector_index)
    for n in range(2):
        for i, k in enumerate(classes):
            product = double_backward(net, x[n : n + 1], TARGETS[target], k)
            vectors, value = spectrum.eigenvectors[n, i], values[n, i]
            gradient = spectrum.gradient[n, i]
            for v in (*torch.randn(3, 3072, dtype=F64), gradient, *vectors[:2]):
                expected = product(v)
                rebuilt = vectors.T @ (value * (vectors @ v))
                assert (rebuilt - expected).norm() < 1e-6 * expected.norm()
            along = gradient @ product(gradient) / gradient.square().sum()
            torch.testing.assert_close(spectrum.gradient_curvature[n, i], along)
    # prob has both signs among its six eigenvalues, loss none below the zeros that are left out
    if target == "prob":
        assert_same_as_scipy(spectrum, double_backward(net, x[:1], TARGETS[target], classes[0]), 3072)


def test_lanczos_on_the_mnist_cnn_is_what_scipy_finds():
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.GELU(),
        nn.Conv2d(32, 64, 3),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(9216, 128),
        nn.GELU(),
        nn.Linear(128, 10),
    ).double()
    digit = torch.tensor(load_digits().images[2] / 16).reshape(1, 1, 8, 8)
    x = F.interpolate(digit, (28, 28), mode="bilinear")
    x = x + 0.1 * torch.rand_like(x)  # away from the kinks where equal neighbors tie in max-pooling
    found = input_spectrum(net, x, 2, method="lanczos", num_eigenvalues=6)
    product = double_backward(net, x, TARGETS["logit"], 2)
    operator = LinearOperator((784, 784), lambda v: product(torch.from_numpy(v.ravel())).numpy(), dtype=float)
    values, vectors = eigsh(operator, 6, which="BE", v0=np.ones(784), tol=1e-8)
    order = np.argsort(-values)
    expected, vectors = torch.from_numpy(values[order]), torch.from_numpy(vectors.T[order].copy())
    assert found.converged.all()
    assert not found.complete
    assert ((found.eigenvalues[0, 0] - expected).abs() <= found.residuals[0, 0]).all()
    magnitudes = found.eigenvalues.gather(-1, found.vector_index).abs()[0, 0]
    assert torch.equal(magnitudes, magnitudes.sort(descending=True).values)
    overlap = (found.eigenvectors[0, 0] * vectors[found.vector_index[0, 0]]).sum(-1).abs()
    assert (overlap > 0.999).all()
    # a larger step crosses kinks of the pooling
    by_differences = differenced(net, x, TARGETS["logit"], 2, step=1e-7)
    for v, i in zip(found.eigenvectors[0, 0], found.vector_index[0, 0], strict=True):
        away = (by_differences(v) - found.eigenvalues[0, 0, i] * v).norm()
        assert away <= found.residuals[0, 0, i] + 1e-5 * found.spectral_norm[0, 0]
