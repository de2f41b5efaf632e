"""Why a Hessian is what it is: curved, zero for a reason, or not to be trusted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_hessian.curvature.memory import in_groups, on_few, out_of_memory
from lightning_hessian.curvature.operators.autodiff import (
    ForwardOverReverse,
    ReverseOverReverse,
    gradients,
    in_float64,
    random_vectors,
)
from lightning_hessian.curvature.operators.target_batch import TargetBatch

Kind = Literal["curved", "piecewise_linear", "linear", "disconnected", "inconsistent"]

NUM_DRAWS = 3  # random directions that must all give exactly 0.0 before a Hessian is called zero
GROUP = 16  # samples looked at together, at least
GROUP_ENTRIES = 2**14  # input entries looked at together where samples are small
WITNESS_SAMPLES = 5  # ReLU kinks spoil single samples: the median over a few decides
WITNESS_STEP = 1e-7  # relative to 1 + ‖x‖; small, so that few of a large network's kinks are crossed
WITNESS_NOISE = 1e-2  # relative to the spread of the input's entries
WITNESS_TOLERANCE = 1e-2  # below what a wrong derivative shows, above what rounding does

MESSAGES: dict[Kind, str] = {
    "curved": "The target bends with the input: its Hessian is not zero.",
    "piecewise_linear": (
        "The target is piecewise linear in the input (as with ReLU, LeakyReLU or max-pooling), so its Hessian "
        "is exactly zero almost everywhere. This is correct. For curvature, take a target that bends the "
        "outputs: 'prob', 'log_prob' or 'loss', or a smooth activation such as GELU or softplus."
    ),
    "linear": (
        "The target is a linear function of the input: its gradient is the same everywhere and its Hessian is "
        "exactly zero. This is correct. For curvature, take a target that bends the outputs: 'prob', "
        "'log_prob' or 'loss'."
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
    "The device has no room for two samples at a time, so whether one changes the output of another was not checked."
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


def diagnose(
    batch: TargetBatch,
    generator: torch.Generator,
    group_size: int | None = None,
    same_network: Diagnosis | None = None,
) -> Diagnosis:
    """Says what kind of function of its input every target is, from a few HVPs along random directions.

    A Hessian is called zero only when the HVPs along ``NUM_DRAWS`` random directions are exactly 0.0 for
    every sample and a random mixture of its classes, in float64 where the model can be evaluated in it, by
    both engines where both run. Whether derivatives are true is witnessed in float64 by central finite
    differences. Cost: about 15 HVPs and 10 forward passes, ``GROUP`` samples at a time, or ``group_size`` at most.

    Args:
        batch: what is differentiated.
        generator: of the random directions.
        group_size: samples examined at a time, at most.
        same_network: the diagnosis of another target of the same outputs at the same samples: what it says of the
            network is not examined again.
    """
    group_size = group_size or batch.num_samples
    if same_network is not None:
        if not same_network.trusted:
            return same_network
        unchecked = tuple(f for f in same_network.findings if f == COUPLING_UNCHECKED)
        result = _diagnosed_alone(batch, generator, group_size, same_network.network)
        return replace(result, findings=(*unchecked, *result.findings))
    if finding := _random_forward(batch, group_size):
        return Diagnosis("curved", "curved", (finding,), trusted=False)
    coupled = _coupled_samples(batch, generator)
    if coupled:
        return Diagnosis("curved", "curved", (COUPLED,), trusted=False)
    result = _diagnosed_alone(batch, generator, group_size)
    unchecked = (COUPLING_UNCHECKED,) if coupled is None else ()
    return replace(result, findings=(*unchecked, *result.findings))


def _diagnosed_alone(
    batch: TargetBatch, generator: torch.Generator, group_size: int, network: Kind | None = None
) -> Diagnosis:
    """The diagnosis of a deterministic function of each sample alone; ``network``: what is known of its outputs."""
    exact = in_float64(batch)
    if network is None:
        network = _kind(_mixture(_outputs(exact or batch), generator), generator, group_size)
    result = Diagnosis(_kind(_mixture(exact or batch, generator), generator, group_size), network)
    if exact is None:
        finding = "The model cannot be evaluated in float64, so finite differences could not confirm the numbers."
        return replace(result, findings=(finding,))
    if result.kind == "curved" and _lost(batch, exact, generator, group_size):
        finding = f"It is so flat that it underflows in {str(batch.x.dtype).removeprefix('torch.')}: use float64."
        return replace(result, findings=(finding,), trusted=False)
    return _with_witness(result, exact.select(slice(0, WITNESS_SAMPLES)), generator, group_size)


def _mixture(batch: TargetBatch, generator: torch.Generator) -> TargetBatch:
    """One random weighted sum of each sample's targets: flat only if all of them are."""
    with torch.no_grad():
        num_terms = on_few(batch, 2, lambda few: few.values(few.x).shape[1])
    return replace(batch, mixture=torch.randn(num_terms, generator=generator, dtype=torch.float64))


