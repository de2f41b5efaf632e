"""Runs a measurement by the method that was planned for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from lightning_hessian.curvature.dense import decompose, hessians, matrix_bytes, symmetrize_, zero_parts
from lightning_hessian.curvature.density import Density, exact_density
from lightning_hessian.curvature.derivatives import EngineName, engines_agree, gradients
from lightning_hessian.curvature.diagnosis import Diagnosis, diagnose
from lightning_hessian.curvature.extremes import extreme_parts
from lightning_hessian.curvature.low_rank import low_rank_bytes, low_rank_hessians, low_rank_parts, part_norms
from lightning_hessian.curvature.memory import group_size, in_groups, product_bytes
from lightning_hessian.curvature.plan import FLAT, Options, Plan, make_plan, working_memory
from lightning_hessian.curvature.problems import Problems
from lightning_hessian.curvature.spectrum import Cost, MethodName, Spectrum
from lightning_hessian.errors import MeasurementError

# How asymmetric a Hessian may be before its digits are called rounding.
ASYMMETRY_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}

ESTIMATED = ("trace", "frobenius_norm", "diagonal", "head_norm", "network_norm")


@dataclass(frozen=True)
class Measurement:
    """A spectrum, the whole matrices ``[S, K, D, D]`` of the first S samples where asked for, and what was planned."""

    spectrum: Spectrum
    hessian: Tensor | None
    plan: Plan


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
    kept: MethodName | None = None,
) -> Measurement:
    """The spectrum of every problem, and the whole matrices of a few samples.

    Args:
        problems: what to differentiate.
        target: name of the target, for the result.
        options: how to measure.
        diagnosis: of these problems, where it is known already.
        num_matrices: for how many samples, counted from the first, the matrices are wanted.
        kept: the method that an earlier measurement of a curved network chose.

    Raises:
        MeasurementError: values, gradients or Hessians are not finite, the method does not apply, or nothing
            fits the memory.
    """
    begin = time.perf_counter()
    options = replace(options, max_memory=options.memory(problems.x.device))
    gradient = finite_gradients(problems, options)
    diagnosis = diagnosis or _diagnosed(problems, options)
    plan = make_plan(problems, diagnosis, options, kept)
    if diagnosis.zero:
        result = _zero(gradient, options, num_matrices)
    else:
        left = working_memory(plan.method, problems, diagnosis, options)
        run = {"dense": _dense, "low_rank": _low_rank, "lanczos": _lanczos}[plan.method]
        result = run(problems, gradient, diagnosis, replace(options, max_memory=left), num_matrices)
    spectrum = Spectrum(
        **_with_exact_errors(result.parts),
        complete=result.complete,
        density=exact_density(result.parts["eigenvalues"], problems.num_inputs) if result.complete else result.density,
        gradient=gradient,
        method=plan.method,
        reason=plan.reason,
        engine=result.engine,
        target=target,
        diagnosis=_with_asymmetry(diagnosis, result.parts["asymmetry"], problems.x.dtype),
        cost=Cost(time.perf_counter() - begin, result.num_hvps),
    )
    return Measurement(spectrum, torch.cat(result.matrices) if num_matrices else None, plan)


def diagnose_finite(problems: Problems, options: Options) -> Diagnosis:
    """The diagnosis of problems whose values and gradients are finite.

    Raises:
        MeasurementError: they are not.
    """
    finite_gradients(problems, options)
    return _diagnosed(problems, options)


def finite_gradients(problems: Problems, options: Options) -> Tensor:
    """The gradients ``[N, K, D]``, as many samples at a time as fit the memory.

    Raises:
        MeasurementError: inputs, values or gradients are not finite.
    """

    def work(samples: slice) -> tuple[Tensor, Tensor]:
        group = problems.select(samples)
        with torch.no_grad():
            values = group.values(group.x)
        return values, gradients(group)

    _tell_if_not_finite("inputs", problems.x)
    groups = in_groups(problems.num_samples, _fitting(problems, options, 1), work)
    values, gradient = (torch.cat(parts) for parts in zip(*(result for _, result in groups), strict=True))
    _tell_if_not_finite("values of the target", values)
    _tell_if_not_finite("gradients", gradient)
    return gradient


def _tell_if_not_finite(name: str, numbers: Tensor) -> None:
    bad = (~numbers.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise MeasurementError(
            f"The {name} are not finite (NaN or infinite) for samples {bad[:10]} of {len(numbers)}, "
            f"so there is no Hessian to measure. Look for NaN in the weights or in the inputs."
        )


def _diagnosed(problems: Problems, options: Options) -> Diagnosis:
    # In float64, and by both engines: four times the memory of a product.
    return diagnose(problems, options.generator(), _fitting(problems, options, 4))


def _fitting(problems: Problems, options: Options, num_products: int) -> int:
    """For how many samples the memory of ``num_products`` products may be taken; at least one."""
    return max(1, options.memory(problems.x.device) // (num_products * product_bytes(problems)))


def whole_hessians(problems: Problems, options: Options, diagnosis: Diagnosis) -> Iterator[tuple[slice, Tensor]]:
    """Symmetric whole Hessians, a group at a time: JᵀAJ if exact, else by the fastest engine that is true."""
    size, make = _matrix_maker(problems, options, diagnosis)
    for samples, (matrices, _, _) in in_groups(problems.num_samples, size, make):
        yield samples, matrices


def _matrix_maker(
    problems: Problems, options: Options, diagnosis: Diagnosis
) -> tuple[int, Callable[[slice], tuple[Tensor, Tensor, EngineName]]]:
    """How many samples' whole Hessians fit the memory, and a function that makes them for some samples.

    It gives symmetric matrices ``[n, K, D, D]``, their relative asymmetry before ``[n, K]``, and the engine.
    """
    memory = options.memory(problems.x.device)
    of_matrices = matrix_bytes(problems.select(slice(0, 1)))
    per_sample = low_rank_bytes(problems) + of_matrices
    if diagnosis.network in FLAT and options.method != "dense" and per_sample <= memory:

        def make_low_rank(samples: slice) -> tuple[Tensor, Tensor, EngineName]:
            matrices = low_rank_hessians(problems.select(samples))
            return matrices, symmetrize_(matrices), "reverse_over_reverse"

        return memory // per_sample, make_low_rank
    per_column = product_bytes(problems)
    generator = options.generator()
    agree, _ = engines_agree(problems, generator)

    def make(samples: slice) -> tuple[Tensor, Tensor, EngineName]:
        matrices, engine = hessians(
            problems.select(samples),
            get_args(EngineName) if agree else ("reverse_over_reverse",),
            chunk_size=options.chunk_size,
            max_memory=memory,
            generator=generator,
            per_column=per_column,
        )
        return matrices, symmetrize_(matrices), engine

    what = f"The whole Hessians ({problems.num_classes} classes, D = {problems.num_inputs})"
    return group_size(problems.num_samples, per_column + of_matrices, memory, what), make


def _zero(gradient: Tensor, options: Options, num_matrices: int) -> _Result:
    num_listed = min(options.num_eigenvalues, gradient.shape[-1])
    matrices = [gradient.new_zeros(num_matrices, *gradient.shape[1:], gradient.shape[-1])]
    return _Result(zero_parts(gradient, num_listed, num_listed), matrices, 0)


def _dense(problems: Problems, gradient: Tensor, diagnosis: Diagnosis, options: Options, num_matrices: int) -> _Result:
    size, make = _matrix_maker(problems, options, diagnosis)

    def work(samples: slice) -> tuple[dict[str, Tensor], Tensor, EngineName]:
        matrices, asymmetry, engine = make(samples)
        found = decompose(matrices, gradient[samples], options.num_eigenvalues)
        found |= {**part_norms(problems.select(samples), matrices), "asymmetry": asymmetry}
        return found, matrices[: max(0, num_matrices - samples.start)].clone(), engine

    groups = [result for _, result in in_groups(problems.num_samples, size, work)]
    parts, kept, engines = zip(*groups, strict=True)
    return _Result(_joined(parts), list(kept), problems.num_inputs, engines[-1])


def _low_rank(
    problems: Problems, gradient: Tensor, diagnosis: Diagnosis, options: Options, num_matrices: int
) -> _Result:
    memory = options.memory(problems.x.device)
    size = group_size(problems.num_samples, low_rank_bytes(problems), memory, "The gradients of all outputs")
    groups = in_groups(
        problems.num_samples, size, lambda s: low_rank_parts(problems.select(s), options.num_eigenvalues)
    )
    parts = [found for _, found in groups]
    kept = _first_matrices(problems, diagnosis, options, num_matrices)
    return _Result(_joined(parts), kept, 0)


def _lanczos(
    problems: Problems, gradient: Tensor, diagnosis: Diagnosis, options: Options, num_matrices: int
) -> _Result:
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
    return [matrices for _, matrices in whole_hessians(few, options, diagnosis)]


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _with_exact_errors(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parts with an error of zero for every quantity that a method did not estimate."""
    norms = {name: torch.zeros_like(parts["trace"]) for name in ("head_norm", "network_norm")}  # of a zero Hessian
    parts = {**norms, **parts}
    return {**{f"{name}_error": torch.zeros_like(parts[name]) for name in ESTIMATED}, **parts}


def _with_asymmetry(diagnosis: Diagnosis, asymmetry: Tensor, dtype: torch.dtype) -> Diagnosis:
    worst = float(asymmetry.max())
    if not diagnosis.trusted or worst <= ASYMMETRY_TOLERANCE[dtype]:
        return diagnosis  # where the cause is known, rounding is not it
    finding = (
        f"A Hessian is asymmetric by {worst:.1e} of its norm: in {str(dtype).removeprefix('torch.')} it is "
        f"lost in rounding. Measure in float64."
    )
    return replace(diagnosis, findings=(*diagnosis.findings, finding), trusted=False)
