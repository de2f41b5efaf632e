"""Why a Hessian is what it is: curved, zero for a reason, or wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

Kind = Literal["curved", "zero_here", "rounding", "piecewise_linear", "linear", "disconnected", "inconsistent"]

MESSAGES: dict[Kind, str] = {
    "curved": "The target is a curved function of the input: its Hessian is not zero.",
    "zero_here": (
        "The Hessian is exactly zero at these samples, and not zero elsewhere: the target is curved, but not where it "
        "was measured (a plateau, such as that of ReLU² or of a clamp)."
    ),
    "rounding": (
        "The Hessian is zero up to rounding: its entries are no larger than what rounding leaves of sums that cancel "
        "(the sum of all softmax outputs, for example)."
    ),
    "piecewise_linear": (
        "The target is piecewise linear in the input at these samples (as with ReLU, LeakyReLU or max-pooling), so its "
        "Hessian is exactly zero there. This is correct."
    ),
    "linear": (
        "The target is a linear function of the input: its gradient is the same everywhere and its Hessian is "
        "exactly zero. This is correct."
    ),
    "disconnected": (
        "The target does not depend on the input as far as autograd sees: gradient and Hessian are zero. Look "
        "for torch.no_grad(), .detach(), argmax, rounding or integer arithmetic between input and output, and for "
        "a saturated softmax or sigmoid."
    ),
    "inconsistent": (
        "Two ways of differentiating disagree: what autograd gives is not a derivative of the values, at any sample."
    ),
}
CURVED: tuple[Kind, ...] = ("curved", "rounding", "inconsistent")  # not exactly zero
MAX_LISTED = 10  # samples that a message names


@dataclass(frozen=True)
class Finding:
    """Something that was noticed.

    Attributes:
        sentence: in words; ``{}`` stands for the samples that it concerns.
        samples: their numbers; none where it concerns all of them.
        lasts: whether it stays true of these samples at later measurements, until they are checked again.
        unconfirmed: whether it is about numbers that could not be checked, as far as they should be.
    """

    sentence: str
    samples: tuple[int, ...] = ()
    lasts: bool = False
    unconfirmed: bool = False

    def __str__(self) -> str:
        return self.sentence.format(named(self.samples)) if self.samples else self.sentence


@dataclass(frozen=True)
class Diagnosis:
    """Why a Hessian is what it is.

    Attributes:
        kind: what the target is as a function of the input, at the samples.
        network: what the outputs themselves are as functions of the input. A target such as ``prob`` can be
            curved over a piecewise linear network.
        findings: what else was noticed.
        trusted: False where no number is a derivative of a fixed function of one sample: the forward is random, or
            samples influence each other. What is wrong at single samples is marked in ``Spectrum.valid``.
        advice: what to measure instead of a Hessian that is zero.
    """

    kind: Kind
    network: Kind
    findings: tuple[Finding, ...] = ()
    trusted: bool = True
    advice: str = ""

    @property
    def message(self) -> str:
        """The diagnosis in words: what it means and what to do."""
        if not self.trusted:  # what the derivatives seem to say means nothing
            return " ".join(map(str, self.findings))
        advice = (self.advice,) if self.kind in ("piecewise_linear", "linear") and self.advice else ()
        return " ".join((MESSAGES[self.kind], *advice, *map(str, self.findings)))

    @property
    def zero(self) -> bool:
        """Whether the Hessian of the target is exactly zero at all samples."""
        return self.kind not in CURVED

    @property
    def network_is_piecewise_linear(self) -> bool:
        """Whether the Hessian is JᵀAJ alone, since the network itself is linear around the samples."""
        return self.network not in CURVED

    def with_findings(self, findings: Iterable[Finding]) -> Diagnosis:
        """The same with more findings; of equal sentences one is left, about the samples of both."""
        return replace(self, findings=joined([*self.findings, *findings]))


def joined(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """One finding for each sentence."""
    by_sentence: dict[str, Finding] = {}
    for finding in findings:
        known = by_sentence.get(finding.sentence, finding)
        all_samples = not (known.samples and finding.samples)
        samples = () if all_samples else tuple(sorted({*known.samples, *finding.samples}))
        by_sentence[finding.sentence] = replace(finding, samples=samples, lasts=known.lasts or finding.lasts)
    return tuple(by_sentence.values())


def about_some(findings: Iterable[Finding], chosen: Callable[[int], bool]) -> tuple[Finding, ...]:
    """Findings about single samples, as far as they are about those chosen."""
    kept = [replace(finding, samples=tuple(filter(chosen, finding.samples))) for finding in findings]
    return tuple(finding for finding in kept if finding.samples)


def advice(num_outputs: int) -> str:
    """What to measure instead of a Hessian that is zero."""
    if num_outputs == 1:
        return (
            "For curvature, choose a target that is a curved function of the output, such as "
            "target=lambda z, classes: z.sigmoid(), or a smooth activation such as GELU or softplus."
        )
    return (
        "For curvature, choose a target that is a curved function of the outputs: 'prob', 'log_prob' or 'loss', or a "
        "smooth activation such as GELU or softplus."
    )


def combined(diagnoses: Sequence[Diagnosis]) -> Diagnosis:
    """One diagnosis of all samples from those of groups of samples."""
    order = get_args(Kind)
    first = min(diagnoses, key=lambda d: order.index(d.kind))
    network = min((d.network for d in diagnoses), key=order.index)
    findings = joined(finding for d in diagnoses for finding in d.findings)
    return replace(first, network=network, findings=findings, trusted=all(d.trusted for d in diagnoses))


def named(samples: Iterable[int]) -> str:
    """Samples in words: ``sample 3`` or ``samples 0, 4 and 7``."""
    numbers = sorted(set(samples))
    if len(numbers) == 1:
        return f"sample {numbers[0]}"
    listed = [str(i) for i in numbers[:MAX_LISTED]]
    if len(numbers) > MAX_LISTED:
        listed.append(f"{len(numbers) - MAX_LISTED} others")
    return f"samples {', '.join(listed[:-1])} and {listed[-1]}"
