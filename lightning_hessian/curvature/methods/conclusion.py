"""What is said about the results of a measurement, and which of them are valid."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_hessian.curvature.checks.cause_search import CONTRADICTED, WRONG_HESSIAN
from lightning_hessian.curvature.checks.diagnosis import Diagnosis, Finding
from lightning_hessian.curvature.checks.result_check import why_not_finite
from lightning_hessian.curvature.checks.verdict import Verdict
from lightning_hessian.curvature.checks.zero import gradients_contradict, kind_of_zero, underflow, weighted_targets
from lightning_hessian.curvature.methods.interface import MethodInput, Share
from lightning_hessian.curvature.methods.plan import Plan
from lightning_hessian.curvature.spectrum import Decomposition
from lightning_hessian.errors import MeasurementError

# How asymmetric a Hessian may be before its digits are called rounding.
ASYMMETRY_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}


@dataclass(frozen=True)
class Conclusion:
    """What follows from results and their checks.

    Attributes:
        diagnosis: with what was found about the results.
        valid: ``[N, K]``, which of them are.
    """

    diagnosis: Diagnosis
    valid: Tensor


def conclude(given: MethodInput, plan: Plan, found: Decomposition, verdict: Verdict, share: Share) -> Conclusion:
    """What is said about the results, and which of them are valid.

    Raises:
        MeasurementError: not one Hessian is finite.
    """
    batch, generator, of_checks = given.batch, given.options.generator(), verdict.explanation
    norm = found.eigenvalues.abs().amax(dim=-1)
    measured = torch.ones_like(norm, dtype=torch.bool)
    if share.finite is not None:
        measured &= share.finite.to(norm.device).unsqueeze(1)
    finite = norm.isfinite()
    valid = of_checks.valid & measured & finite
    diagnosis = plan.diagnosis.with_findings(of_checks.findings)
    lost = measured & ~finite
    if lost.any():
        why = why_not_finite(batch.select(lost.any(dim=1).nonzero().flatten()), generator)
        diagnosis = diagnosis.with_findings(_findings(lost, f"The Hessian at {{}} is not finite. {why}", share))
        if not finite.any():
            raise MeasurementError(" ".join(map(str, diagnosis.findings)))
    allowed = max(ASYMMETRY_TOLERANCE[batch.x.dtype], of_checks.precision)
    asymmetric = valid & ~of_checks.is_rounding & (found.asymmetry > allowed)
    if asymmetric.any():
        worst = float(found.asymmetry[asymmetric].max())
        help_ = " It is lost in rounding: measure in float64." if batch.x.dtype == torch.float32 else ""
        sentence = f"The Hessian at {{}} is asymmetric by up to {worst:.1e} of its norm.{help_}"
        diagnosis = diagnosis.with_findings(_findings(asymmetric, sentence, share))
        valid = valid & ~asymmetric
    if (valid & of_checks.is_rounding).any():
        everywhere = bool((of_checks.is_rounding | (norm == 0) | ~valid).all())
        findings = _findings(valid & of_checks.is_rounding, "It is zero up to rounding at {}.", share)
        diagnosis = replace(diagnosis, kind="rounding") if everywhere else diagnosis.with_findings(findings)
    zero, wrong = valid & (norm == 0) & ~of_checks.is_rounding, of_checks.wrong
    if zero.any() and not diagnosis.zero:
        diagnosis, invalid, contradicted = _judge_zeros(given, zero, valid, diagnosis, share, generator)
        valid, wrong = valid & ~invalid, wrong | contradicted
    if not valid.any() and diagnosis.kind != "disconnected" and wrong.any():
        diagnosis = replace(diagnosis, kind="inconsistent")
    return Conclusion(replace(diagnosis, trusted=of_checks.trusted), valid)


def _judge_zeros(
    given: MethodInput, zero: Tensor, valid: Tensor, diagnosis: Diagnosis, share: Share, generator: torch.Generator
) -> tuple[Diagnosis, Tensor, Tensor]:
    """What Hessians of a curved target that are ``zero [N, K]`` are; which are not, and which gradients contradict."""
    batch = given.batch
    lost, findings = underflow(batch, zero, share.numbers, generator)
    samples = zero.any(dim=1).nonzero().flatten()
    contradicted = gradients_contradict(batch.select(samples), generator).unsqueeze(1).expand(-1, zero.shape[1])
    wrong = torch.zeros_like(zero).index_copy(0, samples, contradicted) & zero & ~lost
    findings += _findings(wrong, CONTRADICTED.format("Hessian", WRONG_HESSIAN), share)
    diagnosis, invalid = diagnosis.with_findings(findings), lost | wrong
    zero = zero & ~invalid
    if zero.any() and (zero | invalid | ~valid).all():
        first = batch.select(zero.any(dim=1).nonzero()[:1].flatten())
        kind = kind_of_zero(weighted_targets(first, generator), generator)
        if kind == "linear" and not given.gradient.any():
            kind = "disconnected"  # a constant, as a probability that underflows everywhere
        return replace(diagnosis, kind=kind), invalid, wrong
    return diagnosis.with_findings(_findings(zero, "It is exactly zero at {}.", share)), invalid, wrong


def _findings(entries: Tensor, sentence: str, share: Share) -> list[Finding]:
    """One finding about the samples of ``entries [N, K]``, or none where no entry is set."""
    samples = entries.any(dim=1).nonzero().flatten().tolist()
    return [Finding(sentence, tuple(share.numbers[i] for i in samples))] if samples else []
