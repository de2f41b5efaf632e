"""Copies that stand in for what remembers its use and cannot be put back: caches of functions, and counters."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from typing import Any

COUNTERS = (itertools.count, itertools.cycle, type(iter(range(0))))


def stand_in(value: Any) -> Any | None:
    """A copy to be used meanwhile, or None for everything that needs none.

    What a function cached by ``lru_cache`` returns may depend on the default dtype, which is another one meanwhile: its
    copy starts with an empty cache.
    """
    if isinstance(value, functools._lru_cache_wrapper):
        return functools.lru_cache(**value.cache_parameters())(value.__wrapped__)
    if isinstance(value, (staticmethod, classmethod)) and (inner := stand_in(value.__func__)) is not None:
        return type(value)(inner)
    if not isinstance(value, COUNTERS):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.14, they cannot be copied any more
        try:
            return copy.deepcopy(value)
        except TypeError:
            return None
