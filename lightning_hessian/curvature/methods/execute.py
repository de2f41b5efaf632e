"""Runs a measurement by the method that was planned for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from lightning_hessian.curvature.algorithms.quadrature import Density, exact_density
from lightning_hessian.curvature.analysis import Analysis, finite_gradients
from lightning_hessian.curvature.checks.diagnosis import Diagnosis
from lightning_hessian.curvature.cost_model import Facts
from lightning_hessian.curvature.memory import group_size, in_groups, joined
from lightning_hessian.curvature.meter import Meter
from lightning_hessian.curvature.methods.dense import decompose, dense_bytes, hessians, symmetrize_, zero_parts
from lightning_hessian.curvature.methods.lanczos import extreme_parts, lanczos_bytes
from lightning_hessian.curvature.methods.low_rank import gauss_newton_hessians, low_rank_bytes, low_rank_parts
from lightning_hessian.curvature.methods.plan import FLAT, Options, Plan, working_memory
from lightning_hessian.curvature.operators.autodiff import AutodiffMode
from lightning_hessian.curvature.operators.target_batch import TargetBatch
from lightning_hessian.curvature.operators.terms import term_norms
from lightning_hessian.curvature.progress import Progress, silent
from lightning_hessian.curvature.spectrum import Spectrum

# How asymmetric a Hessian may be before its digits are called rounding.
ASYMMETRY_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}

ALL_VECTORS = 64  # outputs up to which ``low_rank`` keeps all eigenvectors: with them the spectrum is the matrix

ESTIMATED = ("trace", "frobenius_norm", "diagonal", "gauss_newton_norm", "functional_norm")


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
    num_matvecs: int
    engine: AutodiffMode = "reverse_over_reverse"
    complete: bool = True
    density: Density | None = None


@dataclass(frozen=True)
class _Given:
    """What a method works on. ``num_matrices``: of the first samples, whose whole matrices are wanted too."""

    batch: TargetBatch
    facts: Facts
    gradient: Tensor
    diagnosis: Diagnosis
    options: Options
    num_matrices: int
    progress: Progress


def execute(
    batch: TargetBatch,
    plan: Plan,
    options: Options,
    *,
    target: str,
    analysis: Analysis | None = None,
    meter: Meter | None = None,
    progress: Progress = silent,
) -> Measurement:
    """The spectra of a batch, and the whole matrices of its first samples, by the method that was planned.

    Args:
        batch: what to differentiate: all samples the plan was made for, or some of them.
        plan: from ``make_plan``; ``num_matrices`` counts samples of this batch.
        options: those the plan was made with.
        target: name of the target, for the result.
        analysis: of exactly this batch where it was made; otherwise gradients and costs are determined here.
        meter: started when the measurement began.
        progress: called with the number of finished columns (``dense``), samples (``low_rank``) or matrix-vector
            products (``lanczos``).

    Raises:
        MeasurementError: gradients or Hessians are not finite, or one sample does not fit the memory.
    """
    meter = meter or Meter(batch.x.device)
    options = replace(options, max_memory=options.memory(batch.x.device))
    facts = analysis.costs if analysis else Facts(batch, options.seed)
    gradient = analysis.gradient if analysis else finite_gradients(batch, facts, options)
    diagnosis = plan.diagnosis
    if diagnosis.zero:
        result = _zero(gradient, options, plan.num_matrices)
    else:
        left = working_memory(plan, batch, facts, diagnosis, options)
        run = {"dense": _dense, "low_rank": _low_rank, "lanczos": _lanczos}[plan.method]
        bounded = replace(options, max_memory=left)
        result = run(_Given(batch, facts, gradient, diagnosis, bounded, plan.num_matrices, progress))
    spectrum = Spectrum(
        **_with_exact_errors(result.parts),
        complete=result.complete,
        density=exact_density(result.parts["eigenvalues"], batch.num_inputs) if result.complete else result.density,
        gradient=gradient,
        method=plan.method,
        reason=plan.reason,
        autodiff_mode=result.engine,
        target=target,
        diagnosis=with_asymmetry(diagnosis, result.parts["asymmetry"], batch.x.dtype),
        cost=meter.cost(result.num_matvecs),
    )
    return Measurement(spectrum, torch.cat(result.matrices) if plan.num_matrices else None, plan)


def whole_hessians(
    batch: TargetBatch, facts: Facts, options: Options, diagnosis: Diagnosis, progress: Progress = silent
) -> Iterator[tuple[slice, Tensor]]:
    """Symmetric whole Hessians, a group at a time: JᵀAJ if exact, else by the fastest engine that is true."""
    size, make = _matrix_maker(batch, facts, options, diagnosis, progress)
    for samples, (matrices, _, _) in in_groups(batch.num_samples, size, make):
        yield samples, matrices


def _matrix_maker(
    batch: TargetBatch, facts: Facts, options: Options, diagnosis: Diagnosis, progress: Progress
) -> tuple[int, Callable[[slice], tuple[Tensor, Tensor, Counter[AutodiffMode]]]]:
    """How many samples' whole Hessians fit the memory, and a function that makes them for some samples.

    It gives symmetric matrices ``[n, K, D, D]``, their relative asymmetry before ``[n, K]``, and how many columns
    each engine made.
    """
    memory = options.memory(batch.x.device)
    of_matrices = 6 * facts.matrix_bytes
    if diagnosis.network in FLAT and options.method != "dense":
        per_sample = low_rank_bytes(facts) + of_matrices
        if per_sample <= memory:

            def make_low_rank(samples: slice) -> tuple[Tensor, Tensor, Counter[AutodiffMode]]:
                matrices = gauss_newton_hessians(batch.select(samples))
                return matrices, symmetrize_(matrices), Counter()

            return memory // per_sample, make_low_rank

    def make(samples: slice) -> tuple[Tensor, Tensor, Counter[AutodiffMode]]:
        def told(what: str, done: int, _: int | None) -> None:
            progress(what, samples.start * batch.num_inputs + done, batch.num_samples * batch.num_inputs)

        matrices, made = hessians(
            batch.select(samples),
            get_args(AutodiffMode) if facts.agree else ("reverse_over_reverse",),
            chunk_size=options.chunk_size,
            max_memory=memory,
            generator=options.generator(),
            per_column=facts.product_bytes,
            progress=told,
        )
        return matrices, symmetrize_(matrices), made

    what = f"The whole Hessians ({batch.num_classes} classes, D = {batch.num_inputs})"
    # With what term_norms needs where that fits: whole_hessians makes no term_norms, and may have room for less.
    per_sample = dense_bytes(facts) if dense_bytes(facts) <= memory else facts.product_bytes + of_matrices
    return group_size(batch.num_samples, per_sample, memory, what), make


def _zero(gradient: Tensor, options: Options, num_matrices: int) -> _Result:
    num_listed = min(options.num_eigenvalues, gradient.shape[-1])
    matrices = [gradient.new_zeros(num_matrices, *gradient.shape[1:], gradient.shape[-1])]
    return _Result(zero_parts(gradient, num_listed, num_listed), matrices, 0)


def _dense(given: _Given) -> _Result:
    batch, options = given.batch, given.options
    size, make = _matrix_maker(batch, given.facts, options, given.diagnosis, given.progress)

    def work(samples: slice) -> tuple[dict[str, Tensor], Tensor, Counter[AutodiffMode]]:
        matrices, asymmetry, made = make(samples)
        found = decompose(matrices, given.gradient[samples], options.num_eigenvalues)
        found |= {**term_norms(batch.select(samples), matrices), "asymmetry": asymmetry}
        return found, matrices[: max(0, given.num_matrices - samples.start)].clone(), made

    parts, kept, most = [], [], Counter[AutodiffMode]()
    for samples, (found, matrices, made) in in_groups(batch.num_samples, size, work):
        parts.append(found)
        kept.append(matrices)
        for engine, num_columns in made.items():
            most[engine] += num_columns * (samples.stop - samples.start)
    return _Result(joined(parts), kept, batch.num_inputs, most.most_common(1)[0][0])


def _low_rank(given: _Given) -> _Result:
    batch, options = given.batch, given.options

    def work(samples: slice) -> dict[str, Tensor]:
        return low_rank_parts(batch.select(samples), given.gradient[samples], num_vectors)

    memory, needed = options.memory(batch.x.device), low_rank_bytes(given.facts)
    num_vectors = options.num_eigenvalues
    more = min(given.facts.num_outputs, batch.num_inputs) - num_vectors
    # Twice while groups are joined, as all results.
    beside = 2 * batch.num_samples * batch.num_classes * more * given.facts.row_bytes
    if more > 0 and num_vectors + more <= ALL_VECTORS and needed + beside <= memory:
        num_vectors, memory = num_vectors + more, memory - beside
    size = group_size(batch.num_samples, needed, memory, "The gradients of all outputs")
    parts = []
    for samples, found in in_groups(batch.num_samples, size, work):
        parts.append(found)
        given.progress("samples", samples.stop, batch.num_samples)
    return _Result(joined(parts), _first_matrices(given), 0)


def _lanczos(given: _Given) -> _Result:
    batch, options = given.batch, given.options
    per_sample = lanczos_bytes(given.facts, options.num_eigenvalues, options.block_size)
    memory = options.memory(batch.x.device)
    parts, num_matvecs = extreme_parts(
        batch,
        given.gradient,
        options.num_eigenvalues,
        block_size=options.block_size,
        head_only=given.diagnosis.network in FLAT,
        group_size=group_size(batch.num_samples, per_sample, memory, "The Lanczos basis"),
        generator=options.generator(),
        density_vectors=options.density_vectors,
        progress=given.progress,
    )
    nodes, weights = (parts.pop(f"density_{name}", None) for name in ("nodes", "weights"))
    rule = None if nodes is None or weights is None else Density(nodes, weights)
    complete = parts["eigenvalues"].shape[-1] == batch.num_inputs
    return _Result(parts, _first_matrices(given), num_matvecs, complete=complete, density=rule)


def _first_matrices(given: _Given) -> list[Tensor]:
    if given.num_matrices == 0:
        return []
    few = given.batch.select(slice(0, given.num_matrices))
    groups = whole_hessians(few, given.facts, given.options, given.diagnosis, given.progress)
    return [matrices for _, matrices in groups]


def _with_exact_errors(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parts with an error of zero for every quantity that a method did not estimate."""
    norms = {
        name: torch.zeros_like(parts["trace"]) for name in ("gauss_newton_norm", "functional_norm")
    }  # of a zero Hessian
    parts = {**norms, **parts}
    return {**{f"{name}_error": torch.zeros_like(parts[name]) for name in ESTIMATED}, **parts}


def with_asymmetry(diagnosis: Diagnosis, asymmetry: Tensor, dtype: torch.dtype) -> Diagnosis:
    """The diagnosis, and that it is not to be trusted where a Hessian was far from symmetric."""
    worst = float(asymmetry.max())
    if not diagnosis.trusted or worst <= ASYMMETRY_TOLERANCE[dtype]:
        return diagnosis  # where the cause is known, rounding is not it
    finding = (
        f"A Hessian is asymmetric by {worst:.1e} of its norm: in {str(dtype).removeprefix('torch.')} it is "
        f"lost in rounding. Measure in float64."
    )
    return replace(diagnosis, findings=(*diagnosis.findings, finding), trusted=False)
