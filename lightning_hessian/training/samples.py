"""Which samples are measured: chosen once, fixed for the whole run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from lightning_hessian.errors import ConfigurationError
from lightning_hessian.model.arguments import check_lengths
from lightning_hessian.model.function import Inputs
from lightning_hessian.model.isolation import frozen_random_streams

LARGEST_COPY = 2**30  # bytes of an in-memory dataset that may be copied for a moment
LABEL_NAMES = ("labels", "label")  # of batches that are dicts: transformers' own, and the common one

InputFunction = Callable[[Any], Any]


@dataclass(frozen=True)
class Samples:
    """The fixed held-out samples, on the CPU.

    Attributes:
        inputs: what the model takes: one tensor ``[N, *shape]``, or a dict or tuple of tensors ``[N, ...]``.
        labels: integer ``[N]``, where known.
    """

    inputs: Inputs
    labels: Tensor | None

    def __len__(self) -> int:
        """N, the number of samples."""
        return len(tree_leaves(self.inputs)[0])

    @property
    def shapes(self) -> str:
        """The shapes of the inputs, as text."""
        return str(tree_map(lambda t: [*t.shape], self.inputs))


@dataclass(frozen=True)
class SampleSource:
    """Where the samples of a run come from.

    Attributes:
        given: a batch or a map-style dataset; None: the first batch of a validation (or test) loader.
        num_samples: how many of it, from the first.
        sample_indices: which of it, instead of the first ones.
        val_dataloader_idx: which loader, where there are several.
        input_fn: ``batch -> x`` or ``batch -> (x, labels)``.
        wrt: what is differentiated; see ``samples_from_batch``.
    """

    given: Any = None
    num_samples: int = 8
    sample_indices: Sequence[int] | None = None
    val_dataloader_idx: int = 0
    input_fn: InputFunction | None = None
    wrt: str | int | None = None

    def select(self, source: Any) -> Samples:
        """The samples of a batch or a map-style dataset.

        Raises:
            ConfigurationError: the input is not found in it, or an index is out of range.
        """
        is_batch = isinstance(source, (Tensor, list, tuple, Mapping)) or not hasattr(source, "__getitem__")
        take = samples_from_batch if is_batch else samples_from_dataset
        return take(source, self.num_samples, self.sample_indices, self.input_fn, self.wrt)


def samples_from_batch(
    batch: Any,
    num_samples: int,
    sample_indices: Sequence[int] | None = None,
    input_fn: InputFunction | None = None,
    wrt: str | int | None = None,
) -> Samples:
    """The first ``num_samples`` of a batch, or those at ``sample_indices``, copied to the CPU.

    Args:
        batch: a tensor, ``(x, labels, ...)``, a dict in which x is unambiguous, or anything that ``input_fn``
            understands.
        num_samples: how many samples to take; all of them if the batch has fewer.
        sample_indices: positions in the batch, instead of the first ones.
        input_fn: ``batch -> x`` or ``batch -> (x, labels)``; x may be a dict or tuple of tensors.
        wrt: the name of one of several inputs: then all tensors of a dict but its labels are inputs.

    Raises:
        ConfigurationError: x cannot be found in the batch, or an index is out of range.
    """
    inputs, labels = _found(batch, wrt) if input_fn is None else _split(input_fn(batch), "(from input_fn)")
    size = len(tree_leaves(inputs)[0])
    if sample_indices is not None and not all(0 <= i < size for i in sample_indices):
        raise ConfigurationError(
            f"sample_indices={list(sample_indices)} is out of range: there are {size} samples to choose from."
        )
    if sample_indices is not None and len(sample_indices) == 0:
        raise ConfigurationError(
            "sample_indices=[] selects no sample: give at least one index, or None for the first samples."
        )
    chosen = list(range(min(num_samples, size))) if sample_indices is None else list(sample_indices)
    with torch.inference_mode(False):  # an inference tensor could not be differentiated
        return Samples(*tree_map_only(Tensor, lambda t: t.detach()[chosen].to("cpu", copy=True), (inputs, labels)))


def samples_from_dataset(
    dataset: Dataset[Any],
    num_samples: int,
    sample_indices: Sequence[int] | None = None,
    input_fn: InputFunction | None = None,
    wrt: str | int | None = None,
) -> Samples:
    """The first samples of a map-style dataset, or those at ``sample_indices``; leaves all random streams as they are.

    The other arguments are those of ``samples_from_batch``.
    """
    if not hasattr(dataset, "__len__"):
        raise ConfigurationError("The samples must be a map-style dataset with a length; give a tensor or (x, labels).")
    size = len(dataset)
    chosen = list(range(min(num_samples, size))) if sample_indices is None else list(sample_indices)
    if not all(0 <= i < size for i in chosen):
        raise ConfigurationError(f"sample_indices={chosen} is out of range: the dataset has {size} samples.")
    with frozen_random_streams():
        batch = default_collate([dataset[i] for i in chosen])
    return samples_from_batch(batch, len(chosen), None, input_fn, wrt)


def first_batch(loader: Any) -> Any | None:
    """A loader's first batch, made from copies of its dataset and sampler so that both stay as they are.

    Returns None where that is not possible: for an iterable dataset, which would be used up by reading, a dataset that
    cannot be copied or is larger than ``LARGEST_COPY``, or something that is not a ``DataLoader``.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    if loader.batch_sampler is None:
        return None
    if sum(array.nbytes for array in _arrays(loader.dataset)) > LARGEST_COPY:
        return None
    with frozen_random_streams():
        try:
            dataset, sampler = copy.deepcopy((loader.dataset, loader.batch_sampler))
            indices = next(iter(sampler), None)
            return None if indices is None else loader.collate_fn([dataset[i] for i in indices])
        except Exception:  # the dataset cannot be copied, or opens its file in a worker: a real batch will come
            return None


