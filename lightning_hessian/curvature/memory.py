"""How much memory a measurement may take, and how much one HVP takes."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHARE_OF_FREE_MEMORY = 0.5  # the other half stays for the training that goes on beside us


def available_memory(device: torch.device) -> int:
    """Bytes that a measurement may use by default: half of what is free on ``device`` now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((free + unused) * SHARE_OF_FREE_MEMORY)
    pages = os.sysconf("SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES")
    return int(pages * os.sysconf("SC_PAGE_SIZE") * SHARE_OF_FREE_MEMORY)


class AllocatedBytes(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's own class
    """Counts the bytes of every new tensor made inside the context: an upper bound of what it holds at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if _is_plain(t)}
        for t in tree_leaves(result):
            if _is_plain(t) and t.untyped_storage().data_ptr() not in given:
                self.total += t.untyped_storage().nbytes()
        return result


def _is_plain(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that the device's memory is used up."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def readable(num_bytes: float) -> str:
    """A number of bytes in words: ``1.5 GiB``."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GiB"
