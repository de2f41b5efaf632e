"""Why second derivatives are exactly zero: everywhere, at these samples, or only in this precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import attempted, in_groups
from lightning_hessian.curvature.checks.diagnosis import Finding, Kind
from lightning_hessian.curvature.checks.step_dependence import STEADY
from lightning_hessian.curvature.operators.autodiff import ReverseOverReverse, random_vectors
from lightning_hessian.curvature.target_batch import TargetBatch

SCALES = (1.0, 10.0)  # of the moves to other inputs, in standard deviations of the input's entries plus one
NUM_DRAWS = 4  # random outputs, or moves of the input, at which a target is looked at
ROUNDING = 1000.0  # multiples of eps·max |t| per squared rms of the input
LAST_DIGITS, STABLE = 4, 0.1  # a move in multiples of eps, and the relative change after it of what is not rounding
NEARBY = 1e-2  # another, relative
LEAST_ROUNDING = 1e-7  # of that: what is smaller yet is no rounding
AT_ONCE = 8  # samples that are looked at in float64
SMALLER = (1e-2, 1e-4)  # where the forward accepts no input so far away
# Distances between which gradients are compared, in root mean squares of the sample's entries: few kinks are so close.
NEAR = (1e-8, 1e-7, 1e-6)
NEAR_IN_FLOAT32 = (1e-3, 3e-3, 1e-2)  # where a backward fails in float64


def weighted_outputs(batch: TargetBatch, num_outputs: int, generator: torch.Generator) -> TargetBatch:
    """One random weighted sum of each sample's outputs: its second derivatives are zero only if theirs are."""
    weights = torch.randn(num_outputs, generator=generator, dtype=torch.float64)
    return replace(batch, target=lambda z, classes: z, class_weights=weights)


def weighted_targets(batch: TargetBatch, generator: torch.Generator) -> TargetBatch:
    """One random weighted sum of each sample's targets."""
    weights = torch.randn(batch.num_classes, generator=generator, dtype=torch.float64)
    return replace(batch, class_weights=weights)


def kind_in_outputs(batch: TargetBatch, outputs: Tensor, generator: torch.Generator) -> Kind:
    """What the target is as a function of the outputs: curved, piecewise linear or linear.

    Looked at at random outputs in the shape of ``outputs [N, C]``, since at its own a softmax may be saturated.
    """
    gradients = []
    for _ in range(NUM_DRAWS):
        z = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
        autodiff = ReverseOverReverse(TargetBatch(lambda z: z, batch.target, z, batch.classes))
        if autodiff.hvp(random_vectors(autodiff.batch, generator)).any():
            return "curved"
        gradients.append(autodiff.gradient())
    same = all(torch.equal(gradient, gradients[0]) for gradient in gradients[1:])
    return "linear" if same else "piecewise_linear"


def zero_in_float64(batch: TargetBatch, generator: torch.Generator) -> bool:
    """Whether an HVP is no more than rounding in float64 too; True where the model cannot be evaluated in it."""
    return not curved_in_float64(batch, generator).any()


