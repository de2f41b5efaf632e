"""How long a planned measurement is expected to take, and what of it is dropped to stay within ``max_seconds``.

In this order: heatmaps, then random vectors of the estimates (of the density first), then Lanczos steps. What would
surely not fit is dropped by the plan, which all processes share; the rest is decided while working, by the time that
the work itself has taken so far, and only where that changes no shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lightning_hessian.curvature.algorithms.quadrature import NUM_STEPS
from lightning_hessian.curvature.cost_model import EIGH_SECONDS, GRADIENT_IN_MATVECS, ModelCosts, expected_seconds
from lightning_hessian.curvature.meter import Pace, duration
from lightning_hessian.curvature.methods.interface import MethodInput
from lightning_hessian.curvature.methods.plan import Plan
from lightning_hessian.curvature.options import MethodName, Options
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.errors import TimeLimitError

# Columns are not even begun where they are expected to take that many times the time left: their first block, an eighth
# of them at most, says how long they take, and the expectation rests on a single HVP, the first of its kind.
HOPELESS = 8
NO_HEATMAPS = "no heatmaps were drawn"


def expected_duration(
    plan: Plan, batch: TargetBatch, costs: ModelCosts, options: Options, seconds_per_matvec: float
) -> float:
    """Seconds that the planned measurement is expected to take, from those of one HVP of all problems."""
    if plan.diagnosis.zero:
        return 0.0
    if plan.method == "low_rank":
        return _low_rank_seconds(batch, costs, seconds_per_matvec)
    num_matrices = plan.num_matrices if plan.method == "lanczos" else 0
    return _seconds(batch, plan.applied_to(options), seconds_per_matvec, num_matrices)[plan.method]


def within_limit(
    plan: Plan,
    batch: TargetBatch,
    costs: ModelCosts,
    options: Options,
    *,
    seconds_per_matvec: float | None,
    seconds_left: float,
) -> Plan:
    """The plan without what surely takes longer than the time that is left; without a limit the plan itself.

    Args:
        plan: from ``make_plan``.
        batch, costs, options: those it was made for.
        seconds_per_matvec: of one HVP of every problem; None: not known, and nothing is dropped here.
        seconds_left: infinite without a limit.
    """
    if math.isinf(seconds_left) or seconds_per_matvec is None or plan.diagnosis.zero:
        return plan
    without_density = replace(options, density_vectors=0)
    expected = _seconds(batch, without_density, seconds_per_matvec)
    gradients = _low_rank_seconds(batch, costs, seconds_per_matvec)
    late = {
        "dense": expected["dense"] > HOPELESS * seconds_left,
        "low_rank": gradients > max(seconds_left, expected["lanczos"]),
    }
    if options.method == "auto" and late.get(plan.method):
        plan = ends_only(plan, options)
    if plan.method != "lanczos":
        return plan
    plan = _without_late_heatmaps(plan, batch, expected["dense"], seconds_left)
    return _with_fitting_density(plan, batch, options, seconds_per_matvec, seconds_left - expected["lanczos"])


def _without_late_heatmaps(plan: Plan, batch: TargetBatch, dense_seconds: float, seconds_left: float) -> Plan:
    """``dense_seconds``: those of all samples' whole matrices."""
    if plan.num_matrices == 0 or plan.num_matrices / batch.num_samples * dense_seconds <= HOPELESS * seconds_left:
        return plan
    return replace(plan, num_matrices=0, dropped=(*plan.dropped, NO_HEATMAPS))


def _with_fitting_density(
    plan: Plan, batch: TargetBatch, options: Options, seconds_per_matvec: float, seconds_left: float
) -> Plan:
    """``seconds_left``: beside all else; two starting vectors or none, since the error comes from their spread."""
    per_vector = min(NUM_STEPS, batch.num_inputs) * seconds_per_matvec
    if options.density_vectors * per_vector <= max(0.0, seconds_left):
        return plan
    fitting = int(max(0.0, seconds_left) / per_vector)
    if fitting < 2:
        return replace(plan, density_vectors=0, dropped=(*plan.dropped, "the density was not estimated"))
    dropped = f"the density was estimated from {fitting} starting vectors"
    return replace(plan, density_vectors=fitting, dropped=(*plan.dropped, dropped))


def ends_only(plan: Plan, options: Options) -> Plan:
    """The plan that takes the place of one for complete spectra that would not be done in time."""
    return replace(
        plan,
        method="lanczos",
        reason=f"complete spectra would have taken longer than max_seconds={options.max_seconds:g} allows",
        dropped=(*plan.dropped, "only the ends of the spectra were computed"),
    )


def check_pace(given: MethodInput, pace: Pace, columns: int, num_matrices: int = 0) -> None:
    """Raises where whole Hessians will not be done in time.

    Args:
        given: with the limit.
        pace: of their columns.
        columns: of each sample, finished so far, summed over samples.
        num_matrices: that are still to be decomposed.

    Raises:
        TimeLimitError: it says how long they are expected to take, and what would fit.
    """
    num_samples, num_classes, num_inputs = given.batch.shape
    after = num_matrices * EIGH_SECONDS[given.batch.x.dtype] * num_inputs**3
    late = pace.lateness(columns, after)
    limit = given.limit.max_seconds
    if late is None or limit is None:
        return
    expected, had = late
    fitting = max(0, int(num_samples * had / expected))
    fewer = f"Measure {fitting} sample{'s' if fitting > 1 else ''} at a time, use" if fitting else "Use"
    raise TimeLimitError(
        f"The whole Hessians of {num_samples} sample{'s' if num_samples > 1 else ''} ({num_classes} "
        f"class{'es' if num_classes > 1 else ''}, D = {num_inputs}) are expected to take {duration(expected)}, and "
        f"max_seconds={limit:g} leaves {duration(max(0.0, had))} for them. {fewer} "
        f"method='lanczos' (of input_spectrum or the callback), or allow "
        f"max_seconds={_rounded_up(limit - had + expected)}."
    )


def about_dropped(options: Options, dropped: Sequence[str]) -> str:
    """What was dropped, in one sentence."""
    *first, last = dict.fromkeys(dropped)
    return f"To stay within max_seconds={options.max_seconds:g}, {', '.join(first)}{' and ' if first else ''}{last}."


def _seconds(
    batch: TargetBatch, options: Options, seconds_per_matvec: float, num_matrices: int = 0
) -> dict[MethodName, float]:
    eigh_seconds = EIGH_SECONDS[batch.x.dtype]
    return expected_seconds(batch.shape, options, seconds_per_matvec, eigh_seconds, num_matrices)


def _low_rank_seconds(batch: TargetBatch, costs: ModelCosts, seconds_per_matvec: float) -> float:
    return costs.num_outputs * GRADIENT_IN_MATVECS * seconds_per_matvec / batch.num_classes


def _rounded_up(seconds: float) -> str:
    """With a fifth more, to two digits."""
    unit = 10.0 ** (math.floor(math.log10(1.2 * seconds)) - 1)
    return f"{math.ceil(1.2 * seconds / unit) * unit:.3g}"
