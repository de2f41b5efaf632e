"""Small networks that many tests share."""

from torch import nn


def mlp(activation: type[nn.Module] = nn.GELU, inputs: int = 6, outputs: int = 3, width: int = 8) -> nn.Sequential:
    """A small float64 network with two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, outputs)
    ).double()
