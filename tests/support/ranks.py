"""Processes that train together, each started as ``python -m support.ranks FOLDER SCENARIO...``.

Every process writes ``FOLDER/SCENARIO/rank_R.pt``: the scalars, the weights, the warnings and the error it ended with.
"""

import os
import socket
import subprocess
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.utils.data import IterableDataset

from lightning_hessian import InputHessianMonitor
from lightning_hessian.curvature.meter import Pace
from lightning_hessian.curvature.options import Options
from lightning_hessian.model.state_snapshot import StateSnapshot
from lightning_hessian.training.distributed import ProcessGroup
from lightning_hessian.training.measurement import measure
from lightning_hessian.training.samples import Samples
from lightning_hessian.training.settings import MeasurementSettings
from support.training import Classifier, digits, fit, small_monitor

TESTS = Path(__file__).parent.parent
TIMEOUT = 240  # seconds, after which a hang is a failure; a launch takes a tenth of it on two free cores
BROKEN = "measured and found wanting"
SAMPLES = tuple(values[::2] for values in digits(64, 70).tensors)


# As ``torchrun --nproc-per-node=2`` sets it.
TORCHRUN = [
    {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "test",
    }
    for rank in (0, 1)
]


def free_port() -> int:
    """A port that nothing uses, and that the system gives to nobody who asks for any, as servers of other tests do."""
    first = 20_000 + os.getpid() * 100 % 10_000
    for port in range(first, first + 100):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise OSError(f"No port from {first} on is free.")


def together(command: list[str], environments: list[dict[str, str]]) -> list[str]:
    """Runs one process for each environment until all have ended, and gives what they printed."""
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    }
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen(command, env={**common, **own}, **pipes) for own in environments]
    printed = []
    try:
        for process in processes:
            printed.append(process.communicate(timeout=TIMEOUT)[0])
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    if any(codes):
        raise AssertionError(f"Processes ended with {codes}:\n" + "\n".join(printed))
    return printed


def leave() -> None:
    """Ends the process at once: in the interpreter's own exit, gloo's threads abort it now and then.

    With this package or without; see https://github.com/pytorch/pytorch/pull/179291.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def launch(folder: Path, *scenarios: str, environments: list[dict[str, str]]) -> list[str]:
    """Runs the scenarios in one process for each environment, and gives what they printed."""
    return together([sys.executable, "-m", "support.ranks", str(folder), *scenarios], environments)


class Faulty(Classifier):
    """Cannot be measured on some ranks; trains and validates everywhere."""

    def __init__(self, *ranks: int) -> None:
        super().__init__()
        self.ranks = ranks

    def forward(self, x):
        if not self.training and torch.is_grad_enabled() and self.global_rank in self.ranks:
            raise ArithmeticError(BROKEN)
        return super().forward(x)


class Sharded(LightningModule):
    """A network without batch statistics whose layers and root are sharded by FSDP2."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.GELU(), nn.Linear(7, 10))
        self.register_buffer("scale", torch.tensor(2.0))
        self.flags: list[list[bool]] = []

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        for layer in (self.net[1], self.net[3], self):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def forward(self, x):
        return self.net(x) * self.scale

    training_step = Classifier.training_step
    validation_step = Classifier.validation_step
    configure_optimizers = Classifier.configure_optimizers


class Stream(IterableDataset):
    """Held-out digits that cannot be read twice."""

    def __iter__(self):
        return iter([digits(64, 96)[i] for i in range(32)])


def without_batches(monitor, *ranks: int):
    """The monitor, to which no validation batch comes on some ranks."""
    inner = monitor.on_validation_batch_start

    def on_validation_batch_start(trainer, *arguments, **keywords):
        if trainer.global_rank not in ranks:
            inner(trainer, *arguments, **keywords)

    monitor.on_validation_batch_start = on_validation_batch_start
    return monitor


def no_input_on_rank_0(batch):
    if torch.distributed.get_rank() == 0:
        raise ArithmeticError(BROKEN)
    return batch


SEQUENCES = ("sequence", "sequence_prepare", "sequence_decide", "sequence_share", "sequence_close")


@dataclass(frozen=True)
class RecordingGroup(ProcessGroup):
    """Notes the collectives that are called, without those inside others."""

    calls: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)

    def _noted(self, name: str, *arguments: Any) -> Any:
        if not self.running:
            self.calls.append(name)
        self.running.append(name)
        try:
            return getattr(ProcessGroup, name)(self, *arguments)
        finally:
            self.running.pop()

    tensors = partialmethod(_noted, "tensors")
    on_first = partialmethod(_noted, "on_first")
    on_all = partialmethod(_noted, "on_all")
    gather = partialmethod(_noted, "gather")
    any = partialmethod(_noted, "any")


class FailsIn(nn.Module):
    """Fails in one step of a measurement, on this rank."""

    def __init__(self, step: str | None) -> None:
        super().__init__()
        self.step, self.net = step, nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.GELU(), nn.Linear(5, 3))

    def forward(self, x):
        if self.step not in (None, "close") and torch.is_grad_enabled() == (self.step != "prepare"):
            raise ArithmeticError(BROKEN)
        return self.net(x)


def _cannot_restore(snapshot: StateSnapshot) -> None:
    raise ArithmeticError(BROKEN)


