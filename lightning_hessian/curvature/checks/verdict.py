"""What the checks say about results, and what they pass on to the next measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import combine
from lightning_hessian.curvature.checks.diagnosis import Finding, about_some, joined
from lightning_hessian.curvature.checks.explanation import Explanation
from lightning_hessian.curvature.target_batch import TargetBatch

TURNS = 8  # measurements after which every sample has been checked again, if there are so many


@dataclass(frozen=True)
class PreviousChecks:
    """What the checks of one measurement pass on to the next of the same samples.

    Attributes:
        steps: ``[N]``, h at which each sample was last checked.
        valid: ``[N]``, whether all its numbers were.
        on_kink: ``[N]``, whether they could be confirmed beside the sample only.
        findings: about samples that could not be confirmed at themselves.
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
        return replace(
            self,
            steps=self.steps[samples],
            valid=self.valid[samples],
            on_kink=self.on_kink[samples],
            findings=about_some(self.findings, lambda number: number in numbers),
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
        steps: ``[N]``, see ``PreviousChecks``.
        explanation: what was certified, and why the rest was not.
    """

    steps: Tensor
    explanation: Explanation

    @property
    def error(self) -> Tensor:
        """``[N, K]``, see ``Spectrum.finite_difference_error``."""
        return self.explanation.error

    def with_second(self, which: Tensor, second: Verdict, finding: Finding) -> Verdict:
        """The verdict after samples ``which`` have been measured again, with another one on them."""

        def replaced(pair: list[Tensor]) -> Tensor:
            return pair[0].index_copy(0, which, pair[1].to(pair[0]))

        first, last = self.explanation, second.explanation
        last = replace(last, valid=last.valid & ~last.again.unsqueeze(1))  # other numbers again: none is right
        explanation = replace(
            combine([first, last], replaced),
            trusted=first.trusted and last.trusted,
            findings=joined([finding, *first.findings, *last.findings]),
            again=first.again,
        )
        return Verdict(replaced([self.steps, second.steps]), explanation)

    def passed_on(
        self, previous: PreviousChecks | None, circumstances: tuple[str, ...], finite: Tensor | None = None
    ) -> PreviousChecks:
        """What the next measurement needs to know; ``finite [N]`` are samples of which there are numbers."""
        valid = self.explanation.valid.all(dim=1)
        if finite is not None:
            valid = valid & finite.to(valid.device)
        turn = 0 if previous is None else previous.turn + 1
        findings = tuple(finding for finding in self.explanation.findings if finding.lasts)
        # Copies: those of samples that were not checked again are views of the previous ones.
        steps, valid, on_kink = (t.detach().cpu().clone() for t in (self.steps, valid, self.explanation.on_kink))
        return PreviousChecks(steps, valid, on_kink, findings, turn, circumstances)


def unchecked(batch: TargetBatch) -> Verdict:
    """The verdict on results that are not to be checked: all are valid, without an error."""
    nothing = batch.x.new_full(batch.shape[:2], torch.nan)
    return Verdict(nothing[:, 0], unexplained(nothing))


def unexplained(error: Tensor, findings: tuple[Finding, ...] = ()) -> Explanation:
    """That all is valid, with errors ``[N, K]``."""
    false = torch.zeros_like(error, dtype=torch.bool)
    return Explanation(~false, True, findings, false[:, 0], false, false, false[:, 0], error)
