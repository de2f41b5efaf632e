"""Picks the method of a measurement and runs it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_hessian.curvature.dense import ChunkSize, decompose, hessians, symmetrize_, zero_parts
from lightning_hessian.curvature.density import Density, exact_density
from lightning_hessian.curvature.derivatives import EngineName, engines_agree, gradients
from lightning_hessian.curvature.diagnosis import Diagnosis, diagnose
from lightning_hessian.curvature.extremes import extreme_parts
from lightning_hessian.curvature.low_rank import low_rank_bytes, low_rank_hessians, low_rank_parts, part_norms
from lightning_hessian.curvature.memory import available_memory, group_size
from lightning_hessian.curvature.problems import Problems
from lightning_hessian.curvature.spectrum import Cost, MethodName, Spectrum
from lightning_hessian.errors import MeasurementError

MethodChoice = Literal["auto", "dense", "low_rank", "lanczos"]
METHODS: tuple[MethodChoice, ...] = get_args(MethodChoice)

# How asymmetric a Hessian may be before its digits are called rounding.
ASYMMETRY_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}

# Up to this many inputs all D columns cost no more than the 100 to 200 products of Lanczos and its estimates,
# and the whole spectrum is had exactly.
LARGEST_DENSE = 256

ESTIMATED = ("trace", "frobenius_norm", "diagonal", "head_norm", "network_norm")

FLAT = ("piecewise_linear", "linear")  # networks whose Hessian is JᵀAJ


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        method: ``"auto"`` or a method.
        num_eigenvalues: eigenvectors kept per problem; for ``lanczos`` the number of eigenvalues.
        chunk_size: columns computed at once; ``"auto"``: found while working.
        max_memory: bytes that may be used; None: half of what is free on the device.
        block_size: start vectors of ``lanczos``: it sees an eigenvalue at most that many times.
        seed: of the monitor's own random vectors, the same at every measurement: curves show the network.
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
class Measurement:
    """A spectrum, with the whole matrices ``[S, K, D, D]`` of the first S samples where they were asked for."""

    spectrum: Spectrum
    hessian: Tensor | None


@dataclass(frozen=True)
class _Result:
    """What a method gives: parts of a ``Spectrum``, the matrices it met on the way, and its cost in HVPs."""

    parts: dict[str, Tensor]
    matrices: list[Tensor]
    num_hvps: int
    engine: EngineName = "reverse_over_reverse"
    complete: bool = True
    density: Density | None = None


def measure(
    problems: Problems,
    target: str,
    options: Options,
    *,
    diagnosis: Diagnosis | None = None,
    num_matrices: int = 0,
) -> Measurement:
    """The spectrum of every problem, and the whole matrices of a few samples.

    Args:
        problems: what to differentiate.
        target: name of the target, for the result.
        options: how to measure.
        diagnosis: of these problems, where it is known already.
        num_matrices: for how many samples, counted from the first, the matrices are wanted.

    Raises:
        MeasurementError: values, gradients or Hessians are not finite, the method does not apply, or nothing
            fits the memory.
    """
    begin = time.perf_counter()
    diagnosis = diagnosis or diagnose_finite(problems, options)
    method, reason = choose_method(problems, diagnosis, options)
    if diagnosis.zero:
        result = _zero(problems, options, num_matrices)
    else:
        run = {"dense": _dense, "low_rank": _low_rank, "lanczos": _lanczos}[method]
        result = run(problems, diagnosis, options, num_matrices)
    spectrum = Spectrum(
        **_with_exact_errors(result.parts),
        complete=result.complete,
        density=exact_density(result.parts["eigenvalues"], problems.num_inputs) if result.complete else result.density,
        gradient=gradients(problems),
        method=method,
        reason=reason,
        engine=result.engine,
        target=target,
        diagnosis=_with_asymmetry(diagnosis, result.parts["asymmetry"], problems.x.dtype),
        cost=Cost(time.perf_counter() - begin, result.num_hvps),
    )
    return Measurement(spectrum, torch.cat(result.matrices) if num_matrices else None)


def choose_method(problems: Problems, diagnosis: Diagnosis, options: Options) -> tuple[MethodName, str]:
    """The cheapest method that is exact or knows its error, and why it was chosen, in words.

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
        return options.method, "asked for"
    if diagnosis.zero:
        return "low_rank", "the Hessian is exactly zero"
    if flat and low_rank_bytes(problems) <= options.memory(problems.x.device):
        return "low_rank", "the network is piecewise linear: C gradients hold the whole Hessian"
    if flat:
        return "lanczos", "the network is piecewise linear, and its C gradients do not fit the memory"
    if problems.num_inputs <= LARGEST_DENSE:
        return "dense", f"D = {problems.num_inputs} is small enough for whole matrices"
    return "lanczos", f"D = {problems.num_inputs} columns cost more than the ends of the spectrum"


