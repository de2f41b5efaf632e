"""Which method finds the spectra of a batch, by what it costs and by what fits the memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch

from lightning_hessian.curvature.dense import ChunkSize, dense_bytes
from lightning_hessian.curvature.density import NUM_STEPS
from lightning_hessian.curvature.derivatives import ReverseOverReverse, engines_agree, random_vectors
from lightning_hessian.curvature.diagnosis import Diagnosis
from lightning_hessian.curvature.extremes import lanczos_bytes
from lightning_hessian.curvature.low_rank import low_rank_bytes
from lightning_hessian.curvature.memory import available_memory, in_groups, product_bytes, readable
from lightning_hessian.curvature.problems import Problems
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
EIGH = 1e-10  # seconds per D³ of a float32 eigendecomposition with vectors (6e-11 to 1.3e-10, one CPU core)
ESTIMATES = 60  # products for trace, norms of the two parts and checks
ORTHOGONALISATION = 1.3  # what a Lanczos iteration costs in products


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        method: ``"auto"`` or a method.
        num_eigenvalues: eigenvectors kept per problem; for ``lanczos`` the number of eigenvalues.
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
    """

    method: MethodName
    reason: str
    seconds_per_hvp: float | None = None
    expected_seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def lasts(self) -> bool:
        """Whether clock or memory decided, which may decide otherwise next time: a run had better keep the choice."""
        return self.seconds_per_hvp is not None or self.method == "lanczos"


def make_plan(problems: Problems, diagnosis: Diagnosis, options: Options, kept: MethodName | None = None) -> Plan:
    """The cheapest method that is exact or knows its error, and fits the memory.

    Args:
        problems: what to differentiate.
        diagnosis: of these problems.
        options: how to measure.
        kept: what an earlier measurement of the run chose by clock or memory: taken again where it still
            applies, so that the curves of a run are of one kind.

    Raises:
        MeasurementError: ``low_rank`` was asked for and the network is not piecewise linear.
    """
    flat = diagnosis.network in FLAT
    if options.method == "low_rank" and not flat:
        raise MeasurementError(
            "method='low_rank' is exact for networks that are piecewise linear in their input, and this one is "
            f"{diagnosis.network}. Use method='auto', 'dense' or 'lanczos'."
        )
    if options.method != "auto":
        return Plan(options.method, "asked for")
    if diagnosis.zero:
        return Plan("low_rank", "the Hessian is exactly zero")
    memory = options.memory(problems.x.device)
    whole: MethodName = "low_rank" if flat else "dense"
    need = least_memory(whole, problems, options)
    if need > memory:
        less = least_memory("lanczos", problems, options) < need
        what = "gradients of all outputs" if flat else "whole matrices"
        reason = f"the {what} need {readable(need)} for one sample, and {readable(memory)} may be used"
        return Plan("lanczos" if less else whole, reason)
    if kept == "lanczos" or (kept == "dense" and not flat):
        return Plan(kept, "kept from the first measurement of this run, so that its curves are of one kind")
    if flat:
        return Plan("low_rank", "the network is piecewise linear: C gradients hold the whole Hessian")
    if problems.num_inputs <= LARGEST_DENSE:
        return Plan("dense", f"D = {problems.num_inputs} is small enough for whole matrices")
    agree, _ = engines_agree(problems, options.generator())
    seconds = seconds_per_hvp(problems, memory, options.generator())
    return cheaper(problems.shape, options, seconds, shared=agree)


def cheaper(shape: tuple[int, int, int], options: Options, seconds: float, *, shared: bool) -> Plan:
    """``dense`` unless it costs much more than ``lanczos``: it is exact and complete.

    Args:
        shape: (N, K, D).
        options: how to measure.
        seconds: of one HVP of every problem.
        shared: whether the fast engine works on this model: its columns share passes between classes.
    """
    num_samples, num_classes, num_inputs = shape
    column = (1 + num_classes) / (2 * num_classes) if shared else 1
    dense = num_inputs * column * seconds + num_samples * num_classes * EIGH * num_inputs**3
    products = max(4 * options.num_eigenvalues, 40) + ESTIMATES + NUM_STEPS * options.density_vectors
    lanczos = products * ORTHOGONALISATION * seconds
    numbers = (
        f"with {seconds:.2g} s per Hessian-vector product, the whole spectrum (D = {num_inputs}) is expected to "
        f"take {dense:.2g} s and its ends {lanczos:.2g} s"
    )
    method: MethodName = "dense" if dense <= max(CHEAP, WORTH * lanczos) else "lanczos"
    return Plan(method, numbers, seconds, {"dense": dense, "lanczos": lanczos})