def _arrays(value: object, depth: int = 4) -> Iterable[Tensor | np.ndarray[Any, Any]]:
    """The arrays inside a dataset."""
    if isinstance(value, (Tensor, np.ndarray)):
        yield value
    elif depth:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        for item in (*inner, *getattr(value, "__dict__", {}).values()):
            yield from _arrays(item, depth - 1)


def _found(batch: Any, wrt: str | int | None) -> tuple[Inputs, Tensor | None]:
    """Inputs and labels of a batch; in a dict, only what is unambiguous."""
    if not isinstance(batch, Mapping):
        return _split(batch)
    tensors = {name: t for name, t in batch.items() if isinstance(t, Tensor) and name not in LABEL_NAMES}
    labels = next((batch[name] for name in LABEL_NAMES if name in batch), None)
    if wrt in tensors:
        return _split((tensors, labels))
    large = [t for t in tensors.values() if t.dim() >= 2]
    if len(large) != 1 or (wrt is None and not large[0].is_floating_point()):
        raise _not_found(batch)
    return _split((large[0], labels))


def _split(batch: Any, source: str = "") -> tuple[Inputs, Tensor | None]:
    """``x``, ``(x,)`` or ``(x, labels, ...)`` as inputs and labels."""
    first, labels, *_ = (*batch, None, None) if isinstance(batch, (list, tuple)) else (batch, None)
    inputs = dict(first) if isinstance(first, Mapping) else tuple(first) if isinstance(first, list) else first
    several = isinstance(inputs, (dict, tuple))
    tensors: list[Any] = [*inputs.values()] if isinstance(inputs, dict) else [*inputs] if several else [inputs]
    if not tensors or not all(isinstance(t, Tensor) and t.dim() >= (1 if several else 2) for t in tensors):
        raise _not_found(batch, source)
    check_lengths(tensors)
    is_labels = isinstance(labels, Tensor) and labels.shape == tensors[0].shape[:1] and not labels.is_floating_point()
    return inputs, labels if is_labels else None


def _not_found(batch: Any, source: str = "") -> ConfigurationError:
    first = next(iter(batch), None) if isinstance(batch, (list, tuple)) else batch
    got = f"{type(batch).__name__} with {type(first).__name__}" if first is not None else "an empty batch"
    if isinstance(batch, Mapping):
        got = f"{type(batch).__name__} with the keys {list(batch)}"
    return ConfigurationError(
        f"The input was not found in {' '.join(filter(None, [got, source]))}. Give input_fn, which takes a batch and "
        f"returns x [N, *shape] or (x, labels), for example input_fn=lambda batch: (batch['image'], batch['label']); "
        f"for several inputs x is a dict or tuple of tensors, and wrt names the one to differentiate."
    )
