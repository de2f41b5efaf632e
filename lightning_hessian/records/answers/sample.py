"""The input, gradient, diagonal and eigenvectors of one sample and class: what the file of a measurement answers."""

from __future__ import annotations

import numpy as np

from lightning_hessian.records.answers.history import Answer, MissingError
from lightning_hessian.records.answers.matrix import is_index, matrix_source
from lightning_hessian.records.event_format import Summary
from lightning_hessian.records.payload import ArrayFile, DamagedDataError


def check_file(file: ArrayFile, summary: Summary) -> None:
    """Checks that a file is of the measurement whose event was read.

    Raises:
        MissingError: it is of another one: a resumed run may have written one of the two again, and not yet the other.
        DamagedDataError: its arrays are not of the samples, classes and inputs of the event.
    """
    if file.meta.get("measured_at") != summary.meta.get("measured_at"):
        step = summary.meta["step"]
        raise MissingError(f"The file of step {step} is of another measurement than the event. Try again later.")
    if file.shape("gradient") != (*summary.shape, summary.meta["num_inputs"]):
        raise DamagedDataError("its gradient is of another measurement than the event")


def input_of(file: ArrayFile, sample: int) -> Answer:
    """The input of one sample: array ``x [*shape]``."""
    x = file.read("x", sample)
    return {"x": x}, {"shape": list(x.shape)}


def maps(file: ArrayFile, summary: Summary, sample: int, class_index: int) -> Answer:
    """What has the shape of the input, for one sample and class.

    Raises:
        DamagedDataError: the arrays of the file do not fit each other.
    """
    at = (sample, class_index)
    arrays = {name: file.read(name, *at) for name in ("gradient", "diagonal", "diagonal_error")}
    if "eigenvectors" in file and "vector_index" in file:
        index = file.read("vector_index", *at)
        arrays["eigenvectors"] = file.read("eigenvectors", *at)
        for name in ("eigenvalues", "residuals", "converged"):
            listed = file.read(name, *at)
            if index.shape != arrays["eigenvectors"].shape[:1] or not is_index(index, len(listed)):
                raise DamagedDataError("eigenvectors do not fit eigenvalues")
            arrays[f"eigenvector_{name.removeprefix('eigen')}"] = listed[index]
    source, why_not = matrix_source(file, summary, sample, class_index)
    error = float(np.abs(arrays["diagonal_error"]).max(initial=0))
    finite = error if np.isfinite(error) else None
    return arrays, {"matrix": source, "why_no_matrix": why_not, "largest_diagonal_error": finite}
