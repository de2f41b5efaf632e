"""What the measurements of one run have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_hessian.curvature.checks.verdict import PreviousChecks
from lightning_hessian.curvature.options import MethodName
from lightning_hessian.model.arguments import Target
from lightning_hessian.records.locations import Location
from lightning_hessian.records.record import Record
from lightning_hessian.training.samples import Samples
from lightning_hessian.training.schedule import START, TrainingPosition


@dataclass
class RunState:
    """What one measurement of a run passes on to the next, so that their numbers are comparable; checkpoints hold it.

    Attributes:
        samples: at which the run measures, once they are known.
        target: what ``"auto"`` chose.
        method: what ``"auto"`` chose by time or memory, where the choice might otherwise change during the run.
        checks: of the last measurement.
        seconds_per_matvec: of one HVP at all samples by one process, as first measured. Checkpoints do not hold it: a
            resumed run may have another device.
        counted_bytes: what derivatives were seen to allocate, see ``ModelCosts``; nor do checkpoints hold these.
        previous: the last record, without its whole matrices; on rank 0.
        record_path: where it was saved; on rank 0.
        measured_step: optimizer steps before the last measurement.
        position: where training was.
    """

    samples: Samples | None = None
    target: Target | None = None
    method: MethodName | None = None
    checks: PreviousChecks | None = None
    seconds_per_matvec: float | None = None
    counted_bytes: dict[tuple[object, ...], int] = field(default_factory=dict)
    previous: Record | None = None
    record_path: Location | None = None
    measured_step: int | None = None
    position: TrainingPosition = START
