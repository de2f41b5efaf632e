"""What whole measurements cost: forward passes of the user's network, counted, and wall time in gradients."""

from __future__ import annotations

import statistics
import sys
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import save, seconds
from benchmarks.models import Residual, ViT, frozen, mnist_cnn, resnet50
from lightning_hessian.curvature.options import Options
from lightning_hessian.training.measurement import RunState, measure
from lightning_hessian.training.samples import Samples
from lightning_hessian.training.schedule import TrainingPosition
from lightning_hessian.training.settings import MeasurementSettings

LATER = 3  # measurements of the same run after the first
PASSED_THROUGH = ("function", "target_batch", "batching", "price", "distributed", "measurement", "memory")


class ForwardCounter:
    """Rows that a network saw in its forward passes, those in float64 twice, by the functions that asked for them."""

    __slots__ = ("by_part",)

    __module__ = "builtins"  # a measurement puts back what a forward writes to, but not objects of such modules

    def __init__(self) -> None:
        self.by_part: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Sample-forwards so far."""
        return sum(self.by_part.values())

    def add(self, x: Tensor) -> None:
        """Counts one forward pass."""
        self.by_part[_part(sys._getframe(1))] += len(x) * (2 if x.dtype == torch.float64 else 1)

    def take(self) -> dict[str, int]:
        """The counts by part, largest first; starts from zero again."""
        counts, self.by_part = dict(self.by_part.most_common()), Counter()
        return counts


class Counted(nn.Module):
    """A network that counts its forward passes; under ``vmap`` the rows that it sees are those of one direction."""

    def __init__(self, network: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network
        self.counter = ForwardCounter()

    def forward(self, x: Tensor) -> Any:
        """As the network."""
        self.counter.add(x)
        return self.network(x)


def _part(frame: types.FrameType | None) -> str:
    """The two innermost functions of the package that are more than a way to call the network."""
    found: list[str] = []
    while frame is not None and len(found) < 2:
        module = frame.f_globals.get("__name__", "")
        stem = module.rpartition(".")[2]
        if module.startswith("lightning_hessian.") and stem not in PASSED_THROUGH:
            name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)  # from Python 3.11
            found.append(f"{stem}.{name.replace('.<locals>', '')}")
        frame = frame.f_back
    return " < ".join(found) or "other"


@dataclass(frozen=True)
class Case:
    """A measurement whose cost is looked at.

    Attributes:
        name: in tables.
        make: the network.
        shape: of the samples ``[N, ...]``.
        target: of class 3.
        wanted: gradients that the first and the later measurements may take.
        piecewise_linear: whether the network is.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    target: str
    wanted: tuple[int, int]
    piecewise_linear: bool

    @property
    def wanted_forwards(self) -> tuple[int, int]:
        """Sample-forwards per sample that the first and the later measurements may take."""
        return (32, 8) if self.piecewise_linear else (16, 6)


class ResNet18Widths(nn.Module):
    """Eight residual blocks of 64 to 512 channels, ReLU and batch norm; a stride-2 convolution between widths."""

    def __init__(self, num_outputs: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
        width = 64
        for wider in (64, 128, 256, 512):
            if wider != width:
                layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.BatchNorm2d(wider), nn.ReLU()]
            layers += [Residual(wider), Residual(wider)]
            width = wider
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, H, W]`` to ``[N, C]``."""
        return self.head(self.body(x).mean((2, 3)))


CASES = (
    Case("residual ReLU network, 3×64×64", ResNet18Widths, (4, 3, 64, 64), "prob", (24, 10), True),
    Case("ResNet-50, 3×224×224", lambda: resnet50(10), (2, 3, 224, 224), "prob", (28, 12), True),
    Case("small ViT, 3×32×32", lambda: ViT(3, 32, 4), (4, 3, 32, 32), "logit", (120, 80), False),
    Case("forum CNN, 28×28", mnist_cnn, (8, 1, 28, 28), "logit", (110, 70), False),
)


def price_of(case: Case, *, later: int = LATER, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Counts and times of a first measurement and of ``later`` further ones of the same run.

    Two runs: one of three measurements counts, the other is timed, each measurement between two rounds of gradients.
    """
    torch.manual_seed(0)
    network = frozen(case.make()).to(device)
    x = torch.randn(case.shape)
    counted = Counted(network)
    measure_counted = run_of(counted, x, case.target)
    counts = []
    for step in range(3):
        record = measure_counted(step)
        counts.append(counted.counter.take())
    gradient = gradient_of(network, x.to(device))
    gradient()
    measure_timed = run_of(network, x, case.target)
    measured, gradients = [], []
    for step in range(1 + later):
        gradients.append(min(seconds(gradient) for _ in range(3)))
        measured.append(seconds(lambda step=step: measure_timed(step)))
    gradients.append(min(seconds(gradient) for _ in range(3)))
    one = statistics.median(gradients)
    per_sample = [sum(c.values()) / len(x) for c in counts]
    return {
        "case": case.name,
        "num_samples": len(x),
        "target": case.target,
        "method": record.method,
        "num_matvecs": record.num_matvecs,
        "gradient_seconds": round(one, 5),
        "first": _row(per_sample[:1], measured[:1], one, case.wanted_forwards[0], case.wanted[0]),
        "later": _row(per_sample[1:], measured[1:], one, case.wanted_forwards[1], case.wanted[1]),
        "forwards_by_part": {"first": counts[0], "later": counts[-1]},
    }


def _row(
    forwards: list[float], times: list[float], gradient: float, wanted_forwards: int, wanted: int
) -> dict[str, Any]:
    gradients = [t / gradient for t in times]
    return {
        "forwards_per_sample": round(max(forwards), 2),
        "wanted_forwards": wanted_forwards,
        "gradients": round(statistics.median(gradients), 1),
        "worst_gradients": round(max(gradients), 1),
        "wanted_gradients": wanted,
        "seconds": round(statistics.median(times), 4),
        "reached": max(forwards) <= wanted_forwards and statistics.median(gradients) <= wanted,
    }


def run_of(model: nn.Module, x: Tensor, target: Any, **options: Any) -> Callable[[int], Any]:
    """A run of its own, as the callback makes it with its defaults; each call measures once, without heatmaps."""
    settings = MeasurementSettings([3], target, "float32", Options(**options), heatmap_samples=0)
    samples, state = Samples(x, None), RunState()
    return lambda step: measure(model, samples, settings, state, position=TrainingPosition(step, step, step))


def gradient_of(network: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """One forward and backward pass of the batch, for one class."""

    def gradient() -> Tensor:
        point = x.clone().requires_grad_()
        output = network(point)
        logits = output if isinstance(output, Tensor) else output.logits
        (found,) = torch.autograd.grad(logits[:, 3].sum(), point)
        return found

    return gradient


def main() -> None:
    """Some minutes on two cores; ResNet-50 only where transformers is installed."""
    rows = []
    for case in CASES:
        try:
            row = price_of(case)
        except ImportError as error:
            row = {"case": case.name, "left_out": f"{error.name} is not installed"}
        rows.append(row)
        print("price:", row, flush=True)
    save("price", {"rows": rows})


if __name__ == "__main__":
    main()
