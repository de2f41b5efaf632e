"""The context in which a live model may be differentiated twice, and which leaves everything as it was."""

from __future__ import annotations

import random
import threading
import types
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from lightning_hessian.errors import quiet
from lightning_hessian.model.state_snapshot import StateSnapshot
from lightning_hessian.model.torch_settings import exact_settings, replaced, without_cudnn

COMPILED = "OptimizedModule"
WRAPPERS = {  # by the attribute that holds the module inside
    COMPILED: "_orig_mod",
    "_FabricModule": "_original_module",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
}

ONE_AT_A_TIME = threading.RLock()  # what is changed and put back belongs to the whole process, or to a shared model


@contextmanager
def isolated(parts: Sequence[object], device: torch.device, default_dtype: torch.dtype) -> Iterator[None]:
    """Makes exact second derivatives of a model possible, and restores everything afterwards.

    Inside: ``exact_settings``, eval mode, cuDNN off if the model contains RNNs, backward hooks and ``self.log`` off,
    no conversion of the model, no wrapper of Fabric or DDP around it, no hooks of FSDP2 and tensor parallelism; and no
    warnings but those of this package. Restored, also on an exception: all of these, the random streams of Python,
    NumPy and torch (CPU and ``device``), every module's ``training`` flag, ``.grad`` and ``requires_grad``, and
    whatever a forward or its hooks wrote to: attributes, containers, generators, closures.

    ``parts`` are what the model is made of: modules, and functions and other objects, which are treated as the modules
    that they refer to. Other threads wait until it is closed.
    """
    with ExitStack() as stack:
        stack.enter_context(ONE_AT_A_TIME)
        stack.enter_context(quiet())
        stack.enter_context(frozen_random_streams(device))
        stack.enter_context(exact_settings(device, default_dtype))
        inside = stack.enter_context(preserved(*parts))
        if any(isinstance(module, nn.RNNBase) for module in inside):
            stack.enter_context(without_cudnn())
        for module in inside:  # directly: ``eval()`` and ``train()`` may be overridden, and cannot be undone
            stack.enter_context(replaced(module, training=False))
        yield


@contextmanager
def frozen_random_streams(device: torch.device | None = None) -> Iterator[None]:
    """Restores the random streams of Python, NumPy and torch afterwards, before another thread may do the same."""
    devices = [device] if device is not None and device.type not in ("cpu", "mps") else []
    with ONE_AT_A_TIME:
        python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the stream of the user's run
        try:
            with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
                yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


@contextmanager
def preserved(*parts: object) -> Iterator[list[nn.Module]]:
    """Restores what a model's own code may write to; yields all its modules, unregistered ones too."""
    snapshot = StateSnapshot.take(*parts)
    flags = [(p, p.requires_grad, p.grad) for module in snapshot.modules for p in module.parameters(recurse=False)]
    for module in snapshot.modules:  # restored with the snapshot
        _without_collectives(module)
        _without_conversion(module)
        _without_wrapper(module)
        module._backward_hooks.clear()  # they see gradients and may change them; the function is that of the forward
        module._backward_pre_hooks.clear()
        if hasattr(type(module), "trainer"):  # a LightningModule, which may also be a part of another
            logging = [name for name in ("log", "log_dict") if hasattr(module, name)]
            module.__dict__.update(dict.fromkeys(logging, lambda *args, **kwargs: None))
    try:
        for parameter, _, _ in flags:
            parameter.requires_grad_(False)  # no graph may reach the parameters
        yield snapshot.modules
    finally:
        try:
            snapshot.restore()
        finally:
            for parameter, requires_grad, grad in flags:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad


def _without_collectives(module: nn.Module) -> None:
    """Removes the hooks by which torch shards a forward over processes: a single process would wait in them forever."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        ours = [key for key, hook in hooks.items() if getattr(hook, "__module__", "").startswith("torch.distributed.")]
        for key in ours:
            del hooks[key]
    methods = [(name, value) for name, value in vars(module).items() if isinstance(value, types.MethodType)]
    for name, method in methods:  # those that were registered with FSDP2 as a forward
        home = getattr(method.__func__, "__globals__", {}).get("__name__", "")
        if home.startswith("torch.distributed."):
            del vars(module)[name]


def _without_conversion(module: nn.Module) -> None:
    """Lets ``to``, ``float`` and the like do nothing in a forward: under forward mode they crash the process."""
    vars(module)["_apply"] = lambda fn, recurse=True: module


def _without_wrapper(module: nn.Module) -> None:
    """Calls what Fabric or DDP wraps directly: they convert inputs and outputs, and wait for other processes."""
    inner = wrapped_module(module)
    if inner is not None and type(module).__name__ != COMPILED:
        vars(module)["forward"] = inner


def wrapped_module(module: nn.Module) -> nn.Module | None:
    """What a wrapper of torch or Fabric was made of, or None for other modules."""
    attribute = WRAPPERS.get(type(module).__name__)
    return None if attribute is None else getattr(module, attribute)
