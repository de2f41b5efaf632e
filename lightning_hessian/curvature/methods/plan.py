"""Which method finds the spectra of a batch, by what it costs and by what fits the memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_hessian.curvature.checks.diagnosis import Diagnosis
from lightning_hessian.curvature.cost_model import Facts
from lightning_hessian.curvature.memory import available_memory, in_groups, readable
from lightning_hessian.curvature.methods.dense import ChunkSize, dense_bytes, first_block, wait_for, whole_bytes
from lightning_hessian.curvature.methods.lanczos import expected_products, lanczos_bytes
from lightning_hessian.curvature.methods.low_rank import low_rank_bytes
from lightning_hessian.curvature.operators.autodiff import (
    AUTODIFF_MODES,
    AutodiffMode,
    Engine,
    ReverseOverReverse,
    random_vectors,
)
from lightning_hessian.curvature.operators.target_batch import TargetBatch
from lightning_hessian.curvature.spectrum import MethodName
from lightning_hessian.errors import MeasurementError

MethodChoice = Literal["auto", "dense", "low_rank", "lanczos"]
METHODS: tuple[MethodChoice, ...] = get_args(MethodChoice)

FLAT = ("piecewise_linear", "linear")  # networks whose Hessian is JᵀAJ

# Up to this many inputs all D columns cost no more than the 100 to 200 products of Lanczos and its estimates,
# and the whole spectrum is had exactly.
LARGEST_DENSE = 256

CHEAP = 1.0  # seconds that the whole spectrum may cost, whatever its ends would
WORTH = 2.0  # how many times as much as its ends the whole spectrum may cost
# Seconds per D³ of an eigendecomposition with vectors on one CPU core: 6e-11 to 1.3e-10 in float32, by LAPACK, at
# D = 256 to 3072. Float64 moves twice the bytes. Accelerators and several cores are faster: an upper figure there.
EIGH = {torch.float32: 1e-10, torch.float64: 2e-10}
ORTHOGONALISATION = 1.1  # what a Lanczos iteration costs in products (benchmarks/lanczos.py)


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        method: ``"auto"`` or a method.
        num_eigenvalues: eigenvectors kept per problem; for ``lanczos`` the number of eigenvalues. ``low_rank`` keeps
            those of all its eigenvalues where there are no more than 64 and memory allows.
        chunk_size: columns computed at once; ``"auto"``: found while working.
        max_memory: bytes that may be used; None: half of what is free on the device.
        seed: of the monitor's own random vectors, the same at every measurement: curves show the network.
        block_size: start vectors of ``lanczos``: it sees an eigenvalue at most that many times.
        density_vectors: starting vectors for the density of eigenvalues where ``lanczos`` finds only their ends;
            0: no density there. Complete spectra have theirs without.
    """

    method: MethodChoice = "auto"
    num_eigenvalues: int = 10
    chunk_size: ChunkSize = "auto"
    max_memory: int | None = None
    seed: int = 0
    block_size: int = 1
    density_vectors: int = 0

    def memory(self, device: torch.device) -> int:
        """The bytes that may be used on ``device``."""
        return self.max_memory or available_memory(device)

    def generator(self) -> torch.Generator:
        """A fresh generator of our own, so that no random stream of the run is drawn from."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Plan:
    """The method of a measurement.

    Attributes:
        method: its name.
        reason: why it was chosen, in words, with the numbers that decided.
        seconds_per_hvp: measured time of one HVP of every problem; None where it was not needed.
        expected_seconds: of each method that was compared.
        num_matrices: for how many samples, counted from the first, whole matrices are made.
        diagnosis: of all samples; its findings say what the memory has no room for.
    """

    method: MethodName
    reason: str
    diagnosis: Diagnosis
    seconds_per_hvp: float | None = None
    expected_seconds: Mapping[str, float] = field(default_factory=dict)
    num_matrices: int = 0

    @property
    def lasts(self) -> bool:
        """Whether clock or memory decided, which may decide otherwise next time: a run had better keep the choice."""
        return self.seconds_per_hvp is not None or self.method == "lanczos"


def make_plan(
    batch: TargetBatch,
    costs: Facts,
    diagnosis: Diagnosis,
    options: Options,
    *,
    previous_method: MethodName | None = None,
    num_matrices: int = 0,
) -> Plan:
    """The cheapest method that is exact or knows its error, and fits the memory.

    Args:
        batch: what to differentiate.
        costs: of this batch.
        diagnosis: of this batch.
        options: how to measure.
        previous_method: what an earlier measurement of the run chose by time or memory: used again where it still
            applies, so that the curves of a run are comparable.
        num_matrices: for how many samples the whole matrices are wanted: planned where they fit beside the results.

    Raises:
        MeasurementError: ``low_rank`` was asked for and the network is not piecewise linear.
    """
    if options.method == "low_rank" and diagnosis.network not in FLAT:
        raise MeasurementError(
            "method='low_rank' is exact for networks that are piecewise linear in their input, and this one is "
            f"{diagnosis.network}. Use method='auto', 'dense' or 'lanczos'."
        )
    memory = options.memory(batch.x.device)
    flat = diagnosis.network in FLAT
    one = 0 if diagnosis.zero else whole_bytes(costs, flat)
    fitting = num_matrices if result_bytes(batch, options, num_matrices) + one <= memory else 0
    plan = _method(batch, costs, diagnosis, options, previous_method, fitting)
    beside = 0 if diagnosis.zero else max(one, bytes_per_sample(plan.method, costs, options))
    need = result_bytes(batch, options, num_matrices) + beside
    if num_matrices == 0 or need <= memory:
        return replace(plan, num_matrices=num_matrices)
    finding = (
        f"Whole matrices for heatmaps need {readable(need)}, and {readable(memory)} may be used: no heatmap. "
        f"heatmap_samples=0 says so, or max_memory={need} makes room."
    )
    return replace(plan, num_matrices=0, diagnosis=replace(diagnosis, findings=(*diagnosis.findings, finding)))


def _method(
    batch: TargetBatch,
    facts: Facts,
    diagnosis: Diagnosis,
    options: Options,
    previous_method: MethodName | None,
    num_matrices: int,
) -> Plan:
    if options.method != "auto":
        return Plan(options.method, "asked for", diagnosis)
    if diagnosis.zero:
        return Plan("low_rank", "the Hessian is exactly zero", diagnosis)
    flat = diagnosis.network in FLAT
    memory = options.memory(batch.x.device)
    whole: MethodName = "low_rank" if flat else "dense"
    need = least_memory(whole, batch, facts, options)
    if need > memory:
        less = least_memory("lanczos", batch, facts, options) < need
        what = "gradients of all outputs" if flat else "whole matrices"
        reason = f"the {what} need {readable(need)} for one sample, and {readable(memory)} may be used"
        return Plan("lanczos" if less else whole, reason, diagnosis)
    if previous_method == "lanczos" or (previous_method == "dense" and not flat):
        return Plan(
            previous_method,
            "kept from the first measurement of this run, so that its curves are of one kind",
            diagnosis,
        )
    if flat:
        return Plan("low_rank", "the network is piecewise linear: C gradients hold the whole Hessian", diagnosis)
    if batch.num_inputs <= LARGEST_DENSE:
        return Plan("dense", f"D = {batch.num_inputs} is small enough for whole matrices", diagnosis)
    if num_matrices == batch.num_samples:
        return Plan("dense", "the whole matrices of every sample are wanted for heatmaps anyway", diagnosis)
    return cheaper(
        batch.shape,
        options,
        seconds_per_hvp(batch, facts, memory, options.generator()),
        seconds_per_column(batch, facts, memory, options.chunk_size),
        EIGH[batch.x.dtype],
        num_matrices,
        diagnosis=diagnosis,
    )


def cheaper(
    shape: tuple[int, int, int],
    options: Options,
    hvp: float,
    column: float,
    eigh: float,
    num_matrices: int = 0,
    *,
    diagnosis: Diagnosis,
) -> Plan:
    """``dense`` unless it costs much more than ``lanczos``: it is exact and complete.

    Args:
        shape: (N, K, D).
        options: how to measure.
        hvp: seconds of one HVP of every problem.
        column: seconds of one column of every problem's matrix, in a block.
        eigh: seconds per D³ of an eigendecomposition.
        num_matrices: for how many samples ``lanczos`` would be followed by all columns too.
        diagnosis: of the batch.
    """
    num_samples, num_classes, num_inputs = shape
    dense = num_inputs * column + num_samples * num_classes * eigh * num_inputs**3
    products = expected_products(num_inputs, options.num_eigenvalues, options.block_size, options.density_vectors)
    lanczos = products * ORTHOGONALISATION * hvp + num_matrices / num_samples * num_inputs * column
    numbers = (
        f"with {hvp:.2g} s per Hessian-vector product and {column:.2g} s per column, the whole spectrum "
        f"(D = {num_inputs}) is expected to take {dense:.2g} s and its ends {lanczos:.2g} s"
    )
    method: MethodName = "dense" if dense <= max(CHEAP, WORTH * lanczos) else "lanczos"
    return Plan(method, numbers, diagnosis, hvp, {"dense": dense, "lanczos": lanczos})


def seconds_per_hvp(batch: TargetBatch, facts: Facts, memory: int, generator: torch.Generator) -> float:
    """Median time of three HVPs of all problems on their retained graph, from as many samples as fit ``memory``."""

    def times(samples: slice) -> list[float]:
        few = batch.select(samples)
        engine, v = ReverseOverReverse(few), random_vectors(few, generator)
        engine.hvp(v)  # warm-up
        return [_seconds(lambda: engine.hvp(v)) for _ in range(3)]

    size = max(1, memory // facts.product_bytes)
    samples, measured = next(in_groups(batch.num_samples, size, times))
    return sorted(measured)[1] * batch.num_samples / (samples.stop - samples.start)


def seconds_per_column(batch: TargetBatch, facts: Facts, memory: int, chunk_size: ChunkSize) -> float:
    """Time of one column of all problems by the faster engine, from one block such as the work begins with.

    What a column in a block costs hangs on block size and engine: only the clock tells.
    """
    engines: tuple[AutodiffMode, ...] = get_args(AutodiffMode) if facts.agree else ("reverse_over_reverse",)

    def time_of(samples: slice) -> float:
        few = batch.select(samples)
        count = first_block(few.num_samples, facts.product_bytes) if chunk_size == "auto" else chunk_size
        room = memory // (few.num_samples * facts.product_bytes)
        basis = torch.eye(batch.num_inputs)[: max(1, min(count, room))].to(few.x)
        return min(_seconds_of_block(AUTODIFF_MODES[name](few), basis) for name in engines) / len(basis)

    size = max(1, memory // (facts.product_bytes + 6 * facts.matrix_bytes))  # as many as the work takes at a time
    samples, measured = next(in_groups(batch.num_samples, size, time_of))
    return measured * batch.num_samples / (samples.stop - samples.start)


def _seconds_of_block(engine: Engine, basis: Tensor) -> float:
    engine.prepare(len(basis))
    return _seconds(lambda: engine.columns(basis))


def _seconds(work: Callable[[], Tensor]) -> float:
    begin = time.perf_counter()
    wait_for(work())
    return time.perf_counter() - begin


def result_bytes(batch: TargetBatch, options: Options, num_matrices: int = 0) -> int:
    """The memory of a whole batch's results, twice while groups are joined.

    These are vectors, gradients and diagonals, and the whole matrices of the first ``num_matrices`` samples.
    """
    num_samples, num_classes, num_inputs = batch.shape
    num_rows = num_samples * (min(options.num_eigenvalues, num_inputs) + 6) + num_matrices * num_inputs
    return 2 * num_classes * num_rows * num_inputs * batch.x.element_size()


def bytes_per_sample(method: MethodName, facts: Facts, options: Options) -> int:
    """The memory that a method takes for each sample it works on at the same time."""
    if method == "lanczos":
        return lanczos_bytes(facts, options.num_eigenvalues, options.block_size)
    return low_rank_bytes(facts) if method == "low_rank" else dense_bytes(facts)


def least_memory(method: MethodName, batch: TargetBatch, facts: Facts, options: Options) -> int:
    """The ``max_memory`` with which a method works, one sample at a time."""
    return result_bytes(batch, options) + bytes_per_sample(method, facts, options)


def working_memory(plan: Plan, batch: TargetBatch, facts: Facts, diagnosis: Diagnosis, options: Options) -> int:
    """The bytes that are left beside the results.

    Raises:
        MeasurementError: they are not enough for one sample; the message says what would fit.
    """
    memory = options.memory(batch.x.device)
    need = least_memory(plan.method, batch, facts, options)
    if need <= memory:
        return memory - result_bytes(batch, options, plan.num_matrices)
    num_samples, num_classes, num_inputs = batch.shape
    raise MeasurementError(
        f"method='{plan.method}' needs {readable(need)} to work on one sample of {num_classes} "
        f"class{'es' if num_classes > 1 else ''} (D = {num_inputs}) beside the results of {num_samples}, and "
        f"{readable(memory)} may be used. {_what_fits(plan.method, batch, facts, diagnosis, options, memory)}"
    )


def _what_fits(
    method: MethodName, batch: TargetBatch, facts: Facts, diagnosis: Diagnosis, options: Options, memory: int
) -> str:
    def fits(fewer: TargetBatch, by: MethodName) -> bool:
        same = fewer.num_classes == batch.num_classes
        return least_memory(by, fewer, facts if same else Facts(fewer), options) <= memory

    def most(count: int, select: str) -> int:
        """The largest number below ``count`` that fits; 0 if none does."""
        low, high = 0, count
        while high - low > 1:
            middle = (low + high) // 2
            fewer = _first_classes(batch, middle) if select == "classes" else batch.select(slice(0, middle))
            low, high = (middle, high) if fits(fewer, method) else (low, middle)
        return low

    found = []
    if num_classes := most(batch.num_classes, "classes"):
        found.append(f"look at {num_classes} class{'es' if num_classes > 1 else ''} at most")
    if num_samples := most(batch.num_samples, "samples"):
        found.append(f"measure {num_samples} sample{'s' if num_samples > 1 else ''} at a time")
    exact: MethodName = "low_rank" if diagnosis.network in FLAT else "dense"
    others: tuple[MethodName, ...] = ("lanczos", exact)
    found += [f"take method='{other}'" for other in others if other != method and fits(batch, other)]
    found.append(f"allow max_memory={least_memory(method, batch, facts, options)}")
    sentence = ", or ".join(found)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _first_classes(batch: TargetBatch, count: int) -> TargetBatch:
    return replace(batch, classes=batch.classes[:, :count])