def seconds_per_hvp(problems: Problems, memory: int, generator: torch.Generator) -> float:
    """Median time of three HVPs of all problems on their retained graph, from as many samples as fit ``memory``."""

    def times(samples: slice) -> list[float]:
        few = problems.select(samples)
        engine, v = ReverseOverReverse(few), random_vectors(few, generator)
        engine.hvp(v)  # warm-up
        return [_seconds(engine, v) for _ in range(3)]

    size = max(1, memory // product_bytes(problems))
    samples, measured = next(in_groups(problems.num_samples, size, times))
    return sorted(measured)[1] * problems.num_samples / (samples.stop - samples.start)


def _seconds(engine: ReverseOverReverse, v: torch.Tensor) -> float:
    begin = time.perf_counter()
    result = engine.hvp(v)
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return time.perf_counter() - begin


def result_bytes(problems: Problems, options: Options) -> int:
    """The memory of a whole batch's results: vectors, gradients and diagonals, twice while groups are joined."""
    num_samples, num_classes, num_inputs = problems.shape
    num_rows = min(options.num_eigenvalues, num_inputs) + 6
    return 2 * num_samples * num_classes * num_rows * num_inputs * problems.x.element_size()


def bytes_per_sample(method: MethodName, problems: Problems, options: Options) -> int:
    """The memory that a method takes for each sample it works on at the same time."""
    if method == "lanczos":
        return lanczos_bytes(problems, options.num_eigenvalues, options.block_size)
    return low_rank_bytes(problems) if method == "low_rank" else dense_bytes(problems)


def least_memory(method: MethodName, problems: Problems, options: Options) -> int:
    """The ``max_memory`` with which a method works, one sample at a time."""
    return result_bytes(problems, options) + bytes_per_sample(method, problems, options)


def working_memory(method: MethodName, problems: Problems, diagnosis: Diagnosis, options: Options) -> int:
    """The bytes that are left beside the results.

    Raises:
        MeasurementError: they are not enough for one sample; the message says what would fit.
    """
    memory = options.memory(problems.x.device)
    need = least_memory(method, problems, options)
    if need <= memory:
        return memory - result_bytes(problems, options)
    num_samples, num_classes, num_inputs = problems.shape
    raise MeasurementError(
        f"method='{method}' needs {readable(need)} to work on one sample of {num_classes} "
        f"class{'es' if num_classes > 1 else ''} (D = {num_inputs}) beside the results of {num_samples}, and "
        f"{readable(memory)} may be used. {_what_fits(method, problems, diagnosis, options, memory)}"
    )


def _what_fits(method: MethodName, problems: Problems, diagnosis: Diagnosis, options: Options, memory: int) -> str:
    def fits(fewer: Problems, by: MethodName) -> bool:
        return least_memory(by, fewer, options) <= memory

    def most(count: int, select: str) -> int:
        """The largest number below ``count`` that fits; 0 if none does."""
        low, high = 0, count
        while high - low > 1:
            middle = (low + high) // 2
            fewer = _first_classes(problems, middle) if select == "classes" else problems.select(slice(0, middle))
            low, high = (middle, high) if fits(fewer, method) else (low, middle)
        return low

    found = []
    if num_classes := most(problems.num_classes, "classes"):
        found.append(f"look at {num_classes} class{'es' if num_classes > 1 else ''} at most")
    if num_samples := most(problems.num_samples, "samples"):
        found.append(f"measure {num_samples} sample{'s' if num_samples > 1 else ''} at a time")
    exact: MethodName = "low_rank" if diagnosis.network in FLAT else "dense"
    others: tuple[MethodName, ...] = ("lanczos", exact)
    found += [f"take method='{other}'" for other in others if other != method and fits(problems, other)]
    found.append(f"allow max_memory={least_memory(method, problems, options)}")
    sentence = ", or ".join(found)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _first_classes(problems: Problems, count: int) -> Problems:
    return replace(problems, classes=problems.classes[:, :count])
