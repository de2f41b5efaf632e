"""Fixtures shared by all tests: float64 by default, small networks, a seeded start."""

import matplotlib
import pytest
import torch
from torch import nn

matplotlib.use("agg")
torch.set_num_threads(1)  # the networks of the tests are small: threads would wait for each other


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def mlp(activation: type[nn.Module] = nn.GELU, inputs: int = 6, outputs: int = 3, width: int = 8) -> nn.Sequential:
    """A small float64 network with two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, outputs)
    ).double()
