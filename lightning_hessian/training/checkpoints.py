"""Models and positions in training from files: checkpoints of Lightning, and plain state dicts."""

from __future__ import annotations

import glob
import hashlib
import importlib
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from lightning_hessian.errors import ConfigurationError, whole_number
from lightning_hessian.training.schedule import TrainingPosition

WEIGHTS = ("state_dict", "model_state_dict", "model", "network")  # under which loops save a module's state dict
STEPS, EPOCHS = ("global_step", "step", "iteration"), ("epoch",)
MONITOR = re.compile(r"InputHessianMonitor\{'name': (.*)\}")  # the keys of monitors' states
HOW_TO_NAME = "Give module:Class or module:function, with the module as you would import it here."


class CheckpointError(Exception):
    """A file is not a checkpoint that can be measured; the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A file, and what is in it.

    Attributes:
        path: of the file.
        content: as it was saved, on the CPU.
    """

    path: Path
    content: Mapping[str, Any]

    @property
    def position(self) -> TrainingPosition:
        """Where training was: from the content, else from the name, as in ``epoch=3-step=400.ckpt``.

        Raises:
            CheckpointError: neither says at which step.
        """
        try:
            return self._position()
        except (KeyError, TypeError, AttributeError) as error:  # another program's idea of a checkpoint
            raise CheckpointError(
                f"{self.path} does not say where training was ({type(error).__name__}: {error})."
            ) from error

    def _position(self) -> TrainingPosition:
        step, epoch = self._number(STEPS), self._number(EPOCHS)
        if step is None:
            raise CheckpointError(
                f"{self.path} does not say at which training step it was saved. Save a dict with 'global_step' beside "
                f"'state_dict', or name it like model_step=400{self.path.suffix}."
            )
        logged_step = step
        if "loops" in self.content:  # of Lightning
            loop = self.content["loops"]["fit_loop"]
            ended = loop["epoch_loop.batch_progress"]["total"]
            batches = loop["epoch_loop.state_dict"].get("_batches_that_stepped", step)
            # In a batch's own hooks that batch is not counted yet.
            logged_step = max(0, batches - (ended["completed"] == ended["processed"]))
            epoch = max(0, loop["epoch_progress"]["current"]["ready"] - 1)
        return TrainingPosition(step, logged_step, epoch or 0)

    @property
    def state_dict(self) -> Mapping[str, Tensor]:
        """The module's parameters and buffers.

        Raises:
            CheckpointError: there are none.
        """
        found = self._named_state_dict()
        if found is None and self._is_state_dict:
            found = self.content
        if found is None:
            raise CheckpointError(
                f"{self.path} holds no state dict: it has {', '.join(map(repr, self.content)) or 'nothing'}. Save "
                f"model.state_dict(), or a dict with it as 'state_dict'."
            )
        return found

    @property
    def is_of_lightning(self) -> bool:
        """Whether a Trainer of Lightning saved it."""
        return "pytorch-lightning_version" in self.content

    @property
    def fingerprint(self) -> str:
        """What tells these weights from others: a hash of their names, kinds and values.

        Raises:
            CheckpointError: there are no weights.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict.items()):
            if not isinstance(tensor, Tensor):
                continue
            digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
            if tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta:
                values = tensor.detach().resolve_conj().resolve_neg().contiguous()
                digest.update(values.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _named_state_dict(self) -> Mapping[str, Any] | None:
        """The weights where they are one entry of several."""
        for name in WEIGHTS:
            found = self.content.get(name)
            found = found.state_dict() if isinstance(found, nn.Module) else found
            if isinstance(found, Mapping) and any(isinstance(each, Tensor) for each in found.values()):
                return found
        return None

    @property
    def _is_state_dict(self) -> bool:
        """Whether the file holds weights and nothing else: an entry ``step`` is then a buffer of the model."""
        tensors = [each for name, each in self.content.items() if not name.endswith("_extra_state")]
        return bool(tensors) and all(isinstance(each, Tensor) for each in tensors)

    def samples_of_monitor(self, name: str | None) -> tuple[Any, Any] | None:
        """Inputs and labels that an ``InputHessianMonitor`` of that name has stored, or None."""
        for key, state in self.content.get("callbacks", {}).items():
            match = MONITOR.fullmatch(key)
            if match and match[1] == repr(name) and state.get("samples"):
                return state["samples"]["inputs"], state["samples"]["labels"]
        return None

    def _number(self, names: Iterable[str]) -> int | None:
        for name in names:
            value = None if self._is_state_dict else self.content.get(name)
            if isinstance(value, Tensor) and value.numel() == 1:
                value = value.item()
            with suppress(ConfigurationError):
                return whole_number(name, value)
            if (number := number_in_name(self.path, name)) is not None:
                return number
        return None


def number_in_name(path: Path, name: str) -> int | None:
    """400 in ``epoch=3-step=400.ckpt`` for ``step``; None where there is none."""
    match = re.search(rf"(?:^|[^a-z]){name}[=_-]?(\d+)", path.stem.lower())
    return int(match[1]) if match else None


def read_checkpoint(path: Path, file: IO[bytes]) -> Checkpoint:
    """A checkpoint on the CPU; like Lightning, it trusts the file, since the model's code is the user's own.

    Args:
        path: of the file.
        file: the file, open: its name may stand for a newer one soon.

    Raises:
        CheckpointError: it cannot be read, as long as it is being written for example.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            return Checkpoint(path, {"state_dict": load(file.read())})
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # hyperparameters of other kinds
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=False)
    except Exception as error:  # whatever a damaged file makes of the unpickler
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {first_line(error)}).") from error
    if isinstance(content, nn.Module):  # torch.save(model)
        content = {"state_dict": content.state_dict()}
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, and not a checkpoint or state dict.")
    return Checkpoint(path, content)


