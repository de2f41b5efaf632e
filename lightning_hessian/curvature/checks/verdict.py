"""Checks of results against values: which samples are checked when, and what becomes of those that fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import combine, out_of_memory
from lightning_hessian.curvature.checks.certificate import FIRST_STEP, OUTCOMES, Certificate, certify
from lightning_hessian.curvature.checks.diagnosis import Finding, joined
from lightning_hessian.curvature.checks.explanation import Explanation, explain
from lightning_hessian.curvature.checks.prediction import Prediction
from lightning_hessian.curvature.checks.second_look import in_company, outcome_beside
from lightning_hessian.curvature.checks.through_outputs import compare_through_outputs
from lightning_hessian.curvature.checks.zero import root_mean_square, weighted_targets, zero_in_float64
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
        valid: ``[N]``, whether all its numbers were.
        on_kink: ``[N]``, whether they could be confirmed beside the sample only, or not at all.
        findings: about samples that are ``on_kink``.
        turn: how many measurements have been checked in turn.
        circumstances: method, autodiff mode and kinds: where they change, every sample is checked again.
    """

    steps: Tensor
    valid: Tensor
    on_kink: Tensor
    findings: tuple[Finding, ...]
    turn: int
    circumstances: tuple[str, ...]

    def select(self, samples: slice) -> PreviousChecks:
        """Those of some samples, numbered as in the whole."""
        numbers = range(len(self.steps))[samples]
        kept = [replace(f, samples=tuple(n for n in f.samples if n in numbers)) for f in self.findings]
        return replace(
            self,
            steps=self.steps[samples],
            valid=self.valid[samples],
            on_kink=self.on_kink[samples],
            findings=tuple(finding for finding in kept if finding.samples),
        )

    def due(self, numbers: Sequence[int], num_samples: int) -> Tensor:
        """Positions among ``numbers`` of the samples whose turn it is, of all ``num_samples``, and of invalid ones."""
        count = -(-num_samples // TURNS)
        chosen = {(self.turn * count + i) % num_samples for i in range(count)}
        valid = self.valid.tolist()
        return torch.tensor([i for i, n in enumerate(numbers) if n in chosen or not valid[i]], dtype=torch.long)


@dataclass(frozen=True)
class Verdict:
    """What the checks say about results.

    Attributes:
        error: ``[N, K]``, see ``Spectrum.finite_difference_error``.
        steps: ``[N]``, see ``PreviousChecks``.
        on_kink: ``[N]``, see ``PreviousChecks``.
        explanation: of what was not certified.
    """

    error: Tensor
    steps: Tensor
    on_kink: Tensor
    explanation: Explanation

    def with_second(self, which: Tensor, second: Verdict, finding: Finding) -> Verdict:
        """The verdict after samples ``which`` have been measured again, with another one on them."""
        first, last = self.explanation, second.explanation
        explanation = Explanation(
            valid=first.valid.index_copy(0, which, last.valid),
            trusted=first.trusted and last.trusted,
            findings=joined([finding, *first.findings, *last.findings]),
            again=first.again,
            is_rounding=first.is_rounding.index_copy(0, which, last.is_rounding),
            wrong=first.wrong.index_copy(0, which, last.wrong),
        )
        return Verdict(
            error=self.error.index_copy(0, which, second.error),
            steps=self.steps.index_copy(0, which, second.steps),
            on_kink=self.on_kink.index_copy(0, which, second.on_kink),
            explanation=explanation,
        )

    def passed_on(self, previous: PreviousChecks | None, circumstances: tuple[str, ...]) -> PreviousChecks:
        """What the next measurement needs to know."""
        valid = self.explanation.valid.all(dim=1)
        turn = 0 if previous is None else previous.turn + 1
        findings = tuple(finding for finding in self.explanation.findings if finding.lasts)
        # Copies: those of samples that were not checked again are views of the previous ones.
        steps, valid, on_kink = (t.detach().cpu().clone() for t in (self.steps, valid, self.on_kink))
        return PreviousChecks(steps, valid, on_kink, findings, turn, circumstances)


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
    previous: PreviousChecks | None = None,
    due: Tensor | None = None,
) -> Verdict:
    """Certifies the samples that are due, all of them if one fails, and explains what fails; see ``checked``."""
    first_steps = FIRST_STEP * (SHORT if settings.piecewise_linear else 1.0) * root_mean_square(batch.x)
    if previous is not None:
        first_steps = previous.steps.to(first_steps)
    generator = torch.Generator().manual_seed(settings.seed)

    def certified(chosen: Tensor) -> Certificate:
        if settings.piecewise_linear and prediction.spectral_norm.any():
            few = batch.select(chosen), prediction.select(chosen)
            found = compare_through_outputs(*few, settings.group_size, first_steps[chosen])
            if found is not None:
                failed = (~found.is_outcome("certified")).any(dim=1).nonzero().flatten()
                return found if len(failed) == 0 else _with_kinks(found, failed, *few, settings.group_size)
        return certify(batch.select(chosen), prediction.select(chosen), settings.group_size, first_steps[chosen])

    nothing = torch.full_like(prediction.slope, torch.nan)
    everything = torch.arange(batch.num_samples, device=batch.x.device)
    if previous is not None and due is not None:
        on_kink = previous.on_kink.to(batch.x.device)
        due = due.to(batch.x.device)
        chosen, beside = due[~on_kink[due]], due[on_kink[due]]
        error, steps, passed = nothing, first_steps, True
        if len(chosen):
            found = certified(chosen)
            error = error.index_copy(0, chosen, found.error.to(error))
            steps = steps.index_copy(0, chosen, found.step.to(steps))
            passed = bool(found.is_outcome("certified").all())
        if len(beside):
            few, direction = batch.select(beside), prediction.direction[beside]
            outcome = outcome_beside(few, direction, settings.group_size, generator)
            passed &= not bool((outcome == OUTCOMES.index("contradicted")).any())
        if passed:
            return Verdict(error, steps, on_kink, _unexplained(nothing, previous.findings))
    found = certified(everything)
    error, steps = found.error.to(nothing), found.step.to(first_steps)
    is_certified = found.is_outcome("certified")
    if is_certified.all():
        return Verdict(error, steps, torch.zeros_like(is_certified[:, 0]), _unexplained(nothing))
    why = explain(batch, prediction, found, group_size=settings.group_size, numbers=numbers, generator=generator)
    on_kink = (~is_certified & why.valid & ~why.is_rounding).any(dim=1)
    # What could not be compared at the sample itself has no error; ``why`` says so.
    return Verdict(error.where(is_certified | ~why.valid, torch.nan), steps, on_kink, why)


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
        f"{batch.num_samples}), since a kernel of PyTorch is; they were computed again by reverse_over_reverse, beside "
        f"copies of the samples.",
        tuple(names),
    )

    def replaced(pair: list[Tensor]) -> Tensor:
        return pair[0].index_copy(0, which[: len(pair[1])], pair[1])

    second = check(few, rows.prediction, numbers=names, settings=settings)
    return combine([results, rows], replaced), verdict.with_second(which, second, finding)


def unchecked(batch: TargetBatch) -> Verdict:
    """That on results that nobody asked to check."""
    nothing = batch.x.new_full(batch.shape[:2], torch.nan)
    explanation = _unexplained(nothing)
    return Verdict(nothing, nothing[:, 0], explanation.again, explanation)


def _unexplained(entries: Tensor, findings: tuple[Finding, ...] = ()) -> Explanation:
    false = torch.zeros_like(entries, dtype=torch.bool)
    return Explanation(~false, True, findings, false[:, 0], false, false)


def underflow(batch: TargetBatch, zero: Tensor, numbers: Sequence[int], generator: torch.Generator) -> list[Finding]:
    """Whether Hessians that are ``zero [N, K]`` are so in this precision only: looked at for the first of them."""
    samples = zero.any(dim=1).nonzero().flatten()
    if batch.x.dtype == torch.float64:
        return []
    if zero_in_float64(weighted_targets(batch.select(samples[:1]), generator), generator):
        return []
    sentence = "The curvature at {} underflows in float32: measure in float64."
    return [Finding(sentence, tuple(numbers[i] for i in samples.tolist()))]


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
