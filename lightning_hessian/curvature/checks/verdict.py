"""Checks of results against values: which samples are checked when, and what becomes of those that fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import combine, out_of_memory
from lightning_hessian.curvature.checks.certificate import FIRST_STEP, Certificate, Prediction, certify
from lightning_hessian.curvature.checks.diagnosis import named
from lightning_hessian.curvature.checks.explanation import Explanation, explain, in_company
from lightning_hessian.curvature.checks.zero import root_mean_square
from lightning_hessian.curvature.operators.autodiff import ReverseOverReverse, random_vectors
from lightning_hessian.curvature.target_batch import TargetBatch

TURNS = 8  # measurements after which every sample has been checked again, if there are so many
# The first step where the network is piecewise linear, in units of FIRST_STEP: longer ones cross its kinks.
SHORT = 1e-2


@dataclass(frozen=True)
class PreviousChecks:
    """What the checks of one measurement pass on to the next of the same samples.

    Attributes:
        steps: ``[N]``, h at which each sample was last checked.
        turn: how many measurements have been checked in turn.
        circumstances: method, autodiff mode and kinds: where they change, every sample is checked again.
    """

    steps: Tensor
    turn: int
    circumstances: tuple[str, ...]

    def select(self, samples: slice) -> PreviousChecks:
        """Those of some samples."""
        return replace(self, steps=self.steps[samples])

    def due(self, numbers: Sequence[int], num_samples: int) -> Tensor:
        """Positions among ``numbers`` of the samples, of all ``num_samples``, whose turn it is."""
        count = -(-num_samples // TURNS)
        chosen = {(self.turn * count + i) % num_samples for i in range(count)}
        return torch.tensor([i for i, number in enumerate(numbers) if number in chosen], dtype=torch.long)


@dataclass(frozen=True)
class Verdict:
    """What the checks say about results.

    Attributes:
        error: ``[N, K]``, see ``Spectrum.finite_difference_error``.
        steps: ``[N]``, see ``PreviousChecks``.
        explanation: of what was not certified.
    """

    error: Tensor
    steps: Tensor
    explanation: Explanation

    def with_second(self, which: Tensor, second: Verdict, finding: str) -> Verdict:
        """The verdict after samples ``which`` have been measured again, with another one on them."""
        first, last = self.explanation, second.explanation
        explanation = Explanation(
            valid=first.valid.index_copy(0, which, last.valid),
            trusted=first.trusted and last.trusted,
            findings=(finding, *first.findings, *last.findings),
            again=first.again,
            is_rounding=first.is_rounding.index_copy(0, which, last.is_rounding),
            wrong=first.wrong.index_copy(0, which, last.wrong),
        )
        error = self.error.index_copy(0, which, second.error)
        return Verdict(error, self.steps.index_copy(0, which, second.steps), explanation)


class Checkable(Protocol):
    """Results, a dataclass of tensors, that say something along one direction of every sample."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def prediction(self) -> Prediction:
        """What they say."""


Results = TypeVar("Results", bound=Checkable)


@dataclass(frozen=True)
class CheckSettings:
    """How results are checked.

    Attributes:
        group_size: samples worked on at a time.
        seed: of random inputs.
        piecewise_linear: whether the network is, whose kinks only short steps do not cross.
    """

    group_size: int
    seed: int = 0
    piecewise_linear: bool = False


