"""What is found out about a batch before a method is chosen: gradients, costs, and what kind of function it is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import concatenate, in_groups
from lightning_hessian.curvature.checks.diagnosis import CURVED, Diagnosis, Finding, Kind, advice
from lightning_hessian.curvature.checks.explanation import find_dependence
from lightning_hessian.curvature.checks.zero import (
    gradients_contradict,
    kind_in_outputs,
    kind_of_zero,
    weighted_outputs,
    zero_in_float64,
)
from lightning_hessian.curvature.cost_model import ForwardPass, ModelCosts, check_group, fitting_samples
from lightning_hessian.curvature.meter import Stopwatch
from lightning_hessian.curvature.operators.autodiff import ReverseOverReverse, has_custom_function
from lightning_hessian.curvature.options import Options
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.errors import MeasurementError

FEW = 4  # samples for each that is examined apart from the others, at least


@dataclass(frozen=True)
class Derivatives:
    """First derivatives of a batch, and one second derivative of its outputs.

    Attributes:
        outputs: ``[N, C]``.
        values: of the targets, ``[N, K]``.
        gradient: of the targets, ``[N, K, D]``.
        outputs_hvp: ``[N, D]``, the HVP of one random weighted sum of each sample's outputs, or None.
        seconds_per_matvec: one HVP of every problem takes, as that of the outputs did; None without one.
        has_custom_function: whether the outputs are made by a custom ``autograd.Function``, as far as was looked.
    """

    outputs: Tensor
    values: Tensor
    gradient: Tensor
    outputs_hvp: Tensor | None
    seconds_per_matvec: float | None = None
    has_custom_function: bool = False


@dataclass(frozen=True)
class Analysis:
    """What is known about a batch before its Hessians are.

    Attributes:
        costs: of its derivatives.
        gradient: ``[N, K, D]``.
        finite: ``[N]``, whether inputs, values and gradients of a sample are.
        diagnosis: the kinds of target and network, and what is not finite.
        seconds_per_matvec: see ``Derivatives``.
        dependence: see ``CheckSettings``.
    """

    costs: ModelCosts
    gradient: Tensor
    finite: Tensor
    diagnosis: Diagnosis
    seconds_per_matvec: float | None = None
    dependence: str = ""

    def select(self, samples: slice | Tensor) -> Analysis:
        """That of some samples."""
        return replace(self, gradient=self.gradient[samples], finite=self.finite[samples])

    @property
    def stand_ins(self) -> Tensor:
        """``[N]``, which sample is computed in place of each: itself, or the last finite one before it, else the first.

        The samples keep their order, which may matter to the model.
        """
        numbers = torch.arange(len(self.finite), device=self.finite.device)
        return numbers.where(self.finite, self.finite.nonzero()[0]).cummax(dim=0).values


def analyze(
    batch: TargetBatch,
    options: Options,
    network: Kind | None = None,
    *,
    look_again: bool = True,
    is_timed: bool = False,
    examined: Tensor | None = None,
    forward: ForwardPass | None = None,
    alone: bool = True,
    counted: dict[tuple[object, ...], int] | None = None,
) -> Analysis:
    """Gradients, costs and kinds of a batch.

    The outputs count as linear around the samples if one HVP of a random weighted sum of them is exactly 0.0 at every
    sample, and in float64 at one of them.

    Args:
        batch: what is differentiated.
        options: how to measure.
        network: what the outputs are as functions of the input, if that is known.
        look_again: whether that was at other weights, where a network that was not curved is examined again.
        is_timed: whether an HVP is timed though the network is known.
        examined: the samples at which it is then, where it was linear or piecewise linear beyond the samples too, if
            they are a quarter of all at most (they take another forward pass); None: all.
        forward: what a forward pass has shown already.
        alone: whether samples are also evaluated one by one, which is done once per run.
        counted: see ``ModelCosts``.

    Raises:
        MeasurementError: not one sample has finite derivatives.

    Cost: a gradient; where the network is examined, one HVP; where it is not curved, three HVPs at one sample, and
    with a custom ``autograd.Function`` three gradients and an HVP more; and that of ``find_dependence``.
    """
    memory = options.memory(batch.x.device)
    costs = ModelCosts(batch, memory, forward, {} if counted is None else counted)
    examine = network is None or (look_again and network != "curved") or is_timed
    apart = None
    if examine and not is_timed and examined is not None and network in ("linear", "piecewise_linear"):
        apart = examined if FEW * len(examined) <= batch.num_samples else None
    found = differentiate(batch, costs, memory, options.generator() if examine and apart is None else None)
    finite, findings = finite_samples(batch, found.values, found.gradient)
    hvp, generator = found.outputs_hvp, options.generator()
    if apart is not None and len(few := apart[finite[apart]]):
        some = differentiate(batch.select(few), costs, memory, generator).outputs_hvp
        hvp = None if some is None else some.new_zeros(len(finite), batch.num_inputs).index_copy(0, few, some)
    first = batch.select(finite.nonzero()[:1].flatten())
    if hvp is not None and hvp[finite].any():
        network = "curved"
    if network is None:
        network = _kind_of_outputs(first, found.outputs.shape[1], generator, found.has_custom_function)
    kind: Kind = "curved"
    if network not in CURVED:
        of_target = kind_in_outputs(batch, found.outputs, generator)
        kind = of_target if of_target == "curved" or network == "linear" else network
    diagnosis = Diagnosis(kind, network, tuple(findings), advice=advice(found.outputs.shape[1]))
    dependence = ""
    if forward is not None and options.check:
        dependence = find_dependence(batch, found.values, forward.outputs, check_group(costs, memory), alone=alone)
    return Analysis(costs, found.gradient, finite, diagnosis, found.seconds_per_matvec, dependence)


def curved(
    batch: TargetBatch, costs: ModelCosts, forward: ForwardPass, values: Tensor, gradient: Tensor
) -> Analysis | None:
    """That of a curved network whose first derivatives are known, or None where not all of them are finite."""
    if not all(numbers.isfinite().all() for numbers in (batch.x, values, gradient)):
        return None
    diagnosis = Diagnosis("curved", "curved", advice=advice(costs.num_outputs))
    finite = torch.ones(batch.num_samples, dtype=torch.bool, device=batch.x.device)
    dependence = find_dependence(batch, values, forward.outputs, check_group(costs, costs.memory))
    return Analysis(costs, gradient, finite, diagnosis, dependence=dependence)


def differentiate(
    batch: TargetBatch, costs: ModelCosts, memory_budget: int, generator: torch.Generator | None = None
) -> Derivatives:
    """First derivatives, of as many samples at a time as fit ``memory_budget``.

    Args:
        batch: what is differentiated.
        costs: of its derivatives.
        memory_budget: bytes that may be used.
        generator: of the weights and the direction of ``outputs_hvp``, the same for every sample; None: without it.
    """
    state = None if generator is None else generator.get_state()
    seconds = 0.0

    def work(samples: slice) -> Derivatives:
        nonlocal seconds
        autodiff = ReverseOverReverse(batch.select(samples))
        outputs, gradient, hvp = autodiff.outputs, autodiff.gradient(create_graph=False), None
        if generator is not None and state is not None:
            generator.set_state(state)
            weights, v = (
                torch.randn(size, generator=generator, dtype=torch.float64).to(outputs)
                for size in (outputs.shape[1], batch.num_inputs)
            )
            with Stopwatch(batch.x.device) as stopwatch:
                hvp = autodiff.hvp_of_outputs(weights, v.expand(len(outputs), -1))
            seconds += stopwatch.seconds
        custom = generator is not None and has_custom_function(outputs)
        return Derivatives(outputs.detach(), autodiff.values.detach(), gradient, hvp, has_custom_function=custom)

    # With the graph of a second gradient, that of the sum of outputs.
    size = fitting_samples(memory_budget, (1 if generator is None else 2) * costs.matvec_bytes, batch.x.device)
    groups = in_groups(batch.num_samples, size, work)
    found = concatenate([found for _, found in groups])
    # One scalar per sample was differentiated, not one for every class.
    return replace(found, seconds_per_matvec=None if generator is None else seconds * batch.num_classes)


def _kind_of_outputs(
    first: TargetBatch, num_outputs: int, generator: torch.Generator, has_custom_function: bool
) -> Kind:
    """Of a network whose second derivatives are zero: confirmed in float64, and looked at elsewhere."""
    outputs = weighted_outputs(first, num_outputs, generator)
    is_zero = zero_in_float64(outputs, generator)
    if is_zero and has_custom_function:
        is_zero = not gradients_contradict(outputs, generator).any()
    return kind_of_zero(outputs, generator) if is_zero else "curved"


def finite_samples(batch: TargetBatch, values: Tensor, gradient: Tensor) -> tuple[Tensor, list[Finding]]:
    """Which samples ``[N]`` have finite derivatives, and what is not finite at the others, in words.

    Raises:
        MeasurementError: none has.
    """
    causes = {
        "Inputs are": batch.x,
        "Values of the target are": values,
        "The values are finite but gradients are": gradient,
    }
    finite = torch.ones(batch.num_samples, dtype=torch.bool, device=batch.x.device)
    findings = []
    for what, numbers in causes.items():
        bad = finite & ~numbers.isfinite().flatten(1).all(dim=1)
        if bad.any():
            samples = tuple(bad.nonzero().flatten().tolist())
            findings.append(Finding(f"{what} not finite at {{}}.{_HELP.get(what, '')}", samples))
        finite &= ~bad
    if not finite.any():
        raise MeasurementError(f"There is no Hessian to measure. {' '.join(map(str, findings))}")
    return finite, findings


_HELP = {
    "Values of the target are": " Look for NaN in the weights, for log(0) or a division by zero, and for overflow.",
    "The values are finite but gradients are": (
        " Look for torch.where over a branch that is infinite or NaN where it is not taken, and for 0/0 in the "
        "derivative of a norm or a square root at zero."
    ),
}
