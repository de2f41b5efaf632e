"""Why derivatives and differences of values do not agree: looked into only where they do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import attempted, combine, in_groups
from lightning_hessian.curvature.checks.cause_search import CauseSearch
from lightning_hessian.curvature.checks.certificate import SINGLE, Certificate, certify, in_float64
from lightning_hessian.curvature.checks.coupling import (
    changes_alone,
    changes_with_number,
    has_changed_at_random,
    is_coupled,
    is_random,
)
from lightning_hessian.curvature.checks.diagnosis import Finding
from lightning_hessian.curvature.checks.forward_precision import coarsest_dtype
from lightning_hessian.curvature.checks.prediction import Prediction
from lightning_hessian.curvature.target_batch import TargetBatch

RANDOM = (
    "Two forward passes on the same input differ: the forward is random (dropout that stays on, sampled "
    "noise), or the target is, and rows of one Hessian would come from different functions. Make it deterministic in "
    "eval mode."
)
COUPLED = (
    "The output for one sample changes with the other samples in the batch, or with its place among them (batch norm "
    "without running statistics, a mean over the batch, padding to its longest sequence, steps of a solver that all "
    "share): there is no Hessian per sample. Measure with a forward that treats samples one by one."
)
NUMBER_MATTERS = (
    "The outputs for a sample, or its target, change with the number of samples in the batch (a division by it, for "
    "example): there is no Hessian per sample. Measure with a forward and a target that treat samples one by one."
)
COUPLING_UNCHECKED = (
    "Whether the output for one sample changes with the other samples in the batch could not be checked: the forward "
    "accepts no other batch, or two samples do not fit the device."
)


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
        on_kink: ``[N]``, samples on a kink whose derivatives were confirmed beside it.
        error: ``[N, K]``, that of the certificate, or of the comparison that confirmed an entry; NaN without one.
        precision: relative, in which the forward computes, where it is half precision; else 0.
    """

    valid: Tensor
    trusted: bool
    findings: tuple[Finding, ...]
    again: Tensor
    is_rounding: Tensor
    wrong: Tensor
    on_kink: Tensor
    error: Tensor
    precision: float = 0.0


def find_dependence(batch: TargetBatch, values: Tensor, outputs: Tensor, group_size: int, *, alone: bool = True) -> str:
    """Whether outputs depend on more than their own sample, such as chance or the other samples of the batch.

    Args:
        batch: the samples.
        values: of the targets, ``[N, K]``.
        outputs: of an earlier pass, ``[N, C]``.
        group_size: samples worked on at a time.
        alone: whether samples are also evaluated one by one.

    Returns:
        A sentence for the diagnosis; empty where nothing was seen.

    Cost: if ``alone``, a forward pass of each of at most ``NUM_ALONE`` samples.
    """
    if has_changed_at_random(batch, values, outputs, group_size):
        return RANDOM
    if not alone or changes_alone(batch, outputs) is None:
        return ""
    exact = in_float64(batch)  # where rounding is not taken for a coupling
    precision = _eps(batch, coarsest_dtype(exact))
    with torch.no_grad():
        found = attempted(lambda: _outputs(exact, group_size))
    if found is None:
        exact, found = batch, outputs
    scale = float(outputs.abs().nan_to_num().max())
    sample = changes_alone(exact, found, precision, scale)
    if sample is None:
        return ""
    if is_random(batch, group_size, sample):
        return RANDOM
    single, no_noise = batch.select(slice(sample, sample + 1)), values.new_zeros(values.shape[1])
    coupled = _is_coupled_beyond_rounding(batch, sample, group_size, torch.Generator().manual_seed(0), precision, scale)
    number_matters = changes_with_number(single, 0, group_size, no_noise, precision, scale)
    return NUMBER_MATTERS if number_matters and not coupled else COUPLED


