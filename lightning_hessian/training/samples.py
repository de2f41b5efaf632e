"""Which samples are measured: chosen once, fixed for the whole run."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.data import DataLoader, IterableDataset, default_collate

from lightning_hessian.errors import ConfigurationError, store_whole_numbers, whole_numbers
from lightning_hessian.model.function import Inputs
from lightning_hessian.model.isolation import frozen_random_streams
from lightning_hessian.model.state_snapshot import unchanged
from lightning_hessian.training.batch import InputFunction, check_pair, find_inputs
from lightning_hessian.training.batch_structure import structure

LARGEST_COPY = 2**30  # bytes of an in-memory dataset that may be copied temporarily


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
    """Where the samples of a run come from: arguments of ``InputHessianMonitor``, its ``samples`` as ``given``."""

    given: Any = None
    num_samples: int = 8
    sample_indices: Sequence[int] | None = None
    val_dataloader_idx: int = 0
    input_fn: InputFunction | None = None
    wrt: str | int | None = None

    def __post_init__(self) -> None:
        store_whole_numbers(self, num_samples=1, val_dataloader_idx=0)
        if self.sample_indices is not None:
            object.__setattr__(self, "sample_indices", whole_numbers("sample_indices", self.sample_indices))

    def select(self, source: Any) -> Samples:
        """The samples of what a user gave: a batch, or a map-style dataset.

        The batch, the dataset, ``input_fn`` and all random streams stay as they are.

        Raises:
            ConfigurationError: the input is not found in it, or an index is out of range.
        """
        with frozen_random_streams(), unchanged(source, self.input_fn):
            return self._selected(source)

    def _selected(self, source: Any) -> Samples:
        if isinstance(source, DataLoader):
            raise ConfigurationError("samples is a DataLoader. Give its dataset, samples=loader.dataset, or a batch.")
        if isinstance(source, (Tensor, list, tuple, Mapping)) or not hasattr(source, "__getitem__"):
            source = tree_map_only(np.ndarray, torch.as_tensor, source)
            if self.input_fn is None:
                check_pair(source, "samples= holds")
            return self.select_from_batch(source)
        if not hasattr(source, "__len__"):
            raise ConfigurationError(
                "The samples must be a map-style dataset with a length; give a tensor or (x, labels)."
            )
        chosen = self._chosen(len(source), "the dataset has {} samples")
        taken = [source[i] for i in chosen]
        try:
            batch = default_collate(taken)
        except (TypeError, RuntimeError) as error:  # of another kind, or of different shapes
            raise ConfigurationError(
                f"The samples of the dataset, such as {structure(taken[0])}, cannot be put into a batch "
                f"({str(error).splitlines()[0]}). Give samples=x or samples=(x, labels), with x [N, *shape]."
            ) from error
        return replace(self, num_samples=len(chosen), sample_indices=None).select_from_batch(batch)

    def select_from_batch(self, batch: Any) -> Samples:
        """The samples of a batch, copied to the CPU; the batch, ``input_fn`` and random streams stay as they are.

        Raises:
            ConfigurationError: as ``select``.
        """
        with frozen_random_streams(), unchanged(batch, self.input_fn):
            return self._of_batch(batch)

    def _of_batch(self, batch: Any) -> Samples:
        inputs, labels = find_inputs(batch, self.wrt, self.input_fn)
        chosen = self._chosen(len(tree_leaves(inputs)[0]), "there are {} samples to choose from")
        with torch.inference_mode(False):  # an inference tensor could not be differentiated
            taken = tree_map_only(Tensor, lambda t: t.detach()[chosen].to("cpu", copy=True), (inputs, labels))
            return Samples(*taken)

    def _chosen(self, size: int, available: str) -> list[int]:
        if self.sample_indices is None:
            return list(range(min(self.num_samples, size)))
        chosen = list(self.sample_indices)
        if any(i >= size for i in chosen):
            raise ConfigurationError(f"sample_indices={chosen} is out of range: {available.format(size)}.")
        if not chosen:
            raise ConfigurationError(
                "sample_indices=[] selects no sample: give at least one index, or None for the first samples."
            )
        return chosen


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
    try:
        dataset, sampler = copy.deepcopy((loader.dataset, loader.batch_sampler))
        with frozen_random_streams(), unchanged(dataset, sampler, loader.collate_fn):
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
