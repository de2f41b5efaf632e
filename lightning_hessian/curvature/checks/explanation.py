"""Why derivatives and differences of values do not agree: looked into only where they do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import in_groups, out_of_memory
from lightning_hessian.curvature.checks.certificate import CERTIFIED, OUTCOMES, Certificate, Outcome
from lightning_hessian.curvature.checks.diagnosis import Finding
from lightning_hessian.curvature.checks.prediction import Prediction, unit
from lightning_hessian.curvature.checks.second_look import in_company, outcome_along, outcome_beside
from lightning_hessian.curvature.checks.zero import is_rounding, root_mean_square, rounding_of_curvature
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.errors import MeasurementError

RANDOM = (
    "Two forward passes on the same input differ: the forward is random (dropout that stays on, sampled "
    "noise), and rows of one Hessian would come from different functions. Make it deterministic in eval mode."
)
COUPLED = (
    "The output for one sample changes with the other samples in the batch (batch norm without running "
    "statistics, or a mean over the batch): there is no Hessian per sample. Measure with a forward that "
    "treats samples one by one."
)
COUPLING_UNCHECKED = (
    "Two samples do not fit the device at the same time, so whether one changes the output of another was not checked."
)
WRONG_GRADIENT = (
    "Look for .detach() or torch.no_grad() over part of the forward, and for a custom autograd.Function whose backward "
    "is not its derivative."
)
WRONG_HESSIAN = (
    "Look for .detach() or torch.no_grad() over part of the forward, for a custom autograd.Function whose backward is "
    "not itself differentiable, and for an operation whose second derivative PyTorch gets wrong at these inputs."
)
UNCONFIRMED: dict[Outcome, str] = {
    "unverifiable": "the model gives no finite values near them, in float64 where it can be evaluated in it",
    "noise": "rounding in the forward hides second differences of the values",
    "kink": "the target has a kink there",
}
SCALES = (1.0, 1e-2, 1e-4)  # of another sample's noise, in standard deviations; smaller where a forward refuses it
NUM_REPEATED = 16  # samples that are evaluated again to see whether the forward is random


@dataclass(frozen=True)
class Explanation:
    """What was found out about entries that differences of values did not confirm.

    Attributes:
        valid: ``[N, K]``, False where the derivatives are wrong.
        trusted: as in ``Diagnosis``.
        findings: the causes, and what could not be confirmed.
        again: ``[N]``, samples whose derivatives are right in reverse_over_reverse beside copies of themselves.
        is_rounding: ``[N, K]``, where the Hessian is zero up to rounding.
        wrong: ``[N, K]``, what values contradict for no reason found but the derivatives themselves.
    """

    valid: Tensor
    trusted: bool
    findings: tuple[Finding, ...]
    again: Tensor
    is_rounding: Tensor
    wrong: Tensor


def explain(
    batch: TargetBatch,
    prediction: Prediction,
    certificate: Certificate,
    *,
    group_size: int,
    numbers: Sequence[int],
    generator: torch.Generator,
) -> Explanation:
    """Finds out why ``certificate`` does not certify every entry of ``batch``.

    Args:
        batch: as it was differentiated.
        prediction: what was compared with values.
        certificate: how that went.
        group_size: samples worked on at a time.
        numbers: of the samples, for the findings.
        generator: of random inputs.

    Cost: four forward passes of a few samples, and for each of at most four possible causes one HVP and differences of
    values, at the samples in question.
    """
    search = _Search(batch, prediction, certificate, group_size, numbers, generator)
    nothing = torch.zeros_like(search.open)
    for concerns_all, finding in ((search.is_random, RANDOM), (search.is_coupled, COUPLED)):
        if concerns_all():
            return Explanation(nothing, False, (Finding(finding),), nothing[:, 0], nothing, nothing)
    rounding = search.rounding()
    again = search.right_in_company()
    search.look_inside_range()
    search.look_beside_kinks()
    search.look_in_float64()
    search.look_again_where_others_fail()
    search.list_rest()
    return Explanation(search.valid, True, tuple(search.findings), again, rounding, search.wrong)


@dataclass
class _Search:
    """Looks for one cause after another; ``open [N, K]`` are the entries without one so far."""

    batch: TargetBatch
    prediction: Prediction
    certificate: Certificate
    group_size: int
    numbers: Sequence[int]
    generator: torch.Generator
    findings: list[Finding] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slope_only = bool(self.prediction.curvature.isnan().all())
        self.open = ~self.certificate.is_outcome("certified")
        self.valid = torch.ones_like(self.open)
        self.wrong = torch.zeros_like(self.open)  # though the certificate calls it something else

    def is_random(self) -> bool:
        """Whether two forward passes on the same inputs differ."""

        def repeats(few: slice) -> bool:
            group = self.batch.select(few)
            with torch.no_grad():
                return _close(group.outputs(group.x), group.outputs(group.x))

        count = min(NUM_REPEATED, self.batch.num_samples)
        return not all(same for _, same in in_groups(count, self.group_size, repeats))

    def is_coupled(self) -> bool:
        """Whether the outputs of one sample depend on the other sample in a batch of two."""
        pair = self.batch.select(self._samples()[:1]).repeat_interleave(2)
        noise = self._noise(pair.x) * (pair.x.std(correction=0) + 1)
        for scale in SCALES:
            inputs = [torch.stack([pair.x[0], pair.x[1] + scale * other]) for other in noise]
            try:
                with torch.no_grad():
                    alone, accompanied = (pair.outputs(x)[0] for x in inputs)
            except Exception as error:  # an assertion on the range of the input, for example
                if out_of_memory(error):
                    self.findings.append(Finding(COUPLING_UNCHECKED))
                    return False
                continue
            return not _close(alone, accompanied)
        return False

    def rounding(self) -> Tensor:
        """Second derivatives no larger than what rounding leaves of terms that cancel, as by values."""
        x, norm, error = self.batch.x, self.prediction.spectral_norm, self.certificate.error
        limit = rounding_of_curvature(self.batch, self.certificate.size.to(x))
        slope, slope_limit = self.prediction.gradient_norm, limit * root_mean_square(x).unsqueeze(1)
        found = is_rounding(slope, slope_limit)
        if self.slope_only:
            norm, error, limit = slope, self.certificate.slope_error, slope_limit
        else:
            found |= is_rounding(norm, limit)
        by_values = error.to(x) * norm.where(norm > 0, 1)
        found &= self.open & (norm <= limit) & ~(by_values > limit)
        self.open = self.open & ~found
        return found

    def right_in_company(self) -> Tensor:
        """Samples where kernels are wrong in one autodiff mode, or for a batch of one."""
        samples = self._samples("contradicted", "kink", "noise")
        try:
            outcome = self._outcome(samples, in_company(self.batch.select(samples)))
        except MeasurementError:  # two samples do not fit the device
            return torch.zeros_like(self.open[:, 0])
        agreed = (outcome == CERTIFIED).all(dim=1)
        again = torch.zeros_like(self.open[:, 0]).index_fill(0, samples[agreed], True)
        self.open = self.open & ~again.unsqueeze(1)
        return again

    def look_inside_range(self) -> None:
        """Forwards that accept a range of inputs only: entries strictly inside the range of the data are moved."""
        samples = self._samples("unverifiable")
        few = self.batch.select(samples)
        inside = (few.x > self.batch.x.min()) & (few.x < self.batch.x.max())
        self._confirm(
            samples,
            self._outcome(samples, few, direction=self.prediction.direction[samples] * inside.flatten(1)),
            "The forward does not accept all inputs near {}, so only entries strictly inside the range of the data "
            "were moved to check the numbers there.",
        )

    def look_beside_kinks(self) -> None:
        """Samples on kinks, at neighbors with derivatives of their own."""
        samples = self._samples("kink")
        if len(samples) == 0:
            return
        few, direction = self.batch.select(samples), self.prediction.direction[samples]
        outcome = outcome_beside(few, direction, self.group_size, self.generator, slope_only=self.slope_only)
        self._confirm(
            samples,
            outcome,
            "The target has a kink exactly at {}: its slopes to both sides differ, as where equal neighbors tie in "
            "max-pooling (the constant background of an image). There, gradient and Hessian are those of the "
            "adjoining smooth piece that autograd picks.",
        )
        self.wrong |= self._at(samples, outcome == OUTCOMES.index("contradicted")) & self.open

    def look_in_float64(self) -> None:
        """Derivatives that are right in float64 only."""
        samples = self._samples("contradicted")
        if self.batch.x.dtype == torch.float64 or len(samples) == 0:
            return
        try:
            outcome = self._outcome(samples, self.batch.select(samples).to(torch.float64))
        except Exception as error:  # the model cannot be differentiated in it
            if out_of_memory(error):
                raise
            return
        lost = self._at(samples, outcome == CERTIFIED) & self.open
        reported = self.prediction.gradient_norm if self.slope_only else self.prediction.spectral_norm
        what = "underflows in float32" if not reported[lost].any() else "is lost in the rounding of float32"
        number = "gradient" if self.slope_only else "curvature"
        self._confirm(samples, outcome, f"The {number} at {{}} {what}: measure in float64.", lasts=False)
        self.valid &= ~lost

    def look_again_where_others_fail(self) -> None:
        """Along another direction at samples that were certified: an error may lie across the first one by chance."""
        self.wrong |= self.open & self.certificate.is_outcome("contradicted")
        certified = self.certificate.is_outcome("certified")
        samples = certified.any(dim=1).nonzero().flatten()
        if not self.wrong.any() or len(samples) == 0:
            return
        direction = self.prediction.direction[samples] + 2 * unit(self._noise(self.prediction.direction[samples]))
        outcome = self._outcome(samples, self.batch.select(samples), direction=direction)
        self.wrong |= self._at(samples, outcome == OUTCOMES.index("contradicted")) & certified

    def list_rest(self) -> None:
        """Entries that values contradict for no reason found, and those that nothing could confirm."""
        of = self.certificate
        slope = self.wrong & ~(of.slope_error <= of.error)
        self.valid &= ~self.wrong
        # Without numbers, which would make it another sentence at every measurement: they are in the error.
        for what, entries, help_ in (
            ("gradient", slope, WRONG_GRADIENT),
            ("Hessian", self.wrong & ~slope, WRONG_HESSIAN),
        ):
            if entries.any():
                self._find(entries, f"Finite differences contradict the {what} at {{}}. {help_}")
        for outcome, cause in UNCONFIRMED.items():
            entries = self.open & of.is_outcome(outcome) & ~self.wrong
            if entries.any():
                self._find(
                    entries, f"Differences of values could not confirm the numbers at {{}}: {cause}.", lasts=True
                )

    def _outcome(self, samples: Tensor, batch: TargetBatch, direction: Tensor | None = None) -> Tensor:
        """How derivatives of ``batch``, along one direction of each of ``samples``, compare with its values, [n, K]."""
        if len(samples) == 0:
            return self.certificate.outcome[:0]
        direction = self.prediction.direction[samples] if direction is None else direction
        return outcome_along(batch, direction, self.group_size, slope_only=self.slope_only)

    def _confirm(self, samples: Tensor, outcome: Tensor, finding: str, *, lasts: bool = True) -> None:
        """The cause of the open entries that are certified now has been found; ``{}`` stands for their samples."""
        entries = self._at(samples, outcome == CERTIFIED) & self.open
        self.open = self.open & ~entries
        if entries.any():
            self._find(entries, finding, lasts=lasts)

    def _at(self, samples: Tensor, entries: Tensor) -> Tensor:
        """Entries ``[n, K]`` of some samples among those of all."""
        return torch.zeros_like(self.open).index_copy(0, samples, entries)

    def _samples(self, *outcomes: Outcome) -> Tensor:
        """Samples with an open entry of one of some outcomes."""
        chosen = torch.zeros_like(self.open) if outcomes else torch.ones_like(self.open)
        for outcome in outcomes:
            chosen |= self.certificate.is_outcome(outcome)
        return (self.open & chosen).any(dim=1).nonzero().flatten()

    def _find(self, entries: Tensor, sentence: str, *, lasts: bool = False) -> None:
        samples = entries.any(dim=1).nonzero().flatten().tolist()
        self.findings.append(Finding(sentence, tuple(self.numbers[i] for i in samples), lasts))

    def _noise(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=self.generator, dtype=torch.float64).to(x)


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to what another order of summation may change; NaNs compare equal, and are reported elsewhere."""
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    scale = float(torch.nan_to_num(a).abs().max())
    return torch.allclose(a, b, rtol=0, atol=tolerance * scale, equal_nan=True)
