"""Figures of one sample and class, for notebooks and papers: ordinary matplotlib figures with axes to change.

``pyplot`` is not used: nothing is shown twice in a notebook, and no figure has to be closed.
"""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_hessian.records.color_scale import color_limit
from lightning_hessian.records.matrices import Array
from lightning_hessian.records.record import ClassId, Record
from lightning_hessian.render.maps import (
    DIVERGING,
    InputMap,
    diagonal_map,
    eigenvector_maps,
    gradient_map,
    input_map,
    short,
)

POSITIVE, NEGATIVE, DOUBTFUL = "#b2182b", "#2166ac", "#b26a00"
LINEAR_SHARE = 1e-4  # of the largest |λ|: below it the signed logarithmic axis is linear
PANEL = 2.6  # inches
ENTRIES = "input entry (row-major)"


class Picture(Figure):
    """A figure that a notebook shows by itself, also where ``pyplot`` was never imported."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def plot_spectrum(record: Record, sample: int = 0, class_id: ClassId | None = None) -> Figure:
    """The eigenvalues of one sample and class in descending order, on a signed logarithmic axis.

    Red is positive, blue is negative, gray is zero within its residual; error bars are residuals ‖Hv − λv‖, within
    which an eigenvalue lies; open triangles have not converged. Below 10⁻⁴ of the largest |λ| the axis is linear.

    Args:
        record: one measurement, as ``load_records`` gives them.
        sample: which of the N.
        class_id: which of ``record.class_ids``; by default the first.

    Returns:
        A matplotlib figure with one axes; a notebook shows it, ``figure.savefig("spectrum.pdf")`` saves it.

    Raises:
        IndexError: there is no such sample.
        ValueError: there is no such class, or the Hessian is not valid.

    Example:
        >>> from lightning_hessian import plot_spectrum
        >>> figure = plot_spectrum(record)  # of f(x) = ½ (3 x₀² + x₁² − 2 x₂²)
        >>> figure.axes[0].get_ylabel()
        'λ (logit per input unit²)'
        >>> figure.axes[0].lines[0].get_ydata()
        array([3., 1.])
    """
    index = record.indices(sample, class_id)
    record.check_valid(sample, class_id)
    values, residuals, converged = record.eigenvalues[index], record.residuals[index], record.converged[index]
    figure = Picture(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    numbers = np.arange(1, len(values) + 1)
    kinds: list[tuple[str, Array, dict[str, Any]]] = [
        ("positive", converged & (values > residuals), {"color": POSITIVE, "marker": "o"}),
        ("negative", converged & (values < -residuals), {"color": NEGATIVE, "marker": "o"}),
        ("zero within the residual", converged & (np.abs(values) <= residuals), {"color": "gray", "marker": "o"}),
        ("not converged", ~converged, {"color": DOUBTFUL, "marker": "^", "markerfacecolor": "none"}),
    ]
    for label, chosen, style in kinds:
        if chosen.any():
            errors = residuals[chosen]
            axes.errorbar(numbers[chosen], values[chosen], errors, ls="none", ms=5, capsize=2, label=label, **style)
    largest = float(np.abs(values).max(initial=0))
    if largest > 0:
        axes.set_yscale("symlog", linthresh=10.0 ** np.floor(np.log10(LINEAR_SHARE * largest)))
    axes.axhline(0, color="gray", linewidth=0.6)
    figure.suptitle(f"{_about(record, index)}\n{_about_unlisted(record, values)}", fontsize=11)
    axes.set(xlabel="number of the eigenvalue, in descending order", ylabel=f"λ ({record.target} per input unit²)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(title="bars: residuals")
    return figure


def plot_hessian(record: Record, sample: int = 0, class_id: ClassId | None = None) -> Figure:
    """The whole Hessian of one sample and class as a heatmap: red positive, blue negative, white zero.

    The color scale is symmetric and ends at the 99th percentile of |H|; the title gives the largest entry.

    Args:
        record: one measurement, with that matrix stored, or with the eigenvectors of a complete spectrum.
        sample: which of the N.
        class_id: which of ``record.class_ids``; by default the first.

    Returns:
        A matplotlib figure; ``figure.axes[0]`` is the matrix, ``figure.axes[1]`` its color bar.

    Raises:
        IndexError: there is no such sample.
        ValueError: there is no such class, or the record does not hold that matrix, or it is not valid.

    Example:
        >>> from lightning_hessian import plot_hessian
        >>> figure = plot_hessian(record)  # of f(x) = ½ (3 x₀² + x₁² − 2 x₂²)
        >>> figure.axes[0].images[0].get_array().data
        array([[ 3.,  0.,  0.],
               [ 0.,  1.,  0.],
               [ 0.,  0., -2.]])
    """
    index = record.indices(sample, class_id)
    matrix = record.matrix(sample, class_id)
    largest = float(np.abs(matrix).max())
    limit = color_limit(matrix) or 1.0
    figure = Picture(figsize=(6.0, 5.4), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(matrix, cmap=DIVERGING, vmin=-limit, vmax=limit, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, extend="both" if largest > limit else "neither")
    bar.set_label(f"{record.target} per input unit²")
    size = f"{len(matrix)}×{len(matrix)}, largest |entry| {short(largest)}"
    figure.suptitle(f"{_about(record, index)}\n{size}", fontsize=11)
    axes.set(xlabel=ENTRIES, ylabel=ENTRIES)
    return figure


def plot_input(record: Record, sample: int = 0, class_id: ClassId | None = None, num_eigenvectors: int = 3) -> Figure:
    """Input, gradient, diagonal of the Hessian and top eigenvectors of one sample and class, in the input's shape.

    Signed quantities are red where positive and blue where negative on symmetric scales; channels stand side by
    side; inputs of one axis are lines. Eigenvectors come largest |λ| first, each with its residual.

    Args:
        record: one measurement.
        sample: which of the N.
        class_id: which of ``record.class_ids``; by default the first.
        num_eigenvectors: how many at most.

    Returns:
        A matplotlib figure; its axes are labeled ``input``, ``gradient``, ``diagonal``, ``eigenvector 1``, … and the
        color bars.

    Raises:
        IndexError: there is no such sample.
        ValueError: there is no such class, or the Hessian is not valid.

    Example:
        >>> from lightning_hessian import plot_input
        >>> figure = plot_input(record, num_eigenvectors=1)  # of f(x) = ½ (3 x₀² + x₁² − 2 x₂²)
        >>> [axes.get_label() for axes in figure.axes]
        ['input', 'gradient', 'diagonal', 'eigenvector 1']
        >>> figure.axes[2].lines[0].get_ydata()
        array([ 3.,  1., -2.])
    """
    index = record.indices(sample, class_id)
    record.check_valid(sample, class_id)
    shown = input_map(record, sample)
    maps = [
        replace(shown, title=f"input: {shown.title}"),
        gradient_map(record, sample, class_id),
        diagonal_map(record, sample, class_id),
        *(vector for vector in eigenvector_maps(record, sample, class_id, num_eigenvectors) if vector is not None),
    ]
    num_columns = min(3, len(maps))
    num_rows = -(-len(maps) // num_columns)
    size = (num_columns * (PANEL + 0.6), num_rows * (PANEL + 0.5) + 0.4)
    figure = Picture(figsize=size, layout="constrained")
    figure.suptitle(_about(record, index), fontsize=11)
    panels = [figure.add_subplot(num_rows, num_columns, i, label=each.label) for i, each in enumerate(maps, 1)]
    for axes, each in zip(panels, maps, strict=True):
        axes.set_title(each.title, fontsize=10)
        _draw_map(figure, axes, each)
    return figure


def _about(record: Record, index: tuple[int, int]) -> str:
    sample, class_id = index[0], record.class_ids[index[1]]
    return f"{record.target} of {record.output_words(sample, class_id)}, sample {sample}, {record.when}"


def _about_unlisted(record: Record, values: Array) -> str:
    """What the eigenvalues that are not listed are."""
    num_others = record.gradient.shape[-1] - len(values)
    if not num_others:
        return f"all {len(values)} eigenvalues"
    rest = "all zero" if record.complete else "between the two ends, not listed"
    return f"{len(values)} eigenvalues; the other {num_others} are {rest}"


def _draw_map(figure: Figure, axes: Axes, shown: InputMap) -> None:
    if shown.values.ndim == 1:
        axes.plot(np.arange(len(shown.values)), shown.values, marker=".", linewidth=1)
        axes.axhline(0, color="gray", linewidth=0.5, zorder=0)
        axes.set(xlabel="input entry", ylabel=shown.unit)
    elif shown.cmap is None:
        axes.imshow(shown.values, interpolation="nearest")
        axes.set_xlabel(f"{short(shown.low)} to {short(shown.high)} shown as 0 to 1")
    else:
        image = axes.imshow(shown.values, interpolation="nearest", cmap=shown.cmap, vmin=shown.low, vmax=shown.high)
        figure.colorbar(image, ax=axes, label=shown.unit, shrink=0.8)
