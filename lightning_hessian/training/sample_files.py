"""Samples from files, without executing any code in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_hessian.errors import ConfigurationError
from lightning_hessian.training.checkpoints import first_line


def read_samples(path: Path) -> Any:
    """What a file of samples holds: x, ``(x, labels)``, or tensors by name. No code in it is executed.

    Args:
        path: ``.pt`` (a tensor, a tuple or a dict), ``.npz`` or ``.safetensors``; labels are recognized by their name.

    Raises:
        ConfigurationError: it cannot be read.
    """
    readers: dict[str, Callable[[Path], Any]] = {
        ".pt": _tensors,
        ".pth": _tensors,
        ".npz": _arrays,
        ".safetensors": _safetensors,
    }
    if path.suffix not in readers:
        raise ConfigurationError(f"Samples are read from {', '.join(readers)} files, and {path} is none of them.")
    try:
        return readers[path.suffix](path)
    except Exception as error:
        raise ConfigurationError(
            f"The samples in {path} cannot be read: {type(error).__name__}: {first_line(error)}. Save tensors only: "
            f"torch.save((x, labels), 'samples.pt')."
        ) from error


def _tensors(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _arrays(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)