def find_checkpoints(patterns: Iterable[str]) -> list[Path]:
    """The files that paths, glob patterns and directories (all checkpoints in them) name, each once."""
    found: dict[str, Path] = {}
    for pattern in patterns:
        inside = [os.path.join(pattern, f"*{end}") for end in (".ckpt", ".pt", ".pth", ".safetensors")]
        for each in inside if os.path.isdir(pattern) else [pattern]:
            for path in sorted(glob.glob(each, recursive=True)):
                if os.path.isfile(path):
                    found.setdefault(os.path.realpath(path), Path(path))
    return list(found.values())


class ModelSource:
    """What makes models: a class or function of the user, ``package.module:Class`` or ``module:function``.

    Checkpoints of Lightning are loaded by the class's ``load_from_checkpoint``, if it has one. Else it is called
    without arguments, and returns a module for the checkpoint's state dict.

    Raises:
        ConfigurationError: there is no such module or attribute, or it cannot be called.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        module_name, _, attribute = name.partition(":")
        if not module_name or not attribute:
            raise ConfigurationError(f"{name!r} does not name a model. {HOW_TO_NAME}")
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())  # as ``python -m`` does
        try:
            found: Any = importlib.import_module(module_name)
        except Exception as error:
            raise ConfigurationError(
                f"The module {module_name!r} cannot be imported: {type(error).__name__}: {first_line(error)}. "
                f"{HOW_TO_NAME}"
            ) from error
        for part in attribute.split("."):
            if not hasattr(found, part):
                known = ", ".join(n for n, value in vars(found).items() if isinstance(value, type) and n[0] != "_")
                raise ConfigurationError(f"There is no {part!r} in {module_name}; it has {known or 'no classes'}.")
            found = getattr(found, part)
        if not callable(found):
            raise ConfigurationError(f"{name} is a {type(found).__name__}, and neither a class nor a function.")
        self._make: Callable[..., Any] = found

    def load(self, checkpoint: Checkpoint, file: IO[bytes], device: torch.device) -> nn.Module:
        """The model with the checkpoint's weights, from its open file.

        Raises:
            CheckpointError: it is a checkpoint of another model.
            ConfigurationError: the model cannot be made.
        """
        load = getattr(self._make, "load_from_checkpoint", None) if checkpoint.is_of_lightning else None
        if load is None:
            model = self._made()
        try:
            if load is not None:
                file.seek(0)
                model = load(file, map_location=device)
            else:
                model.load_state_dict(_named_as_in(model, checkpoint.state_dict))
        except TypeError as error:  # arguments are missing
            raise ConfigurationError(
                f"{self.name} cannot be made from the hyperparameters in {checkpoint.path} ({error}). Call "
                f"self.save_hyperparameters() in its __init__, or give a function without arguments that returns the "
                f"model, as module:function."
            ) from error
        except (RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"{checkpoint.path} is not a checkpoint of {self.name}: {' '.join(str(error).split())[:300]}"
            ) from error
        return model.to(device)

    def _made(self) -> Any:
        try:
            model = self._make()
        except Exception as error:
            raise ConfigurationError(
                f"{self.name}() failed with {type(error).__name__}: {first_line(error)}. For a plain state dict, give "
                f"a function without arguments that returns the model, as module:function."
            ) from error
        if not isinstance(model, nn.Module):
            raise ConfigurationError(f"{self.name}() returned a {type(model).__name__}, and not an nn.Module.")
        return model


def _named_as_in(model: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights without what DDP and ``torch.compile`` put before their names, where a name does not fit as it is."""
    known = model.state_dict().keys()
    if weights.keys() <= known:  # with the versions that a state dict of torch has beside its entries
        return weights

    def fitting(name: str) -> str:
        bare = name.replace("_orig_mod.", "").removeprefix("module.")
        return bare if name not in known and bare in known else name

    return {fitting(name): each for name, each in weights.items()}


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, without its full stop."""
    return (str(error).splitlines() or [""])[0].rstrip(".")
