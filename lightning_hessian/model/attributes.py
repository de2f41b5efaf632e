"""Objects of a user's own, which a forward may write to, and their attributes."""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

import torch

NOT_FOLLOWED = ("torch", "lightning", "pytorch_lightning", "numpy", "builtins")  # trainers, optimizers, loaders
FOLLOWED = (torch.quasirandom.SobolEngine,)  # nevertheless
MISSING = object()  # for what an empty slot holds


def slots_of(owner: object) -> dict[str, Any]:
    """The attributes that an object has in slots; ``MISSING`` where one is empty."""
    kinds = [kind for kind in type(owner).__mro__ if not is_foreign(kind.__module__)]
    found = [n for k in kinds for n, slot in vars(k).items() if isinstance(slot, types.MemberDescriptorType)]
    return {name: getattr(owner, name, MISSING) for name in found}


def put_back(owner: object, name: str, value: Any) -> None:
    """Sets an attribute where it has changed, past a class that forbids it: frozen dataclasses, enumerations."""
    if getattr(owner, name, MISSING) is value:
        return
    kind = type if isinstance(owner, type) else object
    if value is MISSING:
        kind.__delattr__(owner, name)
    else:
        kind.__setattr__(owner, name, value)


def is_foreign(home: str | None) -> bool:
    """Whether what comes from this module is left alone: a Trainer, an optimizer, a loader."""
    return home is None or home.split(".")[0] in NOT_FOLLOWED


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
