"""Remembers the values of attributes, containers, tensors and generators, and puts them back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

DEPTH = 4  # how deep containers and plain objects inside a module's attributes are followed
NOT_FOLLOWED = ("torch", "lightning", "pytorch_lightning", "numpy", "builtins")  # trainers, optimizers, loaders
LARGEST_COPY = 2**26  # bytes; larger plain tensors are put back by reference only


class Keeper:
    """Keeps what it is shown; ``restore`` puts all of it back, references and values."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self._seen: set[int] = set()

    def keep_attributes(self, owner: object, depth: int = DEPTH) -> None:
        """Keeps every attribute of ``owner``; of a module's parameters the reference only."""
        if id(owner) in self._seen:
            return
        self._seen.add(id(owner))
        attributes = vars(owner)
        before = dict(attributes)
        self._undo.append(lambda: _refill(attributes, before))
        for name, value in before.items():
            self._keep(value, 1 if name in ("_parameters", "_modules") else depth)

    def restore(self) -> None:
        """Puts everything back."""
        for undo in self._undo:
            undo()

    def _keep(self, value: Any, depth: int) -> None:
        if depth == 0 or id(value) in self._seen:
            return
        if isinstance(value, (Tensor, torch.Generator, dict, list, set)):
            self._seen.add(id(value))
        if isinstance(value, Tensor):
            self._keep_tensor(value)
        elif isinstance(value, torch.Generator):
            state = value.get_state()
            self._undo.append(lambda: value.set_state(state))
        elif isinstance(value, dict):
            items = dict(value)
            self._undo.append(lambda: _refill(value, items))
            self._keep_all(items.values(), depth)
        elif isinstance(value, list):
            entries = list(value)
            self._undo.append(lambda: value.__setitem__(slice(None), entries))
            self._keep_all(entries, depth)
        elif isinstance(value, set):
            members = set(value)
            self._undo.append(lambda: _refill(value, members))
        elif isinstance(value, tuple):
            self._keep_all(value, depth)
        elif _is_plain(value):
            self.keep_attributes(value, depth - 1)

    def _keep_all(self, values: Any, depth: int) -> None:
        for value in values:
            self._keep(value, depth - 1)

    def _keep_tensor(self, tensor: Tensor) -> None:
        if hasattr(tensor, "to_local"):  # a sharded one: of this process's part, since comparing wholes is collective
            tensor = getattr(tensor.detach(), "to_local")()  # noqa: B009 - Tensor has no such method
        if tensor.layout != torch.strided or tensor.nbytes > LARGEST_COPY:
            return
        copy = tensor.detach().clone()

        def undo() -> None:
            if not torch.equal(tensor, copy):
                with torch.no_grad():
                    tensor.copy_(copy)

        self._undo.append(undo)


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    container.update(contents)


def _is_plain(value: object) -> bool:
    """Whether this is an object of the user's own, with attributes that a forward may count in."""
    home = type(value).__module__.split(".")[0]
    followed = home not in NOT_FOLLOWED and not isinstance(value, (nn.Module, type)) and not callable(value)
    return followed and hasattr(value, "__dict__")
