"""Whole Hessians at D = 784, against ``vmap(torch.func.hessian)`` and against the forum's loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import hessian, vmap

from benchmarks.common import alternate, check_equal, compare, cost, save, seconds
from benchmarks.models import ViT, cnn, frozen, mlp, mnist_cnn, problems_of
from lightning_hessian import input_hessian
from lightning_hessian.curvature.checks.mode_agreement import modes_agree
from lightning_hessian.curvature.cost_model import ModelCosts, first_block, largest_block
from lightning_hessian.curvature.memory import available_memory
from lightning_hessian.curvature.methods.columns import hessians
from lightning_hessian.curvature.methods.dense import symmetrize_
from lightning_hessian.curvature.operators.autodiff import gradients
from lightning_hessian.curvature.target_batch import TargetBatch

NUM_SAMPLES = 4
COLUMNS, END_TO_END, PEER = "columns.hessians", "input_hessian, end to end", "vmap(torch.func.hessian)"


def hessians_alone(batch: TargetBatch) -> Tensor:
    """The numerics alone: comparing the autodiff modes, the columns, and their check; no isolation, no diagnosis."""
    generator = torch.Generator().manual_seed(0)
    modes = ("forward_over_reverse", "reverse_over_reverse")
    if not modes_agree(batch, generator)[0]:
        modes = modes[1:]
    costs, memory = ModelCosts(batch), available_memory(batch.x.device)
    matrices, _ = hessians(
        batch,
        modes,
        first_block=first_block(costs, batch.num_samples),
        largest_block=largest_block(costs, batch.num_samples, memory),
        generator=generator,
    )
    symmetrize_(matrices)
    return matrices


def peer_hessians(model: nn.Module, x: Tensor, classes: list[int], chunk: int) -> Tensor:
    """``vmap(torch.func.hessian)``, ``chunk`` samples at a time."""

    def one(sample: Tensor) -> Tensor:
        return model(sample.unsqueeze(0))[0, classes]

    return vmap(hessian(one), chunk_size=chunk)(x).reshape(len(x), len(classes), 784, 784)


def against_func(name: str, model: nn.Module, num_classes: int) -> dict[str, Any]:
    """One network and number of classes; the peer's better chunk of samples is found first."""
    x, classes = torch.randn(NUM_SAMPLES, 1, 28, 28), list(range(num_classes))
    batch = problems_of(model, x, classes)
    chunk = 1
    if num_classes < 10 or name == "MLP":  # there, all samples at once take more than 10 GB
        chunk = min([1, NUM_SAMPLES], key=lambda size: seconds(lambda: peer_hessians(model, x, classes, size)))
    works: dict[str, Callable[[], Tensor]] = {
        COLUMNS: lambda: hessians_alone(batch),
        END_TO_END: lambda: input_hessian(model, x, classes),
        PEER: lambda: peer_hessians(model, x, classes, chunk),
    }
    expected = works[PEER]()
    difference = max(check_equal(works[ours](), expected, 1e-3) for ours in (COLUMNS, END_TO_END))
    times = alternate(works, repeats=3, warm=False)  # the check was the warm-up
    row = {
        "network": name,
        "N": NUM_SAMPLES,
        "K": num_classes,
        "peer_chunk": chunk,
        "difference": difference,
        "columns": compare(times, COLUMNS, PEER, wanted=2.5),
        "end_to_end": compare(times, END_TO_END, PEER, wanted=2.5),
    }
    print("dense:", name, num_classes, row["columns"], row["end_to_end"]["median"], flush=True)
    return row


def forum_loop(model: nn.Module, x: Tensor) -> Tensor:
    """One double backward per row, as answered in the forum."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[0, 2], x, create_graph=True)
    rows = [torch.autograd.grad(entry, x, retain_graph=True)[0].flatten() for entry in gradient.flatten()]
    return torch.stack(rows)


def against_forum() -> list[dict[str, Any]]:
    """MNIST CNN, one sample, one class."""
    model, x = mnist_cnn(), torch.randn(1, 1, 28, 28)
    batch = problems_of(model, x, [2])
    works: dict[str, Callable[[], Tensor]] = {
        COLUMNS: lambda: hessians_alone(batch)[0, 0],
        END_TO_END: lambda: input_hessian(model, x, 2)[0, 0],
        "forum loop": lambda: forum_loop(model, x),
    }
    expected = works["forum loop"]()
    for ours in (COLUMNS, END_TO_END):
        check_equal(works[ours](), expected, 1e-3)
    times = alternate(works, repeats=3, warm=False)
    rows = [compare(times, ours, "forum loop", wanted=10) for ours in (COLUMNS, END_TO_END)]
    print("forum:", rows, flush=True)
    return rows


def column_cost(model: nn.Module) -> dict[str, Any]:
    """A column of one problem's Hessian at K = 10, against forward and backward for one class of one sample."""
    x = torch.randn(NUM_SAMPLES, 1, 28, 28)
    batch, single = problems_of(model, x, range(10)), problems_of(model, x, [0])
    many = problems_of(model, torch.randn(256, 1, 28, 28), [0])
    times = alternate(
        {
            "hessian": lambda: hessians_alone(batch),
            "gradient": lambda: [gradients(single) for _ in range(100)],
            "gradient of 256": lambda: [gradients(many) for _ in range(4)],
        }
    )
    column = [t / (784 * 10 * NUM_SAMPLES) for t in times["hessian"]]
    result = {
        "same batch of 4": cost(column, [t / (100 * NUM_SAMPLES) for t in times["gradient"]], wanted=1.1),
        "batch of 256": cost(column, [t / 1024 for t in times["gradient of 256"]], wanted=1.1),
    }
    print("column:", result, flush=True)
    return result


def main() -> None:
    """All of it: about four minutes on two cores."""
    torch.manual_seed(0)
    networks = {"MLP": mlp(), "ViT": frozen(ViT(1, 28, 4)), "CNN": cnn()}
    report: dict[str, Any] = {"rows": []}
    for name, model in networks.items():
        for num_classes in (1, 3, 10):
            report["rows"].append(against_func(name, model, num_classes))
            report["summary"] = summary(report["rows"])
            save("dense", report)  # what is there so far
    report["forum_loop"] = against_forum()
    save("dense", report)
    report["column_at_K_10"] = {name: column_cost(model) for name, model in networks.items()}
    print("dense:", report["summary"], flush=True)
    save("dense", report)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric mean of the cases' medians, and the worst round of all."""
    result = {}
    for level in ("columns", "end_to_end"):
        medians = [row[level]["median"] for row in rows]
        result[level] = {
            "cases": len(rows),
            "geometric_mean": round(math.exp(sum(map(math.log, medians)) / len(medians)), 3),
            "worst_case": min(row[level]["worst"] for row in rows),
            "wanted_at_least": 2.5,
        }
    return result


if __name__ == "__main__":
    main()
