"""How often the truth lies within 1, 2 and 3 standard errors of an estimate, over many seeds, beside Student's t."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor, nn

from benchmarks.common import save
from benchmarks.models import frozen, problems_of
from lightning_hessian import input_spectrum
from lightning_hessian.curvature.algorithms.hutchinson import NUM_VECTORS, estimate, estimate_norm, random_products
from lightning_hessian.curvature.algorithms.krylov import KnownProducts
from lightning_hessian.curvature.algorithms.lanczos import lanczos
from lightning_hessian.curvature.algorithms.quadrature import density
from lightning_hessian.curvature.methods.lanczos import lanczos_decomposition
from lightning_hessian.curvature.operators.autodiff import gradients
from lightning_hessian.curvature.operators.hessian import MatrixOperator
from lightning_hessian.curvature.options import Options
from lightning_hessian.curvature.spectrum import ESTIMATED

SEEDS = 1000
DENSITY_SEEDS = 500
D, MATVECS, STEPS, STARTS = 60, 20, 25, 10
SPECTRA = {
    "even": torch.linspace(-0.3, 0.7, D),
    "geometric, both signs": torch.tensor([(-1.0) ** i * 0.9**i for i in range(D)]),
    "three outliers": torch.cat([torch.tensor([30.0, -20.0, 10.0]), torch.linspace(-1, 1, D - 3)]),
}


class Coverage:
    """Shares of cases in which the truth was within 1, 2 and 3 standard errors."""

    def __init__(self, degrees: int) -> None:
        self.nominal = [round(float(2 * student.cdf(k, degrees) - 1), 4) for k in (1, 2, 3)]
        self._sums: dict[str, Tensor] = {}
        self._seeds: dict[str, int] = {}

    def add(self, name: str, found: Tensor, error: Tensor, truth: Tensor) -> None:
        """One seed's estimates ``[P, ...]``, with their standard errors and the truth."""
        away = (found - truth).abs()
        inside = torch.stack([(away <= k * error).double().reshape(len(away), -1).mean(1) for k in (1, 2, 3)], dim=1)
        self._sums[name] = self._sums.get(name, torch.zeros_like(inside)) + inside
        self._seeds[name] = self._seeds.get(name, 0) + 1

    def report(self, cases: list[str]) -> dict[str, Any]:
        """The shares by quantity and case."""
        shares = {name: (total / self._seeds[name]).tolist() for name, total in self._sums.items()}
        found = {
            name: dict(zip(cases, [[round(share, 4) for share in row] for row in rows], strict=True))
            for name, rows in shares.items()
        }
        return {"nominal": self.nominal, "seeds": max(self._seeds.values()), **found}


def prescribed() -> tuple[MatrixOperator, Tensor]:
    """One matrix with random eigenvectors for each of ``SPECTRA``, and the spectra ``[P, D]``."""
    spectra = torch.stack(list(SPECTRA.values())).double()
    q = torch.linalg.qr(torch.randn(len(spectra), D, D, dtype=torch.float64)).Q
    return MatrixOperator(q @ torch.diag_embed(spectra) @ q.mT), spectra


def of_estimates(operator: MatrixOperator) -> dict[str, Any]:
    """Trace, Frobenius norm and diagonal outside of a Krylov space of 20 dimensions out of 60, and the norm alone."""
    coverage, matrices = Coverage(NUM_VECTORS - 1), operator.matrices
    diagonal, norm = matrices.diagonal(dim1=1, dim2=2), torch.linalg.matrix_norm(matrices)
    nothing = KnownProducts(matrices[:, :0], matrices[:, :0])
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        known = lanczos(operator, 10, generator=generator, max_matvecs=MATVECS).known
        found = estimate(known, random_products(operator, known, generator=generator))
        outside = random_products(operator, nothing, generator=generator).products
        alone = estimate_norm(nothing, outside)
        coverage.add("trace", found.trace, found.trace_error, diagonal.sum(1))
        coverage.add("frobenius_norm", found.frobenius_norm, found.frobenius_norm_error, norm)
        coverage.add("diagonal", found.diagonal, found.diagonal_error, diagonal)
        coverage.add("norm with nothing known", alone.value, alone.error, norm)
    return coverage.report(list(SPECTRA))


def of_density(operator: MatrixOperator, spectra: Tensor) -> dict[str, Any]:
    """Bands of the cumulative and of the smoothed density at nine points across the bulk, for several widths."""
    coverage = Coverage(STARTS - 1)
    at = torch.linspace(-0.25, 0.65, 9, dtype=torch.float64)
    distance = spectra.unsqueeze(-1) - at
    for seed in range(DENSITY_SEEDS):
        rule = density(operator, STEPS, STARTS, generator=torch.Generator().manual_seed(seed))
        coverage.add("cumulative", *rule.cumulative(at), (distance <= 0).double().mean(1))
        for width in (0.02, 0.05, 0.1, 0.2):
            bumps = torch.exp(-(distance / width).square() / 2) / (width * (2 * torch.pi) ** 0.5)
            coverage.add(f"smoothed, width {width}", *rule.smoothed(at, width), bumps.mean(1))
    return {"steps": STEPS, "starting vectors": STARTS, **coverage.report(list(SPECTRA))}


def of_network(num_outputs: int) -> dict[str, Any]:
    """Everything that the method ``lanczos`` estimates, on a GELU network whose whole Hessians are known.

    With 5 outputs the norm of the Gauss-Newton term is exact, with 100 it is estimated too.
    """
    layers = [nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, num_outputs)]
    net, x, classes = frozen(nn.Sequential(*layers).double()), torch.randn(2, 64, dtype=torch.float64), [0, 3]
    whole = input_spectrum(net, x, classes, "prob", method="dense")
    batch = problems_of(net, x, classes, "prob")
    coverage = Coverage(NUM_VECTORS - 1)
    for seed in range(SEEDS // 4):
        found = lanczos_decomposition(batch, gradients(batch), Options(seed=seed)).decomposition
        for name in ESTIMATED:
            value, error, truth = getattr(found, name), getattr(found, f"{name}_error"), getattr(whole, name)
            coverage.add(name, *(t.flatten(0, 1) for t in (value, error + 1e-12 * truth.abs(), truth)))
        spectrum = replace(whole, **vars(found))
        share, error = spectrum.gauss_newton_share, spectrum.gauss_newton_share_error
        coverage.add("gauss_newton_share", *(t.flatten(0, 1) for t in (share, error, whole.gauss_newton_share)))
    return coverage.report([f"sample {n}, class {k}" for n in range(2) for k in classes])


def main() -> None:
    """A minute and a half on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    operator, spectra = prescribed()
    report: dict[str, Any] = {}
    for name, work in {
        "estimates, prescribed spectra": lambda: of_estimates(operator),
        "density, prescribed spectra": lambda: of_density(operator, spectra),
        "lanczos on a network, 5 outputs": lambda: of_network(5),
        "lanczos on a network, 100 outputs": lambda: of_network(100),
    }.items():
        report[name] = work()
        print("statistics:", name, report[name], flush=True)
    save("statistics", report)
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
