"""Which argument helps where the input of a batch is not found, written out for this batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_hessian.training.batch_structure import (
    LABEL_NAMES,
    Leaf,
    are_labels,
    fields_of,
    is_integer,
    is_list_of_samples,
    leaves,
    may_be_input,
    quoted,
)

IN_GENERAL = (
    "Give input_fn, which takes a batch and returns floating-point x [N, *shape] or (x, labels); for several inputs x "
    "is a dict or tuple of tensors, and wrt names the one to differentiate."
)
OF_GRAPHS = (
    "A graph is one sample: give samples=graph.x.unsqueeze(0) and "
    "forward_fn=lambda module, x: torch.cat([module(nodes, graph.edge_index) for nodes in x])."
)
OF_LISTS = (
    "Give input_fn=lambda batch: torch.stack(list(batch[0])), for images of one size; if the model takes a list, also "
    "forward_fn=lambda module, x: module(list(x)), and output_fn, which makes [N, C] of what it returns."
)
OF_PACKED = (
    "Pad packed sequences, input_fn=lambda batch: torch.nn.utils.rnn.pad_packed_sequence(batch{place}, "
    "batch_first=True)[0], and let forward_fn pack them."
)


def advice(batch: Any, wrt: str | int | None) -> str:
    """What to give, in one or two sentences."""
    fields = fields_of(batch)
    parts = [batch] if fields is not None or not isinstance(batch, (list, tuple)) else batch
    if any("edge_index" in (fields_of(part) or {}) for part in parts):
        return OF_GRAPHS
    if isinstance(batch, PackedSequence):
        return OF_PACKED.format(place="")
    if fields is None and isinstance(batch, (list, tuple)) and batch:
        packed = [place for place, part in enumerate(batch) if isinstance(part, PackedSequence)]
        if packed:
            return OF_PACKED.format(place=f"[{packed[0]}]")
        if is_list_of_samples(batch):
            return f"It is a list of samples. Give input_fn=lambda batch: {_put_together(batch[0])}."
        if isinstance(batch[0], (list, tuple)) and not isinstance([*batch, None][1], Tensor | None):
            return OF_LISTS
    found = [leaf for leaf in leaves(batch) if leaf.value.dim() >= 1]
    floating = [leaf for leaf in found if may_be_input(leaf.name, leaf.value)]
    images = [leaf for leaf in found if leaf.value.dim() > 2 and leaf.value.dtype == torch.uint8]
    tokens = [leaf for leaf in found if leaf.value.dim() == 2 and is_integer(leaf.value)]
    if floating:
        return _of_several(floating, found)
    if images:
        return f"Give input_fn=lambda batch: {_with_labels(f'{images[0].expression}.float() / 255', images[0], found)}."
    return _of_tokens(tokens, found, wrt) if tokens else IN_GENERAL


def _of_several(floating: list[Leaf], found: list[Leaf]) -> str:
    chosen = floating[0]
    sentence = f"Give input_fn=lambda batch: {_with_labels(chosen.expression, chosen, found)}"
    if sum(leaf.holder == chosen.holder for leaf in floating) == 1:
        return f"{sentence}."
    return f"{sentence}; or, if the model takes all of them, the one to differentiate: wrt={quoted(chosen.name)}."


def _of_tokens(tokens: list[Leaf], found: list[Leaf], wrt: str | int | None) -> str:
    beside = [leaf for leaf in found if leaf.holder == tokens[0].holder and leaf.value.dim() >= 2]
    by_name = all(isinstance(leaf.name, str) for leaf in beside) and len(beside) > 1
    x = f"{{{', '.join(f'{quoted(leaf.name)}: {leaf.expression}' for leaf in beside)}}}"
    sentence = f"input_fn=lambda batch: {_with_labels(x if by_name else tokens[0].expression, tokens[0], found)}"
    if isinstance(wrt, str):
        return f"Give {sentence}."
    return f"Tokens have no derivative: name the layer that embeds them, such as wrt='embedding', and give {sentence}."


def _with_labels(x: str, sample: Leaf, found: list[Leaf]) -> str:
    labels = [leaf for leaf in found if are_labels(leaf.value, len(sample.value))]
    named = [leaf for leaf in labels if leaf.name in LABEL_NAMES] or labels
    return f"({x}, {named[0].expression})" if named else x


def _put_together(sample: Any) -> str:
    if isinstance(sample, Mapping):
        x = next((name for name, t in sample.items() if isinstance(t, Tensor) and t.dim() and not is_integer(t)), None)
        label = next((name for name in LABEL_NAMES if name in sample), None)
        if x is not None:
            stacked = f"torch.stack([sample[{quoted(x)}] for sample in batch])"
            integers = f"torch.tensor([int(sample[{quoted(label)}]) for sample in batch])"
            return stacked if label is None else f"({stacked}, {integers})"
    return "torch.utils.data.default_collate(batch)"