def sequence(name: str, rank: int, size: int) -> dict[str, Any]:
    """The collectives of one measurement, and the error it ended with; ``sequence_STEP`` fails in that step."""
    step = name.partition("_")[2] or None
    fails = step is not None and rank == (0 if step == "decide" or size == 1 else 1)
    group = RecordingGroup(rank, size, size)
    torch.manual_seed(1)
    model, settings = FailsIn(step if fails else None), MeasurementSettings([0, 2], "prob", "float32", Options())
    left: dict[str, Any] = {"error": None, "record": False}
    restore = StateSnapshot.restore
    try:
        if fails and step == "close":
            StateSnapshot.restore = _cannot_restore
        left["record"] = measure(model, Samples(*SAMPLES), settings, group=group) is not None
    except Exception as error:
        left["error"] = (type(error).__name__, str(error))
    finally:
        StateSnapshot.restore = restore
    return {**left, "calls": group.calls}


def late(rank: int, size: int) -> dict[str, Any]:
    """One measurement, whole matrices of which are late on the last rank only: its collectives, and its method."""
    group = RecordingGroup(rank, size, size)
    torch.manual_seed(1)
    if rank == size - 1:
        Pace.lateness = lambda *_: (100.0, 1.0)
    options = Options(max_seconds=50.0, num_eigenvalues=4)
    record = measure(
        FailsIn(None), Samples(*SAMPLES), MeasurementSettings([0, 2], "prob", "float32", options), group=group
    )
    return {"calls": group.calls, "record": record and (record.method, record.eigenvalues.shape, record.message)}


def scenario(name: str) -> dict[str, Any]:
    """The monitor, the model and what else a scenario asks of ``fit``; without "monitor" it trains alone."""
    many = {"num_samples": 3, "heatmap_samples": 2}
    smooth = {"heatmap_samples": 2, "target": "prob"}
    two = {"strategy": "ddp", "devices": 2, "max_epochs": 1}
    sharded = {
        "model": Sharded(),
        "strategy": ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
        ),
        "devices": 2,
    }
    return {
        "uneven": lambda: {
            "monitor": small_monitor(**many, every_n_train_steps=1, samples=SAMPLES),
            "held_out": False,  # validation makes the buffers of all ranks equal
            **two,
        },
        "without": lambda: {"held_out": False, **two},
        "relu": lambda: {"monitor": small_monitor(num_samples=3), "model": Classifier(nn.ReLU), **two},
        "one": lambda: {
            "monitor": small_monitor(**{**smooth, "num_samples": 1}, method="lanczos", num_eigenvalues=4),
            **two,
        },
        "lanczos": lambda: {
            "monitor": small_monitor(
                **{**smooth, "num_samples": 5}, method="lanczos", num_eigenvalues=4, density_vectors=2
            ),
            **two,
        },
        "float64": lambda: {"monitor": small_monitor(**many, dtype="float64", classes="predicted"), **two},
        "faulty": lambda: {"monitor": small_monitor(**many, on_error="warn"), "model": Faulty(1), **two},
        "raising": lambda: {"monitor": small_monitor(**many), "model": Faulty(1), **two},
        "all_raising": lambda: {"monitor": small_monitor(num_samples=1), "model": Faulty(0, 1), **two},
        "unwritable": lambda: {"monitor": small_monitor(on_error="warn"), "logger": Unwritable(sys.argv[1]), **two},
        "no_samples_on_1": lambda: {"monitor": without_batches(small_monitor(**many), 1), "held_out": Stream(), **two},
        "no_samples_on_0": lambda: {
            "monitor": without_batches(small_monitor(on_error="warn"), 0),
            "held_out": Stream(),
            **two,
        },
        "bad_input": lambda: {"monitor": small_monitor(input_fn=no_input_on_rank_0), **two},
        "bad_classes": lambda: {"monitor": small_monitor(classes=[99]), **two},
        "sharded": lambda: {"monitor": small_monitor(**many, every_n_train_steps=1), **sharded},
        "sharded_without": lambda: sharded,
        "nodes": lambda: {
            "monitor": small_monitor(**many),
            "strategy": "ddp",
            "devices": 1,
            "num_nodes": 2,
            "max_epochs": 1,
        },
        "spawn": lambda: {"monitor": small_monitor(**many), **two, "strategy": "ddp_spawn"},
        "fork": lambda: {"monitor": small_monitor(**many), **two, "strategy": "ddp_fork"},
    }[name]()


class Unwritable(TensorBoardLogger):
    """A logger that cannot write what is measured."""

    def log_metrics(self, metrics, step=None):
        if any(name.startswith("hessian") for name in metrics):
            raise OSError(BROKEN)


def own_rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("NODE_RANK", "0")))


def run(folder: Path, name: str) -> None:
    """Runs one scenario on this rank, and writes down how it went."""
    rank = own_rank()
    if name in SEQUENCES or name == "late":
        (folder / name).mkdir(parents=True, exist_ok=True)
        size = torch.distributed.get_world_size()
        left = late(rank, size) if name == "late" else sequence(name, rank, size)
        torch.save(left, folder / name / f"rank_{rank}.pt")
        return
    torch.manual_seed(1)
    arguments = scenario(name)
    monitor = arguments.pop("monitor", None)
    folder = folder / name
    left = {"error": None}
    home = folder / f"home_{rank}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer = fit(home, *([monitor] if monitor else []), **arguments)
            left["metrics"] = {k: float(v) for k, v in trainer.callback_metrics.items()}
            left["weights"] = whole(trainer.lightning_module.state_dict())
        except Exception as error:
            left["error"] = (type(error).__name__, str(error))
    left["warnings"] = [str(w.message) for w in caught]
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(left, folder / f"rank_{rank}.pt")


def whole(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for n, t in state.items()}


def measured_alone(model: nn.Module, x: torch.Tensor, y: torch.Tensor, monitor: InputHessianMonitor):
    """The record of the same weights by a single process."""
    return measure(model, Samples(x, y), monitor._settings.measurement)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[2:]:
        run(Path(sys.argv[1]), each)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    leave()
