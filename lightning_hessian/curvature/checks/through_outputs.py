"""The check for piecewise linear networks, whose kinks leave no room for second differences of the whole function."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import attempted, in_groups
from lightning_hessian.curvature.checks.certificate import OUTCOMES, Certificate, compare
from lightning_hessian.curvature.checks.differences import ROUNDING
from lightning_hessian.curvature.checks.prediction import Prediction
from lightning_hessian.curvature.checks.step_dependence import MARGIN, STEADY
from lightning_hessian.curvature.target_batch import TargetBatch

POINTS = (-10.0, -1.0, 0.0, 1.0, 10.0)  # of the values, in steps h
MORE_POINTS = (-100.0, -0.1, 0.1, 100.0)  # where the outputs look curved
VISIBLE = 1e-2  # of the spectral norm: less curvature of the outputs does not matter


def compare_through_outputs(
    batch: TargetBatch, prediction: Prediction, group_size: int, step: Tensor
) -> Certificate | None:
    """Compares JᵀAJ with values: first differences of the outputs, and second differences of the target of outputs.

    With z the outputs, and dz = (z(x + h w) − z(x − h w)) / 2h measured,

        wᵀJᵀAJw    against    second differences of s ↦ τ(z(x) + s·dz),

    which need no small step and no network. That the outputs are linear around x was seen by exact zeros of their
    second derivatives; they are contradicted where second differences of the outputs are the same at four lengths of
    the step. (Those across kinks are not.)

    Args:
        batch: as it was differentiated.
        prediction: of the same samples.
        group_size: samples whose values are computed at a time.
        step: ``[N]``, h.

    Returns:
        As ``compare``; None where there are no finite values in float64.

    Cost: 5 values per sample, 9 where outputs look curved.
    """
    exact = attempted(lambda: batch.to(torch.float64))
    if exact is None:
        return None
    z = attempted(lambda: _outputs(exact, prediction.direction, step, POINTS, group_size))
    if z is None or not z.isfinite().all():
        return None
    h = step.to(z).reshape(-1, 1)
    change = (z[:, 3] - z[:, 1]) / (2 * h)
    size = change.norm(dim=1, keepdim=True)
    size = size.where(size > 0, 1)
    of_outputs = TargetBatch(lambda z: z, exact.target, z[:, 2], exact.classes)
    found = compare(
        of_outputs,
        Prediction(
            direction=change / size,
            slope=prediction.slope / size.to(prediction.slope),
            curvature=prediction.curvature / size.to(prediction.slope) ** 2,
            gradient_norm=prediction.gradient_norm / size.to(prediction.slope),
            spectral_norm=prediction.spectral_norm / size.to(prediction.slope) ** 2,
            share=prediction.share,
        ),
        len(z),
        direction_error=_error_of_kinks(z, change, h),
    )
    differences = _SecondDifferences(z[:, 2], _slopes(of_outputs))
    curved = differences.looks_curved(prediction, z[:, 0], z[:, 4], 10 * h)
    curved &= differences.same(z[:, 0], z[:, 4], 10 * h, z[:, 1], z[:, 3], h)
    kink = differences.has_kink(prediction, z, h)
    found = replace(found, outcome=found.outcome.masked_fill(kink, OUTCOMES.index("kink")))
    which = curved.any(dim=1).nonzero().flatten()
    if len(which):
        few, h = differences.select(which), h[which]
        of_few = exact.select(which), prediction.direction[which], step[which]
        more = attempted(lambda: _outputs(*of_few, MORE_POINTS, group_size))
        if more is None or not more.isfinite().all():
            return None
        settled = few.same(more[:, 0], more[:, 3], 100 * h, z[which, 0], z[which, 4], 10 * h)
        settled &= few.same(z[which, 1], z[which, 3], h, more[:, 1], more[:, 2], 0.1 * h)
        contradicted = torch.zeros_like(curved).index_copy(0, which, settled & curved[which])
        found = replace(found, outcome=found.outcome.masked_fill(contradicted, OUTCOMES.index("contradicted")))
    return replace(found, step=step)


def _error_of_kinks(z: Tensor, change: Tensor, h: Tensor) -> Tensor:
    """``[N]``, how far the kinks within a step move dz, relative to it, from what they do within ten steps.

    They are crossed in proportion to the step, and those of many units add up like random numbers.
    """
    farther = (z[:, 4] - z[:, 0]) / (20 * h)
    size = change.norm(dim=1)
    return (farther - change).norm(dim=1) / size.where(size > 0, 1) / 10**0.5


def _outputs(batch: TargetBatch, direction: Tensor, step: Tensor, points: tuple[float, ...], group_size: int) -> Tensor:
    """Outputs ``[N, points, C]`` at x + j h w."""
    which = torch.arange(batch.num_samples, device=batch.x.device).repeat_interleave(len(points))
    shift = (torch.tensor(points).to(batch.x) * step.to(batch.x).unsqueeze(1)).reshape(-1, 1)

    def work(rows: slice) -> Tensor:
        few = batch.select(which[rows])  # copies, so that x may be moved in place
        few.x.add_((direction[which[rows]].to(few.x) * shift[rows]).reshape(few.x.shape))
        with torch.no_grad():
            return few.outputs(few.x).to(torch.float64)

    values = [found for _, found in in_groups(len(which), len(points) * group_size, work)]
    return torch.cat(values).reshape(batch.num_samples, len(points), -1)


def _slopes(of_outputs: TargetBatch) -> Tensor:
    """∂τ/∂z, ``[N, K, C]``."""
    z = of_outputs.x.detach().requires_grad_()
    values = of_outputs.values(z)
    rows = [torch.autograd.grad(values[:, k].sum(), z, retain_graph=True)[0] for k in range(values.shape[1])]
    return torch.stack(rows, dim=1)


@dataclass(frozen=True)
class _SecondDifferences:
    """Of the outputs z ``[N, C]``, weighted with the slopes ``[N, K, C]`` of the targets."""

    z: Tensor
    slopes: Tensor

    def select(self, samples: Tensor) -> _SecondDifferences:
        return _SecondDifferences(self.z[samples], self.slopes[samples])

    def at(self, below: Tensor, above: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Σ ∂τ/∂z Δ²z/h² ``[N, K]``, and what rounding may leave of it."""
        second = ((above - 2 * self.z + below) / h**2).unsqueeze(1)
        rounding = 4 * ROUNDING * torch.finfo(self.z.dtype).eps * self.z.abs() / h**2
        return (self.slopes * second).sum(-1), (self.slopes.abs() * rounding.unsqueeze(1)).sum(-1)

    def looks_curved(self, prediction: Prediction, below: Tensor, above: Tensor, h: Tensor) -> Tensor:
        """Where second differences of the outputs would matter to the Hessian, and are more than rounding."""
        second, rounding = self.at(below, above, h)
        return (second.abs() > VISIBLE * prediction.spectral_norm.to(second)) & (second.abs() > MARGIN * rounding)

    def has_kink(self, prediction: Prediction, z: Tensor, h: Tensor) -> Tensor:
        """Where slopes to both sides differ, from outputs at all ``POINTS``: autograd may give their mean."""
        second, rounding = self.at(z[:, 1], z[:, 3], h)
        kink, farther = second * h, self.at(z[:, 0], z[:, 4], 10 * h)[0] * 10 * h
        visible = kink.abs() > VISIBLE * prediction.gradient_norm.to(kink) + MARGIN * rounding * h
        return visible & ((kink - farther).abs() <= STEADY * kink.abs())

    def same(self, below: Tensor, above: Tensor, h: Tensor, nearer: Tensor, other: Tensor, shorter: Tensor) -> Tensor:
        """Where second differences at two steps agree, up to rounding."""
        second, _ = self.at(below, above, h)
        at_shorter, rounding = self.at(nearer, other, shorter)
        return (second - at_shorter).abs() <= STEADY * second.abs() + MARGIN * rounding
