"""One measurement as numpy arrays and metadata: what is saved, drawn and logged. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lightning_hessian.records.matrices import from_eigenvectors, spans

if TYPE_CHECKING:
    from lightning_hessian.curvature.methods.execute import Measurement

Array = np.ndarray[Any, np.dtype[Any]]
Stage = Literal["fit", "validate", "test"]
ClassId = int | str
"""The output looked at, as the user named it: ``2``, ``"label"`` or ``"predicted"``."""


@dataclass(frozen=True, repr=False)
class Record:
    """One measurement. Arrays are numpy; N samples, K classes, M eigenvalues, V eigenvectors, D inputs.

    The names shared with ``Spectrum`` mean the same there; in addition:

    Attributes:
        name: of the monitor, or None.
        step: optimizer steps before the measurement (``trainer.global_step``).
        logged_step: the loggers' step, on the axis of Lightning's own curves.
        epoch: the epoch whose training made these weights, from 0 (Lightning's ``current_epoch``).
        stage: the method of the Trainer that was running: ``fit``, ``validate`` or ``test``.
        x: the differentiated input at the samples, or the output of the layer that ``wrt`` names, ``[N, *shape]``.
        labels: ``[N]``, or None.
        predicted: ``[N]``, the class of the largest output.
        classes: ``[N, K]``.
        class_ids: the K outputs looked at, as the user named them: ``(2, 3)``, ``("label",)`` or ``("predicted",)``.
        class_names: names of all classes, or None.
        density_nodes: ``[N, K, S, m]``, the nodes of ``Spectrum.density``, or None. S = 1: the eigenvalues themselves,
            zeros included; S ≥ 2: an estimate from S random starting vectors.
        density_weights: ``[N, K, S, m]``, their weights, which sum to 1 over m, or None.
        top_eigenvector_cosine: ``[N, K]``, |cos| between the top eigenvectors of this and the previous measurement; see
            ``subspace.SubspaceOverlap``. NaN where that is not defined, as at the first measurement.
        top_subspace_overlap: ``[N, K]``, the same of the space of top eigenvectors.
        hessian: ``[S, K, D, D]``, whole matrices of the first S samples, or None where not kept.
        diagnosis: kind of function of the input; see ``Diagnosis``.
        network: the same of the outputs themselves.
        message: the diagnosis in words.
        seconds: wall time of the measurement, without drawing and writing.
        num_matvecs: HVPs per problem.
        memory: bytes by which memory rose at its peak, or None where that is not known; see ``Cost``.
        memory_exact: True if ``memory`` is that number, False if it is an upper bound.
        overhead: seconds spent measuring so far in this fit, drawing and writing included, per second of training; None
            before there was any training.
        skipped: how many measurements were skipped so far because of ``max_overhead``; None where none was given.
        made_with: versions and options.
        picture_scale: ``[S', K']``, where the colours of the Hessians' pictures end, of the first 8 samples and 10
            classes: the 99th percentile of |H| when it was first not zero in this run, so that pictures of different
            steps compare; 0 before; None where there were no pictures.
        why_no_matrix: why ``hessian`` is None or holds fewer samples than asked for; None where it holds them all.
    """

    name: str | None
    step: int
    logged_step: int
    epoch: int
    stage: Stage
    x: Array
    labels: Array | None
    predicted: Array
    classes: Array
    class_ids: tuple[ClassId, ...]
    class_names: tuple[str, ...] | None
    eigenvalues: Array
    eigenvectors: Array | None
    vector_index: Array | None
    residuals: Array
    converged: Array
    complete: bool
    gradient: Array
    gradient_norm: Array
    lambda_max: Array
    lambda_min: Array
    spectral_norm: Array
    trace: Array
    trace_error: Array
    frobenius_norm: Array
    frobenius_norm_error: Array
    gauss_newton_norm: Array
    gauss_newton_norm_error: Array
    functional_norm: Array
    functional_norm_error: Array
    gauss_newton_share: Array
    gauss_newton_share_error: Array
    diagonal: Array
    diagonal_error: Array
    negative_share: Array
    effective_rank: Array
    normalized_curvature: Array
    linear_radius: Array
    gradient_curvature: Array
    gradient_alignment: Array
    asymmetry: Array
    density_nodes: Array | None
    density_weights: Array | None
    top_eigenvector_cosine: Array
    top_subspace_overlap: Array
    hessian: Array | None
    target: str
    method: str
    reason: str
    autodiff_mode: str
    diagnosis: str
    network: str
    message: str
    seconds: float
    num_matvecs: int
    memory: int | None
    memory_exact: bool
    overhead: float | None
    skipped: int | None
    made_with: Mapping[str, Any]
    picture_scale: Array | None = None
    why_no_matrix: str | None = None

    def __repr__(self) -> str:
        return f"Record({self.target}, {self.when}, classes {list(self.class_ids)}, x {self.x.shape}, {self.diagnosis})"

    @property
    def when(self) -> str:
        """When the measurement was made, in words."""
        if self.stage != "fit":
            return f"{self.stage}, after {self.step} optimizer steps"
        return "before training" if self.step == 0 else f"epoch {self.epoch}, after {self.step} optimizer steps"

    def class_index(self, class_id: ClassId) -> int:
        """The position of ``class_id`` along the axis K of every array.

        Raises:
            ValueError: the record has no such class.
        """
        if class_id not in self.class_ids or isinstance(class_id, bool):
            known = ", ".join(map(repr, self.class_ids))
            raise ValueError(f"class_id={class_id!r} was not measured: this record has {known}.")
        return self.class_ids.index(class_id)

    def tag_suffix(self, class_id: ClassId) -> str:
        """What follows the slash in the tags of one class: ``prob_class_3``, after the monitor's name if it has one.

        Outside a fit the stage comes first, since the numbers of a test are no points of the fit's curves.
        """
        suffix = f"{self.target}_{class_title(class_id).replace(' ', '_')}"
        return self.tag(suffix if self.stage == "fit" else f"{self.stage}_{suffix}")

    def tag(self, text: str) -> str:
        """``text``, after the monitor's name where it has one."""
        return named(self.name, text)

    @property
    def is_spanned(self) -> bool:
        """Whether eigenvalues and eigenvectors give the whole matrix of every problem, to rounding."""
        if not self.complete or self.eigenvectors is None or self.vector_index is None:
            return False
        return spans(self.eigenvalues, self.vector_index, self.gradient.shape[-1])

    def matrix(self, sample: int, class_id: ClassId) -> Array:
        """The whole Hessian ``[D, D]`` of one sample and class: as stored, or V diag(λ) Vᵀ where all eigenvectors are.

        Args:
            sample: which of the N.
            class_id: one of ``class_ids``.

        Raises:
            ValueError: the record does not hold that matrix, or has no such class; the message says why.
        """
        index = self.class_index(class_id)
        if self.hessian is not None and sample < len(self.hessian):
            return self.hessian[sample, index]
        if self.complete and self.eigenvectors is not None and self.vector_index is not None:
            arrays = (self.eigenvalues, self.eigenvectors, self.vector_index)
            matrix = from_eigenvectors(*(array[sample, index] for array in arrays))
            if matrix is not None:
                return matrix
        why_not = self.why_no_matrix or "heatmap_samples sets for how many samples matrices are formed."
        raise ValueError(
            f"The record of step {self.step} holds no whole Hessian of sample {sample}, nor all eigenvectors to "
            f"reconstruct it. {why_not}"
        )

    def class_name(self, sample: int, class_id: ClassId) -> str:
        """The name, or else the number, of the output that ``class_id`` is for this sample."""
        k = int(self.classes[sample, self.class_index(class_id)])
        return self.class_names[k] if self.class_names else str(k)


def class_title(class_id: ClassId) -> str:
    """A class in words: ``class 2``, ``label`` or ``predicted``."""
    return f"class {class_id}" if isinstance(class_id, int) else class_id


def named(name: str | None, text: str) -> str:
    """``text``, after a monitor's name where it has one."""
    return text if name is None else f"{name}_{text}"


def make_record(measurement: Measurement, **context: Any) -> Record:
    """A record of ``measurement``; ``context`` gives the fields that a measurement does not know."""
    spectrum = measurement.spectrum
    told = {f.name for f in fields(Record)} - set(context) - {"picture_scale", "why_no_matrix"}
    diagnosis, cost = spectrum.diagnosis, spectrum.cost
    values: dict[str, Any] = {
        "hessian": measurement.hessian,
        "density_nodes": spectrum.density and spectrum.density.nodes,
        "density_weights": spectrum.density and spectrum.density.weights,
        "top_eigenvector_cosine": np.full(spectrum.trace.shape, np.nan),
        "top_subspace_overlap": np.full(spectrum.trace.shape, np.nan),
        "diagnosis": diagnosis.kind,
        "network": diagnosis.network,
        "message": diagnosis.message,
        "seconds": cost.seconds,
        "num_matvecs": cost.num_matvecs,
        "memory": cost.memory,
        "memory_exact": cost.memory_exact,
        "overhead": None,
        "skipped": None,
    }
    values |= {name: getattr(spectrum, name) for name in told - set(values)}
    return Record(**{name: _array(value) for name, value in {**values, **context}.items()})


def _array(value: Any) -> Any:
    """A torch tensor as a numpy array, told by its methods; anything else as it is."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value
