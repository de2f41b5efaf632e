"""Runs one measurement: diagnosis, engine, method, spectrum."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_hessian.curvature.dense import ChunkSize, decompose, hessians, symmetric_part, zero_parts
from lightning_hessian.curvature.derivatives import EngineName, engines_agree, gradients
from lightning_hessian.curvature.diagnosis import Diagnosis, diagnose
from lightning_hessian.curvature.memory import available_memory
from lightning_hessian.curvature.problems import Problems
from lightning_hessian.curvature.spectrum import Cost, Spectrum
from lightning_hessian.errors import MeasurementError

# How asymmetric a Hessian may be before its digits are called rounding.
ASYMMETRY_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        num_eigenvalues: eigenvectors kept per problem, those of largest |λ|.
        chunk_size: columns computed at once; ``"auto"``: found while working.
        max_memory: bytes that may be used; None: half of what is free on the device.
        seed: of the random directions used in checks.
    """

    num_eigenvalues: int = 10
    chunk_size: ChunkSize = "auto"
    max_memory: int | None = None
    seed: int = 0

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


def measure(
    problems: Problems,
    target: str,
    options: Options,
    *,
    diagnosis: Diagnosis | None = None,
    num_matrices: int = 0,
) -> Measurement:
    """The complete spectrum of every problem, from whole Hessians a group of samples at a time.

    Args:
        problems: what to differentiate.
        target: name of the target, for the result.
        options: how to measure.
        diagnosis: of these problems, where it is known already.
        num_matrices: for how many samples, counted from the first, the matrices are kept.

    Raises:
        MeasurementError: values, gradients or Hessians are not finite, or nothing fits the memory.
    """
    begin = time.perf_counter()
    diagnosis = diagnosis or diagnose_finite(problems, options)
    gradient = gradients(problems)
    engine: EngineName = "reverse_over_reverse"
    parts, kept, num_hvps = [], [], 0
    if diagnosis.zero:
        num_listed = min(options.num_eigenvalues, problems.num_inputs)
        parts.append(zero_parts(gradient, num_listed, num_listed))
        kept.append(gradient.new_zeros(num_matrices, *gradient.shape[1:], problems.num_inputs))
    else:
        num_hvps = problems.num_inputs
        for samples, matrices, used in whole_hessians(problems, options):
            engine = used
            parts.append(decompose(matrices, gradient[samples], options.num_eigenvalues))
            kept.append(symmetric_part(matrices[: max(0, num_matrices - samples.start)])[0])
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    spectrum = Spectrum(
        **joined,
        complete=True,
        gradient=gradient,
        trace_error=torch.zeros_like(joined["trace"]),
        method="dense",
        engine=engine,
        target=target,
        diagnosis=_with_asymmetry(diagnosis, joined["asymmetry"], problems.x.dtype),
        cost=Cost(time.perf_counter() - begin, num_hvps),
    )
    return Measurement(spectrum, torch.cat(kept) if num_matrices else None)


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


def whole_hessians(problems: Problems, options: Options) -> Iterator[tuple[slice, Tensor, EngineName]]:
    """Whole Hessians, a group of samples at a time, by the fast engine if it agrees with the other."""
    generator = options.generator()
    agree, _ = engines_agree(problems, generator)
    yield from hessians(
        problems,
        "forward_over_reverse" if agree else "reverse_over_reverse",
        chunk_size=options.chunk_size,
        max_memory=options.memory(problems.x.device),
        generator=generator,
    )


def _with_asymmetry(diagnosis: Diagnosis, asymmetry: Tensor, dtype: torch.dtype) -> Diagnosis:
    worst = float(asymmetry.max())
    if worst <= ASYMMETRY_TOLERANCE[dtype]:
        return diagnosis
    finding = (
        f"A Hessian is asymmetric by {worst:.1e} of its norm: in {str(dtype).removeprefix('torch.')} it is "
        f"lost in rounding. Measure in float64."
    )
    return replace(diagnosis, findings=(*diagnosis.findings, finding), trusted=False)