def _outputs(batch: TargetBatch) -> TargetBatch:
    """The outputs themselves as targets."""
    return replace(batch, target=lambda z, classes: z)


def _kind(mixture: TargetBatch, generator: torch.Generator, group_size: int) -> Kind:
    size = min(group_size, max(GROUP, GROUP_ENTRIES // mixture.num_inputs))
    groups = in_groups(mixture.num_samples, size, lambda samples: _kind_of_group(mixture.select(samples), generator))
    kinds = {kind for _, kind in groups}
    order: tuple[Kind, ...] = ("curved", "piecewise_linear", "linear", "disconnected")
    return next(kind for kind in order if kind in kinds)


def _kind_of_group(mixture: TargetBatch, generator: torch.Generator) -> Kind:
    x = mixture.x.detach().clone().requires_grad_()
    values = mixture.values(x)
    if not values.requires_grad or torch.autograd.grad(values.sum(), x, allow_unused=True)[0] is None:
        return "disconnected"
    reverse = ReverseOverReverse(mixture)
    for _ in range(NUM_DRAWS):
        v = random_vectors(mixture, generator)
        if reverse.hvp(v).count_nonzero() or _forward_hvp(mixture, v).count_nonzero():
            return "curved"
    gradient = reverse.gradient()
    places = [_elsewhere(mixture, scale, generator) for scale in (1.0, 10.0)]
    others = [gradients(there) for there in places]
    if not gradient.any() and not any(other.any() for other in others):
        with torch.no_grad():
            moved = any(not torch.equal(there.values(there.x), values) for there in places)
        return "disconnected" if moved else "linear"
    scale = float(gradient.abs().max())
    same = all(torch.allclose(gradient, other, rtol=1e-4, atol=1e-6 * scale) for other in others)
    return "linear" if same else "piecewise_linear"


def _forward_hvp(batch: TargetBatch, v: Tensor) -> Tensor:
    try:
        return ForwardOverReverse(batch).hvp(v)
    except Exception as error:  # this engine does not cover every module; the other one has spoken
        if out_of_memory(error):
            raise
        return torch.zeros_like(v)


def _elsewhere(batch: TargetBatch, scale: float, generator: torch.Generator) -> TargetBatch:
    """The same problems at inputs moved by noise of ``scale`` times their spread."""
    x = batch.x
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    return replace(batch, x=x + scale * (x.std(correction=0) + 1) * noise)


def _lost(batch: TargetBatch, exact: TargetBatch, generator: torch.Generator, group_size: int) -> bool:
    """Whether HVPs are exactly zero in the dtype of x and not in float64, for some problem."""

    def lost(samples: slice) -> bool:
        few, same = batch.select(samples), exact.select(samples)
        v = random_vectors(same, generator)
        truth = ReverseOverReverse(same).hvp(v).norm(dim=-1) > 0
        return bool((truth & (ReverseOverReverse(few).hvp(v.to(few.x)).norm(dim=-1) == 0)).any())

    return any(found for _, found in in_groups(min(GROUP, batch.num_samples), group_size, lost))


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
    """Whether the outputs of one sample differ in the company of two different others; None: no room for two."""
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
    """Equal up to what another order of summation may change; NaN counts as equal and is reported elsewhere."""
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    scale = float(torch.nan_to_num(a).abs().max())
    return torch.allclose(a, b, rtol=0, atol=tolerance * scale, equal_nan=True)


def _with_witness(result: Diagnosis, few: TargetBatch, generator: torch.Generator, group_size: int) -> Diagnosis:
    for name, difference in _witness_differences(few, generator, group_size).items():
        if difference > WITNESS_TOLERANCE:
            finding = f"Finite differences contradict the {name} by {difference:.0%} along random directions."
            kind: Kind = "disconnected" if result.kind == "disconnected" else "inconsistent"
            return replace(result, kind=kind, findings=(finding,), trusted=False)
    kinks = _samples_on_kinks(few, generator, group_size)
    if not kinks:
        return result
    finding = (
        f"The target has a kink exactly at {kinks} of the {few.num_samples} samples looked at: its slopes to both "
        "sides differ, as where equal neighbours tie in max-pooling (the constant background of an image). "
        "There, gradient and Hessian are those of the adjoining smooth piece that autograd picks."
    )
    return replace(result, findings=(finding,))


def _witness_differences(batch: TargetBatch, generator: torch.Generator, group_size: int) -> dict[str, float]:
    """How far derivatives along random directions are from central finite differences, in float64.

    The gradient is held against differences of the values, the HVP against differences of the gradient:
    ``.detach()`` may spoil the one and leave the other whole. A difference quotient speaks only where it
    stays the same at half the step: across the kinks of a ReLU network it does not. Median over samples,
    each moved by a little noise: real images lie on kinks (see ``_samples_on_kinks``), their neighbours do not.
    """
    batch = batch.repeat(-(-WITNESS_SAMPLES // batch.num_samples))
    noise = torch.randn(batch.x.shape, generator=generator, dtype=torch.float64).to(batch.x)
    batch = replace(batch, x=batch.x + WITNESS_NOISE * (batch.x.std(correction=0) + 1e-3) * noise)
    direction = random_vectors(batch, generator)[:, :1]  # one per sample, for all its classes

    def errors(samples: slice) -> dict[str, tuple[Tensor, Tensor]]:
        return _witness_errors(batch.select(samples), direction[samples])

    groups = [found for _, found in in_groups(batch.num_samples, group_size, errors)]
    return {
        name: _median(*(torch.cat(parts) for parts in zip(*(found[name] for found in groups), strict=True)))
        for name in groups[0]
    }


def _witness_errors(batch: TargetBatch, direction: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """For gradient and Hessian the relative error of every sample ``[N]``, and whether its quotients speak."""
    here = ReverseOverReverse(batch)
    gradient, product = here.gradient(), here.hvp(direction.expand(batch.shape))
    with torch.no_grad():
        values = batch.values(batch.x).unsqueeze(-1)
    step = WITNESS_STEP * (1 + batch.x.flatten(1).norm(dim=1)).reshape(-1, 1, 1)
    wide, narrow = (_difference_quotients(batch, direction, h) for h in (step, step / 2))
    slope = (gradient * direction).sum(-1, keepdim=True)
    eps = torch.finfo(torch.float64).eps
    noise = 1000 * eps / step.squeeze(-1)
    return {
        "gradient": _relative_error(slope, wide[0], narrow[0], noise * values.norm(dim=-1)),
        "Hessian": _relative_error(product, wide[1], narrow[1], noise * gradient.norm(dim=-1)),
    }


def _samples_on_kinks(batch: TargetBatch, generator: torch.Generator, group_size: int) -> int:
    """At how many samples the slopes ahead and behind along a random direction differ (float64)."""
    direction = random_vectors(batch, generator)[:, 0].reshape(batch.x.shape)
    step = WITNESS_STEP * 10 * (1 + batch.x.flatten(1).norm(dim=1, keepdim=True))
    shift = step.reshape(-1, *[1] * (batch.x.dim() - 1)) * direction

    def values(samples: slice) -> list[Tensor]:
        few = batch.select(samples)
        with torch.no_grad():
            return [few.values(few.x + sign * shift[samples]) for sign in (-1, 0, 1)]

    groups = [found for _, found in in_groups(batch.num_samples, group_size, values)]
    behind, here, ahead = (torch.cat(parts) for parts in zip(*groups, strict=True))
    left, right = (here - behind) / step, (ahead - here) / step
    noise = 1000 * torch.finfo(torch.float64).eps / step * here.abs()
    scale = torch.maximum(left.abs(), right.abs())
    kinked = ((left - right).abs() > noise + WITNESS_TOLERANCE * scale).any(dim=1)
    return int(kinked.sum())


def _difference_quotients(batch: TargetBatch, direction: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences of the values ``[N, K, 1]`` and of the gradients ``[N, K, D]``."""
    shift = (step * direction)[:, 0].reshape(batch.x.shape)
    ends = [replace(batch, x=batch.x + shift), replace(batch, x=batch.x - shift)]
    with torch.no_grad():
        above, below = (end.values(end.x).unsqueeze(-1) for end in ends)
    ahead, behind = (gradients(end) for end in ends)
    return (above - below) / (2 * step), (ahead - behind) / (2 * step)


def _relative_error(derivative: Tensor, wide: Tensor, narrow: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The largest error over each sample's classes beyond ``noise``, and whether its two quotients agree."""
    size = torch.maximum(derivative.norm(dim=-1), narrow.norm(dim=-1)).clamp_min(1e-300)
    unsteady = ((wide - narrow).norm(dim=-1) - noise).clamp_min(0) / size
    error = ((derivative - narrow).norm(dim=-1) - noise).clamp_min(0) / size
    speaks = (unsteady <= WITNESS_TOLERANCE / 10).all(dim=1)
    return error.amax(dim=1), speaks


def _median(error: Tensor, speaks: Tensor) -> float:
    """Over the samples that speak; 0 where none do."""
    return float(error[speaks].median()) if speaks.any() else 0.0
