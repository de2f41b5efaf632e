"""Complete spectra of a residual ReLU network on 3×32×32: C gradients against whole matrices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import hessian, vmap

from benchmarks.common import alternate, check_equal, compare, save, seconds
from benchmarks.models import problems_of, residual_relu
from lightning_hessian import input_spectrum
from lightning_hessian.curvature.methods.low_rank import low_rank_decomposition
from lightning_hessian.curvature.operators.autodiff import gradients

CLASSES = [0, 3, 7]
WANTED = {"low_rank_decomposition": 1000, "input_spectrum, end to end": 500}  # times the speed of the peer


def main() -> None:
    """4 samples × 3 classes, target prob, all 3072 eigenvalues of each; the peer takes long and runs once."""
    torch.manual_seed(0)
    model, x = residual_relu(), torch.randn(4, 3, 32, 32)
    batch = problems_of(model, x, CLASSES, "prob")

    def one(sample: Tensor) -> Tensor:
        return model(sample.unsqueeze(0)).softmax(1)[0, CLASSES]

    def peer() -> Tensor:
        matrices = vmap(hessian(one), chunk_size=1)(x).reshape(4, len(CLASSES), 3072, 3072)
        return torch.linalg.eigvalsh(matrices)

    works = {
        "low_rank_decomposition": lambda: low_rank_decomposition(batch, gradients(batch), 10, torch.Generator()),
        "input_spectrum, end to end": lambda: input_spectrum(model, x, CLASSES, "prob"),
    }
    found: list[Tensor] = []
    peer_seconds = seconds(lambda: found.append(peer()))
    spectrum = input_spectrum(model, x, CLASSES, "prob")
    if spectrum.method != "low_rank":
        raise AssertionError(f"Measured by {spectrum.method}: {spectrum.reason}")
    listed = spectrum.eigenvalues
    zeros = listed.new_zeros(*listed.shape[:2], 3072 - listed.shape[2])
    ours = torch.cat([listed, zeros], dim=2).sort(dim=2).values
    difference = check_equal(ours, found[0], 1e-4)
    times = alternate(works, repeats=7)
    times["vmap(hessian) + eigvalsh"] = [peer_seconds] * 7
    rows = [compare(times, name, "vmap(hessian) + eigvalsh", wanted=WANTED[name]) for name in works]
    for row in rows:
        print("low_rank:", row, flush=True)
    save("low_rank", {"difference": difference, "peer_rounds": 1, "rows": rows})


if __name__ == "__main__":
    main()
