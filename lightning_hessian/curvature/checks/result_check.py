"""Checks of results against values: which samples are checked when, and what becomes of those that fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import attempted, combine
from lightning_hessian.curvature.checks.certificate import Certificate, certify
from lightning_hessian.curvature.checks.diagnosis import Finding, about_some, joined
from lightning_hessian.curvature.checks.explanation import Explanation, explain, not_a_function
from lightning_hessian.curvature.checks.prediction import Prediction
from lightning_hessian.curvature.checks.second_look import compare_beside, in_company
from lightning_hessian.curvature.checks.step_sizes import FIRST_STEP
from lightning_hessian.curvature.checks.through_outputs import compare_through_outputs
from lightning_hessian.curvature.checks.verdict import PreviousChecks, Verdict, unexplained
from lightning_hessian.curvature.checks.zero import root_mean_square
from lightning_hessian.curvature.operators.autodiff import ReverseOverReverse, random_vectors
from lightning_hessian.curvature.target_batch import TargetBatch

# The first step where the network is piecewise linear, in units of FIRST_STEP: longer ones cross its kinks.
SHORT = 1e-2


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
        dependence: a sentence that says so where outputs have been seen to depend on more than their own sample, and
            derivatives per sample do not exist; otherwise empty.
    """

    group_size: int
    seed: int = 0
    piecewise_linear: bool = False
    dependence: str = ""


def check(
    batch: TargetBatch,
    prediction: Prediction,
    *,
    numbers: Sequence[int],
    settings: CheckSettings,
    previous: PreviousChecks | None = None,
    due: Tensor | None = None,
) -> Verdict:
    """Certifies the samples that are due, all of them if one fails, and explains what fails; see ``checked``."""
    checks = _Checks(batch, prediction, numbers, settings)
    if settings.dependence:
        return Verdict(
            checks.first_steps, not_a_function(settings.dependence, torch.full_like(prediction.slope, torch.nan))
        )
    found = None if previous is None or due is None else checks.of_some(previous, due.to(batch.x.device))
    return found or checks.of_all()


@dataclass(frozen=True)
class _Checks:
    batch: TargetBatch
    prediction: Prediction
    numbers: Sequence[int]
    settings: CheckSettings

    def of_all(self) -> Verdict:
        """Of every sample."""
        found = self._certified(torch.arange(self.batch.num_samples, device=self.batch.x.device), self.first_steps)
        is_certified = found.is_outcome("certified")
        error = found.error.to(self.prediction.slope)
        steps = found.step.to(self.first_steps).where(is_certified.all(dim=1), self.first_steps)
        if is_certified.all():
            return Verdict(steps, unexplained(error))
        return Verdict(steps, self._explained(found))

    def of_some(self, previous: PreviousChecks, due: Tensor) -> Verdict | None:
        """Of samples that are due, about which the rest is known; None where one is not as it was."""
        was_on_kink = previous.on_kink.to(due.device)
        on_kink = was_on_kink
        error = torch.full_like(self.prediction.slope, torch.nan)
        steps, findings = previous.steps.to(self.first_steps), previous.findings
        unconfirmed = {number for finding in findings for number in finding.samples}
        if len(chosen := due[~was_on_kink[due]]):
            found = self._certified(chosen, steps)
            certified = found.is_outcome("certified").all(dim=1)
            steps = steps.index_copy(0, chosen, found.step.to(steps).where(certified, self.first_steps[chosen]))
            errors, failed = found.error.to(error), chosen[~certified]
            if any(self.numbers[i] not in unconfirmed for i in failed.tolist()):
                return None
            if len(failed):
                some = _Checks(*self._few(failed), self.settings)
                why = some._explained(combine([found], lambda tensors: tensors[0][~certified]))
                if not (why.trusted and why.valid.all()) or why.again.any():
                    return None
                errors = errors.index_copy(0, (~certified).nonzero().flatten(), why.error)
                again = {self.numbers[i] for i in failed.tolist()}
                kept = about_some(findings, lambda number: number not in again)
                findings = joined([*kept, *(finding for finding in why.findings if finding.lasts)])
                on_kink = on_kink.index_copy(0, failed, why.on_kink)
            error = error.index_copy(0, chosen, errors)
            confirmed = {self.numbers[i] for i in chosen[certified].tolist()}
            findings = about_some(findings, lambda number: number not in confirmed)
        if len(beside := due[was_on_kink[due]]):
            few, predicted, _ = self._few(beside)
            at_neighbors, reported = compare_beside(few, predicted, self.settings.group_size, self._generator())
            if not reported.all() or (at_neighbors is not None and at_neighbors.is_outcome("contradicted").any()):
                return None
            if at_neighbors is not None:
                error = error.index_copy(0, beside, at_neighbors.error.to(error))
        return Verdict(steps, replace(unexplained(error, findings), on_kink=on_kink))

    @property
    def first_steps(self) -> Tensor:
        """``[N]``, h of samples about which nothing is known."""
        return FIRST_STEP * (SHORT if self.settings.piecewise_linear else 1.0) * root_mean_square(self.batch.x)

    def _few(self, chosen: Tensor) -> tuple[TargetBatch, Prediction, list[int]]:
        numbers = [self.numbers[i] for i in chosen.tolist()]
        return self.batch.select(chosen), self.prediction.select(chosen), numbers

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.settings.seed)

    def _certified(self, chosen: Tensor, steps: Tensor) -> Certificate:
        """The certificate of some samples."""
        batch, prediction, _ = self._few(chosen)
        group_size, steps = self.settings.group_size, steps[chosen]
        if self.settings.piecewise_linear and prediction.spectral_norm.any():
            found = compare_through_outputs(batch, prediction, group_size, steps)
            if found is not None:
                failed = (~found.is_outcome("certified")).any(dim=1).nonzero().flatten()
                return found if len(failed) == 0 else _with_kinks(found, failed, batch, prediction, group_size)
        return certify(batch, prediction, group_size, steps)

    def _explained(self, found: Certificate) -> Explanation:
        return explain(
            self.batch,
            self.prediction,
            found,
            group_size=self.settings.group_size,
            numbers=self.numbers,
            generator=self._generator(),
        )


