"""A snapshot of attributes, containers, tensors, functions and generators, which can be restored."""

from __future__ import annotations

import array
import functools
import random
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_hessian.errors import warn
from lightning_hessian.model.attributes import (
    is_foreign,
    is_library,
    is_namespace,
    is_plain,
    put_back,
    refill_slot,
    slots_of,
)
from lightning_hessian.model.stand_ins import stand_in

DEPTH = 4  # how deep containers and plain objects inside a module's attributes are followed
BUFFERS = (bytearray, array.array)
CONSTANTS = (bool, int, float, str, type(None))
LARGEST_COPY = 2**26  # bytes; of larger plain tensors and arrays only the reference is restored


class StateSnapshot:
    """What a forward of a model may write to, as it was; ``restore`` brings it back, references and values.

    Meanwhile, stand-ins take the place of what could not be brought back.

    Attributes:
        modules: every module found: those registered, and those that attributes, hooks or functions refer to.
    """

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self._undo: list[Callable[[], object]] = []
        self._seen: set[int] = set()
        self._stand_ins: dict[int, Any] = {}

    @classmethod
    def take(cls, *owners: object) -> StateSnapshot:
        """A snapshot of all that modules, functions and other objects hold; of parameters only the references."""
        snapshot = cls()
        try:
            for owner in owners:
                snapshot._add(owner, DEPTH)
        except BaseException:
            snapshot.restore()
            raise
        return snapshot

    def restore(self) -> None:
        """Restores everything; the first failure is raised at the end."""
        errors = []
        for undo in self._undo:
            try:
                undo()
            except Exception as error:  # a user's container that forbids writing; the rest must be restored anyway
                errors.append(error)
        if errors:
            raise errors[0]

    def _add_module(self, model: nn.Module) -> None:
        for module in model.modules():
            if id(module) not in self._seen:
                self.modules.append(module)
                self._add_attributes(module, DEPTH)

    def _add_attributes(self, owner: object, depth: int) -> None:
        self._seen.add(id(owner))
        attributes = getattr(owner, "__dict__", {})
        before = dict(attributes)
        self._undo.append(lambda: _refill(attributes, before))
        self._substitute(before, attributes.__setitem__)
        for kind in type(owner).__mro__:
            self._add_class(kind, depth)
        for name, value in before.items():
            self._add(value, 1 if name in ("_parameters", "_modules") else depth)
        for slot, value in slots_of(owner).items():
            self._undo.append(functools.partial(refill_slot, owner, slot, value))
            self._add(value, depth)

    def _add_class(self, kind: type, depth: int) -> None:
        """What methods may write to: the class itself, and the globals that they name."""
        if id(kind) in self._seen or is_library(kind.__module__):
            return
        self._seen.add(id(kind))
        attributes = dict(vars(kind))
        for name, value in attributes.items():
            if isinstance(value, (*CONSTANTS, tuple)) and not name.startswith("__"):
                self._undo.append(functools.partial(put_back, kind, name, value))
            self._add(getattr(value, "__func__", getattr(value, "fget", value)), depth)

        def write(name: str, copy: Any) -> None:
            self._undo.append(functools.partial(setattr, kind, name, attributes[name]))
            setattr(kind, name, copy)

        self._substitute(attributes, write)

    def _add(self, value: Any, depth: int) -> None:
        if depth == 0 or type(value) in CONSTANTS or id(value) in self._seen:
            return
        if isinstance(value, types.ModuleType):
            return  # what functions name in it is followed by ``_add_globals``
        if is_namespace(value):  # never emptied, and of a library not even followed
            if not is_library(value["__name__"]):
                self._seen.add(id(value))
                self._add_globals(value, {name for name in value if not name.startswith("__")}, depth)
            return
        if isinstance(value, (dict, list, set, deque, *BUFFERS)):
            self._add_container(value, depth)
        elif isinstance(value, (tuple, functools.partial, types.MethodType)):
            self._add_all(_members(value), depth)
        elif isinstance(value, nn.Module):
            self._add_module(value)
        elif isinstance(value, types.FunctionType):
            self._add_function(value, depth)
        elif isinstance(value, (Tensor, np.ndarray)):
            self._add_array(value)
        elif (stream := _random_stream(value)) is not None:
            self._seen.add(id(value))
            state, set_state = stream
            self._undo.append(lambda: set_state(state))
        elif isinstance(value, type):
            self._add_class(value, depth - 1)
        elif is_plain(value):
            self._add_attributes(value, depth - 1)

    def _add_all(self, values: Iterable[Any], depth: int) -> None:
        for value in values:
            self._add(value, depth - 1)

    def _add_container(self, container: Any, depth: int) -> None:
        self._seen.add(id(container))
        contents: Any = container[:] if isinstance(container, BUFFERS) else container.copy()
        if isinstance(container, (list, *BUFFERS)):
            self._undo.append(lambda: container.__setitem__(slice(None), contents))
        else:
            self._undo.append(lambda: _refill(container, contents))
        if isinstance(container, (dict, list)):
            self._substitute(contents if isinstance(contents, dict) else enumerate(contents), container.__setitem__)
        if not isinstance(container, (set, *BUFFERS)):
            self._add_all(contents.values() if isinstance(contents, dict) else contents, depth)

    def _add_function(self, function: types.FunctionType, depth: int) -> None:
        """What a function may write to: its closure, attributes and defaults, and the globals it names."""
        if is_foreign(function.__module__):
            return
        self._seen.add(id(function))
        self._add(function.__dict__, depth)
        self._add_all((*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()), depth)
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # a variable without a value yet
                continue
            self._undo.append(functools.partial(setattr, cell, "cell_contents", content))
            self._substitute({"cell_contents": content}, functools.partial(setattr, cell))
            self._add(content, depth - 1)
        self._add_globals(function.__globals__, _names(function.__code__), depth)

    def _add_globals(self, space: dict[str, Any], names: set[str], depth: int) -> None:
        """What these names stand for, in a module's namespace and in those of the modules among them."""
        named = {name: space[name] for name in names if name in space}
        self._undo.append(lambda: space.update(named))
        self._substitute(named, space.__setitem__)
        for value in named.values():
            if isinstance(value, types.ModuleType) and depth > 1 and not is_library(value.__name__):
                self._add_globals(vars(value), names, depth - 1)
        self._add_all(named.values(), depth)

    def _substitute(
        self, values: Mapping[Any, Any] | Iterable[tuple[Any, Any]], write: Callable[[Any, Any], object]
    ) -> None:
        """Writes stand-ins where they are needed, the same for the same value."""
        for name, value in dict(values).items():
            copy = self._stand_ins.get(id(value)) or stand_in(value)
            if copy is not None:
                self._stand_ins[id(value)] = copy
                write(name, copy)

    def _add_array(self, values: Any) -> None:
        """The values of a tensor or array."""
        self._seen.add(id(values))
        if hasattr(values, "to_local"):  # a sharded one: only this process's shard, as comparing whole is collective
            values = values.detach().to_local()
        if isinstance(values, Tensor) and (values.layout != torch.strided or values.is_meta or values.is_nested):
            return
        if isinstance(values, np.ndarray) and not values.flags.writeable:
            return
        if values.nbytes > LARGEST_COPY:
            self._undo.append(_warning_if_written(values))
            return
        copy = values.detach().clone() if isinstance(values, Tensor) else values.copy()

        def undo() -> None:
            if isinstance(values, np.ndarray):
                values[...] = copy
            elif not torch.equal(values, copy):
                with torch.no_grad():
                    values.copy_(copy)

        self._undo.append(undo)


