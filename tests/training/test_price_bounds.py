"""What a measurement costs in forward passes of the user's network, counted: the same on every machine."""

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.price import Counted, run_of
from lightning_hessian.curvature import cost_model
from lightning_hessian.curvature.memory import allocated_per_sample

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


def test_memory_is_counted_once_in_a_run_unless_the_network_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Any] = []

    def count(batch: Any, work: Any) -> int:
        counted.append(work)
        return allocated_per_sample(batch, work)

    monkeypatch.setattr(cost_model, "allocated_per_sample", count)
    monkeypatch.setattr(cost_model, "SURELY", 1e9)  # no estimate is good enough
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    measure = run_of(network, torch.randn(3, 6), "prob")
    measure(0)
    assert counted
    num_counted = len(counted)
    measure(1)
    assert len(counted) == num_counted
    network.insert(1, nn.Linear(8, 8))
    measure(2)
    assert len(counted) == 2 * num_counted