def gradients_contradict(batch: TargetBatch, generator: torch.Generator) -> Tensor:
    """Samples ``[N]`` beside which gradients change in proportion to the distance, and not as HVPs say.

    A Hessian that is zero is wrong there, as that of a custom function whose derivative is right but not itself
    differentiable. Gradients in float64 show it at distances so short that values are equal up to rounding, and on one
    side of a kink at the sample. A backward that evaluates a module again may find it in float32 only.

    Cost: three gradients and an HVP.
    """

    def work(exact: TargetBatch, distances: tuple[float, ...]) -> tuple[list[Tensor], Tensor]:
        v = torch.randn(exact.x.shape, generator=generator, dtype=torch.float64).to(exact.x)
        v = v * root_mean_square(exact.x).view(-1, *[1] * (v.dim() - 1))
        beside = [ReverseOverReverse(replace(exact, x=exact.x + distance * v)) for distance in distances]
        near = [autodiff.gradient(create_graph=False).flatten(1) for autodiff in beside]
        return near, beside[1].hvp(v.flatten(1).unsqueeze(1).expand(exact.shape).contiguous()).flatten(1)

    distances, found = NEAR, attempted(lambda: work(batch.to(torch.float64), NEAR))
    if found is None and batch.x.dtype != torch.float64:
        distances, found = NEAR_IN_FLOAT32, attempted(lambda: work(batch, NEAR_IN_FLOAT32))
    if found is None:
        return torch.zeros(batch.num_samples, dtype=torch.bool, device=batch.x.device)
    near, product = found
    first, second = ((near[i + 1] - near[i]) / (distances[i + 1] - distances[i]) for i in range(2))
    size = second.norm(dim=1)
    settled = (size > 0) & ((second - first).norm(dim=1) <= STEADY * size)
    return settled & ((second - product).norm(dim=1) > STEADY * size)


def curved_in_float64(batch: TargetBatch, generator: torch.Generator, vectors: Tensor | None = None) -> Tensor:
    """Samples ``[N]`` with an HVP, along ``vectors [N, K, D]`` or random ones, of more than rounding in float64."""

    def work(few: slice) -> Tensor:
        exact = batch.select(few).to(torch.float64)
        autodiff = ReverseOverReverse(exact)
        v = random_vectors(exact, generator) if vectors is None else vectors[few].to(exact.x)
        product = autodiff.hvp(v).norm(dim=-1)
        limit = rounding_of_curvature(exact, autodiff.values.detach())
        return (product.bool() & ~is_rounding(product, limit)).any(dim=1)

    found = attempted(lambda: torch.cat([curved for _, curved in in_groups(batch.num_samples, AT_ONCE, work)]))
    if found is None:
        return torch.zeros(batch.num_samples, dtype=torch.bool, device=batch.x.device)
    return found


def underflow(
    batch: TargetBatch,
    zero: Tensor,
    numbers: Sequence[int],
    generator: torch.Generator,
    vectors: Tensor | None = None,
) -> tuple[Tensor, list[Finding]]:
    """Which Hessians that are ``zero [N, K]`` are so in this precision only, and a finding about them.

    Args:
        batch: of the Hessians.
        zero: those looked at.
        numbers: of the samples, for the finding.
        generator: of directions.
        vectors: ``[N, K, D]``, of products that are zero, where it was products that were computed.
    """
    lost = torch.zeros_like(zero)
    if batch.x.dtype != torch.float64:
        for k in zero.any(dim=0).nonzero().flatten().tolist():
            samples = zero[:, k].nonzero().flatten()
            few = batch.select(samples)
            single = replace(few, classes=few.classes[:, k : k + 1])
            along = None if vectors is None else vectors[samples, k : k + 1]
            lost[samples, k] = curved_in_float64(single, generator, along)
    named = tuple(numbers[i] for i in lost.any(dim=1).nonzero().flatten().tolist())
    sentence = "The curvature at {} underflows in float32: measure in float64."
    return lost, [Finding(sentence, named)] if named else []


def rounding_of_curvature(batch: TargetBatch, values: Tensor) -> Tensor:
    """What rounding may leave of second derivatives whose terms cancel, from values ``[N, K]``: a heuristic."""
    size = root_mean_square(batch.x).unsqueeze(1)
    return ROUNDING * torch.finfo(batch.x.dtype).eps * values.abs() / size**2


def is_rounding(size: Tensor, limit: Tensor) -> Tensor:
    """Where numbers are as small as rounding leaves them, and no smaller."""
    return (size > LEAST_ROUNDING * limit) & (size <= limit)


