"""What a forward may write to besides tensors and dicts comes back: slots, classes, modules, caches, counters."""

import array
import builtins
import dataclasses
import enum
import functools
import inspect
import itertools
import operator
import os
import random
import re
import sys
import types
import typing
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from support.networks import mlp
from torch import nn

from lightning_hessian import input_hessian
from lightning_hessian.model import state_snapshot
from lightning_hessian.model.state_snapshot import StateSnapshot

X = torch.rand(1, 6)
STATE = types.ModuleType("state_of_the_user")  # a file of the user's own, imported by name
sys.modules["state_of_the_user"] = STATE


class Mode(str, enum.Enum):
    A = "a"


class Level(enum.IntFlag):
    LOW, HIGH = 1, 2


class Forbidding(type):
    def __setattr__(cls, name, value):
        raise AttributeError("frozen")


class Constants(metaclass=Forbidding):
    factor = 3


class Network(nn.Module):
    """Calls ``use`` of what it holds in each forward."""

    def __init__(self, held, use):
        super().__init__()
        self.net, self.held, self.use = mlp().float(), held, use

    def forward(self, x):
        self.use(self.held)
        return self.net(x)


@pytest.mark.parametrize("held", [Mode.A, Level.LOW | Level.HIGH, Constants(), Mode, slice(3), Path("data", "digits")])
def test_objects_whose_classes_forbid_writing(held):
    model = Network(held, id)
    assert torch.equal(input_hessian(model, X, 0), input_hessian(model.net, X, 0))


@dataclasses.dataclass(slots=True)
class Slots:
    calls: int
    sums: list
    empty: float = dataclasses.field(init=False)


class PrivateSlots:
    __slots__ = ("__calls",)

    def __init__(self):
        self.__calls = 0

    def count(self):
        self.__calls += 1

    def __repr__(self):
        return f"PrivateSlots({self.__calls})"


class Counter:
    __slots__ = ("_calls",)

    def count(self):
        Counter._calls.__set__(self, self._calls + 1)


class ReadOnly(Counter):
    """A subclass whose property has the name of a slot; pathlib.Path of Python 3.13 has such a one."""

    def __init__(self):
        Counter._calls.__set__(self, 0)

    @property
    def _calls(self):
        return Counter._calls.__get__(self)

    def __repr__(self):
        return f"ReadOnly({self._calls})"


def write_slots(held):
    held.calls += 1
    held.sums.append(held.calls)
    held.empty = 1.0


class Totals:
    calls = 0

    @classmethod
    def count(cls):
        cls.calls += 1


def count_on_a_class(held):
    Totals.count()


def count_in_a_module(held):
    STATE.calls += 1


def count_on_a_function(held):
    count_on_a_function.calls += 1


def count_in_a_default(held, calls=[0], *, more={"calls": 0}):  # noqa: B006 - as it is often done
    calls[0] += 1
    more["calls"] += 1


def count_in_bytes(held):
    held[0] += 1


@pytest.mark.parametrize(
    ("make", "use", "state"),
    [
        (lambda: Slots(0, []), write_slots, lambda held: (held.calls, held.sums, hasattr(held, "empty"))),
        (PrivateSlots, PrivateSlots.count, repr),
        (ReadOnly, ReadOnly.count, repr),
        (lambda: None, count_on_a_class, lambda held: Totals.calls),
        (lambda: None, count_in_a_module, lambda held: STATE.calls),
        (lambda: None, count_on_a_function, lambda held: count_on_a_function.calls),
        (lambda: None, count_in_a_default, lambda held: repr(inspect.signature(count_in_a_default))),
        (lambda: bytearray(2), count_in_bytes, bytes),
        (lambda: array.array("i", [0]), count_in_bytes, list),
        (
            lambda: torch.quasirandom.SobolEngine(1),
            lambda held: held.draw(),
            lambda held: (held.num_generated, held.quasi.tolist()),
        ),
    ],
    ids=["slots", "private_slots", "property", "class", "module", "function", "default", "bytes", "array", "sobol"],
)
def test_what_is_written_comes_back(monkeypatch, make, use, state):
    monkeypatch.setattr(Totals, "calls", 0)
    monkeypatch.setattr(STATE, "calls", 0, raising=False)
    monkeypatch.setattr(count_on_a_function, "calls", 0, raising=False)
    model = Network(make(), use)
    before = state(model.held)
    model(X)
    assert state(model.held) != before
    before = state(model.held)
    input_hessian(model, X, 0)
    assert state(model.held) == before


@pytest.mark.parametrize("make", [itertools.count, lambda: itertools.cycle("abc"), lambda: iter(range(10**6))])
@pytest.mark.parametrize("place", [lambda held: held, lambda held: [held], lambda held: {"a": held}])
@pytest.mark.filterwarnings("ignore:.*copy.*itertools:DeprecationWarning")
def test_counters_go_on_where_they_were(make, place):
    def use(held):
        found = held if hasattr(held, "__next__") else next(iter(held.values() if isinstance(held, dict) else held))
        seen.append(next(found))

    seen = []
    counter, other = make(), make()
    model = Network(place(counter), use)
    model(X)
    input_hessian(model, X, 0)
    model(X)
    assert model.held == place(counter)
    assert seen == [next(other), next(other)]