def _with_kinks(
    found: Certificate, failed: Tensor, batch: TargetBatch, prediction: Prediction, group_size: int
) -> Certificate:
    """``found``, where samples that failed count as ``certify`` says if they are on a kink, or certified by it."""
    steps = found.step[failed]
    other = certify(batch.select(failed), prediction.select(failed), group_size, steps)
    better = (other.is_outcome("kink") | other.is_outcome("certified")).all(dim=1)

    def replaced(pair: list[Tensor]) -> Tensor:
        return pair[0].index_copy(0, failed[better], pair[1][better].to(pair[0]))

    return replace(combine([found, other], replaced), step=found.step)


def checked(
    batch: TargetBatch,
    results: Results,
    again: Callable[[TargetBatch, Tensor], Results],
    *,
    numbers: Sequence[int],
    computed_by: str,
    settings: CheckSettings,
    previous: PreviousChecks | None = None,
    due: Tensor | None = None,
) -> tuple[Results, Verdict]:
    """Checks results, and computes those again that come out right beside copies of their samples.

    Args:
        batch: as it was differentiated.
        results: of it; every tensor has a row per sample.
        again: the results for a few samples beside copies of themselves, by reverse_over_reverse; and which they are.
        numbers: of the samples, for messages.
        computed_by: the autodiff mode of ``results``.
        settings: how to check.
        previous: checks of these samples.
        due: positions of the samples to check; None: all.
    """
    verdict = check(batch, results.prediction, numbers=numbers, settings=settings, previous=previous, due=due)
    which = verdict.explanation.again.nonzero().flatten()
    if len(which) == 0:
        return results, verdict
    few, names = in_company(batch.select(which)), [numbers[i] for i in which.tolist()]
    rows = again(few, which)
    finding = Finding(
        f"The derivatives at {{}} were wrong as they were first computed ({computed_by}, in a batch of "
        f"{batch.num_samples}): a kernel of PyTorch or a custom function is wrong in this autodiff mode or at this "
        f"batch size. They were computed again by reverse_over_reverse, beside copies of the samples.",
        tuple(names),
    )

    def replaced(pair: list[Tensor]) -> Tensor:
        if len(pair) == 1:  # whole matrices, of other samples only
            return pair[0]
        old, new = pair
        # In half of the memory there may be fewer eigenvectors.
        shorter = (slice(min(sizes)) for sizes in zip(old.shape[1:], new.shape[1:], strict=True))
        common = (slice(None), *shorter)
        return old[common].index_copy(0, which[: len(new)], new[common])

    second = check(few, rows.prediction, numbers=names, settings=settings)
    if second.explanation.again.any():
        lost = tuple(names[i] for i in second.explanation.again.nonzero().flatten().tolist())
        more = Finding("No two computations of the derivatives at {} agree, so none of them is valid.", lost)
        second = replace(second, explanation=replace(second.explanation, findings=(*second.explanation.findings, more)))
    return combine([results, rows], replaced), verdict.with_second(which, second, finding)


def why_not_finite(batch: TargetBatch, generator: torch.Generator) -> str:
    """What to do about samples whose values and gradients are finite, and whose Hessians are not."""

    def is_finite_in_float64() -> bool:
        exact = batch.to(torch.float64)
        return bool(ReverseOverReverse(exact).hvp(random_vectors(exact, generator)).isfinite().all())

    if batch.x.dtype != torch.float64 and attempted(is_finite_in_float64):
        return "It overflows or underflows in float32: measure in float64."
    return (
        "Values and gradients are finite there: look for 0/0 in a second derivative (a norm, a root or a quotient at "
        "zero), and for overflow."
    )
