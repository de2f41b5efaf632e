"""What every method takes and returns, and which samples of a measurement it is about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from lightning_hessian.curvature.checks.prediction import Prediction
from lightning_hessian.curvature.checks.verdict import PreviousChecks
from lightning_hessian.curvature.cost_model import ModelCosts
from lightning_hessian.curvature.meter import UNLIMITED, Progress, TimeLimit, silent
from lightning_hessian.curvature.operators.autodiff import AutodiffMode
from lightning_hessian.curvature.options import Options
from lightning_hessian.curvature.spectrum import Decomposition
from lightning_hessian.curvature.target_batch import TargetBatch


@dataclass(frozen=True)
class MethodInput:
    """What a method works on, and with. Every method raises a MeasurementError where one sample does not fit.

    Attributes:
        batch: what to differentiate.
        costs: of this model.
        gradient: of the batch, ``[N, K, D]``.
        piecewise_linear: the network is, at these samples: JᵀAJ is the whole Hessian.
        options: how to measure; their ``max_memory`` includes the results.
        memory_budget: bytes that may be used besides the results.
        num_matrices: for how many samples, counted from the first, the whole matrices are wanted too.
        modes: autodiff modes for whole matrices: the first is used where it works (``columns.hessians``).
        limit: in seconds, for all of the method and the checks after it.
        progress: called with the number of finished columns, samples or matrix-vector products.
    """

    batch: TargetBatch
    costs: ModelCosts
    gradient: Tensor
    piecewise_linear: bool
    options: Options
    memory_budget: int
    num_matrices: int = 0
    modes: tuple[AutodiffMode, ...] = get_args(AutodiffMode)
    limit: TimeLimit = UNLIMITED
    progress: Progress = silent


@dataclass(frozen=True)
class MethodResult:
    """What a method returns.

    Attributes:
        decomposition: of every problem.
        prediction: what it says along one direction of every sample, to be checked against values.
        num_matvecs: HVPs per problem.
        autodiff_mode: how most derivatives were taken.
        matrices: the whole matrices ``[S, K, D, D]`` of the first S = ``num_matrices`` samples from a method that
            needs them anyway, else None.
        dropped: what was left out or shortened to stay within the limit, as parts of a sentence.
    """

    decomposition: Decomposition
    prediction: Prediction
    num_matvecs: int = 0
    autodiff_mode: AutodiffMode = "reverse_over_reverse"
    matrices: Tensor | None = None
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Share:
    """Which samples of a measurement a batch holds, and what the last measurement of them passes on.

    Attributes:
        numbers: of the samples, in the whole measurement.
        num_samples: of the whole measurement.
        finite: ``[N]``, False for samples without finite derivatives, for which others stand in; None: all are finite.
        checks: of the last measurement; None: every sample is checked.
    """

    numbers: range
    num_samples: int
    finite: Tensor | None = None
    checks: PreviousChecks | None = None
