"""How far from the samples values are computed: at one step, and at others where that was too long or too noisy."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hessian.curvature.checks.differences import Differences
from lightning_hessian.curvature.checks.prediction import Prediction

FIRST_STEP = 1e-2  # along a unit vector, in root mean squares of the sample's entries
FACTOR = 10.0  # between two steps
# Exponents of the factor after the first step, in the order in which steps are tried: shorter ones down to 1e-6, where
# values hold no second difference any more. The last one is tried where all others showed noise.
SHORTER = (-1, -2, -3, -4, -5, 1)
NOISY = (-2, 1, 2, -1, -3, -4)  # values as noisy as float32: one that is short enough for most kinks, and longer ones
LOOKED_NOISY = (-2, -1, -3, -4, -5, 1)  # as noisy at first, but that shrank with the step, as it does at kinks
TOO_LONG = (0, -1, -2, 1, -3, -4)  # after a first step that was far too long
ORDERS = (SHORTER, NOISY, LOOKED_NOISY, TOO_LONG)
MOST_STEPS = len(SHORTER)  # after the first


class StepSizes:
    """The steps after the first, for every sample in the order that its first differences call for.

    Args:
        first: ``[N]``, h of these.
        found: what they gave.
        p: what was predicted.
        looks_noisy: ``[N]``, whether their noise is that of float32.
    """

    def __init__(self, first: Tensor, found: Differences, p: Prediction, looks_noisy: Tensor) -> None:
        length = FIRST_STEP * _length(found, p)
        self._is_short = length < first / FACTOR
        self._base = length.where(self._is_short, first)
        self._orders = torch.tensor(ORDERS, device=first.device)
        self._looks_noisy = looks_noisy & ~self._is_short
        order = torch.where(self._looks_noisy, ORDERS.index(NOISY), ORDERS.index(SHORTER))
        self._order = self._orders[order.masked_fill(self._is_short, ORDERS.index(TOO_LONG))]

    def of(self, samples: Tensor, i: int) -> Tensor:
        """The step of some samples that follows ``i`` others of these."""
        return self._base[samples] * FACTOR ** self._order[samples, i].to(self._base)

    def compare_noise(self, first: Differences, second: Differences) -> None:
        """Changes the order where the second step shows that what looked like noise at the first was none.

        Noise does not depend on the step; what a step is too long for shrinks with it.
        """
        shrank = (second.noise < first.noise * second.step / first.step * FACTOR).all(dim=1)
        self._order[self._looks_noisy & shrank] = self._orders[ORDERS.index(LOOKED_NOISY)]


def _length(found: Differences, p: Prediction) -> Tensor:
    """``[N]``, over which gradient or value change by themselves, as the derivatives say.

    It is short beside the input where entries are in units that are far apart, or far from zero.
    """
    if p.slope_only:
        lengths = found.size / p.gradient_norm
    else:  # without values there, the first alone
        lengths = torch.fmax(p.gradient_norm / p.spectral_norm, (found.size / p.spectral_norm).sqrt())
    return lengths.nan_to_num(torch.inf).amin(dim=1)