def changes_with_last_digits(
    batch: TargetBatch, direction: Tensor, group_size: int, generator: torch.Generator, *, slope_only: bool
) -> Tensor:
    """Entries ``[N, K]`` whose HVP along ``direction [N, D]``, or gradient, changes if x moves by a few roundings.

    What rounding leaves of terms that cancel does. In float64, where the model can be evaluated in it.

    Cost: five HVPs.
    """
    found = attempted(lambda: _changes(batch.to(torch.float64), direction, group_size, generator, slope_only))
    return _changes(batch, direction, group_size, generator, slope_only) if found is None else found


def changes_nearby(
    batch: TargetBatch, direction: Tensor, group_size: int, generator: torch.Generator, *, slope_only: bool
) -> Tensor:
    """The same if x moves by a hundredth, in the precision of the batch: what is no more than its rounding does."""
    return _changes(batch, direction, group_size, generator, slope_only, NEARBY)


def _changes(
    batch: TargetBatch,
    direction: Tensor,
    group_size: int,
    generator: torch.Generator,
    slope_only: bool,
    move: float | None = None,
) -> Tensor:
    move = LAST_DIGITS * torch.finfo(batch.x.dtype).eps if move is None else move
    each = direction.to(batch.x).unsqueeze(1).expand(batch.shape)
    signs = [
        torch.randn(batch.x.shape, generator=generator, dtype=torch.float64).sign().to(batch.x)
        for _ in range(NUM_DRAWS)
    ]

    def work(few: slice) -> Tensor:
        group = batch.select(few)
        size = root_mean_square(group.x).view(-1, *[1] * (group.x.dim() - 1))
        step = move * group.x.abs().where(group.x != 0, size)

        def derivative(x: Tensor) -> Tensor:
            autodiff = ReverseOverReverse(replace(group, x=x))
            return autodiff.gradient() if slope_only else autodiff.hvp(each[few].contiguous())

        first = derivative(group.x)
        moved = torch.stack([derivative(group.x + step * sign[few]) - first for sign in signs])
        return moved.norm(dim=-1).amax(dim=0) > STABLE * first.norm(dim=-1)

    return torch.cat([found for _, found in in_groups(batch.num_samples, group_size, work)])


def root_mean_square(x: Tensor) -> Tensor:
    """That of each sample's entries, ``[N]``; 1 where it is 0."""
    size = x.flatten(1).square().mean(dim=1).sqrt()
    return size.where(size > 0, 1)


def kind_of_zero(batch: TargetBatch, generator: torch.Generator) -> Kind:
    """What a target whose HVPs are zero at a few samples is around them, from its derivatives elsewhere.

    Cost: a gradient and two HVPs at other inputs.
    """
    here = ReverseOverReverse(batch)
    if not here.values.requires_grad:
        return "disconnected"
    others: list[Tensor] = []
    gradient, depends = here.gradient(), False
    for elsewhere in _elsewhere(batch, generator):
        others.append(elsewhere.gradient())
        depends = depends or not torch.equal(elsewhere.values, here.values)
        if elsewhere.hvp(random_vectors(batch, generator)).any():
            return "zero_here"
    if not gradient.any() and not any(other.any() for other in others):
        return "disconnected" if depends else "linear"
    scale = float(gradient.abs().max())
    same = all(torch.allclose(gradient, other, rtol=1e-4, atol=1e-6 * scale) for other in others)
    return "linear" if same and others else "piecewise_linear"


def _elsewhere(batch: TargetBatch, generator: torch.Generator) -> list[ReverseOverReverse]:
    """The same targets at inputs moved by noise, as far as the forward accepts them."""
    x = batch.x
    found: list[ReverseOverReverse] = []
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)

    def moved(scale: float) -> ReverseOverReverse | None:
        autodiff = ReverseOverReverse(replace(batch, x=x + scale * (x.std(correction=0) + 1) * noise))
        return autodiff if autodiff.values.isfinite().all() else None

    for scale in (*SCALES, *SMALLER):
        if len(found) == len(SCALES) or (found and scale in SMALLER):
            break
        elsewhere = attempted(partial(moved, scale))
        if elsewhere is not None:
            found.append(elsewhere)
    return found
