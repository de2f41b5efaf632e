"""The input and the labels of a batch, where they are unambiguous."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_hessian.errors import ConfigurationError
from lightning_hessian.model.arguments import check_lengths
from lightning_hessian.model.attributes import fields_of
from lightning_hessian.model.function import Inputs
from lightning_hessian.training.batch_advice import advice
from lightning_hessian.training.batch_structure import (
    LABEL_NAMES,
    are_alike,
    are_labels,
    as_labels,
    is_integer,
    is_list_of_samples,
    leaves,
    may_be_input,
    names_labels,
    rows_in_groups,
    structure,
)

InputFunction = Callable[[Any], Any]
Found = tuple[Inputs, Tensor | None]


def find_inputs(batch: Any, wrt: str | int | None, input_fn: InputFunction | None = None) -> Found:
    """Inputs and labels of a batch.

    Raises:
        ConfigurationError: they are not found; the message shows the batch and an argument that fits it.
    """
    if input_fn is None:
        found = _guessed(batch, wrt)
        if found is None:
            helps = advice(batch, wrt, lambda name: _is_found(batch, name))
            raise ConfigurationError(f"The input was not found in the batch: {structure(batch)}. {helps}")
        return found
    returned = input_fn(batch)
    check_pair(returned, "The input_fn returned")
    found = _returned(returned)
    if found is None:
        raise ConfigurationError(
            f"The input was not found in {structure(returned)} (from input_fn), which must return x [N, *shape] or "
            f"(x, labels); for several inputs x is a dict or tuple of tensors [N, ...], and wrt names the one to "
            f"differentiate."
        )
    return found


def check_pair(pair: Any, what: str) -> None:
    """Raises a ConfigurationError where ``pair`` is (x, labels) with labels of other samples; ``what`` says whose."""
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        return
    x, labels = pair
    if isinstance(x, Tensor) and x.dim() > 1 and are_labels(labels) and len(x) != len(labels):
        raise ConfigurationError(f"{what} {len(x)} samples and {len(labels)} labels: pass one label for each sample.")


def _is_found(batch: Any, wrt: str | int) -> bool:
    """Whether naming the input is enough."""
    try:
        return _guessed(batch, wrt) is not None
    except ConfigurationError:  # it has other rows than those beside it
        return False


def _returned(batch: Any) -> Found | None:
    """``x``, ``(x,)`` or ``(x, labels, ...)`` as inputs and labels."""
    first, labels, *_ = (*batch, None, None) if isinstance(batch, (list, tuple)) else (batch, None)
    if isinstance(first, Mapping):
        return _checked(dict(first), labels)
    return _checked(tuple(first) if isinstance(first, list) else first, labels)


def _guessed(batch: Any, wrt: str | int | None) -> Found | None:
    """The same of a batch as a loader gives it."""
    if isinstance(batch, PackedSequence):  # its rows are no samples
        return None
    fields = fields_of(batch)
    if fields is not None:
        second = batch[1] if isinstance(batch, tuple) and len(batch) > 1 else None  # of a NamedTuple
        return _guessed_by_name(fields, wrt, second)
    if not isinstance(batch, (list, tuple)):
        return _checked(batch, None)
    if is_list_of_samples(batch) or are_alike(batch) or any(isinstance(part, PackedSequence) for part in batch):
        return None
    if len(batch) == 1:
        return _guessed(batch[0], wrt)
    first, second = [*list(batch), None, None][:2]
    fields = fields_of(first)
    if fields is not None:
        names_layer = wrt is not None and wrt not in fields
        return _checked(fields, second) if names_layer else _guessed_by_name(fields, wrt, second)
    if not isinstance(first, (list, tuple)):
        return _checked(first, second)
    if not isinstance(second, Tensor | None):  # lists of images and of their targets
        return None
    if len(first) == 1 and not isinstance(wrt, int):
        return _checked(first[0], second)
    return None if wrt is None else _checked(tuple(first), second)


def _guessed_by_name(fields: dict[Any, Any], wrt: str | int | None, second: Any) -> Found | None:
    """The only input of some names, or all of them where ``wrt`` names one."""
    if "edge_index" in fields or any(isinstance(value, PackedSequence) for value in fields.values()):
        return None  # rows are no samples
    if rows_in_groups(list(leaves(fields))) is not None:
        return None  # nor are these
    named = (as_labels(fields[name], len(fields[name])) for name in LABEL_NAMES if is_integer(fields.get(name)))
    labels = next((found for found in named if found is not None), second)
    tensors = {n: t for n, t in fields.items() if isinstance(t, Tensor) and not names_labels(n, t)}
    if wrt in tensors:
        return _checked(tensors, labels)
    found = [t for name, t in tensors.items() if may_be_input(name, t)]
    if wrt is not None and not found:  # tokens, of which a layer is measured
        found = [t for t in tensors.values() if t.dim() >= 2]
    if len(found) != 1 or (are_labels(labels) and len(labels) != len(found[0])):
        return None
    return _checked(found[0], labels)


def _check_storage(tensors: list[Tensor]) -> None:
    """Raises where a tensor has no rows of one shape that could be chosen from."""
    for tensor in tensors:
        if tensor.is_nested:
            raise ConfigurationError(
                "The input is a nested tensor, and samples must have one shape. Give an input_fn that pads it with "
                "torch.nested.to_padded_tensor(x, 0.0), and let forward_fn make what the model takes."
            )
        if tensor.layout != torch.strided:
            raise ConfigurationError(
                f"The input is sparse ({tensor.layout}), and derivatives are taken with respect to all its entries. "
                f"Give an input_fn that returns x.to_dense(), and forward_fn=lambda module, x: module(x.to_sparse()) "
                f"if the model takes nothing else."
            )


def _checked(inputs: Any, labels: Any) -> Found | None:
    """Inputs, with their labels if there is an integer per sample; None where they are not tensors of samples."""
    several = isinstance(inputs, (dict, tuple))
    tensors: list[Any] = [*inputs.values()] if isinstance(inputs, dict) else [*inputs] if several else [inputs]
    if not tensors or not all(isinstance(t, Tensor) and t.dim() >= (1 if several else 2) for t in tensors):
        return None
    _check_storage(tensors)
    check_lengths(tensors)
    return inputs, as_labels(labels, len(tensors[0]))
