"""Whether a network is a fixed function of one sample: the same at every pass, and in every batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import attempted, in_groups, out_of_memory
from lightning_hessian.curvature.checks.differences import OFFSETS
from lightning_hessian.curvature.checks.prediction import LARGEST_ERROR
from lightning_hessian.curvature.target_batch import TargetBatch

SCALES = (1.0, 1e-2, 1e-4)  # of another sample's noise, in standard deviations; smaller where a forward refuses it
NUM_REPEATED = 16  # samples that are evaluated again to see whether the forward is random
NOISE = 100.0  # times its estimate, the least of several steps, may be a difference between two batch sizes
NUM_ALONE = 4  # samples that are also evaluated alone
NUM_PASSES = 8  # of a single sample: a branch taken at random may be the same twice


def is_random(batch: TargetBatch, group_size: int, sample: int = 0) -> bool:
    """Whether outputs or targets of two passes on the same inputs differ, or of eight on one ``sample``."""

    def of(few: TargetBatch) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            outputs = few.outputs(few.x)
            return outputs, few.targets(outputs)

    def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
        return all(map(_close, a, b))

    def repeats(few: slice) -> bool:
        group = batch.select(few)
        return same(of(group), of(group))

    count = min(NUM_REPEATED, batch.num_samples)
    if not all(repeated for _, repeated in in_groups(count, group_size, repeats)):
        return True
    single = batch.select(slice(sample, sample + 1))

    def differ() -> bool:
        first = of(single)
        return not all(same(first, of(single)) for _ in range(NUM_PASSES - 1))

    return bool(attempted(differ))


def has_changed_at_random(batch: TargetBatch, values: Tensor, outputs: Tensor, group_size: int) -> bool:
    """Whether ``values [N, K]`` are not those of earlier ``outputs [N, C]``, since forward or target is random."""
    return not _close(values, batch.targets(outputs)) and is_random(batch, group_size)


def changes_alone(batch: TargetBatch, outputs: Tensor, precision: float = 0.0, scale: float = 0.0) -> int | None:
    """The first of some samples that, evaluated alone, has other outputs than in the batch, ``outputs [N, C]``.

    Differences of values miss a coupling that is constant around each sample, such as padding to the longest sequence.
    Changes below 1 % do not count: adaptive solvers choose their steps for a whole batch.
    """
    if batch.num_samples == 1:
        return None
    for i in range(0, batch.num_samples, -(-batch.num_samples // NUM_ALONE)):
        single = batch.select(slice(i, i + 1))
        with torch.no_grad():
            alone = attempted(partial(single.outputs, single.x))
        if alone is None or alone.shape != outputs[i : i + 1].shape:
            return None
        if not _close(outputs[i : i + 1], alone, max(LARGEST_ERROR**2, precision), scale):
            return i
    return None


def is_coupled(
    batch: TargetBatch,
    sample: int,
    group_size: int,
    generator: torch.Generator,
    precision: float = 0.0,
    scale: float = 0.0,
) -> bool | None:
    """Whether what is measured of a sample changes with the others in its batch, or with its place among them.

    The sample is the first and the last of its batch in turn: it may depend on those before it only. The whole batch is
    looked at where the forward accepts no two samples, for the others only.

    Args:
        batch: the samples.
        sample: which of them is looked at.
        group_size: samples whose five values fit the memory at a time.
        generator: of noise.
        precision: relative, in which the forward computes, where it is worse than that of the samples.
        scale: what that is relative to, where outputs are smaller.

    Returns:
        None where the forward accepts no other batch, or two samples do not fit the device.
    """
    num_samples = batch.num_samples
    other = (sample + 1) % num_samples
    pair = batch.select(torch.tensor([sample, sample], device=batch.x.device))
    answers = [
        _depends_on_place(pair, precision, scale),
        _changes(pair, 0, batch.x[[sample, other]], generator, precision, scale),
        _changes(pair, 1, batch.x[[other, sample]], generator, precision, scale),
    ]
    if answers == [None] * 3 and 1 < num_samples <= len(OFFSETS) * group_size:
        answers = [
            _changes(batch, row, batch.x.roll(1, 0), generator, precision, scale) for row in (sample, num_samples - 1)
        ]
    return next((answer for answer in (True, False) if answer in answers), None)


def changes_with_number(
    batch: TargetBatch, sample: int, group_size: int, noise: Tensor, precision: float = 0.0, scale: float = 0.0
) -> bool | None:
    """Whether the targets of a sample change with the number of samples: as many as there are, one, and five.

    In float64 where that is possible: kernels round differently at other batch sizes.

    Args:
        batch, sample, group_size, precision, scale: as for ``is_coupled``.
        noise: ``[K]``, standard deviation of that in the targets, as a certificate has it.

    Returns:
        None where the forward accepts no other number, or five samples do not fit the device.
    """
    num_samples = min(batch.num_samples, len(OFFSETS) * group_size)
    start = min(sample, batch.num_samples - num_samples)
    single = batch.select(slice(sample, sample + 1))
    beside_others = (batch.select(slice(start, start + num_samples)), sample - start)
    for dtype in (torch.float64, batch.x.dtype):
        cases = (beside_others, (single, 0), (single.repeat_interleave(len(OFFSETS)), 0))
        found = [row for row in (_of_row(few, position, dtype) for few, position in cases) if row is not None]
        if len(found) > 1:
            numbers = torch.stack(found)
            changes = (numbers - numbers[0]).abs().amax(dim=0)[-len(noise) :]
            return bool((changes > _tolerance(numbers, precision, scale) + NOISE * noise.to(changes)).any())
    return None


def _of_row(batch: TargetBatch, row: int, dtype: torch.dtype) -> Tensor | None:
    """Outputs, then targets of one row; None where the forward does not accept the batch, or it does not fit."""
    try:
        batch = batch.to(dtype)
        with torch.no_grad():
            outputs = batch.outputs(batch.x)
            return torch.cat([outputs[row], batch.targets(outputs)[row]])
    except Exception:  # a forward of a fixed number of samples, or a forward or device without this dtype
        return None


def _depends_on_place(pair: TargetBatch, precision: float, scale: float) -> bool | None:
    """Whether the same sample twice gives two results; None where the forward accepts no two, or they do not fit."""
    try:
        with torch.no_grad():
            outputs = pair.outputs(pair.x)
            return not _close(outputs[0], outputs[1], precision, scale)
    except Exception:  # a forward that accepts a single sample, or two that do not fit the device
        return None


def _changes(
    batch: TargetBatch, row: int, swapped: Tensor, generator: torch.Generator, precision: float, scale: float
) -> bool | None:
    """Whether outputs or targets of one row change with other rows; None where none are accepted, or do not fit."""

    def of_row(x: Tensor) -> Tensor:
        outputs = batch.outputs(x)
        return torch.cat([outputs[row], batch.targets(outputs)[row]])

    for x in _other_rows(batch.x, row, swapped, generator):
        try:
            with torch.no_grad():
                return not _close(of_row(batch.x), of_row(x), precision, scale)
        except Exception as error:  # an assertion on the range of the input, for example
            if out_of_memory(error):
                return None
    return None


def _other_rows(x: Tensor, row: int, swapped: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Inputs in which all rows but one differ: by noise, by other samples, and inside of the range of their own."""
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) * (x.std(correction=0) + 1)
    others = [x + scale * noise for scale in SCALES]
    for other in (others[0], swapped, *others[1:], (x + x.mean()) / 2):
        if not torch.equal(other, x):
            changed = other.clone()
            changed[row] = x[row]
            yield changed


def _close(a: Tensor, b: Tensor, precision: float = 0.0, scale: float = 0.0) -> bool:
    """Equal up to what another order of summation may change; NaNs compare equal, and are reported elsewhere."""
    return torch.allclose(a, b, rtol=0, atol=_tolerance(a, precision, scale), equal_nan=True)


def _tolerance(numbers: Tensor, precision: float, scale: float = 0.0) -> float:
    """Of differences that another order of summation may make."""
    return max(torch.finfo(numbers.dtype).eps, precision) ** 0.5 * max(
        scale, float(torch.nan_to_num(numbers).abs().max())
    )