def check(
    batch: TargetBatch,
    prediction: Prediction,
    *,
    numbers: Sequence[int],
    settings: CheckSettings,
    due: Tensor | None = None,
    steps: Tensor | None = None,
) -> Verdict:
    """Certifies the samples that are due, all of them if one fails, and explains what fails; see ``checked``."""
    if steps is None:
        steps = FIRST_STEP * (SHORT if settings.piecewise_linear else 1.0) * root_mean_square(batch.x)
    first_steps = steps.to(batch.x)

    def certified(chosen: Tensor) -> Certificate:
        return certify(batch.select(chosen), prediction.select(chosen), settings.group_size, first_steps[chosen])

    everything = torch.arange(batch.num_samples, device=batch.x.device)
    chosen = everything if due is None else due.to(everything)
    nothing = torch.full_like(prediction.slope, torch.nan)
    if len(chosen) == 0:
        return Verdict(nothing, first_steps, _unexplained(nothing))
    found = certified(chosen)
    if len(chosen) < len(everything) and not found.is_outcome("certified").all():
        chosen, found = everything, certified(everything)
    error = nothing.index_copy(0, chosen, found.error.to(nothing))
    steps = first_steps.index_copy(0, chosen, found.step.to(first_steps))
    if found.is_outcome("certified").all():
        return Verdict(error, steps, _unexplained(error))
    generator = torch.Generator().manual_seed(settings.seed)
    why = explain(batch, prediction, found, group_size=settings.group_size, numbers=numbers, generator=generator)
    # What could not be compared at the sample itself has no error; ``why`` says so.
    compared = found.is_outcome("certified") | ~why.valid
    return Verdict(error.where(compared, torch.nan), steps, why)


def checked(
    batch: TargetBatch,
    results: Results,
    again: Callable[[TargetBatch, Tensor], Results],
    *,
    numbers: Sequence[int],
    computed_by: str,
    settings: CheckSettings,
    due: Tensor | None = None,
    steps: Tensor | None = None,
) -> tuple[Results, Verdict]:
    """Checks results, and computes those again that come out right beside copies of their samples.

    Args:
        batch: as it was differentiated.
        results: of it; every tensor has a row per sample.
        again: the results for a few samples beside copies of themselves, by reverse_over_reverse; and which they are.
        numbers: of the samples, for messages.
        computed_by: the autodiff mode of ``results``.
        settings: how to check.
        due: positions of the samples to check; None: all.
        steps: ``[N]``, h to begin with; None: the default.
    """
    verdict = check(batch, results.prediction, numbers=numbers, settings=settings, due=due, steps=steps)
    which = verdict.explanation.again.nonzero().flatten()
    if len(which) == 0:
        return results, verdict
    few, names = in_company(batch.select(which)), [numbers[i] for i in which.tolist()]
    rows = again(few, which)
    finding = (
        f"The derivatives at {named(names)} were wrong as they were first computed ({computed_by}, in a batch of "
        f"{batch.num_samples}), since a kernel of PyTorch is; they were computed again by reverse_over_reverse, beside "
        f"copies of the samples."
    )

    def replaced(pair: list[Tensor]) -> Tensor:
        return pair[0].index_copy(0, which[: len(pair[1])], pair[1])

    second = check(few, rows.prediction, numbers=names, settings=settings)
    return combine([results, rows], replaced), verdict.with_second(which, second, finding)


def unchecked(batch: TargetBatch) -> Verdict:
    """That on results that nobody asked to check."""
    nothing = batch.x.new_full(batch.shape[:2], torch.nan)
    return Verdict(nothing, nothing[:, 0], _unexplained(nothing))


def _unexplained(entries: Tensor) -> Explanation:
    false = torch.zeros_like(entries, dtype=torch.bool)
    return Explanation(~false, True, (), false[:, 0], false, false)


def why_not_finite(batch: TargetBatch, generator: torch.Generator) -> str:
    """What to do about samples whose values and gradients are finite, and whose Hessians are not."""
    if batch.x.dtype != torch.float64:
        try:
            exact = batch.to(torch.float64)
            if ReverseOverReverse(exact).hvp(random_vectors(exact, generator)).isfinite().all():
                return "It overflows in float32: measure in float64."
        except Exception as error:  # no float64 here
            if out_of_memory(error):
                raise
    return (
        "Values and gradients are finite there: look for 0/0 in a second derivative (a norm, a root or a quotient at "
        "zero), and for overflow."
    )
