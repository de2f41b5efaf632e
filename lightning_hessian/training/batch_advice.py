"""Which argument helps where the input of a batch is not found, written out for this batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_hessian.model.attributes import fields_of
from lightning_hessian.training.batch_structure import (
    COUNTS,
    LABEL_NAMES,
    Leaf,
    are_alike,
    are_labels,
    as_labels,
    is_integer,
    is_list_of_samples,
    leaves,
    may_be_input,
    names_labels,
    quoted,
    rows_in_groups,
)

IN_GENERAL = (
    "Give input_fn, which takes a batch and returns floating-point x [N, *shape] or (x, labels); for several inputs x "
    "is a dict or tuple of tensors, and wrt names the one to differentiate."
)
OF_GRAPHS = (
    "A graph is one sample: give samples=graph.x.unsqueeze(0) and "
    "forward_fn=lambda module, x: torch.cat([module(nodes, graph.edge_index) for nodes in x])."
)
OF_GROUPS = (
    "The rows of {rows} are not samples: {numbers} says to which graph or molecule each belongs, and a whole graph or "
    "molecule is one sample. Give samples=x with x [N, rows of one sample, ...], for example "
    "samples={rows}[{numbers} == 0].unsqueeze(0) of a batch, and a forward_fn, which takes (module, x), makes a batch "
    "of every x[i] and returns outputs [N, C]."
)
OF_LISTS = (
    "Give input_fn=lambda batch: {x}, for images of one size; if the model takes a list, also "
    "forward_fn=lambda module, x: module(list(x)), and output_fn, which makes [N, C] of what it returns."
)
OF_ALIKE = (
    "If these are samples, give input_fn=lambda batch: torch.stack(list(batch)); if each is a batch, the one that the "
    "model takes, input_fn=lambda batch: batch[0]."
)
OF_PACKED = (
    "Packed sequences have no rows: pad them, input_fn=lambda batch: {x}, with wrt=0, and pack them again, "
    "forward_fn=lambda module, x: module(torch.nn.utils.rnn.pack_padded_sequence(x[0], x[1].cpu(), batch_first=True, "
    "enforce_sorted=False))."
)
OF_NUMBERS = "Give input_fn=lambda batch: {x} and forward_fn=lambda module, x: module(x.squeeze(1))."


def advice(batch: Any, wrt: str | int | None, is_found: Callable[[str | int], bool] = lambda name: False) -> str:
    """What to give, in one or two sentences; ``is_found`` says whether a name or position as ``wrt`` is enough."""
    fields = fields_of(batch)
    is_sequence = fields is None and isinstance(batch, (list, tuple))
    found = [leaf for leaf in leaves(batch) if leaf.value.dim() >= 1]
    grouped = rows_in_groups(found)
    parts = [fields_of(part) or {} for part in (batch if is_sequence else [batch])]
    if any("edge_index" in part and ("x" in part or grouped is None) for part in parts):
        return OF_GRAPHS
    packed = next((leaf for leaf in leaves(batch, kind=PackedSequence)), None)
    if packed is not None:
        padded = f"torch.nn.utils.rnn.pad_packed_sequence({packed.expression}, batch_first=True)"
        beside = [leaf for leaf in found if not leaf.expression.startswith(packed.expression)]
        return OF_PACKED.format(x=_with_labels(padded, int(packed.value.batch_sizes[0]), beside, is_tuple=True))
    if grouped is not None:
        return OF_GROUPS.format(rows=grouped[0].expression, numbers=grouped[1].expression)
    if is_sequence and is_list_of_samples(batch):
        return f"It is a list of samples. Give input_fn=lambda batch: {_put_together(batch[0])}."
    if is_sequence and are_alike(batch):
        return OF_ALIKE
    if is_sequence and batch and _is_list_of_tensors(batch[0]) and not isinstance([*batch, None][1], Tensor | None):
        return OF_LISTS.format(x=_stacked(batch))
    return _of_leaves(found, wrt, is_found)


def _of_leaves(found: list[Leaf], wrt: str | int | None, is_found: Callable[[str | int], bool]) -> str:
    floating = [leaf for leaf in found if may_be_input(leaf.name, leaf.value)]
    images = [leaf for leaf in found if leaf.value.dim() > 2 and leaf.value.dtype == torch.uint8]
    tokens = [leaf for leaf in found if leaf.value.dim() == 2 and is_integer(leaf.value)]
    numbers = [leaf for leaf in found if leaf.value.dim() == 1 and leaf.value.is_floating_point()]
    if floating:
        return _of_several(floating, found, is_found)
    if images:
        x = _with_labels(f"{images[0].expression}.float() / 255", len(images[0].value), found)
        return f"Give input_fn=lambda batch: {x}; without the division if the model scales images itself."
    if tokens:
        return _of_tokens(tokens[0], found, wrt)
    if numbers:
        return OF_NUMBERS.format(x=_with_labels(f"{numbers[0].expression}.unsqueeze(1)", len(numbers[0].value), found))
    return IN_GENERAL


def _of_several(floating: list[Leaf], found: list[Leaf], is_found: Callable[[str | int], bool]) -> str:
    chosen = floating[0]
    size = len(chosen.value)
    sentence = f"Give input_fn=lambda batch: {_with_labels(chosen.expression, size, found)}"
    if sum(leaf.holder == chosen.holder for leaf in floating) == 1:
        return f"{sentence}."
    if isinstance(chosen.name, str) and is_found(chosen.name):
        only = f"only name the one to differentiate, wrt={quoted(chosen.name)}"
        return f"{sentence}; or, if the model takes all of them, {only}."
    beside = [leaf for leaf in found if leaf.holder == chosen.holder and len(leaf.value) == size]
    labels = _labels(size, found)
    inputs = [leaf for leaf in beside if leaf is not labels and not names_labels(leaf.name, leaf.value)]
    by_name = all(isinstance(leaf.name, str) for leaf in inputs)
    place = chosen.name if by_name else next(i for i, leaf in enumerate(inputs) if leaf is chosen)
    together = _with_labels(_together(inputs), size, found, is_tuple=not by_name)
    return (
        f"{sentence}; or, if the model takes all of them, input_fn=lambda batch: {together} and the one to "
        f"differentiate, wrt={quoted(place)}."
    )


def _of_tokens(tokens: Leaf, found: list[Leaf], wrt: str | int | None) -> str:
    beside = [leaf for leaf in found if leaf.holder == tokens.holder and leaf.value.dim() >= 2]
    beside = [leaf for leaf in beside if not names_labels(leaf.name, leaf.value)]
    by_name = isinstance(tokens.name, str) and len(beside) > 1
    x = _together(beside) if by_name else tokens.expression
    sentence = f"input_fn=lambda batch: {_with_labels(x, len(tokens.value), found)}"
    if isinstance(wrt, str):
        return f"Give {sentence}."
    return f"Tokens have no derivative: name the layer that embeds them, such as wrt='embedding', and give {sentence}."


def _together(inputs: list[Leaf]) -> str:
    """Several inputs as a dict or tuple."""
    if all(isinstance(leaf.name, str) for leaf in inputs):
        return f"{{{', '.join(f'{quoted(leaf.name)}: {leaf.expression}' for leaf in inputs)}}}"
    return f"({', '.join(leaf.expression for leaf in inputs)})"


def _labels(num_samples: int, found: list[Leaf]) -> Leaf | None:
    """What may be the labels: what is called so, else integers ``[N]`` that do not count or number something."""
    named = [leaf for leaf in found if leaf.name in LABEL_NAMES and as_labels(leaf.value, num_samples) is not None]
    others = [leaf for leaf in found if are_labels(leaf.value, num_samples) and not COUNTS.search(str(leaf.name))]
    return next(iter(named + others), None)


def _with_labels(x: str, num_samples: int, found: list[Leaf], *, is_tuple: bool = False) -> str:
    """What input_fn returns: x, which alone must not be a tuple, with the labels where there are any."""
    labels = _labels(num_samples, found)
    if labels is not None:
        return f"({x}, {labels.expression})"
    return f"({x},)" if is_tuple else x


def _is_list_of_tensors(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(each, Tensor) for each in value)


def _stacked(batch: Sequence[Any]) -> str:
    """Images that come in a list, with their labels if there is an integer for each."""
    x = "torch.stack(list(batch[0]))"
    has_labels = isinstance(batch[1], (list, tuple)) and all(map(_is_label, batch[1]))
    return f"({x}, torch.tensor([int(label) for label in batch[1]]))" if has_labels else x


def _put_together(sample: Any) -> str:
    """A batch of samples that are dicts or objects, or tuples of an input and a label."""
    if fields_of(sample) is None:
        return "torch.utils.data.default_collate(batch)"
    found = list(leaves(sample, "sample", kind=(Tensor, np.ndarray)))
    arrays = [leaf for leaf in found if leaf.value.ndim and not names_labels(leaf.name, leaf.value)]
    floating = [leaf for leaf in arrays if torch.as_tensor(leaf.value).is_floating_point()]
    if not arrays:
        return "torch.utils.data.default_collate(batch)"
    chosen = (floating or arrays)[0]
    row = chosen.expression if isinstance(chosen.value, Tensor) else f"torch.from_numpy({chosen.expression})"
    x = f"torch.stack([{row} for sample in batch])"
    numbers = leaves(sample, "sample", kind=(int, Tensor, np.ndarray, np.generic))
    integers = [leaf for leaf in numbers if leaf.name in LABEL_NAMES and _is_label(leaf.value)]
    return f"({x}, torch.tensor([int({integers[0].expression}) for sample in batch]))" if integers else x


def _is_label(value: Any) -> bool:
    """Whether this is one integer."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.ndim == 0 and not torch.as_tensor(value).is_floating_point()
    return isinstance(value, int)
