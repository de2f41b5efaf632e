"""How difference quotients change with the step: they settle, or grow at kinks and jumps."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from lightning_hessian.curvature.checks.differences import BOTH_SIDES, CURVATURE, THIRD, Differences, deviation
from lightning_hessian.curvature.checks.prediction import LARGEST_ERROR, Prediction

MARGIN = 4  # standard deviations by which noise may explain a difference
STEADY = 0.3  # relative change of a difference quotient from one step to the next, of one that has settled
SAME = 1e-2  # of a jump, which random noise does not repeat
EXPLAINS = 0.1  # of an error: less of a difference between both sides is no cause of it
APART = 1e4  # times the difference between both sides of a kink: a smaller error may be that of a third piece


def by_step(steps: list[Differences]) -> Differences:
    """All steps ``[S, N, K]``, sorted from the longest to the shortest; samples without values last."""
    every = Differences(*(torch.stack([getattr(d, f.name) for d in steps]) for f in fields(Differences)))
    order = every.step.nan_to_num(0).argsort(dim=0, descending=True)
    return at(every, order)


def pooled(steps: list[Differences]) -> list[Differences]:
    """The same, each with at least the noise of all shorter steps.

    Noise does not depend on the step, and a single fourth difference may show less of it; those of longer steps may
    show what the step is too long for.
    """

    def of_shorter(found: Differences) -> Tensor:
        return torch.stack([s.noise.where(s.step <= found.step, 0).nan_to_num(0) for s in steps]).amax(dim=0)

    return [_with_noise(found, of_shorter(found)) for found in steps]


def floored(steps: list[Differences]) -> list[Differences]:
    """The same, each with at least the noise that a step shares with a longer one, as ``pooled`` found.

    Values that were rounded inside of the forward differ by multiples of one quantum: at short steps, often not at all.
    """
    noise = by_step(steps).noise
    shared = noise[1:].where(noise[1:] >= (1 - SAME) * noise[:-1], 0).amax(dim=0)
    return [_with_noise(found, shared) for found in steps]


def _with_noise(found: Differences, least: Tensor) -> Differences:
    """The same with so much noise, ``[N, K]``, at least."""
    factor = (least / found.noise).nan_to_num(1, posinf=1).clamp(min=1)
    return replace(found, noise=factor * found.noise, blur=factor * found.blur, slope_blur=factor * found.slope_blur)


def at(every: Differences, index: Tensor) -> Differences:
    """Those of some steps of every entry."""
    return Differences(*(getattr(every, f.name).gather(0, index) for f in fields(every)))


def masked(found: Differences, where: Tensor) -> Differences:
    """The same, NaN elsewhere."""
    return Differences(*(getattr(found, f.name).where(where, torch.nan) for f in fields(found)))


def slope_scale(found: Differences, p: Prediction) -> Tensor:
    """What errors of a slope are relative to: ‖g‖, or its change over one step where that is more."""
    return torch.maximum(p.gradient_norm, p.spectral_norm * found.step)


def contradicts(every: Differences, p: Prediction, tolerance: Tensor) -> Tensor:
    """Whether a quotient has settled, over two steps, where the derivatives say something else."""
    wrong = _is_wrong(every.error, every.blur, tolerance * p.spectral_norm)
    settled = (every.second[1:] - every.second[:-1]).abs() <= STEADY * every.error[1:]
    wrong_slope = _is_wrong(every.slope_error, every.slope_blur, tolerance * slope_scale(every, p))
    return ((wrong[1:] & wrong[:-1] & settled) | (wrong_slope[1:] & wrong_slope[:-1])).any(dim=0)


def has_kink(every: Differences) -> Tensor:
    """Whether slopes to both sides differ: t″ is inversely proportional to h over three steps, and more than noise."""
    kink = every.second * every.step
    noise = MARGIN * deviation(CURVATURE) * _least_noise(every)
    visible = (kink * every.step).abs() > noise
    return _steady(kink, visible, STEADY).any(dim=0)


def contradicts_both_sides(every: Differences, p: Prediction) -> Tensor:
    """Whether second derivatives to both sides of a kink are equal, and those of the results are far from them.

    Where they differ, autograd may have picked a third smooth piece, about which values along one line say nothing.
    """
    third = every.one_sided * every.step**2  # which no kink enters
    noise = torch.maximum(third.abs() / deviation(THIRD), every.rounding).nan_to_num(torch.inf).amin(dim=0)
    long, short = every.step[:-1], every.step[1:]
    jump = (long * every.one_sided[1:] - short * every.one_sided[:-1]) / (long - short)  # the rest shrinks with h
    error = (every.both_sides - p.curvature).abs()
    blur = deviation(BOTH_SIDES) * noise / every.step**2
    wrong = _is_wrong(error[1:], blur[1:], LARGEST_ERROR * p.share * p.spectral_norm + APART * jump.abs())
    settled = (every.both_sides[1:] - every.both_sides[:-1]).abs() <= STEADY * error[1:]
    return (wrong & settled).any(dim=0)


def has_jump(every: Differences) -> Tensor:
    """Whether the values jump: t″ is inversely proportional to h² over three steps, by more than rounding.

    The fourth difference, from which noise is estimated, is that of the jump here; but noise does not repeat itself.
    """
    jump = every.second * every.step**2
    return _steady(jump, jump.abs() > MARGIN * deviation(CURVATURE) * every.rounding, SAME).any(dim=0)


def has_curvature_jump(every: Differences) -> Tensor:
    """Whether second derivatives to both sides differ: their difference stays while the step shrinks."""
    noise = MARGIN * deviation(THIRD) * _least_noise(every)
    visible = (every.one_sided * every.step**2).abs() > noise
    visible &= every.one_sided.abs() >= EXPLAINS * every.error
    return _steady(every.one_sided, visible, STEADY).any(dim=0)


def _least_noise(every: Differences) -> Tensor:
    return every.noise.nan_to_num(torch.inf).amin(dim=0)


def _steady(quantity: Tensor, visible: Tensor, tolerance: float) -> Tensor:
    """Where a quantity ``[S, N, K]`` is about the same at three steps in a row, ``[S - 2, N, K]``."""
    same = ((quantity[1:] / quantity[:-1] - 1).abs() <= tolerance) & visible[1:] & visible[:-1]
    return same[1:] & same[:-1]


def _is_wrong(error: Tensor, blur: Tensor, scale: Tensor) -> Tensor:
    """Where an error is more than noise, and no shorter step shows a smaller one: a long step may cross kinks."""
    possible = (error + MARGIN * blur).nan_to_num(torch.inf)
    least = possible.flip(0).cummin(dim=0).values.flip(0)
    return (error > scale + MARGIN * blur) & (blur <= STEADY * error) & (least >= (1 - STEADY) * error)
