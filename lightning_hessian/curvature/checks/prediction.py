"""What results say along one direction of every sample, to be compared with differences of values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import combine

# Relative, of derivatives in each precision: the smaller, the smaller a mistake may be that does not pass. Rounding
# leaves less; where the forward computes in float32 under float64 inputs, the noise of the values says so.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-5}
LARGEST_ERROR = 1e-2  # relative, whatever the noise
LARGE = 256  # D from which one matrix after another is faster than a batch of them: on a CPU, five times at 784
POWER_STEPS = 2  # towards the top eigenvector of a whole matrix, which the direction only has to lean to


@dataclass(frozen=True)
class Prediction:
    """What autograd says along one direction w of every sample, to be compared with differences of values.

    Attributes:
        direction: w, ``[N, D]``, unit vectors.
        slope: gᵀw, ``[N, K]``.
        curvature: wᵀHw, ``[N, K]``.
        gradient_norm: ‖g‖, ``[N, K]``, which errors of the slope are relative to.
        spectral_norm: max |λ|, ``[N, K]``, which errors of the curvature are relative to.
        slope_only: whether only the slope is to be compared; there is no curvature then.
        share: of a class's own vectors in w², against that with one class: w sees that much of an error.
    """

    direction: Tensor
    slope: Tensor
    curvature: Tensor
    gradient_norm: Tensor
    spectral_norm: Tensor
    slope_only: bool = False
    share: float = 1.0

    def select(self, samples: Tensor) -> Prediction:
        """That of some samples."""
        return combine([self], lambda tensors: tensors[0][samples])

    def to(self, like: Tensor) -> Prediction:
        """The same in the precision and on the device of ``like``."""
        return combine([self], lambda tensors: tensors[0].to(like))

    @property
    def tolerance(self) -> float:
        """How far derivatives in this precision may be off."""
        return TOLERANCE[self.slope.dtype]


def predict(
    gradient: Tensor,
    top: Tensor,
    spectral_norm: Tensor,
    curvature: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    random: Tensor | None = None,
) -> Prediction:
    """What the results of a method say along one direction of every sample.

    The direction is the unit vector of ±v ± g ± r, where v and g are the unit top eigenvectors and gradients of all
    classes, and r is a random unit vector: along r alone, wᵀHw ≈ tr H / D drowns in noise; without r, curvature that
    the results lack may lie across w. Each is added with the sign with which it does not oppose those before it: the
    gradients of two classes may be opposite.

    Args:
        gradient: g, ``[N, K, D]``.
        top: the eigenvectors of largest magnitude, ``[N, K, D]``.
        spectral_norm: max |λ|, ``[N, K]``.
        curvature: w ``[N, D]`` to wᵀHw ``[N, K]``, from the numbers that are reported.
        generator: of r, which is the same for every sample.
        random: r ``[D]``, where its product with H is known already.
    """
    if random is None:
        random = torch.randn(gradient.shape[-1], generator=generator, dtype=torch.float64).to(gradient)
    w = torch.zeros_like(gradient[:, 0])
    gradients, eigenvectors = (unit(vectors.nan_to_num(0, 0, 0)).unbind(1) for vectors in (gradient, top))
    for vectors in (*gradients, *eigenvectors, unit(random).expand_as(w)):
        w = w + torch.where((w * vectors).sum(-1, keepdim=True) < 0, -1, 1) * vectors
    w = unit(w)
    return Prediction(
        direction=w,
        slope=(gradient @ w.unsqueeze(-1)).squeeze(-1),
        curvature=curvature(w),
        gradient_norm=norm(gradient),
        spectral_norm=spectral_norm,
        share=3 / (2 * gradient.shape[1] + 1),
    )


def predict_slope(gradient: Tensor, generator: torch.Generator) -> Prediction:
    """What gradients ``[N, K, D]`` say along one direction of every sample, without a second derivative."""
    nothing = torch.full_like(gradient[..., 0], torch.nan)
    zero = torch.zeros_like(nothing)
    found = predict(gradient, torch.zeros_like(gradient), zero, lambda w: nothing, generator)
    return replace(found, slope_only=True)


def predict_along(v: Tensor, gradient: Tensor, product: Tensor) -> Prediction:
    """What gradients and HVPs say along ``v [N, D]``; gradients and products H v are ``[N, K, D]``."""
    length = norm(v).reshape(-1, 1, 1)
    w, product = unit(v).unsqueeze(1), product / length.where(length > 0, 1)
    return Prediction(
        direction=w[:, 0],
        slope=(gradient * w).sum(-1),
        curvature=(product * w).sum(-1),
        gradient_norm=norm(gradient),
        spectral_norm=norm(product),
    )


def predict_of_matrices(gradient: Tensor, matrices: Tensor, generator: torch.Generator) -> Prediction:
    """What gradients ``[N, K, D]`` and whole Hessians ``[N, K, D, D]`` say; the top eigenvector by power iteration."""
    top = torch.randn(gradient.shape[-1], generator=generator, dtype=torch.float64).to(gradient)
    top = unit(top.expand_as(gradient))
    size = torch.zeros_like(gradient[..., 0])
    for _ in range(POWER_STEPS):
        product = products(matrices, top)
        size, top = norm(product), unit(product)
    return predict(gradient, top, size, lambda w: quadratic_form(matrices, w), generator)


def products(matrices: Tensor, v: Tensor) -> Tensor:
    """H v ``[N, K, D]`` of ``[N, K, D, D]`` and ``v [N, K, D]``."""
    if v.shape[-1] < LARGE:
        return (matrices @ v.unsqueeze(-1)).squeeze(-1)
    pairs = zip(matrices.flatten(0, 1), v.flatten(0, 1), strict=True)
    return torch.stack([matrix @ vector for matrix, vector in pairs]).view(v.shape)


def quadratic_form(matrices: Tensor, w: Tensor) -> Tensor:
    """wᵀHw ``[N, K]`` of ``[N, K, D, D]`` and ``w [N, D]``."""
    each = w.unsqueeze(1).expand(matrices.shape[:3])
    return (products(matrices, each) * each).sum(-1)


def norm(v: Tensor) -> Tensor:
    """Norms over the last dimension, whose squares may be beyond the range of the precision."""
    return torch.linalg.vector_norm(_scaled(v), dim=-1) * v.abs().amax(dim=-1)


def unit(v: Tensor) -> Tensor:
    """Vectors divided by their norms; zeros stay zeros."""
    scaled = _scaled(v)
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / length.where(length > 0, 1)


def _scaled(v: Tensor) -> Tensor:
    """Vectors divided by their largest magnitude."""
    largest = v.abs().amax(dim=-1, keepdim=True)
    return v / largest.where(largest > 0, 1)
