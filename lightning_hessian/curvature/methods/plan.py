"""Which method finds the spectra of a batch, by what it costs and by what fits the memory."""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass, replace

from lightning_hessian.curvature.checks.diagnosis import Diagnosis
from lightning_hessian.curvature.cost_model import (
    ModelCosts,
    expected_work,
    gauss_newton_hessian_bytes,
    hessian_bytes,
    least_memory,
    method_bytes,
    result_bytes,
)
from lightning_hessian.curvature.memory import readable
from lightning_hessian.curvature.options import MethodName, Options
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.errors import MeasurementError

# Up to this many inputs all D columns cost no more than the 100 to 200 HVPs of Lanczos and its estimates,
# and give the whole spectrum exactly.
LARGEST_DENSE = 256

WORTH = 2.0  # how many times as much as its ends the whole spectrum may cost


@dataclass(frozen=True)
class Plan:
    """The method of a measurement.

    Attributes:
        method: its name.
        reason: why it was chosen, in words, with the numbers that decided.
        diagnosis: of all samples.
        num_matrices: for how many samples, counted from the first, whole matrices are computed.
        memory_for_matrices: bytes with which they would be, where memory is too small for them; else None.
        density_vectors: in place of ``Options.density_vectors``, where they do not all fit ``max_seconds``.
        dropped: what was left out to stay within ``max_seconds``, as parts of a sentence.
    """

    method: MethodName
    reason: str
    diagnosis: Diagnosis
    num_matrices: int = 0
    memory_for_matrices: int | None = None
    density_vectors: int | None = None
    dropped: tuple[str, ...] = ()

    @property
    def reuse_for_run(self) -> bool:
        """Whether later measurements of a run should use the same method: it depends on memory and time, which vary."""
        return self.method != "low_rank"

    def applied_to(self, options: Options) -> Options:
        """The options with which it is carried out."""
        return options if self.density_vectors is None else replace(options, density_vectors=self.density_vectors)


def make_plan(
    batch: TargetBatch,
    costs: ModelCosts,
    diagnosis: Diagnosis,
    options: Options,
    *,
    previous_method: MethodName | None = None,
    num_matrices: int = 0,
) -> Plan:
    """The cheapest method that is exact or has an error estimate, and fits the memory.

    Args:
        batch: what to differentiate, with its ``costs`` and ``diagnosis``.
        previous_method: of an earlier measurement of the run: used again where it still applies, so that the curves of
            a run are comparable.
        num_matrices: for how many samples the whole matrices are wanted: planned where they fit beside the results.

    Raises:
        MeasurementError: ``low_rank`` was asked for and the network is not piecewise linear.
    """
    if options.method == "low_rank" and not diagnosis.network_is_piecewise_linear:
        raise MeasurementError(
            "method='low_rank' is exact for networks that are piecewise linear in their input, and this one is "
            f"{diagnosis.network}. Use method='auto', 'dense' or 'lanczos'."
        )
    memory = options.memory(batch.x.device)
    one_sample = 0 if diagnosis.zero else hessian_bytes(costs)
    if one_sample and diagnosis.network_is_piecewise_linear:
        one_sample = min(one_sample, gauss_newton_hessian_bytes(costs))
    fitting = num_matrices if result_bytes(batch, options, num_matrices) + one_sample <= memory else 0
    plan = _choose(batch, costs, diagnosis, options, memory, previous_method, fitting)
    working = 0 if diagnosis.zero else max(one_sample, method_bytes(plan.method, costs, options))
    need = result_bytes(batch, options, num_matrices) + working
    if num_matrices == 0 or need <= memory:
        return replace(plan, num_matrices=num_matrices)
    return replace(plan, num_matrices=0, memory_for_matrices=need)


