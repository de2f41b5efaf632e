"""Ways of training that are said to change the curvature in the input: attacks, penalties and layers."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus
from torch.nn.utils.parametrizations import spectral_norm

RADIUS = 0.1  # of attacks, per pixel; 0 is black, 1 is white
CURE_STEP, CURE_WEIGHT = 1.0, 0.1
GRADIENT_WEIGHT, BETA_WEIGHT, LIPSCHITZ_WEIGHT = 0.02, 0.01, 0.01
STEEP = 1000.0  # β of a softplus that is a ReLU but for its Hessian


def input_gradient_of_loss(model: nn.Module, x: Tensor, y: Tensor, create_graph: bool = False) -> Tensor:
    """The gradient of each sample's cross-entropy with respect to that sample."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(cross_entropy(model(x), y, reduction="sum"), x, create_graph=create_graph)[0]


def fgsm(model: nn.Module, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """The fast gradient sign method (Goodfellow et al., 2015): each pixel is moved by ``radius`` to raise the loss."""
    return x + radius * input_gradient_of_loss(model, x, y).sign()


def attacked(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Projected gradient descent (Madry et al., 2018): the same in steps, within ``RADIUS`` of each pixel."""
    near = x
    for _ in range(steps):
        near = fgsm(model, near, y, 2 * RADIUS / steps).clamp(x - RADIUS, x + RADIUS)
    return near


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy."""
    return cross_entropy(model(x), y)


def adversarial(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy at attacked digits."""
    return cross_entropy(model(attacked(model, x, y, 3)), y)


def cure(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, and how far its gradient changes within a step along its sign."""
    sign = input_gradient_of_loss(model, x, y).sign()
    step = CURE_STEP * sign / sign.flatten(1).norm(dim=1).clamp(min=1e-12).reshape(-1, 1, 1, 1)
    here, there = (input_gradient_of_loss(model, at, y, create_graph=True) for at in (x, x + step))
    return plain(model, x, y) + CURE_WEIGHT * (there - here).square().flatten(1).sum(1).mean()


class CenteredSoftplus(nn.Module):
    """(log(1 + exp βx) − log 2) / β with a learned β."""

    def __init__(self) -> None:
        super().__init__()
        self.log_beta = nn.Parameter(torch.tensor(5.0).log())

    def forward(self, x: Tensor) -> Tensor:
        """As above."""
        beta = self.log_beta.exp()
        return (softplus(beta * x) - math.log(2)) / beta


class LipschitzBatchNorm(nn.BatchNorm2d):
    """Batch norm, scaled down to a learned Lipschitz constant where its own is larger."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False)
        self.log_lipschitz = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, x: Tensor) -> Tensor:
        """As above; its own Lipschitz constant is 1 over the smallest standard deviation of a channel."""
        smallest = (self.running_var.min() + self.eps).sqrt()
        return super().forward(x) * (self.log_lipschitz.exp() * smallest).clamp(max=1)


def cnn(activation: type[nn.Module]) -> nn.Sequential:
    """Two convolutions and two dense layers, for 14x14 pixels."""
    convolutions = nn.Conv2d(1, 16, 3), activation(), nn.Conv2d(16, 32, 3, stride=2), activation()
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(800, 64), activation(), nn.Linear(64, 10))


def batch_normed(low_curvature: bool) -> nn.Sequential:
    """Three convolutions, each with batch norm, and a dense layer, for 14x14 pixels."""
    layers: list[nn.Module] = []
    for channels, stride in (((1, 16), 1), ((16, 32), 2), ((32, 32), 2)):
        convolution = nn.Conv2d(*channels, 3, stride=stride)
        if low_curvature:
            layers += [spectral_norm(convolution), LipschitzBatchNorm(channels[1]), CenteredSoftplus()]
        else:
            layers += [convolution, nn.BatchNorm2d(channels[1]), nn.Softplus(STEEP)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 2 * 2, 10))


def low_curvature(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, and penalties on every learned β and Lipschitz constant."""
    loss = plain(model, x, y)
    for layer in model.modules():
        if isinstance(layer, CenteredSoftplus):
            loss = loss + BETA_WEIGHT * layer.log_beta.exp()
        if isinstance(layer, LipschitzBatchNorm):
            loss = loss + LIPSCHITZ_WEIGHT * layer.log_lipschitz.abs()
    return loss


def with_gradient_penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The same, with the squared norm of the loss's gradient (Drucker and LeCun, 1992)."""
    gradient = input_gradient_of_loss(model, x, y, create_graph=True)
    return low_curvature(model, x, y) + GRADIENT_WEIGHT * gradient.square().flatten(1).sum(1).mean()
