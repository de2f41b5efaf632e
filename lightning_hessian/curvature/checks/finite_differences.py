"""The finite-difference check: are derivatives by autograd those of the function itself? In float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import in_groups
from lightning_hessian.curvature.operators.autodiff import ReverseOverReverse, gradients, random_vectors
from lightning_hessian.curvature.target_batch import TargetBatch

NUM_SAMPLES = 5  # ReLU kinks spoil single samples: the median over a few decides
STEP = 1e-7  # relative to 1 + ‖x‖; small, so that few of a large network's kinks are crossed
NOISE = 1e-2  # relative to the spread of the input's entries
TOLERANCE = 1e-2  # below the error of a wrong derivative, above that of rounding


def relative_errors(batch: TargetBatch, generator: torch.Generator, group_size: int) -> dict[str, float]:
    """How far derivatives along random directions are from central finite differences, for gradient and Hessian.

    The gradient is compared with differences of the values, the HVP with differences of the gradient: ``.detach()``
    may affect one and not the other. A difference quotient counts only where it stays the same at half the step,
    which it does not across the kinks of a ReLU network. Median over samples, each moved by a little noise: real
    images lie on kinks (see ``samples_on_kinks``), their neighbours do not.
    """
    batch = batch.repeat(-(-NUM_SAMPLES // batch.num_samples))
    noise = torch.randn(batch.x.shape, generator=generator, dtype=torch.float64).to(batch.x)
    batch = replace(batch, x=batch.x + NOISE * (batch.x.std(correction=0) + 1e-3) * noise)
    direction = random_vectors(batch, generator)[:, :1]  # one per sample, for all its classes

    def errors(samples: slice) -> tuple[_Errors, _Errors]:
        return _errors(batch.select(samples), direction[samples])

    of_gradient, of_hessian = zip(
        *(found for _, found in in_groups(batch.num_samples, group_size, errors)), strict=True
    )
    return {"gradient": _median(of_gradient), "Hessian": _median(of_hessian)}


@dataclass(frozen=True)
class _Errors:
    """The relative error at every sample ``[N]``, and whether its difference quotients are steady."""

    relative: Tensor
    steady: Tensor


def _errors(batch: TargetBatch, direction: Tensor) -> tuple[_Errors, _Errors]:
    """Those of gradient and Hessian."""
    here = ReverseOverReverse(batch)
    gradient, product = here.gradient(), here.hvp(direction.expand(batch.shape))
    with torch.no_grad():
        values = batch.values(batch.x).unsqueeze(-1)
    step = STEP * (1 + batch.x.flatten(1).norm(dim=1)).reshape(-1, 1, 1)
    wide, narrow = (_difference_quotients(batch, direction, h) for h in (step, step / 2))
    slope = (gradient * direction).sum(-1, keepdim=True)
    eps = torch.finfo(torch.float64).eps
    noise = 1000 * eps / step.squeeze(-1)
    return (
        _relative_error(slope, wide[0], narrow[0], noise * values.norm(dim=-1)),
        _relative_error(product, wide[1], narrow[1], noise * gradient.norm(dim=-1)),
    )


def _difference_quotients(batch: TargetBatch, direction: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences of the values ``[N, K, 1]`` and of the gradients ``[N, K, D]``."""
    shift = (step * direction)[:, 0].reshape(batch.x.shape)
    ends = [replace(batch, x=batch.x + shift), replace(batch, x=batch.x - shift)]
    with torch.no_grad():
        above, below = (end.values(end.x).unsqueeze(-1) for end in ends)
    ahead, behind = (gradients(end) for end in ends)
    return (above - below) / (2 * step), (ahead - behind) / (2 * step)


def _relative_error(derivative: Tensor, wide: Tensor, narrow: Tensor, noise: Tensor) -> _Errors:
    """The largest error over each sample's classes beyond ``noise``; steady: its two quotients agree."""
    size = torch.maximum(derivative.norm(dim=-1), narrow.norm(dim=-1)).clamp_min(1e-300)
    change = ((wide - narrow).norm(dim=-1) - noise).clamp_min(0) / size
    error = ((derivative - narrow).norm(dim=-1) - noise).clamp_min(0) / size
    return _Errors(error.amax(dim=1), (change <= TOLERANCE / 10).all(dim=1))


def _median(groups: Sequence[_Errors]) -> float:
    """Over the samples whose quotients are steady; 0 without any."""
    relative, steady = (torch.cat([getattr(group, name) for group in groups]) for name in ("relative", "steady"))
    return float(relative[steady].median()) if steady.any() else 0.0


def samples_on_kinks(batch: TargetBatch, generator: torch.Generator, group_size: int) -> int:
    """At how many samples the slopes ahead and behind along a random direction differ (float64)."""
    direction = random_vectors(batch, generator)[:, 0].reshape(batch.x.shape)
    step = STEP * 10 * (1 + batch.x.flatten(1).norm(dim=1, keepdim=True))
    shift = step.reshape(-1, *[1] * (batch.x.dim() - 1)) * direction

    def values(samples: slice) -> list[Tensor]:
        few = batch.select(samples)
        with torch.no_grad():
            return [few.values(few.x + sign * shift[samples]) for sign in (-1, 0, 1)]

    groups = [found for _, found in in_groups(batch.num_samples, group_size, values)]
    behind, here, ahead = (torch.cat(group) for group in zip(*groups, strict=True))
    left, right = (here - behind) / step, (ahead - here) / step
    noise = 1000 * torch.finfo(torch.float64).eps / step * here.abs()
    scale = torch.maximum(left.abs(), right.abs())
    kinked = ((left - right).abs() > noise + TOLERANCE * scale).any(dim=1)
    return int(kinked.sum())
