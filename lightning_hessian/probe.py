"""Which samples are measured: chosen once, kept for the whole run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from lightning_hessian.errors import ConfigurationError
from lightning_hessian.isolation import frozen_random_streams

LARGEST_COPY = 2**30  # bytes of a dataset held in memory that may be copied for a moment

InputFunction = Callable[[Any], Any]


@dataclass(frozen=True)
class Probe:
    """The fixed held-out samples ``x [N, *shape]``, on the CPU, and their labels ``[N]`` where known."""

    x: Tensor
    labels: Tensor | None


def probe_from_batch(
    batch: Any,
    num_samples: int,
    sample_indices: Sequence[int] | None = None,
    input_fn: InputFunction | None = None,
) -> Probe:
    """The first ``num_samples`` of a batch, or those at ``sample_indices``, copied to the CPU.

    Args:
        batch: a tensor, ``(x, labels, ...)``, or anything that ``input_fn`` understands.
        num_samples: how many samples to take; all of them if the batch has fewer.
        sample_indices: positions in the batch, in place of the first ones.
        input_fn: ``batch -> x`` or ``batch -> (x, labels)``.

    Raises:
        ConfigurationError: x cannot be found in the batch, or an index is out of range.
    """
    x, labels = _split(batch if input_fn is None else input_fn(batch), guess=input_fn is None)
    if sample_indices is not None and not all(0 <= i < len(x) for i in sample_indices):
        raise ConfigurationError(
            f"sample_indices={list(sample_indices)} is out of range: there are {len(x)} samples to choose from."
        )
    if sample_indices is not None and len(sample_indices) == 0:
        raise ConfigurationError("sample_indices=[] chooses no sample: give at least one, or None for the first ones.")
    chosen = list(range(min(num_samples, len(x)))) if sample_indices is None else list(sample_indices)
    return Probe(_keep(x, chosen), None if labels is None else _keep(labels, chosen))


def probe_from_dataset(
    dataset: Dataset[Any],
    num_samples: int,
    sample_indices: Sequence[int] | None = None,
    input_fn: InputFunction | None = None,
) -> Probe:
    """The first samples of a map-style dataset, or those at ``sample_indices``; no random stream is drawn from."""
    if not hasattr(dataset, "__len__"):
        raise ConfigurationError("The probe must be a map-style dataset with a length; give a tensor or (x, labels).")
    size = len(dataset)
    chosen = list(range(min(num_samples, size))) if sample_indices is None else list(sample_indices)
    if not all(0 <= i < size for i in chosen):
        raise ConfigurationError(f"sample_indices={chosen} is out of range: the dataset has {size} samples.")
    with frozen_random_streams():
        batch = default_collate([dataset[i] for i in chosen])
    return probe_from_batch(batch, len(chosen), None, input_fn)


def first_batch(loader: Any) -> Any | None:
    """A loader's first batch, made from copies of its dataset and sampler so that both stay as they are.

    Returns None where that is not possible: an iterable dataset, which cannot be read without using it up,
    a dataset that cannot be copied or is larger than ``LARGEST_COPY``, or something that is not a
    ``DataLoader``.
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
        except Exception:  # whatever a user's dataset refuses a copy with; the first real batch will do
            return None
        indices = next(iter(sampler), None)
        return None if indices is None else loader.collate_fn([dataset[i] for i in indices])


def _arrays(value: object, depth: int = 4) -> Iterable[Tensor | np.ndarray[Any, Any]]:
    """The arrays inside a dataset."""
    if isinstance(value, (Tensor, np.ndarray)):
        yield value
    elif depth:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        for part in (*inner, *getattr(value, "__dict__", {}).values()):
            yield from _arrays(part, depth - 1)


def _split(batch: Any, *, guess: bool) -> tuple[Tensor, Tensor | None]:
    parts = tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)
    if not parts or not isinstance(parts[0], Tensor) or parts[0].dim() < 2:
        got = f"{type(batch).__name__} with {type(parts[0]).__name__}" if parts else "an empty batch"
        if isinstance(batch, dict):
            got = f"dict with the keys {list(batch)}"
        advice = "Give input_fn, which takes a batch and gives x [N, *shape] or (x, labels)"
        raise ConfigurationError(
            f"The input was not found in {got}{'' if guess else ' (from input_fn)'}. {advice}, for example "
            f"input_fn=lambda batch: (batch['image'], batch['label'])."
        )
    x, labels = parts[0], parts[1] if len(parts) > 1 else None
    is_labels = isinstance(labels, Tensor) and labels.shape == (len(x),) and not labels.is_floating_point()
    return x, labels if is_labels else None


def _keep(values: Tensor, chosen: list[int]) -> Tensor:
    return values.detach()[chosen].to("cpu", copy=True)
