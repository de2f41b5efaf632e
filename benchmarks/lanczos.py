"""Ten eigenvalues of 24 input-Hessians of a small ViT at once, against solvers that take one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from benchmarks.common import alternate, check_equal, compare, cost, save
from benchmarks.models import Product, ViT, frozen, problems_of, retained_product, usual_product
from lightning_hessian import input_spectrum
from lightning_hessian.curvature.algorithms.krylov import KrylovBasis
from lightning_hessian.curvature.algorithms.lanczos import RitzPairs, lanczos
from lightning_hessian.curvature.operators.autodiff import gradients
from lightning_hessian.curvature.operators.hessian import HessianOperator

try:  # optional: pip install hessian-eigenthings
    from hessian_eigenthings import LambdaOperator
    from hessian_eigenthings import lanczos as their_lanczos
except ImportError:
    LambdaOperator = None

CLASSES, COUNT, D = [0, 3, 7], 10, 3072


def scipy_loop(products: Callable[[], list[Product]]) -> Tensor:
    """``eigsh``, problem after problem."""
    found = []
    for product in products():

        def matvec(v: np.ndarray, product: Product = product) -> np.ndarray:
            return product(torch.from_numpy(v.reshape(-1).astype(np.float32))).numpy()

        operator = LinearOperator((D, D), matvec=matvec, dtype=np.float32)
        start = torch.randn(D, generator=torch.Generator().manual_seed(0)).numpy()
        found.append(eigsh(operator, COUNT, which="LM", tol=1e-3, v0=start)[0])
    return torch.from_numpy(np.stack(found))


def eigenthings_loop(products: Callable[[], list[Product]], steps: int) -> tuple[Tensor, bool]:
    """hessian-eigenthings, problem after problem, and whether all pairs converged in ``steps``."""
    results = [
        their_lanczos(LambdaOperator(product, D), k=COUNT, max_iter=steps, tol=1e-3, reorthogonalize=True, seed=0)
        for product in products()
    ]
    values = torch.stack([result.eigenvalues for result in results])
    return values, all(bool(result.converged.all()) for result in results)


def iteration_cost(operator: HessianOperator) -> dict[str, Any]:
    """Mean of 40 Lanczos iterations, orthogonalization included, against one gradient of the same 24 problems."""
    times = alternate(
        {
            "iterations": lambda: [basis.grow() for basis in [_basis(operator)] for _ in range(40)],
            "products": lambda: [operator.matvec(operator.batch.x.flatten(1)) for _ in range(40)],
            "gradients": lambda: [gradients(operator.batch) for _ in range(40)],
        },
        repeats=5,
    )
    per_call = {name: [t / 40 for t in spent] for name, spent in times.items()}
    return {
        "iteration": cost(per_call["iterations"], per_call["gradients"], wanted=2.0),
        "product alone": cost(per_call["products"], per_call["gradients"], wanted=2.0),
    }


def _basis(operator: HessianOperator) -> KrylovBasis:
    return KrylovBasis(operator, 1, 41, torch.Generator().manual_seed(0))


def _sizes(eigenvalues: Tensor) -> Tensor:
    """|λ|, descending: of +λ and −λ that tie for the last place, either may have been taken."""
    return eigenvalues.abs().sort(1, descending=True).values


def main() -> None:
    """8 samples × 3 classes, D = 3072."""
    torch.manual_seed(0)
    model, x = frozen(ViT(3, 32, 4)), torch.randn(8, 3, 32, 32)
    batch = problems_of(model, x, CLASSES)
    pairs = [(x[n : n + 1], k) for n in range(len(x)) for k in CLASSES]

    def usual() -> list[Product]:
        return [usual_product(model, *pair) for pair in pairs]

    def retained() -> list[Product]:
        return [retained_product(model, *pair) for pair in pairs]

    def ours(tolerance: float = 1e-3) -> RitzPairs:
        generator = torch.Generator().manual_seed(0)
        operator = HessianOperator(batch)
        return lanczos(operator, COUNT, generator=generator, which="largest_magnitude", tolerance=tolerance)

    found, expected = ours(), scipy_loop(usual)
    if not found.converged.all():
        raise AssertionError("Not all of our pairs have converged.")
    magnitudes = found.eigenvalues.abs()
    strict = 1e-3 * float((magnitudes.amin(1) / magnitudes.amax(1)).min())  # at most 1e-3 of every single |λ|
    wrong = (_sizes(found.eigenvalues) - _sizes(expected)).abs().amax(1) > 2e-3 * _sizes(expected)[:, 0]
    report: dict[str, Any] = {
        "products per problem": found.num_matvecs,
        "problems in which an eigenvalue was missed at 1e-3": int(wrong.sum()),  # converged pairs, not the ten largest
        "strict tolerance": strict,
        "difference from scipy, strict": check_equal(_sizes(ours(strict).eigenvalues), _sizes(expected), 2e-3),
    }
    works: dict[str, Callable[[], object]] = {
        "lanczos": ours,
        "lanczos, as strict as scipy": lambda: ours(strict),
        "scipy eigsh, usual HVP": lambda: scipy_loop(usual),
        "scipy eigsh, retained graph": lambda: scipy_loop(retained),
        "input_spectrum(method='lanczos')": lambda: input_spectrum(model, x, CLASSES, method="lanczos"),
    }
    if LambdaOperator is not None:
        few = [usual_product(model, *pair) for pair in pairs[:2]]
        steps = next(s for s in range(30, 400, 10) if eigenthings_loop(lambda: few, s)[1])
        report["hessian-eigenthings"] = {"steps it needs to converge on the first two problems": steps}
        report["hessian-eigenthings"]["difference"] = check_equal(
            _sizes(eigenthings_loop(usual, steps)[0]), _sizes(expected), 2e-3
        )
        works["hessian-eigenthings, usual HVP"] = lambda: eigenthings_loop(usual, steps)
    report["one iteration against one gradient"] = iteration_cost(HessianOperator(batch))
    print("lanczos:", report, flush=True)
    save("lanczos", report)  # what is there so far
    times = alternate(works, warm=False)
    peers = [name for name in works if "HVP" in name or "retained" in name]
    mine = [name for name in works if name not in peers]
    report["rows"] = [compare(times, our, peer, wanted=1.5) for peer in peers for our in mine]
    for row in report["rows"]:
        print("lanczos:", row["ours"], "|", row["against"], row["median"], row["worst"], flush=True)
    save("lanczos", report)


if __name__ == "__main__":
    main()
