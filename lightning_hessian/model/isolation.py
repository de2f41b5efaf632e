"""The context in which a live model may be differentiated twice, and which leaves everything as it was."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.attention
import torch.utils.checkpoint
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_hessian.model.state_snapshot import StateSnapshot


@contextmanager
def isolated(model: object, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Makes exact second derivatives of ``model`` possible, and restores everything afterwards.

    Inside: gradients on, inference mode, autocast, anomaly detection and TF32 off, eval mode, default dtype ``dtype``,
    attention on the math kernel and never on the fast path of eval mode, compiled code run eagerly, cuDNN off if the
    model contains RNNs (cuDNN's have no second derivative), ``self.log`` silent, the hooks of FSDP2 and tensor
    parallelism off. Restored, also on an exception: all of these, the random streams of Python, NumPy and torch (CPU
    and ``device``), every module's ``training`` flag, ``.grad`` and ``requires_grad``, and whatever a forward or its
    hooks wrote to: attributes, containers, generators, closures.

    ``model`` is a module, or a function: then the modules that it refers to or is bound to are isolated.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(frozen_random_streams(device))
        stack.enter_context(_without_autocast(device))
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        stack.enter_context(_full_precision())
        stack.enter_context(_switched(torch.set_default_dtype, torch.get_default_dtype(), dtype))
        stack.enter_context(_attention_by_products())
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled outside again
        stack.enter_context(_without_checkpointing())
        for module in modules_behind(model):
            inside = stack.enter_context(preserved(module))
            if any(isinstance(inner, nn.RNNBase) for inner in inside):
                stack.enter_context(_replaced(torch.backends.cudnn, enabled=False))
            for each in inside:  # directly: ``eval()`` and ``train()`` may be overridden, and cannot be undone
                stack.enter_context(_replaced(each, training=False))
        yield


def modules_behind(model: object) -> list[nn.Module]:
    """The modules a model consists of: itself, the one a method is bound to, or those a function refers to."""
    if isinstance(model, nn.Module):
        return [model]
    owner = getattr(model, "__self__", None)
    if isinstance(owner, nn.Module):
        return [owner]
    if not inspect.isfunction(model):
        return []
    names = inspect.getclosurevars(model)
    return [v for v in (*names.nonlocals.values(), *names.globals.values()) if isinstance(v, nn.Module)]


@contextmanager
def frozen_random_streams(device: torch.device | None = None) -> Iterator[None]:
    """Restores the random streams of Python, NumPy and torch afterwards."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the stream of the user's run
    devices = [device] if device is not None and device.type not in ("cpu", "mps") else []
    try:
        with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


@contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Sets attributes, and puts back what was there."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextmanager
def _switched(write: Callable[[Any], object], before: Any, value: Any) -> Iterator[None]:
    """Switches a setting by its function, and back."""
    write(value)
    try:
        yield
    finally:
        write(before)


@contextmanager
def _without_autocast(device: torch.device) -> Iterator[None]:
    """Autocast off, also where a forward turns it on itself: a bfloat16 product has two correct digits."""
    autocast: Any = torch.autocast
    enter = autocast.__enter__

    def stay_off(context: Any) -> Any:
        entered = enter(context)
        torch.set_autocast_enabled(context.device, False)  # its exit restores the previous state
        return entered

    with (
        _replaced(autocast, __enter__=stay_off),
        torch.autocast("cpu", enabled=False),
        torch.autocast(device.type, enabled=False),
    ):
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """Float32 products in float32: no TF32 on CUDA, no bfloat16 inside oneDNN.

    torch has an old and a new set of switches, and raises where only one of two that belong together was changed; so
    both are changed and both restored.
    """
    backends: Any = torch.backends
    settings = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    settings += [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    saved = [setting.fp32_precision for setting in settings]
    matmul, cudnn = _legacy(torch.get_float32_matmul_precision), _legacy(lambda: backends.cudnn.allow_tf32)
    if matmul is not None:
        torch.set_float32_matmul_precision("highest")
    if cudnn is not None:
        backends.cudnn.allow_tf32 = False
    for setting in settings:
        if setting.fp32_precision not in ("none", "ieee"):
            setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if cudnn is not None:
            backends.cudnn.allow_tf32 = cudnn
        for setting, value in zip(settings, saved, strict=True):
            setting.fp32_precision = value


def _legacy(read: Any) -> Any:
    """An old switch's value, or None where torch does not return it, since only the new one was used."""
    try:
        return read()
    except RuntimeError:
        return None


@contextmanager
def _attention_by_products() -> Iterator[None]:
    """Attention on the only kernel with second derivatives, whatever ``sdpa_kernel`` a forward asks for.

    The fast path that transformer layers take in eval mode without gradients is a different function where samples are
    padded: it returns zeros, or fewer tokens. Values must be those of the function that is differentiated.
    """
    fast, module = torch.backends.mha, torch.nn.attention
    # private: without it, a forward's own choice stands
    fixed = {"_sdpa_kernel": lambda backends, set_priority=False: None} if hasattr(module, "_sdpa_kernel") else {}
    with (
        sdpa_kernel(SDPBackend.MATH),
        _replaced(module, **fixed),
        _switched(fast.set_fastpath_enabled, fast.get_fastpath_enabled(), False),
    ):
        yield


@contextmanager
def preserved(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Restores what the model's own code may write to; yields all its modules, unregistered ones too."""
    snapshot = StateSnapshot.take(model)
    flags = [(p, p.requires_grad, p.grad) for module in snapshot.modules for p in module.parameters(recurse=False)]
    for module in snapshot.modules:
        _without_collectives(module)  # restored with the snapshot
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
    for name, value in list(vars(module).items()):  # methods that were registered with FSDP2 as a forward
        home = getattr(getattr(value, "__func__", None), "__globals__", {}).get("__name__", "")
        if home.startswith("torch.distributed."):
            del vars(module)[name]


@contextmanager
def _without_checkpointing() -> Iterator[None]:
    """Turns activation checkpointing off: recomputation inside a double backward fails in both its modes."""
    module: Any = torch.utils.checkpoint

    def nothing(*args: object, **kwargs: object) -> Iterator[None]:
        yield

    module.CheckpointFunction.apply = lambda run, preserve, *args: run(*args)
    try:
        with _replaced(module, _checkpoint_without_reentrant_generator=nothing):
            yield
    finally:
        del module.CheckpointFunction.apply  # it was inherited
