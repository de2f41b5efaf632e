"""Networks with random weights that do not ask for gradients, their problems, and HVPs as others write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.model.targets import TargetName, resolve_target

Product = Callable[[Tensor], Tensor]


def frozen(model: nn.Module) -> nn.Module:
    """In eval mode, with parameters that do not ask for gradients: cheaper for every competitor alike."""
    return model.eval().requires_grad_(False)


def resnet50(num_classes: int) -> nn.Module:
    """That of transformers' configuration with random weights; nothing is downloaded.

    Batch norms take their statistics from two batches of noise: with those they start with, activations grow from
    layer to layer until the softmax is saturated.
    """
    import transformers

    config = transformers.ResNetConfig(id2label={i: str(i) for i in range(num_classes)})
    network = transformers.ResNetForImageClassification(config)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean of all batches
    with torch.no_grad():
        for _ in range(2):
            network.train()(torch.randn(4, 3, 64, 64))
    return network


def problems_of(model: nn.Module, x: Tensor, classes: Sequence[int], target: TargetName = "logit") -> TargetBatch:
    """The problems of K classes of every sample, without the isolation that ``input_hessian`` puts around them."""
    num_outputs = model(x).shape[1]
    return TargetBatch(
        model, resolve_target(target, num_outputs), x, torch.tensor([list(classes)] * len(x), device=x.device)
    )


def mlp() -> nn.Module:
    """784-256-256-10, GELU."""
    layers = [nn.Flatten(), nn.Linear(784, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10)]
    return frozen(nn.Sequential(*layers))


def cnn() -> nn.Module:
    """Two 3×3 convolutions of 16 and 32 channels, SiLU, and a linear head."""
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 32, 3, padding=1), nn.SiLU()]
    return frozen(nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 28 * 28, 10)))


def mnist_cnn() -> nn.Module:
    """PyTorch's MNIST example with GELU in place of ReLU, and no dropout."""
    layers = [nn.Conv2d(1, 32, 3), nn.GELU(), nn.Conv2d(32, 64, 3), nn.GELU(), nn.MaxPool2d(2), nn.Flatten()]
    return frozen(nn.Sequential(*layers, nn.Linear(64 * 12 * 12, 128), nn.GELU(), nn.Linear(128, 10)))


class Block(nn.Module):
    """Pre-norm transformer block; attention is written out, so that every autodiff mode takes the same path."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, dim]`` to the same shape."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A small vision transformer: patches of 4×4 or 7×7, two blocks of width 64 with four heads."""

    def __init__(self, channels: int, size: int, patch: int, dim: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, dim, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, dim))
        self.blocks = nn.Sequential(*[Block(dim, 4) for _ in range(depth)])
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 10))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, size, size]`` to ``[N, 10]``."""
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2) + self.position).mean(1))


class Attention(nn.Module):
    """Twelve tokens of eight numbers, one transformer block of width 32."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(8, 32), Block(32, 4), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 12, 8]`` to ``[N, 10]``."""
        return self.head(self.block(self.embed(x)).mean(1))


class Recurrent(nn.Module):
    """A GRU of 16 units over sixteen steps of four numbers; written out, as vmap has no rule for torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.state, self.head = nn.Linear(4, 48), nn.Linear(16, 48), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 16, 4]`` to ``[N, 10]``."""
        h = x.new_zeros(len(x), 16)
        for given in self.input(x).unbind(1):
            (reset_x, update_x, new_x), (reset_h, update_h, new_h) = given.chunk(3, -1), self.state(h).chunk(3, -1)
            update = torch.sigmoid(update_x + update_h)
            h = update * h + (1 - update) * torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
        return self.head(h)


class Residual(nn.Module):
    """x + conv(relu(norm(conv(x)))), piecewise linear in eval mode."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        conv = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
        self.inner = nn.Sequential(conv[0], nn.BatchNorm2d(channels), nn.ReLU(), conv[1], nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, H, W]`` to the same shape."""
        return torch.relu(x + self.inner(x))


def residual_relu() -> nn.Module:
    """Residual ReLU network on 3×32×32 with batch norm and max-pooling: 8 channels, two blocks, ten classes."""
    stem = [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Residual(8), nn.MaxPool2d(2)]
    return frozen(nn.Sequential(*stem, Residual(8), nn.Flatten(), nn.Linear(8 * 8 * 8, 10)))


def usual_product(model: nn.Module, x: Tensor, k: int) -> Product:
    """The usual double-backward HVP: forward, gradient and its derivative at every call."""

    def product(v: Tensor) -> Tensor:
        point = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(point)[0, k], point, create_graph=True)
        return torch.autograd.grad(gradient, point, v.reshape(point.shape))[0].flatten()

    return product


def retained_product(model: nn.Module, x: Tensor, k: int) -> Product:
    """As ours: the gradient's graph built once and kept."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[0, k], x, create_graph=True)
    return lambda v: torch.autograd.grad(gradient, x, v.reshape(x.shape), retain_graph=True)[0].flatten()