@contextmanager
def unchanged(*owners: object) -> Iterator[None]:
    """Restores what code of these objects and functions may write to."""
    snapshot = StateSnapshot.take(*owners)
    try:
        yield
    finally:
        snapshot.restore()


def _names(code: types.CodeType) -> set[str]:
    """The names that a function uses, in the functions inside it, too."""
    inner = [_names(value) for value in code.co_consts if isinstance(value, types.CodeType)]
    return set(code.co_names).union(*inner)


def _refill(container: Any, contents: Any) -> None:
    """Uses the base type's methods: a subclass, such as transformers' ModelOutput, may forbid its own."""
    if isinstance(container, dict) and _is_same(container, contents):
        return  # so that what another thread adds meanwhile is not lost
    if not container and not contents:
        return
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


def _is_same(container: dict[Any, Any], contents: dict[Any, Any]) -> bool:
    """Whether nothing has changed, including the order, of which an OrderedDict has one besides that of a dict."""
    items: Any = OrderedDict.items if isinstance(container, OrderedDict) else dict.items
    now, before = list(items(container)), list(contents.items())
    pairs = zip(now, before, strict=False)
    return len(now) == len(before) and all(a is c and b is d for (a, b), (c, d) in pairs)


def _members(value: Any) -> tuple[Any, ...]:
    """What a value that cannot be written to consists of."""
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    return (value.__self__, value.__func__) if isinstance(value, types.MethodType) else value


def _random_stream(value: Any) -> tuple[Any, Callable[[Any], object]] | None:
    """The state of a random generator of any kind, and the function that sets it."""
    if isinstance(value, torch.Generator):
        return value.get_state(), value.set_state
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):  # which has no state
        return value.getstate(), value.setstate
    if isinstance(value, np.random.RandomState):
        return value.get_state(), value.set_state
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state, functools.partial(setattr, value.bit_generator, "state")
    return None


def _warning_if_written(values: Any) -> Callable[[], None]:
    """Warns if a tensor that is too large for a copy was written to."""
    if not isinstance(values, Tensor) or values.is_inference():
        return lambda: None
    version = values._version

    def check() -> None:
        if values._version != version:
            warn(
                f"The forward writes to a plain tensor of more than {LARGEST_COPY >> 20} MiB that the model holds: a "
                f"measurement leaves it changed. Register it with register_buffer, and it will be restored.",
            )

    return check