@functools.lru_cache
def ramp(size):
    return torch.linspace(0, 1, size)


class Ramps:
    @functools.lru_cache  # noqa: B019 - as it is often done
    def own(self, size):
        return torch.linspace(0, 1, size)

    @staticmethod
    @functools.cache
    def everyones(size):
        return torch.linspace(0, 1, size)


STATE.ramp = functools.lru_cache(lambda size: torch.linspace(0, 1, size))


@pytest.mark.parametrize(
    "cached",
    [lambda ramps: ramp(6), lambda ramps: STATE.ramp(6), lambda ramps: ramps.own(6), lambda ramps: ramps.everyones(6)],
    ids=["function", "in_a_module", "method", "static_method"],
)
def test_what_a_forward_caches_while_measured_in_float64_is_not_seen_in_training(cached):
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.ramps = mlp().float(), Ramps()

        def forward(self, x):
            return self.net(x * cached(self.ramps))

    model = Weighted()
    assert input_hessian(model, X, 0, dtype=torch.float64).dtype == torch.float64
    assert cached(model.ramps).dtype == torch.float32
    assert model(X).dtype == torch.float32


def test_nothing_stays_replaced_where_a_snapshot_fails(monkeypatch):
    model = Network({"calls": itertools.count()}, id)
    before = dict(model.held)
    monkeypatch.setattr(StateSnapshot, "_add_function", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        StateSnapshot.take(model)
    assert model.held == before


def test_nested_tensors_that_a_module_holds():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype, once in a process
        held = torch.nested.nested_tensor([torch.rand(3), torch.rand(2)])
    model = Network(held, id)
    assert torch.equal(input_hessian(model, X, 0), input_hessian(model.net, X, 0))


class Formula(nn.Module):
    """Runs text that was executed in a dict of its own, to which Python adds ``__builtins__``."""

    def __init__(self):
        super().__init__()
        self.names, self.space = {"sin": torch.sin}, vars(os)
        exec("def f(x):\n    return sin(x)", self.names)

    def forward(self, x):
        self.names["calls"] = self.names.get("calls", 0) + 1
        return self.names["f"](x)


def test_namespaces_of_modules_are_left_alone(monkeypatch):
    seen = []
    refill = state_snapshot._refill

    def noting(container, contents):
        seen.append(container)
        refill(container, contents)

    monkeypatch.setattr(state_snapshot, "_refill", noting)
    model = Formula()
    input_hessian(model, X, 0)
    assert "calls" not in model.names
    assert any(container is model.names for container in seen)
    assert not any(container is vars(module) for container in seen for module in (builtins, os))


class Read(typing.NamedTuple):
    name: str
    value: object


READ_ONLY = [
    Read("array", np.broadcast_to(np.arange(3.0), (2, 3))),
    Read("getter", operator.itemgetter(0)),
    Read("pattern", re.compile("a", re.IGNORECASE | re.ASCII)),
    Read("system's random numbers", random.SystemRandom()),
    Read("module of a kind of its own", type("Lazy", (types.ModuleType,), {})("lazy")),
]


@pytest.mark.parametrize("held", READ_ONLY, ids=lambda held: held.name)
def test_what_cannot_be_written_to_is_held_without_harm(held):
    model = mlp().float()
    model.held = held.value
    input_hessian(model, X, 0)
    assert model.held is held.value


class Reordering(nn.Module):
    """Uses its entries in turn, as a cache does."""

    def __init__(self, kind):
        super().__init__()
        self.factors = kind(a=1.0, b=2.0)

    def forward(self, x):
        name = next(iter(self.factors))
        if isinstance(self.factors, OrderedDict):
            self.factors.move_to_end(name)
        else:
            self.factors[name] = self.factors.pop(name)
        return x.sin()


@pytest.mark.parametrize("kind", [dict, OrderedDict, type("LeastRecentlyUsed", (OrderedDict,), {})])
def test_the_order_of_a_dict_comes_back(kind):
    model = Reordering(kind)
    snapshot = StateSnapshot.take(model)
    model(X)
    snapshot.restore()
    assert list(model.factors) == ["a", "b"]
    input_hessian(model, X, 0)
    assert list(model.factors) == ["a", "b"]


def test_a_namespace_of_the_users_own_that_a_model_holds_comes_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.space = vars(STATE)

        def forward(self, x):
            self.space["calls"] += 1
            return x.sin()

    STATE.calls = 0
    input_hessian(Counting(), X, 0)
    assert STATE.calls == 0


def test_a_forward_may_measure_another_model():
    inner = nn.Linear(6, 3)

    def outer(x):
        input_hessian(inner, x.detach().float(), 0)
        return x.sin()

    assert input_hessian(outer, X, 0).any()
