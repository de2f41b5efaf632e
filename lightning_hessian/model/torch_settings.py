"""Torch's global settings, as exact second derivatives need them; each comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any

import torch
import torch.nn.attention
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# Where torch has its own switch for the precision of float32 products; which of them exist depends on the version.
PRECISION_SWITCHES = (
    "cuda.matmul",
    "cudnn.conv",
    "cudnn.rnn",
    "mkldnn.matmul",
    "mkldnn.conv",
    "mkldnn.rnn",
)

# What ``checkpoint`` calls, since that itself is imported by name everywhere. Private; from 2.15 "_impl" follows.
CHECKPOINT_GENERATOR = "_checkpoint_without_reentrant_generator"
ENGINE = "_engine_run_backward"  # of torch.autograd, for the same reason


@contextmanager
def exact_settings(device: torch.device, default_dtype: torch.dtype) -> Iterator[None]:
    """Gradients on; inference mode, autocast, anomaly detection, TF32 and activation checkpointing off.

    Torch's default dtype is ``default_dtype``, attention runs on the math kernel and never on the fast path of eval
    mode, compiled code runs eagerly, and hardsigmoid is made of operations that have second derivatives.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_without_autocast(device))
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        stack.enter_context(_full_precision())
        stack.enter_context(switched(torch.set_default_dtype, torch.get_default_dtype(), default_dtype))
        stack.enter_context(_attention_by_products())
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled outside again
        stack.enter_context(_without_checkpointing())
        stack.enter_context(replaced(torch.nn.functional, hardsigmoid=_hardsigmoid))
        stack.enter_context(_without_global_backward_hooks())
        yield


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """As ``torch.nn.functional.hardsigmoid``, whose backward has no derivative: min(max(x + 3, 0), 6) / 6."""
    found = torch.nn.functional.relu6(input + 3) / 6
    return input.copy_(found) if inplace else found


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Its recurrent networks have no second derivative."""
    # torch.backends.cudnn.enabled refuses to be set after torch.backends.disable_global_flags()
    with switched(torch._C._set_cudnn_enabled, torch.backends.cudnn.enabled, False):
        yield


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
        replaced(autocast, __enter__=stay_off),
        torch.autocast("cpu", enabled=False),
        torch.autocast(device.type, enabled=False),
    ):
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """Float32 products in float32: no TF32 on CUDA, no bfloat16 inside oneDNN.

    torch has an old and (from 2.9) a new set of switches, and raises where only one of two that belong together was
    changed; so both are changed and both restored.
    """
    backends: Any = torch.backends
    settings = [found for name in PRECISION_SWITCHES if (found := precision_switch(name)) is not None]
    saved = [setting.fp32_precision for setting in settings]
    matmul, cudnn = _legacy(torch.get_float32_matmul_precision), _legacy(lambda: backends.cudnn.allow_tf32)
    if matmul is not None:
        torch.set_float32_matmul_precision("highest")
    if cudnn is not None:
        torch._C._set_cudnn_allow_tf32(False)  # as in without_cudnn
    for setting in settings:
        if setting.fp32_precision not in ("none", "ieee"):
            setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if cudnn is not None:
            torch._C._set_cudnn_allow_tf32(cudnn)
        for setting, value in zip(settings, saved, strict=True):
            setting.fp32_precision = value


def _legacy(read: Any) -> Any:
    """An old switch's value, or None where torch does not return it, since only the new one was used."""
    try:
        return read()
    except RuntimeError:
        return None


def precision_switch(name: str) -> Any:
    """The new switch of this name, or None."""
    try:
        found = attrgetter(name)(torch.backends)
    except AttributeError:
        return None
    return found if hasattr(found, "fp32_precision") else None


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
        replaced(module, **fixed),
        switched(fast.set_fastpath_enabled, fast.get_fastpath_enabled(), False),
    ):
        yield


@contextmanager
def _without_checkpointing() -> Iterator[None]:
    """Turns activation checkpointing off: recomputation inside a double backward fails in both its modes."""
    module: Any = torch.utils.checkpoint

    def nothing(*args: object, **kwargs: object) -> Iterator[None]:
        yield

    generators = [name for name in vars(module) if name.startswith(CHECKPOINT_GENERATOR)]
    function = module.CheckpointFunction
    if "apply" in vars(function):  # a measurement inside a measured forward: it is off already
        yield
        return
    function.apply = lambda run, preserve, *args: run(*args)
    try:
        with replaced(module, **dict.fromkeys(generators, nothing)):
            yield
    finally:
        del function.apply  # it was inherited


@contextmanager
def _without_global_backward_hooks() -> Iterator[None]:
    """As in ``preserved``, those that are registered for all modules at once."""
    module: Any = nn.modules.module
    with replaced(module, _global_backward_hooks={}, _global_backward_pre_hooks={}):
        yield


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
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
def switched(write: Callable[[Any], object], before: Any, value: Any) -> Iterator[None]:
    """Switches a setting by its function, and back."""
    write(value)
    try:
        yield
    finally:
        write(before)


@contextmanager
def keeping_graphs() -> Iterator[None]:
    """Lets a forward's own ``torch.autograd.grad`` keep its graph, where gradients are on.

    Models of forces leave it out in eval mode (``create_graph=self.training``): what depends on the forces would
    count as constant, and the graph of the energy would be gone.
    """
    run = getattr(torch.autograd, ENGINE, None)
    if run is None or not torch.is_grad_enabled():
        yield
        return

    def keep(outputs: Any, grads: Any, retain: bool, create: bool, *args: Any, **kwargs: Any) -> Any:
        keeps = not kwargs.get("accumulate_grad", False)  # else it is ``backward``
        return run(outputs, grads, retain or keeps, create or keeps, *args, **kwargs)

    with replaced(torch.autograd, **{ENGINE: keep}):
        yield
