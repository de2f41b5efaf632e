"""What is in a batch, by name and place, and as text."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_hessian.model.attributes import fields_of

LABEL_NAMES = ("labels", "label", "targets", "target", "y")  # transformers' own, and the common ones
COUNTS = re.compile("len|size|count|num|idx|index|_id|step|time|group|batch|ptr|atom")  # names of other integers [N]
MOST_SHOWN = 12  # entries of a dict or list
DEPTH = 4  # how deep a batch is looked through


def structure(value: Any, depth: int = DEPTH) -> str:
    """Keys, dtypes and shapes, in a line."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {[*value.shape]}"
    if isinstance(value, np.ndarray):
        return f"NumPy {value.dtype} {[*value.shape]}"
    kind = type(value).__name__
    if depth == 0 or value is None:
        return kind if depth == 0 else "None"
    fields = fields_of(value)
    if fields is not None:
        return f"{kind} {{{_shortened([f'{key!r}: {structure(each, depth - 1)}' for key, each in fields.items()])}}}"
    if isinstance(value, (list, tuple)):
        inner = [structure(each, depth - 1) for each in value]
        if len(inner) > 2 and len(set(inner)) == 1:
            return f"{kind} of {len(inner)} times {inner[0]}"
        return f"{kind} [{_shortened(inner)}]"
    return kind


def _shortened(inner: list[str]) -> str:
    more = [f"and {len(inner) - MOST_SHOWN} more"] if len(inner) > MOST_SHOWN else []
    return ", ".join(inner[:MOST_SHOWN] + more)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Something in a batch: its own name or position, an expression for it, one for what holds it, and its value."""

    name: Any
    expression: str
    holder: str
    value: Any


def leaves(value: Any, expression: str = "batch", kind: Any = Tensor) -> Iterator[Leaf]:
    """All tensors of a batch, or what else is of this kind."""
    return _leaves(value, expression, kind, holder="", name="", depth=DEPTH)


def _leaves(value: Any, expression: str, kind: Any, holder: str, name: Any, depth: int) -> Iterator[Leaf]:
    if isinstance(value, kind):
        yield Leaf(name, expression, holder, value)
    fields = fields_of(value)
    if depth == 0 or (fields is None and not isinstance(value, (list, tuple))):
        return
    is_attribute = fields is not None and not isinstance(value, Mapping)
    for key, each in list(enumerate(value) if fields is None else fields.items())[:MOST_SHOWN]:
        part = f".{key}" if is_attribute else f"[{quoted(key)}]"
        yield from _leaves(each, expression + part, kind, expression, key, depth - 1)


def quoted(name: Any) -> str:
    """A key or position as Python source."""
    return json.dumps(name) if isinstance(name, str) else repr(name)


def is_integer(value: Any) -> bool:
    """Whether this is a tensor of integers."""
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())


def are_labels(value: Any, num_samples: int | None = None) -> bool:
    """Whether this can be labels: integers ``[N]``."""
    return is_integer(value) and value.dim() == 1 and num_samples in (None, len(value))


def as_labels(value: Any, num_samples: int) -> Tensor | None:
    """Labels ``[N]`` of what was given as such, ``[N]`` or ``[N, 1]``; None where it is something else."""
    if is_integer(value) and value.dim() == 2 and value.shape[1] == 1:
        value = value.squeeze(1)
    return value if are_labels(value, num_samples) else None


def names_labels(name: Any, value: Any) -> bool:
    """Whether this is what a model's output is compared with, by its name; "y" may be a coordinate."""
    return name in LABEL_NAMES and (name != "y" or are_labels(value))


def may_be_input(name: Any, value: Any) -> bool:
    """Whether this can be the input alone: not integers, with a row per sample, neither labels nor a mask."""
    is_large = isinstance(value, Tensor) and value.dim() >= 2 and not is_integer(value)
    return is_large and not names_labels(name, value) and "mask" not in str(name).lower()


def rows_in_groups(found: Sequence[Leaf]) -> tuple[Leaf, Leaf] | None:
    """Nodes of several graphs or atoms of several molecules, put together, and the numbers of their graphs; or None.

    Such numbers begin at 0, do not decrease, and leave none out; something else has a row for each graph.
    """
    for numbers in found:
        value = numbers.value
        if value.dim() != 1 or value.dtype not in (torch.int32, torch.int64) or numbers.name in LABEL_NAMES:
            continue
        steps = value.diff(prepend=value.new_zeros(1))
        count = int(steps.sum()) + 1
        if not ((steps == 0) | (steps == 1)).all() or count >= len(value):
            continue
        rows = [leaf for leaf in found if may_be_input(leaf.name, leaf.value) and len(leaf.value) == len(value)]
        if rows and any(leaf.value.dim() and len(leaf.value) == count for leaf in found):
            return rows[0], numbers
    return None


def is_list_of_samples(batch: Sequence[Any]) -> bool:
    """Whether nobody has put the samples together."""
    if not batch or not all(type(sample) is type(batch[0]) for sample in batch):
        return False
    fields = fields_of(batch[0])
    if fields is not None:
        return not any(name in LABEL_NAMES and are_labels(value) for name, value in fields.items())
    if not all(isinstance(sample, (list, tuple)) and len(sample) > 1 for sample in batch):
        return False
    return all(_has_axes(first) and not any(map(_has_axes, rest)) for first, *rest in batch)


def _has_axes(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0


def are_alike(batch: Sequence[Any]) -> bool:
    """Whether this is three inputs or more of one shape: samples that nobody has put together, or several views."""
    return len(batch) > 2 and all(may_be_input("", t) and t.shape == batch[0].shape for t in batch)
