"""The search for causes of a disagreement between derivatives and differences of values, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import attempted
from lightning_hessian.curvature.checks.certificate import Certificate, Outcome, certify
from lightning_hessian.curvature.checks.diagnosis import Finding
from lightning_hessian.curvature.checks.prediction import LARGEST_ERROR, Prediction, unit
from lightning_hessian.curvature.checks.second_look import (
    compare_along,
    compare_beside,
    gives,
    in_company,
    is_rounding_alone,
)
from lightning_hessian.curvature.checks.step_dependence import STEADY
from lightning_hessian.curvature.checks.zero import (
    changes_nearby,
    changes_with_last_digits,
    is_rounding,
    root_mean_square,
    rounding_of_curvature,
)
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.errors import MeasurementError

WRONG_GRADIENT = (
    "Look for .detach() or torch.no_grad() over part of the forward, and for a custom autograd.Function whose backward "
    "is not its derivative."
)
WRONG_HESSIAN = (
    "Look for .detach() or torch.no_grad() over part of the forward, for a custom autograd.Function whose backward is "
    "not itself differentiable, and for an operation whose second derivative PyTorch gets wrong at these inputs."
)
CONTRADICTED = "Finite differences contradict the {} at {{}}. {}"
ONLY_THERE = (
    "Finite differences contradict the {} at {{}}, though not beside them: the target is not differentiable there "
    "(equal entries in a median or a sort, for example), or PyTorch's derivative is wrong at such points (a norm at "
    "zero)."
)
NUMBER_IS_FIXED = (
    "The forward refuses other numbers of samples than it was given, one as well as five, so the numbers at {} could "
    "not be compared with values."
)
UNCONFIRMED: dict[Outcome, str] = {
    "unverifiable": "the model gives no finite values near them, in float64 where it can be evaluated in it",
    "noise": "rounding in the forward hides second differences of the values, or none settle as the step shrinks",
    "kink": "the target has a kink there",
    "jump": "the values jump there",
    "curvature_jump": "the second derivative jumps there",
}
NOT_SMOOTH: dict[Outcome, str] = {
    "kink": (
        "The target has a kink at {}, or too near to tell: its slopes to both sides differ, as where equal "
        "neighbors tie in max-pooling (the constant background of an image). There, gradient and Hessian are those "
        "of one adjoining smooth piece, or a mean of several (as for abs and amax)."
    ),
    "jump": (
        "The values of the target jump at {} (rounding, a comparison or an argmax in the forward). There, gradient and "
        "Hessian are those beside the jump."
    ),
    "curvature_jump": (
        "The second derivative of the target jumps at {}, as that of ELU does at 0 and that of a Huber loss at its "
        "border. There, the Hessian is that of the adjoining smooth piece that autograd picks."
    ),
}


@dataclass
class CauseSearch:
    """Looks for one cause after another; ``open [N, K]`` are the entries without one so far."""

    batch: TargetBatch
    prediction: Prediction
    certificate: Certificate
    group_size: int
    numbers: Sequence[int]
    generator: torch.Generator
    precision: float = 0.0  # relative, in which the forward computes under float64 inputs, if that is worse
    findings: list[Finding] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slope_only = self.prediction.slope_only
        self.open = ~self.certificate.is_outcome("certified")
        self.again = torch.zeros_like(self.open[:, 0])
        self.error = self.certificate.error.where(~self.open, torch.nan).to(self.prediction.slope)
        self.valid = torch.ones_like(self.open)
        self.wrong = torch.zeros_like(self.open)  # though the certificate calls it something else
        self.on_kink = torch.zeros_like(self.again)

    def rounding(self) -> Tensor:
        """Second derivatives no larger than what rounding leaves of terms that cancel, as by values."""
        found = self._rounding_of_float32()
        if found is None:
            found = self._rounding_of_values()
        self.open = self.open & ~found
        return found

    def _rounding_of_float32(self) -> Tensor | None:
        """Open entries that float64 leaves next to nothing of, and that change nearby; None where it cannot tell."""
        samples = self._samples()
        if self.batch.x.dtype == torch.float64 or len(samples) == 0:
            return None
        few, reported = self.batch.select(samples), self.prediction.select(samples)
        found = attempted(lambda: is_rounding_alone(few.to(torch.float64), reported, self.group_size))
        if found is None:
            return None
        rounding = found.any(dim=1).nonzero().flatten()
        if len(rounding):
            some, along = few.select(rounding), reported.direction[rounding]
            changes = changes_nearby(some, along, self.group_size, self.generator, slope_only=self.slope_only)
            found = found & torch.zeros_like(found).index_copy(0, rounding, changes)
        return self._at(samples, found) & self.open

    def _rounding_of_values(self) -> Tensor:
        """Open entries no larger than what rounding of values as large as the target's leaves: a heuristic."""
        x, of, norm = self.batch.x, self.certificate, self.prediction.spectral_norm
        by_values = of.difference
        limit = rounding_of_curvature(self.batch, of.size.to(x))
        slope, slope_limit = self.prediction.gradient_norm, limit * root_mean_square(x).unsqueeze(1)
        found = is_rounding(slope, slope_limit)
        if self.slope_only:
            by_values, norm, limit = of.slope_difference, slope, slope_limit
        else:
            found |= is_rounding(norm, limit)
        found &= self.open & (norm <= limit) & ~(by_values.to(x) > limit)
        # In float64, the values of what is really zero are not curved either.
        in_float64 = limit * (torch.finfo(torch.float64).eps / torch.finfo(x.dtype).eps)
        zero = of.is_outcome("contradicted") & (of.curvature.to(x).abs() <= in_float64) & (not self.slope_only)
        samples = (found & ~zero).any(dim=1).nonzero().flatten()
        if len(samples):
            few, along = self.batch.select(samples), self.prediction.direction[samples]
            changes = changes_with_last_digits(few, along, self.group_size, self.generator, slope_only=self.slope_only)
            found &= zero | self._at(samples, changes)
        allowed = torch.maximum(slope_limit, self.prediction.tolerance * slope)
        return found & ~(of.slope_difference.to(x) > allowed)

    def judge_by_precision(self, dtype: torch.dtype) -> None:
        """Entries of a forward that computes in half precision: noise as large as that is no contradiction."""
        samples, precision = self._samples(), torch.finfo(dtype).eps
        few, predicted = self.batch.select(samples), self.prediction.select(samples)
        found = certify(few, predicted, self.group_size, precision=precision)
        # Where it is not contradicted, it may be right as far as such a forward can be.
        judged = self._at(samples, ~found.is_outcome("contradicted")) & self.open
        if judged.any():
            name = str(dtype).removeprefix("torch.")
            sentence = (
                f"The forward computes partly in {name}: the numbers at {{}} are no better than its precision of "
                f"{precision:.1g}, and could not be compared with values any closer."
            )
            self._find(judged, sentence, lasts=True, unconfirmed=True)
        certified = self._at(samples, found.is_outcome("certified")) & self.open
        errors = self.error.index_copy(0, samples, found.error.to(self.error))
        self.error = self.error.where(~certified, errors)
        self.open = self.open & ~judged

    def look_in_company(self) -> None:
        """Samples where kernels are wrong in one autodiff mode, or for a batch of one."""
        samples = self._samples("contradicted", "kink", "noise")
        try:
            found = self._compare(samples, in_company(self.batch.select(samples)))
        except MeasurementError:  # two samples do not fit the device
            return
        if found is None:
            return
        on_kink = found.is_outcome("kink") & self.certificate.is_outcome("contradicted")[samples]
        other = samples[(found.is_outcome("certified") | on_kink).all(dim=1)]
        in_noise = ~(self.open & ~self.certificate.is_outcome("noise"))[other].any(dim=1)
        if in_noise.any():  # there, nothing need be wrong: it is computed again only if that changes something
            reported = self.prediction.select(other)
            same = gives(in_company(self.batch.select(other)), reported, self.group_size)
            other = other[~(in_noise & same.all(dim=1))]
        self._compute_again(other)

    def look_inside_range(self) -> None:
        """Forwards that accept a range of inputs only: entries strictly inside the range of the data are moved."""
        samples = self._samples("unverifiable")
        few = self.batch.select(samples)
        inside = (few.x > self.batch.x.min()) & (few.x < self.batch.x.max())
        self._confirm(
            samples,
            self._compare(samples, few, direction=self.prediction.direction[samples] * inside.flatten(1)),
            "The forward does not accept all inputs near {}, so only entries strictly inside the range of the data "
            "were moved to check the numbers there.",
        )

    def look_beside_kinks(self) -> None:
        """Samples on kinks: derivatives at neighbors agree with values, and those reported are computed as they are."""
        samples = self._samples(*NOT_SMOOTH)
        if len(samples) == 0:
            return
        found, reported = self._beside(samples)
        self._compute_again(samples[~reported.all(dim=1)])
        if found is None:
            return
        self.on_kink |= self._at(samples, self.open[samples] & found.is_outcome("certified")).any(dim=1)
        for outcome, finding in NOT_SMOOTH.items():
            self._confirm(samples, found, finding, among=self.certificate.is_outcome(outcome))
        self.wrong |= self._at(samples, found.is_outcome("contradicted")) & self.open

    def look_in_float64(self) -> None:
        """Derivatives that are right in float64 only."""
        samples = self._samples("contradicted")
        if self.batch.x.dtype == torch.float64 or len(samples) == 0:
            return
        try:
            found = self._compare(samples, self.batch.select(samples).to(torch.float64))
        except TypeError:  # no float64 on this device
            return
        if found is None:
            return
        right = self._at(samples, found.is_outcome("certified")) & self.open
        of = self.certificate
        lost = right & ~((of.error <= LARGEST_ERROR) & (of.slope_error <= LARGEST_ERROR))
        reported = self.prediction.gradient_norm if self.slope_only else self.prediction.spectral_norm
        what = "underflows in float32" if not reported[lost].any() else "is lost in the rounding of float32"
        number = "gradient" if self.slope_only else "curvature"
        errors = self.error.where(~(right & ~lost), of.error.to(self.error))
        self._confirm(samples, found, f"The {number} at {{}} {what}: measure in float64.", among=lost, lasts=False)
        self._confirm(samples, found, "Rounding in float32 is more than a thousandth of the numbers at {}.")
        self.error = errors
        self.valid &= ~lost

    def look_again_where_others_fail(self) -> None:
        """Along another direction at samples that were certified: an error may lie across the first one by chance."""
        self.wrong |= self.open & self.certificate.is_outcome("contradicted")
        certified = self.certificate.is_outcome("certified")
        samples = certified.any(dim=1).nonzero().flatten()
        if not self.wrong.any() or len(samples) == 0:
            return
        direction = self.prediction.direction[samples] + 2 * unit(self._noise(self.prediction.direction[samples]))
        found = self._compare(samples, self.batch.select(samples), direction=direction)
        if found is not None:
            self.wrong |= self._at(samples, found.is_outcome("contradicted")) & certified

    def list_uncompared(self) -> None:
        """Entries without values, where the forward refuses one sample as well as five."""
        entries = self.open & self.certificate.is_outcome("unverifiable")
        if entries.any():
            self._find(entries, NUMBER_IS_FIXED, lasts=True, unconfirmed=True)
        self.open = self.open & ~entries

    def list_rest(self) -> None:
        """Entries that values contradict for no reason found, and those that nothing could confirm."""
        of = self.certificate
        slope = self.wrong & ((of.slope_error > LARGEST_ERROR) | ~(of.slope_error <= of.error))
        self.valid &= ~self.wrong
        # Without numbers, which would make it another sentence at every measurement: they are in the error.
        beside = self._right_beside()
        for what, entries, help_ in (
            ("gradient", slope, WRONG_GRADIENT),
            ("Hessian", self.wrong & ~slope, WRONG_HESSIAN),
        ):
            if (entries & beside).any():
                self._find(entries & beside, ONLY_THERE.format(what))
            if (entries & ~beside).any():
                self._find(entries & ~beside, CONTRADICTED.format(what, help_))
        for outcome, cause in UNCONFIRMED.items():
            entries = self.open & of.is_outcome(outcome) & ~self.wrong
            if entries.any():
                sentence = f"Differences of values could not confirm the numbers at {{}}: {cause}."
                self._find(entries, sentence, lasts=True, unconfirmed=True)

    def _right_beside(self) -> Tensor:
        """Which wrong entries ``[N, K]`` belong to derivatives that are right beside the samples."""
        samples = self.wrong.any(dim=1).nonzero().flatten()
        if len(samples) == 0:
            return self.wrong
        found, _ = self._beside(samples)
        if found is None:
            return torch.zeros_like(self.wrong)
        # An error that is almost as large there has not vanished: it is tolerated by a narrow margin.
        beside, here = (of.error.fmax(of.slope_error) for of in (found, self.certificate))
        right = found.is_outcome("certified") & (beside <= STEADY * here[samples].to(beside))
        return self._at(samples, right) & self.wrong

    def _compare(self, samples: Tensor, batch: TargetBatch, direction: Tensor | None = None) -> Certificate | None:
        """How derivatives of ``batch``, along one direction of each of ``samples``, compare with its values."""
        if len(samples) == 0:
            return None
        direction = self.prediction.direction[samples] if direction is None else direction
        return compare_along(batch, direction, self.group_size, slope_only=self.slope_only, precision=self.precision)

    def _beside(self, samples: Tensor) -> tuple[Certificate | None, Tensor]:
        """What ``compare_beside`` says about samples."""
        few, predicted = self.batch.select(samples), self.prediction.select(samples)
        return compare_beside(few, predicted, self.group_size, self.generator, precision=self.precision)

    def _confirm(
        self,
        samples: Tensor,
        found: Certificate | None,
        finding: str,
        *,
        among: Tensor | None = None,
        lasts: bool = True,
    ) -> None:
        """The cause of the open entries that are certified now has been found; ``{}`` stands for their samples."""
        if found is None:
            return
        entries = self._at(samples, found.is_outcome("certified")) & self.open
        if among is not None:
            entries &= among
        self.open = self.open & ~entries
        if entries.any():
            self._find(entries, finding, lasts=lasts)
            errors = self.error.index_copy(0, samples, found.error.to(self.error))
            self.error = self.error.where(~entries, errors)

    def _compute_again(self, samples: Tensor) -> None:
        """What is reported at these samples is not what reverse_over_reverse gives."""
        self.again = self.again.index_fill(0, samples, True)
        self.open = self.open & ~self.again.unsqueeze(1)
        self.wrong &= ~self.again.unsqueeze(1)

    def _at(self, samples: Tensor, entries: Tensor) -> Tensor:
        """Entries ``[n, K]`` of some samples among those of all."""
        return torch.zeros_like(self.open).index_copy(0, samples, entries)

    def _samples(self, *outcomes: Outcome) -> Tensor:
        """Samples with an open entry of one of some outcomes."""
        chosen = torch.zeros_like(self.open) if outcomes else torch.ones_like(self.open)
        for outcome in outcomes:
            chosen |= self.certificate.is_outcome(outcome)
        return (self.open & chosen).any(dim=1).nonzero().flatten()

    def _find(self, entries: Tensor, sentence: str, *, lasts: bool = False, unconfirmed: bool = False) -> None:
        samples = entries.any(dim=1).nonzero().flatten().tolist()
        self.findings.append(Finding(sentence, tuple(self.numbers[i] for i in samples), lasts, unconfirmed))

    def _noise(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=self.generator, dtype=torch.float64).to(x)