def _choose(
    batch: TargetBatch,
    costs: ModelCosts,
    diagnosis: Diagnosis,
    options: Options,
    memory: int,
    previous_method: MethodName | None,
    num_matrices: int,
) -> Plan:
    if options.method != "auto":
        return Plan(options.method, "asked for", diagnosis)
    if diagnosis.zero:
        return Plan("low_rank", "the Hessian is exactly zero", diagnosis)
    piecewise_linear = diagnosis.network_is_piecewise_linear
    whole: MethodName = "low_rank" if piecewise_linear else "dense"
    need = least_memory(whole, batch, costs, options)
    if need > memory:
        less = least_memory("lanczos", batch, costs, options) < need
        what = "gradients of all outputs" if piecewise_linear else "whole matrices"
        reason = f"the {what} need {readable(need)} for one sample, and {readable(memory)} may be used"
        return Plan("lanczos" if less else whole, reason, diagnosis)
    again = "as in the first measurement of this run, so that its curves are comparable"
    if previous_method == "lanczos":
        return Plan(previous_method, again, diagnosis)
    if piecewise_linear:
        return Plan("low_rank", "the network is piecewise linear: C gradients give the whole Hessian", diagnosis)
    if batch.num_inputs <= LARGEST_DENSE:
        return Plan("dense", f"D = {batch.num_inputs} is small enough for whole matrices", diagnosis)
    if previous_method == "dense":
        return Plan(previous_method, again, diagnosis)
    if num_matrices == batch.num_samples:
        return Plan("dense", "the whole matrices of every sample are wanted for heatmaps anyway", diagnosis)
    return cheaper(batch.shape, options, num_matrices, diagnosis=diagnosis)


def cheaper(shape: tuple[int, int, int], options: Options, num_matrices: int = 0, *, diagnosis: Diagnosis) -> Plan:
    """``dense`` unless it costs much more than ``lanczos``: it is exact and complete. See ``expected_work``."""
    work = expected_work(shape, options, num_matrices)
    reason = (
        f"the whole spectrum (D = {shape[2]}) is expected to cost as much as {work['dense']:.0f} Hessian-vector "
        f"products and its ends {work['lanczos']:.0f}"
    )
    return Plan("dense" if work["dense"] <= WORTH * work["lanczos"] else "lanczos", reason, diagnosis)


def remaining_memory(plan: Plan, batch: TargetBatch, costs: ModelCosts, options: Options, memory: int) -> int:
    """The bytes that remain for the method beside the results.

    Raises:
        MeasurementError: they are not enough for one sample; the message says what would fit.
    """
    need = least_memory(plan.method, batch, costs, options)
    if need <= memory:
        return memory - result_bytes(batch, options, plan.num_matrices)
    num_samples, num_classes, num_inputs = batch.shape
    raise MeasurementError(
        f"method='{plan.method}' needs {readable(need)} to work on one sample of {num_classes} "
        f"class{'es' if num_classes > 1 else ''} (D = {num_inputs}) beside the results of {num_samples}, and "
        f"{readable(memory)} may be used. {_what_fits(plan, batch, costs, options, memory)}"
    )


def _what_fits(plan: Plan, batch: TargetBatch, costs: ModelCosts, options: Options, memory: int) -> str:
    """What to change, in words: fewer classes, fewer samples, another method, or more memory."""

    def with_classes(count: int) -> int:
        fewer = replace(batch, classes=batch.classes[:, :count])
        return least_memory(plan.method, fewer, ModelCosts(fewer), options)

    def with_samples(count: int) -> int:
        return least_memory(plan.method, batch.select(slice(0, count)), costs, options)

    found = []
    if num_classes := bisect(range(1, batch.num_classes), memory, key=with_classes):  # the most that fit
        found.append(f"measure {num_classes} class{'es' if num_classes > 1 else ''} at most")
    if num_samples := bisect(range(1, batch.num_samples), memory, key=with_samples):
        found.append(f"measure {num_samples} sample{'s' if num_samples > 1 else ''} at a time")
    exact: MethodName = "low_rank" if plan.diagnosis.network_is_piecewise_linear else "dense"
    others: tuple[MethodName, ...] = ("lanczos", exact)
    fitting = [other for other in others if least_memory(other, batch, costs, options) <= memory]
    found += [f"use method='{other}'" for other in fitting if other != plan.method]
    found.append(f"allow max_memory={least_memory(plan.method, batch, costs, options)}")
    sentence = ", or ".join(found)
    return f"{sentence[0].upper()}{sentence[1:]}."
