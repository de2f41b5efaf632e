"""What results say along one direction of every sample, to be compared with differences of values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

# Relative, of derivatives in each precision: the smaller, the smaller a mistake may be that does not pass. Rounding
# leaves less; where the forward computes in float32 under float64 inputs, the noise of the values says so.
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-5}
LARGE = 256  # D from which one matrix after another is faster than a batch of them: on a CPU, five times at 784
POWER_STEPS = 2  # towards the top eigenvector of a whole matrix, which the direction only has to lean to


@dataclass(frozen=True)
class Prediction:
    """What autograd says along one direction w of every sample, to be compared with differences of values.

    Attributes:
        direction: w, ``[N, D]``, unit vectors.
        slope: gᵀw, ``[N, K]``.
        curvature: wᵀHw, ``[N, K]``; NaN where only the slope is to be compared.
        gradient_norm: ‖g‖, ``[N, K]``, which errors of the slope are relative to.
        spectral_norm: max |λ|, ``[N, K]``, which errors of the curvature are relative to.
    """

    direction: Tensor
    slope: Tensor
    curvature: Tensor
    gradient_norm: Tensor
    spectral_norm: Tensor

    def select(self, samples: Tensor) -> Prediction:
        """That of some samples."""
        return Prediction(*(getattr(self, field.name)[samples] for field in fields(self)))

    def to(self, like: Tensor) -> Prediction:
        """The same in the precision and on the device of ``like``."""
        return Prediction(*(getattr(self, field.name).to(like) for field in fields(self)))

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
    classes, with random signs, and r is a random unit vector: along r alone, wᵀHw ≈ tr H / D drowns in noise; without
    r, curvature that the results lack may lie across w.

    Args:
        gradient: g, ``[N, K, D]``.
        top: the eigenvectors of largest magnitude, ``[N, K, D]``.
        spectral_norm: max |λ|, ``[N, K]``.
        curvature: w ``[N, D]`` to wᵀHw ``[N, K]``, from the numbers that are reported.
        generator: of signs and r, which are the same for every sample.
        random: r ``[D]``, where its product with H is known already.
    """
    num_classes, num_inputs = gradient.shape[1:]
    signs = torch.randint(2, (num_classes, 1), generator=generator).to(gradient) * 2 - 1
    if random is None:
        random = torch.randn(num_inputs, generator=generator, dtype=torch.float64).to(gradient)
    gradient, top = gradient.nan_to_num(0, 0, 0), top.nan_to_num(0, 0, 0)
    aligned = torch.where((top * gradient).sum(-1, keepdim=True) < 0, -1, 1)
    known, random = (signs * (aligned * unit(top) + unit(gradient))).sum(dim=1), unit(random)
    # Never against each other: with one input, they would cancel.
    w = unit(known + torch.where((known @ random).unsqueeze(-1) < 0, -1, 1) * random)
    return Prediction(
        direction=w,
        slope=(gradient @ w.unsqueeze(-1)).squeeze(-1),
        curvature=curvature(w),
        gradient_norm=gradient.norm(dim=-1),
        spectral_norm=spectral_norm,
    )


def predict_slope(gradient: Tensor, generator: torch.Generator) -> Prediction:
    """What gradients ``[N, K, D]`` say along one direction of every sample, without a second derivative."""
    nothing = torch.full_like(gradient[..., 0], torch.nan)
    zero = torch.zeros_like(nothing)
    return predict(gradient, torch.zeros_like(gradient), zero, lambda w: nothing, generator)


def predict_along(v: Tensor, gradient: Tensor, product: Tensor) -> Prediction:
    """What gradients and HVPs say along ``v [N, D]``; gradients and products H v are ``[N, K, D]``."""
    norm = v.norm(dim=-1, keepdim=True)
    w, product = unit(v).unsqueeze(1), product / norm.where(norm > 0, 1).unsqueeze(1)
    return Prediction(
        direction=w[:, 0],
        slope=(gradient * w).sum(-1),
        curvature=(product * w).sum(-1),
        gradient_norm=gradient.norm(dim=-1),
        spectral_norm=product.norm(dim=-1),
    )


def predict_of_matrices(gradient: Tensor, matrices: Tensor, generator: torch.Generator) -> Prediction:
    """What gradients ``[N, K, D]`` and whole Hessians ``[N, K, D, D]`` say; the top eigenvector by power iteration."""
    top = torch.randn(gradient.shape[-1], generator=generator, dtype=torch.float64).to(gradient)
    top = unit(top.expand_as(gradient))
    norm = torch.zeros_like(gradient[..., 0])
    for _ in range(POWER_STEPS):
        product = products(matrices, top)
        norm, top = product.norm(dim=-1), unit(product)
    return predict(gradient, top, norm, lambda w: quadratic_form(matrices, w), generator)


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


def unit(v: Tensor) -> Tensor:
    """Vectors divided by their norms; zeros stay zeros."""
    norm = v.norm(dim=-1, keepdim=True)
    return v / norm.where(norm > 0, 1)
