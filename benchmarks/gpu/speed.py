"""How fast on this device: against ``vmap(torch.func.hessian)``, and in gradients."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import hessian, vmap

from benchmarks.common import alternate, check_equal, compare, seconds
from benchmarks.gpu.suite import Suite
from benchmarks.models import ViT, cnn, frozen, mlp, mnist_cnn, problems_of
from benchmarks.price import CASES, ResNet18Widths, gradient_of, price_of
from lightning_hessian import input_hessian, input_spectrum
from lightning_hessian.curvature.operators.autodiff import ForwardOverReverse, ReverseOverReverse

Works = dict[str, Callable[[], dict[str, Any]]]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (mlp, (784,)),
    "CNN": (cnn, (1, 28, 28)),
    "forum CNN": (mnist_cnn, (1, 28, 28)),
    "ViT": (lambda: ViT(1, 28, 7), (1, 28, 28)),
}


def works(suite: Suite) -> Works:
    """Every timing by name."""
    device, sizes = suite.device, suite.sizes
    found: Works = {}
    for name in NETWORKS:
        for k in sizes.classes:
            found[f"dense, {name}, K = {k}"] = lambda name=name, k=k: dense(suite, name, k)
    for name in NETWORKS:
        found[f"HVPs and columns, {name}"] = lambda name=name: columns(suite, name)
    found["lanczos, ResNet-18"] = lambda: large(suite, smooth_resnet18, "lanczos")
    found["lanczos, ViT-S"] = lambda: large(suite, lambda: vit_s(sizes.images, sizes.depth), "lanczos")
    for c in sizes.num_outputs:
        found[f"low_rank, C = {c}"] = lambda c=c: large(suite, lambda: ResNet18Widths(c), "low_rank", "prob")
    for i in (0, 2):
        found[f"price, {CASES[i].name}"] = lambda i=i: price_of(CASES[i], device=device)
    found["eigh by D"] = lambda: eigendecompositions(suite)
    return found


def smooth_resnet18() -> nn.Module:
    """The widths of ResNet-18 with SiLU inside of the blocks and between them, behind a stem of stride 4."""
    network = ResNet18Widths()
    for module in list(network.modules()):
        if isinstance(module, nn.Sequential):
            for i, layer in enumerate(module):
                if isinstance(layer, nn.ReLU):
                    module[i] = nn.SiLU()
    network.body = nn.Sequential(nn.Conv2d(3, 3, 7, stride=4, padding=3), *network.body)
    return network


def vit_s(size: int, depth: int) -> nn.Module:
    """Width 384, twelve blocks, patches of 16×16."""
    return frozen(ViT(3, size, 16, dim=384, depth=depth))


def dense(suite: Suite, name: str, k: int) -> dict[str, Any]:
    """Whole Hessians, checks included and left out, against ``vmap(func.hessian)`` in one call."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().to(suite.device)
    x = torch.randn(suite.sizes.num_samples, *shape, device=suite.device)
    classes = list(range(k))

    def peer() -> Tensor:
        found = vmap(hessian(lambda s: model(s.unsqueeze(0))[0, classes]))(x)
        return found.reshape(len(x), k, 784, 784)

    difference = check_equal(input_hessian(model, x, classes), peer(), 1e-3)
    times = alternate(
        {
            "input_hessian": lambda: input_hessian(model, x, classes),
            "input_hessian, check=False": lambda: input_hessian(model, x, classes, check=False),
            "vmap(func.hessian)": peer,
        },
        repeats=suite.sizes.rounds,
    )
    rows = [compare(times, ours, "vmap(func.hessian)", wanted=w) for ours, w in zip(times, (0.8, 0.95), strict=False)]
    return {"num_samples": len(x), "difference": difference, "rows": rows}


def columns(suite: Suite, name: str) -> dict[str, Any]:
    """One HVP on a retained graph, and one column of a block of 128, in gradients of the same batch."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().to(suite.device)
    x = torch.randn(suite.sizes.num_samples, *shape, device=suite.device)
    batch = problems_of(model, x, [3])
    autodiff, forward = ReverseOverReverse(batch), ForwardOverReverse(batch)
    v = torch.randn(len(x), 1, 784, device=suite.device)
    block = torch.eye(784, device=suite.device)[:128]
    times = alternate(
        {
            "gradient": gradient_of(model, x),
            "HVP": lambda: autodiff.hvp(v),
            "block": lambda: forward.columns(block),
        },
        repeats=suite.sizes.rounds * 3,
    )
    one = statistics.median(times["gradient"])
    return {
        "gradient_seconds": round(one, 6),
        "gradients_per_hvp": round(statistics.median(times["HVP"]) / one, 3),
        "gradients_per_column": round(statistics.median(times["block"]) / one / 128, 4),
    }


def large(suite: Suite, make: Callable[[], nn.Module], method: str, target: str = "log_prob") -> dict[str, Any]:
    """One measurement of a large network: seconds with and without checks, in gradients; peak memory."""
    torch.manual_seed(0)
    model = frozen(make()).to(suite.device)
    size = suite.sizes.images
    x = torch.randn(2, 3, size, size, device=suite.device)
    spectrum = input_spectrum(model, x, 3, target, method=method)
    peak = None
    if suite.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        input_spectrum(model, x, 3, target, method=method)
        peak = torch.cuda.max_memory_allocated() - before
    times = alternate(
        {
            "checked": lambda: input_spectrum(model, x, 3, target, method=method),
            "unchecked": lambda: input_spectrum(model, x, 3, target, method=method, check=False),
            "gradient": gradient_of(model, x),
        },
        repeats=2,
        warm=False,
    )
    checked, unchecked = min(times["checked"]), min(times["unchecked"])
    gradient = min(seconds(gradient_of(model, x)) for _ in range(5))
    return {
        "shape": list(x.shape),
        "seconds": round(checked, 4),
        "gradients": round(checked / gradient, 1),
        "share_of_checking": round(1 - unchecked / checked, 3),
        "num_matvecs": spectrum.cost.num_matvecs,
        "peak_bytes": peak,
        "valid": bool(spectrum.valid.all()),
        "converged": bool(spectrum.converged.all()),
        "finite_difference_error": float(spectrum.finite_difference_error.max()),
    }


def eigendecompositions(suite: Suite) -> dict[str, Any]:
    """Seconds of ``eigh`` with vectors, float32, on this device and on the CPU: one matrix and eight at once."""
    rows = []
    for size in suite.sizes.eigh:
        for number in (1, 8):
            if number * size**3 > 3e10:
                continue
            torch.manual_seed(0)
            a = torch.randn(number, size, size)
            a = a + a.mT
            there = a.to(suite.device)
            works = {"device": partial(torch.linalg.eigh, there), "cpu": partial(torch.linalg.eigh, a)}
            times = alternate(works, repeats=3)
            found = {name: round(statistics.median(spent), 6) for name, spent in times.items()}
            rows.append({"D": size, "matrices": number, **found})
    return {"rows": rows}
