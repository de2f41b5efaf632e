"""Why a Hessian is what it is: curved, zero for a reason, or wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import in_groups, on_few, out_of_memory
from lightning_hessian.curvature.checks import finite_differences
from lightning_hessian.curvature.checks.mode_agreement import in_float64
from lightning_hessian.curvature.operators.autodiff import (
    ForwardOverReverse,
    ReverseOverReverse,
    gradients,
    random_vectors,
)
from lightning_hessian.curvature.target_batch import TargetBatch

Kind = Literal["curved", "piecewise_linear", "linear", "disconnected", "inconsistent"]

NUM_DRAWS = 3  # random directions that must all give exactly 0.0 before a Hessian is called zero
GROUP = 16  # samples examined together, at least
GROUP_ENTRIES = 2**14  # input entries examined together where samples are small

MESSAGES: dict[Kind, str] = {
    "curved": "The target is a curved function of the input: its Hessian is not zero.",
    "piecewise_linear": (
        "The target is piecewise linear in the input (as with ReLU, LeakyReLU or max-pooling), so its Hessian "
        "is exactly zero almost everywhere. This is correct. For curvature, choose a target that is a curved "
        "function of the outputs: 'prob', 'log_prob' or 'loss', or a smooth activation such as GELU or softplus."
    ),
    "linear": (
        "The target is a linear function of the input: its gradient is the same everywhere and its Hessian is "
        "exactly zero. This is correct. For curvature, choose a target that is a curved function of the "
        "outputs: 'prob', 'log_prob' or 'loss'."
    ),
    "disconnected": (
        "The target does not depend on the input as far as autograd sees: gradient and Hessian are zero. Look "
        "for torch.no_grad(), .detach(), argmax, rounding or integer arithmetic between input and output."
    ),
    "inconsistent": (
        "Two ways of differentiating disagree: the Hessian by autograd is not the derivative of the gradient. "
        "Look for .detach() or torch.no_grad() over part of the forward, and for a custom autograd.Function "
        "whose backward is not itself differentiable."
    ),
}

COUPLED = (
    "The output for one sample changes with the other samples in the batch (batch norm without running "
    "statistics, or a mean over the batch): there is no Hessian per sample. Measure with a forward that "
    "treats samples one by one."
)
COUPLING_UNCHECKED = (
    "Two samples do not fit the device at the same time, so whether one changes the output of another was not checked."
)


@dataclass(frozen=True)
class Diagnosis:
    """Why a Hessian is what it is.

    Attributes:
        kind: what the target is as a function of the input.
        network: what the outputs themselves are as functions of the input. A target such as ``prob`` can be
            curved over a piecewise linear network.
        findings: what else was noticed, in sentences.
        trusted: False where the numbers are not per-sample derivatives of a fixed function: two ways of
            differentiating disagree, the forward is random, or samples influence each other.
    """

    kind: Kind
    network: Kind
    findings: tuple[str, ...] = ()
    trusted: bool = True

    @property
    def message(self) -> str:
        """The diagnosis in words: what it means and what to do."""
        return " ".join((MESSAGES[self.kind], *self.findings))

    @property
    def zero(self) -> bool:
        """Whether the Hessian of the target is exactly zero."""
        return self.kind in ("piecewise_linear", "linear", "disconnected")

    @property
    def network_is_piecewise_linear(self) -> bool:
        """Whether the Hessian is JᵀAJ alone, since the network itself is piecewise linear."""
        return self.network in ("piecewise_linear", "linear")


def diagnose(
    batch: TargetBatch,
    generator: torch.Generator,
    group_size: int | None = None,
    same_network: Diagnosis | None = None,
) -> Diagnosis:
    """Finds out what kind of function of its input every target is, from a few HVPs along random directions.

    A Hessian is called zero only when the HVPs along ``NUM_DRAWS`` random directions are exactly 0.0 for
    every sample and a random weighted sum of its classes, in float64 where the model can be evaluated in it, in
    both autodiff modes where both run. Derivatives are compared with central finite differences in float64.
    Cost: about 15 HVPs and 10 forward passes, ``GROUP`` samples at a time, or ``group_size`` at most.

    Args:
        batch: what is differentiated, along directions from ``generator``.
        group_size: samples examined at a time, at most.
        same_network: the diagnosis of another target of the same outputs at the same samples: what it says about the
            network is not examined again.
    """
    group_size = group_size or batch.num_samples
    if same_network is not None:
        if not same_network.trusted:
            return same_network
        network, unchecked = same_network.network, COUPLING_UNCHECKED in same_network.findings
    else:
        if finding := _random_forward(batch, group_size):
            return Diagnosis("curved", "curved", (finding,), trusted=False)
        coupled = _coupled_samples(batch, generator)
        if coupled:
            return Diagnosis("curved", "curved", (COUPLED,), trusted=False)
        network, unchecked = None, coupled is None
    result = _diagnosed_alone(batch, generator, group_size, network)
    return replace(result, findings=(COUPLING_UNCHECKED, *result.findings)) if unchecked else result


def _diagnosed_alone(
    batch: TargetBatch, generator: torch.Generator, group_size: int, network: Kind | None
) -> Diagnosis:
    """The diagnosis of a deterministic function of each sample alone; ``network``: the known kind of its outputs."""
    exact = in_float64(batch)
    if network is None:
        outputs = replace(exact or batch, target=lambda z, classes: z)
        network = _kind(_weighted_sum(outputs, generator), generator, group_size)
    result = Diagnosis(_kind(_weighted_sum(exact or batch, generator), generator, group_size), network)
    if exact is None:
        finding = "The model cannot be evaluated in float64, so finite differences could not confirm the numbers."
        return replace(result, findings=(finding,))
    if result.kind == "curved" and _underflows(batch, exact, generator, group_size):
        finding = f"Its curvature underflows in {str(batch.x.dtype).removeprefix('torch.')}: use float64."
        return replace(result, findings=(finding,), trusted=False)
    return _compared_with_finite_differences(result, exact, generator, group_size)


def _compared_with_finite_differences(
    result: Diagnosis, batch: TargetBatch, generator: torch.Generator, group_size: int
) -> Diagnosis:
    few = batch.select(slice(0, finite_differences.NUM_SAMPLES))
    for name, difference in finite_differences.relative_errors(few, generator, group_size).items():
        if difference > finite_differences.TOLERANCE:
            finding = f"Finite differences contradict the {name} by {difference:.0%} along random directions."
            kind: Kind = "disconnected" if result.kind == "disconnected" else "inconsistent"
            return replace(result, kind=kind, findings=(finding,), trusted=False)
    num_kinks = finite_differences.samples_on_kinks(few, generator, group_size)
    if not num_kinks:
        return result
    finding = (
        f"The target has a kink exactly at {num_kinks} of the {few.num_samples} samples examined: its slopes to both "
        "sides differ, as where equal neighbours tie in max-pooling (the constant background of an image). "
        "There, gradient and Hessian are those of the adjoining smooth piece that autograd picks."
    )
    return replace(result, findings=(finding,))


def _weighted_sum(batch: TargetBatch, generator: torch.Generator) -> TargetBatch:
    """One random weighted sum of each sample's targets: its Hessian is zero only if theirs are."""
    with torch.no_grad():
        num_terms = on_few(batch, 2, lambda few: few.values(few.x).shape[1])
    return replace(batch, class_weights=torch.randn(num_terms, generator=generator, dtype=torch.float64))


