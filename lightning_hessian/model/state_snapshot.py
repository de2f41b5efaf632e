"""Remembers the values of attributes, containers, tensors, functions and generators, and puts them back."""

from __future__ import annotations

import functools
import random
import types
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DEPTH = 4  # how deep containers and plain objects inside a module's attributes are followed
NOT_FOLLOWED = ("torch", "lightning", "pytorch_lightning", "numpy", "builtins")  # trainers, optimizers, loaders
LARGEST_COPY = 2**26  # bytes; larger plain tensors and arrays are put back by reference only


class StateSnapshot:
    """Keeps what it is shown; ``restore`` puts all of it back, references and values.

    Attributes:
        modules: every module that was met: those registered, and those that attributes, hooks or functions hold.
    """

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self._undo: list[Callable[[], object]] = []
        self._seen: set[int] = set()

    def keep_module(self, model: nn.Module) -> None:
        """Keeps every attribute of a module and of those inside; of their parameters the reference only."""
        for module in model.modules():
            if id(module) not in self._seen:
                self.modules.append(module)
                self._keep_attributes(module, DEPTH)

    def restore(self) -> None:
        """Puts everything back, also after something that cannot be; that is raised in the end."""
        errors = []
        for undo in self._undo:
            try:
                undo()
            except Exception as error:  # a container of the user's that refuses; the rest is wanted all the same
                errors.append(error)
        if errors:
            raise errors[0]

    def _keep_attributes(self, owner: object, depth: int) -> None:
        self._seen.add(id(owner))
        attributes = vars(owner)
        before = dict(attributes)
        self._undo.append(lambda: _refill(attributes, before))
        for name, value in before.items():
            self._keep(value, 1 if name in ("_parameters", "_modules") else depth)

    def _keep(self, value: Any, depth: int) -> None:
        if depth == 0 or id(value) in self._seen:
            return
        if isinstance(value, (tuple, functools.partial, types.MethodType)):
            self._keep_all(_parts(value), depth)
        elif isinstance(value, nn.Module):
            self.keep_module(value)
        elif isinstance(value, types.FunctionType):
            self._keep_function(value, depth)
        elif isinstance(value, (Tensor, np.ndarray)):
            self._keep_numbers(value)
        elif (stream := _stream(value)) is not None:
            self._seen.add(id(value))
            state, put_back = stream
            self._undo.append(lambda: put_back(state))
        elif isinstance(value, (dict, list, set, deque)):
            self._keep_container(value, depth)
        elif _is_plain(value):
            self._keep_attributes(value, depth - 1)

    def _keep_all(self, values: Iterable[Any], depth: int) -> None:
        for value in values:
            self._keep(value, depth - 1)

    def _keep_container(self, container: Any, depth: int) -> None:
        self._seen.add(id(container))
        contents = container.copy()
        if isinstance(container, list):
            self._undo.append(lambda: container.__setitem__(slice(None), contents))
        else:
            self._undo.append(lambda: _refill(container, contents))
        if not isinstance(container, set):
            self._keep_all(contents.values() if isinstance(contents, dict) else contents, depth)

    def _keep_function(self, function: types.FunctionType, depth: int) -> None:
        """What a function may write: the variables around it, and the globals it names."""
        if _is_foreign(function.__module__):
            return
        self._seen.add(id(function))
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # a variable that has no value yet
                continue
            self._undo.append(functools.partial(setattr, cell, "cell_contents", content))
            self._keep(content, depth - 1)
        named = {
            name: function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__
        }
        self._undo.append(lambda: function.__globals__.update(named))
        self._keep_all(named.values(), depth)

    def _keep_numbers(self, values: Any) -> None:
        """A tensor's or array's values."""
        self._seen.add(id(values))
        if hasattr(values, "to_local"):  # a sharded one: of this process's part, since comparing wholes is collective
            values = values.detach().to_local()
        if isinstance(values, Tensor) and values.layout != torch.strided:
            return
        if values.nbytes > LARGEST_COPY:
            self._undo.append(_watched(values))
            return
        copy = values.detach().clone() if isinstance(values, Tensor) else values.copy()

        def undo() -> None:
            if isinstance(values, np.ndarray):
                values[...] = copy
            elif not torch.equal(values, copy):
                with torch.no_grad():
                    values.copy_(copy)

        self._undo.append(undo)


def _refill(container: Any, contents: Any) -> None:
    """By the base type's own methods: a subclass, such as transformers' ModelOutput, may forbid its own."""
    if isinstance(container, deque):
        container.clear()
        container.extend(contents)
        return
    base: Any = next(kind for kind in (OrderedDict, dict, set, type(container)) if isinstance(container, kind))
    base.clear(container)
    for name, value in contents.items() if isinstance(contents, dict) else ():
        base.__setitem__(container, name, value)
    if isinstance(contents, (set, frozenset)):
        base.update(container, contents)


def _parts(value: Any) -> tuple[Any, ...]:
    """What something that cannot be written to is made of."""
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    return (value.__self__, value.__func__) if isinstance(value, types.MethodType) else value


def _stream(value: Any) -> tuple[Any, Callable[[Any], object]] | None:
    """The state of a random generator of any kind, and what puts it back."""
    if isinstance(value, torch.Generator):
        return value.get_state(), value.set_state
    if isinstance(value, random.Random):
        return value.getstate(), value.setstate
    if isinstance(value, np.random.RandomState):
        return value.get_state(), value.set_state
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state, functools.partial(setattr, value.bit_generator, "state")
    return None


def _watched(values: Any) -> Callable[[], None]:
    """Tells if a tensor that is too large for a copy was written to."""
    if not isinstance(values, Tensor) or values.is_inference():
        return lambda: None
    version = values._version

    def tell() -> None:
        if values._version != version:
            warnings.warn(
                f"The forward writes to a plain tensor of more than {LARGEST_COPY >> 20} MiB that the model holds: a "
                f"measurement leaves it changed. Register it with register_buffer, and it comes back as it was.",
                stacklevel=2,
            )

    return tell


def _is_foreign(home: str | None) -> bool:
    return home is None or home.split(".")[0] in NOT_FOLLOWED


def _is_plain(value: object) -> bool:
    """Whether this is an object of the user's own, with attributes that a forward may count in."""
    return not isinstance(value, type) and not _is_foreign(type(value).__module__) and hasattr(value, "__dict__")