def not_a_function(finding: str, error: Tensor) -> Explanation:
    """That nothing is a derivative, since outputs are no function of one sample; with errors ``[N, K]``."""
    nothing = torch.zeros_like(error, dtype=torch.bool)
    return Explanation(nothing, False, (Finding(finding),), nothing[:, 0], nothing, nothing, nothing[:, 0], error)


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

    Cost: a dozen forward passes of a single sample, five of a few and one of all, and for each of at most four possible
    causes one HVP and differences of values, at the samples in question.
    """
    dtype = coarsest_dtype(in_float64(batch))
    precision = _eps(batch, dtype)
    first = int((~certificate.is_outcome("certified")).any(dim=1).nonzero()[0])
    random, scale = is_random(batch, group_size, first), _largest_output(batch, first)
    coupled = None if random else _is_coupled_beyond_rounding(batch, first, group_size, generator, precision, scale)
    varies = None
    if not (random or coupled):
        varies = changes_with_number(batch, first, group_size, certificate.noise[first], precision, scale)
    for found, finding in ((random, RANDOM), (coupled, COUPLED), (varies, NUMBER_MATTERS)):
        if found:
            return not_a_function(finding, certificate.error.to(prediction.slope))
    single = SINGLE if dtype == torch.float32 else 0.0  # half precision is judged below
    if single:
        certificate = _at_precision(single, certificate, batch, prediction, group_size)
    search = CauseSearch(batch, prediction, certificate, group_size, numbers, generator, single)
    if coupled is None and batch.num_samples > 1:
        search.findings.append(Finding(COUPLING_UNCHECKED, unconfirmed=True))
    is_half = dtype not in (torch.float32, torch.float64)
    if is_half:
        search.judge_by_precision(dtype)
    rounding = search.rounding()
    search.look_beside_kinks()
    search.look_in_company()
    search.look_inside_range()
    search.look_in_float64()
    search.look_again_where_others_fail()
    if varies is None:
        search.list_uncompared()
    search.list_rest()
    return Explanation(
        search.valid,
        True,
        tuple(search.findings),
        search.again,
        rounding,
        search.wrong,
        search.on_kink,
        search.error,
        precision if is_half else 0.0,
    )


def _is_coupled_beyond_rounding(
    batch: TargetBatch, sample: int, group_size: int, generator: torch.Generator, precision: float, scale: float
) -> bool | None:
    """As ``is_coupled``, in float64 where the forward can be evaluated in it: what is rounding vanishes there."""
    found = is_coupled(in_float64(batch), sample, group_size, generator, precision, scale)
    return is_coupled(batch, sample, group_size, generator, precision) if found is None else found


def _largest_output(batch: TargetBatch, sample: int) -> float:
    """|z|, in the precision of the batch, where it may be no more than rounding; 0 where the forward fails alone."""
    with torch.no_grad():
        own = attempted(lambda: _outputs(batch.select(slice(sample, sample + 1)), 1))
    return 0.0 if own is None else float(own.abs().nan_to_num().max())


def _outputs(batch: TargetBatch, group_size: int) -> Tensor:
    """``[N, C]``, of so many samples at a time."""

    def work(few: slice) -> Tensor:
        group = batch.select(few)
        return group.outputs(group.x)

    return torch.cat([rows for _, rows in in_groups(batch.num_samples, group_size, work)])


def _eps(batch: TargetBatch, dtype: torch.dtype) -> float:
    """That of a forward which computes in ``dtype`` at the least, or of the batch where that is more."""
    return max(torch.finfo(dtype).eps, torch.finfo(batch.x.dtype).eps)


def _at_precision(
    precision: float, found: Certificate, batch: TargetBatch, prediction: Prediction, group_size: int
) -> Certificate:
    """The certificate, where contradictions and noise are judged by the precision in which the forward computes."""
    entries = found.is_outcome("contradicted") | found.is_outcome("noise")
    which = entries.any(dim=1).nonzero().flatten()
    if len(which) == 0:
        return found
    other = certify(batch.select(which), prediction.select(which), group_size, precision=precision)

    def replaced(pair: list[Tensor]) -> Tensor:
        chosen = entries[which] if pair[0].dim() > 1 else entries[which].any(dim=1)
        return pair[0].index_copy(0, which, pair[1].to(pair[0]).where(chosen, pair[0][which]))

    return combine([found, other], replaced)
