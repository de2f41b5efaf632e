"""Checks of plain derivatives (gradients, HVPs, whole Hessians): which are wrong, not finite, or not confirmed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hessian.curvature.checks.diagnosis import Diagnosis, Finding
from lightning_hessian.curvature.checks.prediction import Prediction
from lightning_hessian.curvature.checks.result_check import CheckSettings, checked, why_not_finite
from lightning_hessian.curvature.checks.zero import underflow
from lightning_hessian.curvature.operators.autodiff import AutodiffMode
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.errors import MeasurementError


@dataclass(frozen=True)
class CheckableDerivatives:
    """Derivatives with a row per sample, and what they say along one direction.

    Attributes:
        numbers: ``[N, K, ...]``.
        prediction: of the same samples.
    """

    numbers: Tensor
    prediction: Prediction


@dataclass(frozen=True)
class CheckedDerivatives:
    """Derivatives that have been compared with values.

    Attributes:
        numbers: ``[N, K, ...]``, some of them computed again; NaN for samples without finite derivatives.
        valid: ``[N, K]``, whether they are finite, and not contradicted by values.
        findings: what was noticed.
    """

    numbers: Tensor
    valid: Tensor
    findings: tuple[Finding, ...]

    def warning(self, what: str) -> str | None:
        """What a user has to know about these numbers, which are ``what``; None if they are right."""
        if self.valid.all():
            return " ".join(str(f) for f in self.findings if f.unconfirmed) or None
        return about_invalid(what, self.valid, " ".join(map(str, self.findings)))


def unchecked_derivatives(numbers: Tensor) -> CheckedDerivatives:
    """Derivatives ``[N, K, ...]`` that were not to be compared with values."""
    return CheckedDerivatives(numbers, torch.ones(numbers.shape[:2], dtype=torch.bool, device=numbers.device), ())


def about_invalid(what: str, valid: Tensor, why: str) -> str:
    """How many samples have an entry of ``valid [N, K]`` that is False, and why."""
    return f"The {what} of {int((~valid).any(dim=1).sum())} of {len(valid)} samples cannot be trusted. {why}"


def check_derivatives(
    what: str,
    batch: TargetBatch,
    result: CheckableDerivatives,
    again: Callable[[TargetBatch, Tensor], CheckableDerivatives],
    settings: CheckSettings,
    *,
    finite: Tensor,
    findings: Sequence[Finding],
    numbers: Sequence[int] | None = None,
    computed_by: AutodiffMode = "reverse_over_reverse",
    kind: Diagnosis | None = None,
    along: Tensor | None = None,
) -> CheckedDerivatives:
    """Compares derivatives with values; see ``result_check.checked``.

    Args:
        what: the derivatives are, for findings.
        batch: as it was differentiated.
        result: its derivatives.
        again: the same for a few samples in company.
        settings: how to check.
        finite: ``[N]``, the samples whose values and gradients are finite; ``findings`` say why others are not.
        findings: what is known already.
        numbers: of the samples, for findings; None: 0 to N − 1.
        computed_by: the autodiff mode of ``result``.
        kind: what target and network are, if that is known.
        along: ``[N, K, D]``, the vectors of HVPs.

    Raises:
        MeasurementError: no number is finite.
    """
    numbers = range(batch.num_samples) if numbers is None else numbers
    generator = torch.Generator().manual_seed(settings.seed)
    result, verdict = checked(batch, result, again, numbers=numbers, computed_by=computed_by, settings=settings)
    found, explained = result.numbers, verdict.explanation
    if not finite.all():
        found = found.where(finite.reshape(-1, *[1] * (found.dim() - 1)), torch.nan)
    is_finite = _is_finite(found, result.prediction) & finite.unsqueeze(1)
    valid, findings = explained.valid & is_finite & explained.trusted, [*findings, *explained.findings]
    zero = valid & (result.prediction.spectral_norm == 0) & (not result.prediction.slope_only)
    if zero.any() and not (kind is not None and kind.zero):
        lost, about_lost = underflow(batch, zero, numbers, generator, along)
        valid, findings = valid & ~lost, findings + about_lost
    lost = (finite & ~is_finite.all(dim=1)).nonzero().flatten()
    if len(lost):
        why = why_not_finite(batch.select(lost), generator)
        findings.append(Finding(f"The {what} at {{}} is not finite. {why}", tuple(numbers[i] for i in lost.tolist())))
    if not is_finite.any():
        raise MeasurementError(" ".join(map(str, findings)))
    return CheckedDerivatives(found, valid, tuple(findings))


def _is_finite(numbers: Tensor, prediction: Prediction) -> Tensor:
    """Where all of ``numbers [N, K, ...]`` are finite, as they are where their product with a vector is."""
    finite = prediction.spectral_norm.isfinite() & ~prediction.curvature.isnan()
    return finite if finite.all() else numbers.flatten(2).sum(dim=2).isfinite()
