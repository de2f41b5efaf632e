"""Why second derivatives are exactly zero: everywhere, at these samples, or only in this precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import in_groups, out_of_memory
from lightning_hessian.curvature.checks.diagnosis import Finding, Kind
from lightning_hessian.curvature.operators.autodiff import ReverseOverReverse, random_vectors
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.errors import MeasurementError

SCALES = (1.0, 10.0)  # of the moves to other inputs, in standard deviations of the input's entries plus one
NUM_DRAWS = 4  # random outputs at which a target is looked at
ROUNDING = 1000.0  # multiples of eps·max |t| per squared rms of the input
LEAST_ROUNDING = 1e-7  # of that: what is smaller yet is no rounding
AT_ONCE = 8  # samples that are looked at in float64
SMALLER = (1e-2, 1e-4)  # where the forward accepts no input so far away


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


def curved_in_float64(batch: TargetBatch, generator: torch.Generator, vectors: Tensor | None = None) -> Tensor:
    """Samples ``[N]`` with an HVP, along ``vectors [N, K, D]`` or random ones, of more than rounding in float64."""

    def work(few: slice) -> Tensor:
        exact = batch.select(few).to(torch.float64)
        autodiff = ReverseOverReverse(exact)
        v = random_vectors(exact, generator) if vectors is None else vectors[few].to(exact.x)
        product = autodiff.hvp(v).norm(dim=-1)
        limit = rounding_of_curvature(exact, autodiff.values.detach())
        return (product.bool() & ~is_rounding(product, limit)).any(dim=1)

    try:
        return torch.cat([curved for _, curved in in_groups(batch.num_samples, AT_ONCE, work)])
    except Exception as error:  # no float64 on this device, or a forward that fails in it
        if out_of_memory(error) or isinstance(error, MeasurementError):
            raise
        return torch.zeros(batch.num_samples, dtype=torch.bool, device=batch.x.device)


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
    for scale in (*SCALES, *SMALLER):
        if len(found) == len(SCALES) or (found and scale in SMALLER):
            break
        moved = ReverseOverReverse(replace(batch, x=x + scale * (x.std(correction=0) + 1) * noise))
        try:
            finite = moved.values.isfinite().all()
        except Exception as error:  # an assertion on the range of the input, for example
            if out_of_memory(error):
                raise
            continue
        if finite:
            found.append(moved)
    return found
