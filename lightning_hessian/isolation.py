"""The context in which a live model may be differentiated twice, and from which all comes out untouched."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

RECURRENT = (nn.RNNBase,)


@contextmanager
def isolated(model: object, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Sets the stage for exact second derivatives of ``model``, and puts everything back afterwards.

    Inside: gradients on, inference mode, autocast, anomaly detection and TF32 off, eval mode, default dtype
    ``dtype``, attention on the math kernel, compiled code run eagerly, cuDNN off if the model holds RNNs
    (cuDNN's have no second derivative), ``self.log`` silent. Restored, also on an exception: all of these,
    the random streams of Python, NumPy and torch (CPU and ``device``), every module's ``training`` flag,
    attributes and containers that a forward wrote to, ``.grad`` and ``requires_grad``.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(frozen_random_streams(device))
        for device_type in {"cpu", device.type}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        stack.enter_context(_full_precision())
        stack.enter_context(_default_dtype(dtype))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_eager())
        if isinstance(model, nn.Module):
            if any(isinstance(module, RECURRENT) for module in model.modules()):
                stack.enter_context(_without_cudnn())
            stack.enter_context(_preserved(model))
            stack.enter_context(_eval_mode(model))
        yield


@contextmanager
def frozen_random_streams(device: torch.device | None = None) -> Iterator[None]:
    """Leaves the random streams of Python, NumPy and torch where they were."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the stream of the user's run
    devices = [device] if device is not None and device.type not in ("cpu", "mps") else []
    try:
        with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


@contextmanager
def _full_precision() -> Iterator[None]:
    """Float32 products in float32: no TF32 on CUDA, no bfloat16 inside oneDNN.

    torch has an old and a new set of switches, and raises where only one of two that belong together was
    moved; so both are moved and both put back.
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
    """An old switch's value, or None where torch refuses to tell since only the new one was used."""
    try:
        return read()
    except RuntimeError:
        return None


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _eager() -> Iterator[None]:
    """Compiled modules run eagerly, and stay compiled outside."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _without_cudnn() -> Iterator[None]:
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Sets every module's flag itself: ``eval()`` and ``train()`` may be overridden, and cannot be undone."""
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        module.training = False
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def _preserved(model: nn.Module) -> Iterator[None]:
    """Puts back what a forward may write: attributes, by reference and by value, of every module."""
    saved = [(module, _state_of(module)) for module in model.modules()]
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for name in ("log", "log_dict"):
        if callable(getattr(model, name, None)) and hasattr(type(model), "trainer"):
            model.__dict__[name] = _silent
    try:
        yield
    finally:
        for module, state in saved:
            _restore(module, state)
        for parameter, requires_grad, grad in flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def _silent(*args: object, **kwargs: object) -> None:
    """Stands in for ``self.log`` while a LightningModule's forward is measured."""


def _state_of(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Every attribute with a copy of its value: tensors cloned, containers copied one level deep."""
    return {name: (value, _copy(value)) for name, value in vars(module).items()}


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if isinstance(value, (dict, list, set)) else None


def _restore(module: nn.Module, state: dict[str, tuple[Any, Any]]) -> None:
    for name in set(vars(module)) - set(state):
        del vars(module)[name]
    for name, (value, copy) in state.items():
        vars(module)[name] = value
        if isinstance(value, Tensor):
            if not torch.equal(value, copy):
                with torch.no_grad():
                    value.copy_(copy)
        elif isinstance(value, list):
            value[:] = copy
        elif isinstance(value, (dict, set)):
            value.clear()
            value.update(copy)