def diagnose_finite(problems: Problems, options: Options) -> Diagnosis:
    """The diagnosis of problems whose values and gradients are finite.

    Raises:
        MeasurementError: they are not.
    """
    with torch.no_grad():
        quantities = {"inputs": problems.x, "values of the target": problems.values(problems.x)}
    for name, numbers in {**quantities, "gradients": gradients(problems)}.items():
        bad = (~numbers.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
        if bad:
            raise MeasurementError(
                f"The {name} are not finite (NaN or infinite) for samples {bad[:10]} of {problems.num_samples}, "
                f"so there is no Hessian to measure. Look for NaN in the weights or in the inputs."
            )
    return diagnose(problems, options.generator())


def whole_hessians(
    problems: Problems, options: Options, diagnosis: Diagnosis
) -> Iterator[tuple[slice, Tensor, Tensor, EngineName]]:
    """Whole Hessians, a group of samples at a time: JᵀAJ if exact, else by the fastest engine that is true.

    Gives (samples, symmetric ``[n, K, D, D]``, relative asymmetry before ``[n, K]``, engine).
    """
    matrix_bytes = 3 * problems.num_classes * problems.num_inputs**2 * problems.x.element_size()
    per_sample = low_rank_bytes(problems) + matrix_bytes
    memory = options.memory(problems.x.device)
    engine: EngineName = "reverse_over_reverse"
    if diagnosis.network in FLAT and options.method != "dense" and per_sample <= memory:
        size = memory // per_sample
        for start in range(0, problems.num_samples, size):
            samples = slice(start, min(start + size, problems.num_samples))
            matrices = low_rank_hessians(problems.select(samples))
            yield samples, matrices, symmetrize_(matrices), engine
        return
    generator = options.generator()
    agree, _ = engines_agree(problems, generator)
    groups = hessians(
        problems,
        get_args(EngineName) if agree else (engine,),
        chunk_size=options.chunk_size,
        max_memory=memory,
        generator=generator,
    )
    for samples, matrices, engine in groups:
        yield samples, matrices, symmetrize_(matrices), engine


def _zero(problems: Problems, options: Options, num_matrices: int) -> _Result:
    num_listed = min(options.num_eigenvalues, problems.num_inputs)
    gradient = gradients(problems)
    matrices = [gradient.new_zeros(num_matrices, *gradient.shape[1:], problems.num_inputs)]
    return _Result(zero_parts(gradient, num_listed, num_listed), matrices, 0)


def _dense(problems: Problems, diagnosis: Diagnosis, options: Options, num_matrices: int) -> _Result:
    gradient = gradients(problems)
    parts, kept = [], []
    engine: EngineName = "reverse_over_reverse"
    for samples, matrices, asymmetry, used in whole_hessians(problems, options, diagnosis):
        engine = used
        found = decompose(matrices, gradient[samples], options.num_eigenvalues)
        parts.append({**found, **part_norms(problems.select(samples), matrices), "asymmetry": asymmetry})
        kept.append(matrices[: max(0, num_matrices - samples.start)])
    return _Result(_joined(parts), kept, problems.num_inputs, engine)


def _low_rank(problems: Problems, diagnosis: Diagnosis, options: Options, num_matrices: int) -> _Result:
    per_sample = low_rank_bytes(problems)
    memory = options.memory(problems.x.device)
    size = group_size(problems.num_samples, per_sample, memory, "The gradients of all outputs")
    groups = [problems.select(slice(i, i + size)) for i in range(0, problems.num_samples, size)]
    parts = [low_rank_parts(group, options.num_eigenvalues) for group in groups]
    kept = _first_matrices(problems, diagnosis, options, num_matrices)
    return _Result(_joined(parts), kept, 0)


def _lanczos(problems: Problems, diagnosis: Diagnosis, options: Options, num_matrices: int) -> _Result:
    flat = diagnosis.network in FLAT
    memory = options.memory(problems.x.device)
    parts, num_hvps = extreme_parts(
        problems,
        options.num_eigenvalues,
        block_size=options.block_size,
        head_only=flat,
        max_memory=memory,
        generator=options.generator(),
        density_vectors=options.density_vectors,
    )
    nodes, weights = (parts.pop(f"density_{name}", None) for name in ("nodes", "weights"))
    rule = None if nodes is None or weights is None else Density(nodes, weights)
    kept = _first_matrices(problems, diagnosis, options, num_matrices)
    complete = parts["eigenvalues"].shape[-1] == problems.num_inputs
    return _Result(parts, kept, num_hvps, complete=complete, density=rule)


def _first_matrices(problems: Problems, diagnosis: Diagnosis, options: Options, num_matrices: int) -> list[Tensor]:
    if num_matrices == 0:
        return []
    few = problems.select(slice(0, num_matrices))
    return [matrices for _, matrices, _, _ in whole_hessians(few, options, diagnosis)]


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _with_exact_errors(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parts with an error of zero for every quantity that a method did not estimate."""
    norms = {name: torch.zeros_like(parts["trace"]) for name in ("head_norm", "network_norm")}  # of a zero Hessian
    parts = {**norms, **parts}
    return {**{f"{name}_error": torch.zeros_like(parts[name]) for name in ESTIMATED}, **parts}


def _with_asymmetry(diagnosis: Diagnosis, asymmetry: Tensor, dtype: torch.dtype) -> Diagnosis:
    worst = float(asymmetry.max())
    if worst <= ASYMMETRY_TOLERANCE[dtype]:
        return diagnosis
    finding = (
        f"A Hessian is asymmetric by {worst:.1e} of its norm: in {str(dtype).removeprefix('torch.')} it is "
        f"lost in rounding. Measure in float64."
    )
    return replace(diagnosis, findings=(*diagnosis.findings, finding), trusted=False)
