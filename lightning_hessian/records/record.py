"""One measurement as numpy arrays and metadata: what is saved, plotted and logged. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from lightning_hessian.records.matrices import Array, from_eigenvectors, spans

Stage = Literal["fit", "validate", "test"]
OF_CLASSES = ("prob", "log_prob", "loss", "margin")  # targets that take the outputs for logits of classes
ClassId = int | str
"""The output looked at, as the user named it: ``2``, ``"label"`` or ``"predicted"``."""


@dataclass(frozen=True, repr=False)
class Record:
    """One measurement. Arrays are numpy; N samples, K classes, M eigenvalues, V eigenvectors, D inputs.

    Every metric of ``metrics.METRICS`` is an attribute, too: ``record.lambda_max`` is ``record.metrics["lambda_max"]``.
    Fields that a ``Spectrum`` has as well mean the same there; in addition:

    Attributes:
        name: of the monitor, or None.
        step: optimizer steps before the measurement (``trainer.global_step``).
        logged_step: the loggers' step, on the axis of Lightning's own curves.
        epoch: the epoch whose training produced these weights, from 0 (Lightning's ``current_epoch``).
        stage: the Trainer method that was running: ``fit``, ``validate`` or ``test``.
        measured_at: seconds since 1970.
        x: the differentiated input at the samples, or the output of the layer that ``wrt`` names, ``[N, *shape]``.
        labels: ``[N]``, or None.
        predicted: ``[N]``, the class of the largest output.
        classes: ``[N, K]``, the numbers of the outputs.
        class_ids: the K outputs measured, as the user named them: ``(2, 3)``, ``("label",)`` or ``("predicted",)``.
        class_names: names of all classes, or None.
        density_nodes: ``[N, K, S, m]``, the nodes of ``Spectrum.density``, or None. S = 1: the eigenvalues themselves,
            zeros included; S ≥ 2: an estimate from S random starting vectors.
        density_weights: ``[N, K, S, m]``, their weights, which sum to 1 over m, or None.
        finite_difference_error: ``[N, K]``, relative to max |λ|: how far the Hessian is from a central difference of
            values, at the sample itself; NaN where it was not checked at this measurement. See ``Spectrum``.
        valid: ``[N, K]``, False where the Hessian is wrong or not finite: all its numbers are NaN, and the message says
            why.
        metrics: ``[N, K]`` each, by name. Comparisons with the previous measurement are NaN where they are not
            defined, as at the first one; see ``subspace.SubspaceOverlap``.
        hessian: ``[S, K, D, D]``, whole matrices of the first S samples, or None where there are none.
        diagnosis: kind of function of the input; see ``Diagnosis``.
        network: the same for the outputs themselves.
        message: the diagnosis in words.
        seconds: wall time of the measurement, without plotting and writing.
        num_matvecs: Hessian-vector products per sample and class.
        memory: bytes by which memory rose at its peak, or None where unknown; see ``Cost``.
        memory_exact: True if ``memory`` is that number, False if it is an upper bound.
        made_with: versions, options, and the number of outputs.
        overhead: seconds spent measuring so far in this fit, plotting and writing included, per second of training;
            None before there was any training.
        skipped: how many measurements were skipped so far because of ``max_overhead``; None where none was given.
        color_scale: ``[S', K']``, where the color scale of each Hessian's picture ends, for the first 8 samples and 10
            classes: the 99th percentile of |H| when it was first nonzero in this run, so that pictures of different
            steps compare; 0 before; None where there were no pictures.
        why_no_matrix: why ``hessian`` is None or holds fewer samples than requested; None where it holds them all.
    """

    name: str | None
    step: int
    logged_step: int
    epoch: int
    stage: Stage
    measured_at: float
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
    diagonal: Array
    diagonal_error: Array
    density_nodes: Array | None
    density_weights: Array | None
    finite_difference_error: Array
    valid: Array
    metrics: Mapping[str, Array]
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
    made_with: Mapping[str, Any]
    overhead: float | None = None
    skipped: int | None = None
    color_scale: Array | None = None
    why_no_matrix: str | None = None

    def __getattr__(self, name: str) -> Array:
        metrics = self.__dict__.get("metrics", {})  # absent while a copy is being made
        if name not in metrics:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        found: Array = metrics[name]
        return found

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.metrics})

    def __repr__(self) -> str:
        num_samples, num_classes = self.classes.shape
        eigenvalues = self.eigenvalues[np.isfinite(self.eigenvalues)]
        trace = np.asarray(self.metrics.get("trace", np.nan))
        trace = trace[np.isfinite(trace)]
        numbers = "no finite numbers"
        if eigenvalues.size and trace.size:
            numbers = f"λ {eigenvalues.min():.3g} to {eigenvalues.max():.3g}, mean trace {trace.mean():.3g}"
        ids = ", ".join(map(str, self.class_ids[:5])) + (", …" if num_classes > 5 else "")
        return (
            f"Record({self.target}, {self.when}, {self.method}, {self.diagnosis}\n"
            f"  samples × classes: {num_samples} × {num_classes} ({ids}), x {self.x.shape}\n"
            f"  {numbers}\n"
            f"  valid {self.valid.sum()} of {self.valid.size}, "
            f"eigenvalues converged {self.converged.sum()} of {self.converged.size})"
        )

    def summary(self) -> str:
        """The measurement in words, for a lab notebook: what was measured and how, the numbers and what they mean.

        Example:
            >>> from lightning_hessian import load_records
            >>> print(load_records(folder)[-1].summary())  # doctest: +SKIP
        """
        from lightning_hessian.records.summary import summary

        return summary(self)

    def with_metrics(self, **metrics: Array) -> Record:
        """The same record with other values of some metrics."""
        return replace(self, metrics={**self.metrics, **metrics})

    @property
    def when(self) -> str:
        """When the measurement was made, in words."""
        if self.stage != "fit":
            return f"{self.stage}, after {self.step} optimizer steps"
        return "before training" if self.step == 0 else f"epoch {self.epoch}, after {self.step} optimizer steps"

    def indices(self, sample: int, class_id: ClassId | None = None) -> tuple[int, int]:
        """The positions of one sample and class along the axes N and K of every array.

        Args:
            sample: which of the N, from 0.
            class_id: one of ``class_ids``; by default the first.

        Raises:
            IndexError: there is no such sample.
            ValueError: there is no such class.
        """
        num_samples = len(self.classes)
        if not 0 <= sample < num_samples:
            raise IndexError(f"sample={sample} is out of range: this record has samples 0 to {num_samples - 1}.")
        if class_id is None:
            return sample, 0
        if class_id not in self.class_ids or isinstance(class_id, bool):
            known = ", ".join(map(repr, self.class_ids))
            raise ValueError(f"class_id={class_id!r} was not measured: this record has {known}.")
        return sample, self.class_ids.index(class_id)

    def tag_suffix(self, class_id: ClassId) -> str:
        """What follows the slash in the tags of one class: ``prob_class_3``, after the monitor's name if it has one.

        Outside a fit the stage comes first, since the numbers of a test do not belong to the fit's curves.
        """
        suffix = f"{self.target}_{class_title(class_id).replace(' ', '_')}"
        return with_name(self.name, suffix if self.stage == "fit" else f"{self.stage}_{suffix}")

    @property
    def not_converged(self) -> Array:
        """``[N, K, M]``, the eigenvalues of valid Hessians that have not converged."""
        is_open: Array = ~self.converged & self.valid[..., None]
        return is_open

    @property
    def is_spanned(self) -> bool:
        """Whether eigenvalues and eigenvectors give the whole matrix of every valid sample and class, to rounding."""
        if not self.complete or self.eigenvectors is None or self.vector_index is None:
            return False
        return spans(self.eigenvalues[self.valid], self.vector_index[self.valid], self.gradient.shape[-1])

    def check_valid(self, sample: int, class_id: ClassId | None = None) -> None:
        """Raises a ValueError, with the message, where the Hessian of one sample and class is not valid.

        Args:
            sample: which of the N, from 0.
            class_id: one of ``class_ids``; by default the first.
        """
        index = self.indices(sample, class_id)
        if not self.valid[index]:
            raise ValueError(
                f"The Hessian of sample {sample}, {class_title(self.class_ids[index[1]])}, is not valid at step "
                f"{self.step}: there are no numbers. {self.message}"
            )

    def matrix(self, sample: int, class_id: ClassId | None = None) -> Array:
        """The whole Hessian ``[D, D]`` of one sample and class.

        As it was stored, or V diag(λ) Vᵀ where the record has the eigenvectors of all nonzero eigenvalues.

        Args:
            sample: which of the N, from 0.
            class_id: one of ``class_ids``; by default the first.

        Raises:
            IndexError: there is no such sample.
            ValueError: the record has no such class, or does not hold that matrix, or it is not valid; the message
                says why.
        """
        index = self.indices(sample, class_id)
        self.check_valid(sample, class_id)
        if self.hessian is not None and sample < len(self.hessian):
            return self.hessian[index]
        if self.complete and self.eigenvectors is not None and self.vector_index is not None:
            arrays = (self.eigenvalues, self.eigenvectors, self.vector_index)
            matrix = from_eigenvectors(*(array[index] for array in arrays))
            if matrix is not None:
                return matrix
        why_not = self.why_no_matrix or "heatmap_samples sets for how many samples matrices are formed."
        raise ValueError(
            f"The record of step {self.step} holds no whole Hessian of sample {sample}, nor all eigenvectors to "
            f"reconstruct it. {why_not}"
        )

    def class_name(self, sample: int, class_id: ClassId) -> str:
        """The name, or else the number, of the output that ``class_id`` stands for at this sample."""
        return self.output_name(self.classes[self.indices(sample, class_id)])

    @property
    def has_classes(self) -> bool:
        """Whether outputs are called classes: not where there is but one, nor those of a target without labels."""
        if self.made_with.get("num_outputs") == 1:
            return False
        named = self.class_names is not None or any(isinstance(class_id, str) for class_id in self.class_ids)
        return named or self.labels is not None or self.target in OF_CLASSES

    def output_words(self, sample: int, class_id: ClassId) -> str:
        """The output looked at in words: ``class 2``, ``class dress``, or of a regression ``output 2``."""
        return f"{'class' if self.has_classes else 'output'} {self.class_name(sample, class_id)}"

    def id_name(self, class_id: ClassId) -> str:
        """The name of a class that is the same at all samples, or else what the user called it."""
        return self.output_name(class_id) if isinstance(class_id, int) else class_id

    def output_name(self, output: Any) -> str:
        """The name of an output, or else its number."""
        return self.class_names[int(output)] if self.class_names else str(int(output))


def class_title(class_id: ClassId) -> str:
    """A class in words: ``class 2``, ``label`` or ``predicted``."""
    return f"class {class_id}" if isinstance(class_id, int) else class_id


def with_name(name: str | None, text: str) -> str:
    """``text``, after a monitor's name where it has one."""
    return text if name is None else f"{name}_{text}"
