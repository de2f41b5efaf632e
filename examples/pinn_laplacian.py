"""Are the second derivatives of a PINN as accurate as its values? Its Hessians against a known solution.

A physics-informed network learns the Poisson problem Δu = f on the unit square, u = 0 on its edge, with
f = -5π² sin(πx) sin(2πy), from f alone. The solution is u = sin(πx) sin(2πy). Then the Hessian of the network is
measured at 4,096 points that it was not trained on: N is large and D is 2.

    python examples/pinn_laplacian.py

You will see that the trace of the Hessian (the Laplacian) agrees with f to half a percent, and so does the mixed
derivative, which the training loss does not contain; both are several times less accurate than the values. The worst
points are near the edge, where there are few training points.
"""

import argparse
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_hessian import input_hessian

PI = math.pi


def solution(x: Tensor) -> Tensor:
    """The solution u at points ``[N, 2]``."""
    return torch.sin(PI * x[:, 0]) * torch.sin(2 * PI * x[:, 1])


def solution_hessian(x: Tensor) -> Tensor:
    """Its Hessian ``[N, 2, 2]``; the trace is f."""
    mixed = 2 * PI**2 * torch.cos(PI * x[:, 0]) * torch.cos(2 * PI * x[:, 1])
    u = solution(x)
    return torch.stack([-(PI**2) * u, mixed, mixed, -4 * PI**2 * u], dim=1).unflatten(1, (2, 2))


class Pinn(nn.Module):
    """A small network times a function that is zero on the edge, which it therefore need not learn."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Values ``[N]``."""
        return (16 * x * (1 - x)).prod(1) * self.net(x).squeeze(1)


def residual(model: nn.Module, x: Tensor) -> Tensor:
    """Δu - f at each point. Weights learn from it, so it needs a graph: torch, not the functions of this package."""
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    rows = [torch.autograd.grad(gradient[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
    return rows[0] + rows[1] + 5 * PI**2 * solution(x.detach())


def trained() -> Pinn:
    """A network that solves the problem at 800 random points."""
    torch.manual_seed(0)
    model = Pinn().double()
    points = torch.rand(800, 2, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=600, history_size=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = residual(model, points).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


@dataclass(frozen=True)
class Comparison:
    """Points ``[N, 2]``, and errors there: of u ``[N]`` and of its Hessian ``[N, 2, 2]``."""

    points: Tensor
    value_error: Tensor
    hessian: Tensor
    hessian_error: Tensor
    seconds: float


def compare(num_per_side: int = 64) -> Comparison:
    """Trains, and measures at the centers of 64x64 squares."""
    model = trained()
    middles = (torch.arange(num_per_side, dtype=torch.float64) + 0.5) / num_per_side
    points = torch.cartesian_prod(middles, middles)
    started = time.perf_counter()
    hessian = input_hessian(model, points, classes=0)[:, 0]  # [N, 1, 2, 2]: the only output is "class" 0
    seconds = time.perf_counter() - started
    with torch.no_grad():
        value_error = model(points) - solution(points)
    return Comparison(points, value_error, hessian, hessian - solution_hessian(points), seconds)


def trace(hessians: Tensor) -> Tensor:
    """Laplacians ``[N]`` of Hessians ``[N, 2, 2]``."""
    return hessians.diagonal(dim1=1, dim2=2).sum(1)


def main() -> None:
    """Prints relative errors of values, Laplacians and Hessians."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = compare()
    u, hessian = solution(found.points), solution_hessian(found.points)
    print(f"{len(found.points):,} Hessians in {found.seconds:.2f} s. Relative errors (root mean square):")
    for name, error, exact in (
        ("u", found.value_error, u),
        ("Laplacian, by the trace", trace(found.hessian_error), trace(hessian)),
        ("mixed derivative", found.hessian_error[:, 0, 1], hessian[:, 0, 1]),
    ):
        print(f"  {name:24}{error.norm() / exact.norm():.1e}")
    worst = found.points[trace(found.hessian_error).abs().argmax()]
    print(f"The Laplacian is worst at ({worst[0]:.2f}, {worst[1]:.2f})")


if __name__ == "__main__":
    main()
