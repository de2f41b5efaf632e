"""What a measurement costs in forward passes of the user's network, counted: the same on every machine."""

import pytest
import torch
from torch import nn

from benchmarks.price import Counted, run_of

N, D = 4, 48


def network(activation: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(D, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, 5)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("activation", "target", "method", "first", "later"),
    [(nn.GELU, "logit", "lanczos", 16, 6), (nn.ReLU, "prob", "low_rank", 32, 8)],
)
def test_sample_forwards_of_a_run(
    activation: type[nn.Module], target: str, method: str, first: int, later: int
) -> None:
    counted = Counted(network(activation))
    measure = run_of(counted, torch.randn(N, D), target, method=method)
    counts = []
    for step in range(5):
        assert measure(step).method == method
        counts.append(counted.counter.take())
    per_sample = [sum(count.values()) / N for count in counts]
    assert 3 < per_sample[0] <= first, counts[0]
    assert min(per_sample[1:]) > 1
    assert max(per_sample[1:]) <= later, counts[1]
