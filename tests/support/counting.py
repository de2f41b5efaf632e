"""Notes of what a model did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor


class Notes:
    """A list that no measurement puts back, as it does whatever else a forward writes to."""

    __module__ = "builtins"  # objects of such modules are left alone
    __slots__ = ("_seen",)

    def __init__(self) -> None:
        self._seen: list[Any] = []

    def append(self, value: Any) -> None:
        self._seen.append(value)

    def extend(self, values: Iterable[Any]) -> None:
        self._seen.extend(values)

    def clear(self) -> None:
        self._seen.clear()

    def count(self, value: Any) -> int:
        return self._seen.count(value)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._seen)

    def __len__(self) -> int:
        return len(self._seen)

    def __getitem__(self, index: int) -> Any:
        return self._seen[index]


class Noting:
    """A network that notes the batch sizes of its forward passes."""

    def __init__(self, net: Callable[[Tensor], Tensor]) -> None:
        self.net = net
        self.sizes: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return self.net(x)