def _kind(batch: TargetBatch, generator: torch.Generator, group_size: int) -> Kind:
    size = min(group_size, max(GROUP, GROUP_ENTRIES // batch.num_inputs))
    groups = in_groups(batch.num_samples, size, lambda samples: _kind_of_group(batch.select(samples), generator))
    kinds = {kind for _, kind in groups}
    order: tuple[Kind, ...] = ("curved", "piecewise_linear", "linear", "disconnected")
    return next(kind for kind in order if kind in kinds)


def _kind_of_group(batch: TargetBatch, generator: torch.Generator) -> Kind:
    x = batch.x.detach().clone().requires_grad_()
    values = batch.values(x)
    if not values.requires_grad or torch.autograd.grad(values.sum(), x, allow_unused=True)[0] is None:
        return "disconnected"
    reverse = ReverseOverReverse(batch)
    for _ in range(NUM_DRAWS):
        v = random_vectors(batch, generator)
        if reverse.hvp(v).count_nonzero() or _forward_hvp(batch, v).count_nonzero():
            return "curved"
    gradient = reverse.gradient()
    elsewhere = [_elsewhere(batch, scale, generator) for scale in (1.0, 10.0)]
    others = [gradients(moved) for moved in elsewhere]
    if not gradient.any() and not any(other.any() for other in others):
        with torch.no_grad():
            depends = any(not torch.equal(moved.values(moved.x), values) for moved in elsewhere)
        return "disconnected" if depends else "linear"
    scale = float(gradient.abs().max())
    same = all(torch.allclose(gradient, other, rtol=1e-4, atol=1e-6 * scale) for other in others)
    return "linear" if same else "piecewise_linear"


def _forward_hvp(batch: TargetBatch, v: Tensor) -> Tensor:
    try:
        return ForwardOverReverse(batch).hvp(v)
    except Exception as error:  # this mode does not cover every module; the other one was used already
        if out_of_memory(error):
            raise
        return torch.zeros_like(v)


def _elsewhere(batch: TargetBatch, scale: float, generator: torch.Generator) -> TargetBatch:
    """The same problems at inputs moved by noise of ``scale`` times their spread."""
    x = batch.x
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    return replace(batch, x=x + scale * (x.std(correction=0) + 1) * noise)


def _underflows(batch: TargetBatch, exact: TargetBatch, generator: torch.Generator, group_size: int) -> bool:
    """Whether HVPs are exactly zero in the dtype of x and not in float64, for some problem."""

    def underflows(samples: slice) -> bool:
        few, few_exact = batch.select(samples), exact.select(samples)
        v = random_vectors(few_exact, generator)
        not_zero = ReverseOverReverse(few_exact).hvp(v).norm(dim=-1) > 0
        return bool((not_zero & (ReverseOverReverse(few).hvp(v.to(few.x)).norm(dim=-1) == 0)).any())

    return any(found for _, found in in_groups(min(GROUP, batch.num_samples), group_size, underflows))


def _random_forward(batch: TargetBatch, group_size: int) -> str | None:
    def repeats(samples: slice) -> bool:
        group = batch.select(samples)
        with torch.no_grad():
            return _close(group.outputs(group.x), group.outputs(group.x))

    if all(same for _, same in in_groups(batch.num_samples, group_size, repeats)):
        return None
    return (
        "Two forward passes on the same input differ: the forward is random (dropout that stays on, sampled "
        "noise), and rows of one Hessian would come from different functions. Make it deterministic in eval mode."
    )


def _coupled_samples(batch: TargetBatch, generator: torch.Generator) -> bool | None:
    """Whether the outputs of one sample depend on the other sample in a batch of two; None: two do not fit."""
    pair = batch.select(slice(0, 1)).repeat(2)
    noise = torch.randn((2, *pair.x.shape[1:]), generator=generator, dtype=torch.float64).to(pair.x)
    try:
        with torch.no_grad():
            alone, accompanied = (pair.outputs(torch.stack([pair.x[0], pair.x[1] + other]))[0] for other in noise)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None
    return not _close(alone, accompanied)


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to what another order of summation may change; NaNs compare equal, and are reported elsewhere."""
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    scale = float(torch.nan_to_num(a).abs().max())
    return torch.allclose(a, b, rtol=0, atol=tolerance * scale, equal_nan=True)
