"""How benchmarks count forward passes."""

import torch

from benchmarks.price import Counted


def test_rows_are_counted_and_those_in_float64_twice() -> None:
    counted = Counted(lambda x: x.square()).eval()
    counted(torch.randn(3, 2))
    counted(torch.randn(5, 2, dtype=torch.float64))
    assert counted.counter.total == 13
    torch.func.vmap(counted)(torch.randn(7, 2, 2))  # seven directions, whose rows the network sees once
    assert counted.counter.total == 15
    assert sum(counted.counter.take().values()) == 15
    assert counted.counter.total == 0
