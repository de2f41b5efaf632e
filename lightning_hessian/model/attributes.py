"""Objects of a user's own, and what they hold."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

NOT_FOLLOWED = ("torch", "lightning", "pytorch_lightning", "numpy", "builtins")  # trainers, optimizers, loaders
FOLLOWED = (torch.quasirandom.SobolEngine,)  # nevertheless
MISSING = object()  # for what an empty slot holds


def slots_of(owner: object) -> dict[types.MemberDescriptorType, Any]:
    """What an object has in slots; ``MISSING`` where one is empty.

    By the slots themselves: a subclass may have a property of a slot's name, as ``pathlib.Path`` of Python 3.13 does.
    """
    kinds = [kind for kind in type(owner).__mro__ if not is_foreign(kind.__module__)]
    slots = [slot for k in kinds for slot in vars(k).values() if isinstance(slot, types.MemberDescriptorType)]
    return {slot: _content(slot, owner) for slot in slots}


def fields_of(value: Any) -> dict[Any, Any] | None:
    """What something holds by name: a dict's entries, a dataclass's or NamedTuple's fields, an object's attributes."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return dict(value._asdict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (Tensor, np.ndarray, nn.Module, list, tuple, str, bytes, type)):
        return None
    if callable(getattr(value, "keys", None)) and hasattr(value, "__getitem__"):  # PyTorch Geometric's graphs
        return {key: value[key] for key in value.keys()}  # noqa: SIM118
    if callable(value):
        return None
    slots = {slot.__name__: content for slot, content in slots_of(value).items()}
    attributes = {**slots, **getattr(value, "__dict__", {})}
    named = {n: v for n, v in attributes.items() if not n.startswith("_") and v is not MISSING}
    return named if named or hasattr(value, "__dict__") else None


def refill_slot(owner: object, slot: types.MemberDescriptorType, value: Any) -> None:
    """Sets a slot where it has changed, past a class that forbids it, such as a frozen dataclass."""
    if _content(slot, owner) is value:
        return
    with suppress(AttributeError):  # of a type written in C, a slot may be read-only
        if value is MISSING:
            slot.__delete__(owner)
        else:
            slot.__set__(owner, value)


def _content(slot: types.MemberDescriptorType, owner: object) -> Any:
    try:
        return slot.__get__(owner)
    except AttributeError:
        return MISSING


def put_back(kind: type, name: str, value: Any) -> None:
    """Sets an attribute of a class where it has changed, past a metaclass that forbids it, as that of enumerations."""
    if getattr(kind, name, MISSING) is not value:
        type.__setattr__(kind, name, value)


def is_foreign(home: str | None) -> bool:
    """Whether what comes from this module is left alone: a Trainer, an optimizer, a loader."""
    return home is None or home.split(".")[0] in NOT_FOLLOWED


def is_namespace(value: object) -> bool:
    """Whether this is the dict of a module that has been imported, such as ``builtins``."""
    name = dict.get(value, "__name__") if isinstance(value, dict) else None
    module = sys.modules.get(name) if isinstance(name, str) else None
    return module is not None and getattr(module, "__dict__", None) is value


@functools.cache
def is_library(home: str | None) -> bool:
    """Whether code comes from Python or an installed package, and is not expected to write to globals."""
    file = getattr(sys.modules.get(home or ""), "__file__", None) or ""
    is_python = (home or "").split(".")[0] in sys.stdlib_module_names
    return is_foreign(home) or is_python or "site-packages" in file or "dist-packages" in file


def is_plain(value: object) -> bool:
    """Whether this is an object of the user's own, with attributes that a forward may write to."""
    if isinstance(value, FOLLOWED):
        return True
    if isinstance(value, type) or is_foreign(type(value).__module__):
        return False
    own = getattr(value, "__dict__", None)
    return isinstance(own, dict) or (own is None and bool(slots_of(value)))  # list[int] has that of list
