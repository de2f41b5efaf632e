"""Pictures of one problem of a record, for notebooks and papers: ordinary matplotlib figures with axes to change.

Torch is not known here, nor is ``pyplot``: nothing is drawn twice in a notebook, and no figure has to be closed.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_hessian.records.color_scale import percentile
from lightning_hessian.records.record import Array, ClassId, Record
from lightning_hessian.render.canvas import DIVERGING, as_image, short

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
    """The eigenvalues of one problem in descending order, on a signed logarithmic axis.

    Red is positive, blue is negative, grey is zero within its residual; error bars are residuals ‖Hv − λv‖, within
    which an eigenvalue lies; open triangles have not converged. Below 10⁻⁴ of the largest |λ| the axis is linear.

    Args:
        record: one measurement, as ``load_records`` gives them.
        sample: which of the N.
        class_id: which of ``record.class_ids``; by default the first.

    Returns:
        A matplotlib figure with one axes; a notebook shows it, ``figure.savefig("spectrum.pdf")`` keeps it.

    Raises:
        IndexError: there is no such sample.
        ValueError: there is no such class.

    Example:
        >>> from lightning_hessian import plot_spectrum
        >>> figure = plot_spectrum(record)  # of f(x) = ½ (3 x₀² + x₁² − 2 x₂²)
        >>> figure.axes[0].get_ylabel()
        'λ (logit per input unit²)'
        >>> figure.axes[0].lines[0].get_ydata()
        array([3., 1.])
    """
    column = _checked(record, sample, class_id)
    values, residuals, converged = (
        getattr(record, name)[sample, column] for name in ("eigenvalues", "residuals", "converged")
    )
    figure = Picture(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(1, len(values) + 1)
    kinds: list[tuple[str, Array, dict[str, Any]]] = [
        ("positive", converged & (values > residuals), {"color": POSITIVE, "marker": "o"}),
        ("negative", converged & (values < -residuals), {"color": NEGATIVE, "marker": "o"}),
        ("zero within the residual", converged & (np.abs(values) <= residuals), {"color": "gray", "marker": "o"}),
        ("not converged", ~converged, {"color": DOUBTFUL, "marker": "^", "markerfacecolor": "none"}),
    ]
    for label, chosen, style in kinds:
        if chosen.any():
            errors = residuals[chosen]
            axes.errorbar(places[chosen], values[chosen], errors, ls="none", ms=5, capsize=2, label=label, **style)
    largest = float(np.abs(values).max(initial=0))
    if largest > 0:
        axes.set_yscale("symlog", linthresh=10.0 ** np.floor(np.log10(LINEAR_SHARE * largest)))
    axes.axhline(0, color="gray", linewidth=0.6)
    figure.suptitle(f"{_about(record, sample, column)}\n{_listed(record, values)}", fontsize=11)
    axes.set(xlabel="number of the eigenvalue, in descending order", ylabel=f"λ ({record.target} per input unit²)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(title="bars: residuals")
    return figure


def plot_hessian(record: Record, sample: int = 0, class_id: ClassId | None = None) -> Figure:
    """The whole Hessian of one problem as a heatmap: red positive, blue negative, white zero.

    The colour scale is symmetric and ends at the 99th percentile of |H|; the largest entry is told in the title.

    Args:
        record: one measurement, with that matrix kept or a complete spectrum with its eigenvectors.
        sample: which of the N.
        class_id: which of ``record.class_ids``; by default the first.

    Returns:
        A matplotlib figure; ``figure.axes[0]`` is the matrix, ``figure.axes[1]`` its colour bar.

    Raises:
        IndexError: there is no such sample.
        ValueError: there is no such class.
        ValueError: the record does not hold that matrix.

    Example:
        >>> from lightning_hessian import plot_hessian
        >>> figure = plot_hessian(record)  # of f(x) = ½ (3 x₀² + x₁² − 2 x₂²)
        >>> figure.axes[0].images[0].get_array().data
        array([[ 3.,  0.,  0.],
               [ 0.,  1.,  0.],
               [ 0.,  0., -2.]])
    """
    column = _checked(record, sample, class_id)
    matrix = record.matrix(sample, record.class_ids[column])
    magnitudes = np.abs(matrix)
    largest = float(magnitudes.max())
    limit = percentile(matrix) or largest or 1.0
    figure = Picture(figsize=(6.0, 5.4), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(matrix, cmap=DIVERGING, vmin=-limit, vmax=limit, interpolation="nearest")
    clipped = largest > limit
    bar = figure.colorbar(image, ax=axes, extend="both" if clipped else "neither")
    bar.set_label(f"{record.target} per input unit²")
    told = f"{len(matrix)}×{len(matrix)}, largest |entry| {short(largest)}"
    figure.suptitle(f"{_about(record, sample, column)}\n{told}", fontsize=11)
    axes.set(xlabel=ENTRIES, ylabel=ENTRIES)
    return figure


def plot_input(record: Record, sample: int = 0, class_id: ClassId | None = None, num_eigenvectors: int = 3) -> Figure:
    """Input, gradient, diagonal of the Hessian and top eigenvectors of one problem, in the input's shape.

    Signed quantities are red where positive and blue where negative on symmetric scales; channels stand side by
    side; inputs of one axis are lines. Eigenvectors come largest |λ| first, each with its residual.

    Args:
        record: one measurement.
        sample: which of the N.
        class_id: which of ``record.class_ids``; by default the first.
        num_eigenvectors: how many at most.

    Returns:
        A matplotlib figure; its axes are labelled ``input``, ``gradient``, ``diagonal``, ``eigenvector 1``, … and the
        colour bars.

    Raises:
        IndexError: there is no such sample.
        ValueError: there is no such class.

    Example:
        >>> from lightning_hessian import plot_input
        >>> figure = plot_input(record, num_eigenvectors=1)  # of f(x) = ½ (3 x₀² + x₁² − 2 x₂²)
        >>> [axes.get_label() for axes in figure.axes]
        ['input', 'gradient', 'diagonal', 'eigenvector 1']
        >>> figure.axes[2].lines[0].get_ydata()
        array([ 3.,  1., -2.])
    """
    column = _checked(record, sample, class_id)
    shape = record.x.shape[1:]
    maps = [("input", _input_title(record, sample), record.x[sample], "input units")]
    per = f"{record.target} per input unit"
    gradient = f"gradient, ‖g‖ = {short(record.gradient_norm[sample, column])}"
    maps.append(("gradient", gradient, record.gradient[sample, column], per))
    maps.append(("diagonal", _diagonal_title(record, sample, column), record.diagonal[sample, column], f"{per}²"))
    for rank, (title, vector) in enumerate(_eigenvectors(record, sample, column, num_eigenvectors), 1):
        maps.append((f"eigenvector {rank}", f"eigenvector {rank} by |λ|\n{title}", vector, "unit length"))
    columns = min(3, len(maps))
    rows = -(-len(maps) // columns)
    figure = Picture(figsize=(columns * (PANEL + 0.6), rows * (PANEL + 0.5) + 0.4), layout="constrained")
    figure.suptitle(_about(record, sample, column), fontsize=11)
    panels = [figure.add_subplot(rows, columns, i + 1, label=label) for i, (label, *_) in enumerate(maps)]
    for axes, (label, title, values, unit) in zip(panels, maps, strict=True):
        axes.set_title(title, fontsize=10)
        if len(shape) < 2:
            _draw_line(axes, values.ravel(), unit)
        else:
            _draw_image(axes, values.reshape(shape), unit, signed=label != "input")
    return figure


def _checked(record: Record, sample: int, class_id: ClassId | None) -> int:
    """The position of the class, by default the first."""
    num_samples = len(record.classes)
    if not 0 <= sample < num_samples:
        raise IndexError(f"sample={sample} is out of range: this record has samples 0 to {num_samples - 1}.")
    return 0 if class_id is None else record.class_index(class_id)


def _about(record: Record, sample: int, column: int) -> str:
    class_name = record.class_name(sample, record.class_ids[column])
    return f"{record.target} of class {class_name}, sample {sample}, {record.when}"


def _listed(record: Record, values: Array) -> str:
    """What the eigenvalues that are not listed are, in words."""
    others = record.gradient.shape[-1] - len(values)
    if not others:
        return f"all {len(values)} eigenvalues"
    rest = "all zero" if record.complete else "between the two ends, not listed"
    return f"{len(values)} eigenvalues; the other {others} are {rest}"


def _input_title(record: Record, sample: int) -> str:
    known = [("label", record.labels), ("predicted", record.predicted)]
    told = [f"{word} {_name(record, of[sample])}" for word, of in known if of is not None]
    return f"input: {', '.join(told)}"


def _name(record: Record, k: int) -> str:
    return record.class_names[int(k)] if record.class_names else str(int(k))


def _diagonal_title(record: Record, sample: int, column: int) -> str:
    error = float(record.diagonal_error[sample, column].max())
    return "diagonal of the Hessian" + (f"\nstandard error at most {error:.1g}" if error > 0 else "")


def _eigenvectors(record: Record, sample: int, column: int, most: int) -> list[tuple[str, Array]]:
    """Titles and vectors, largest |λ| first; of a zero eigenvalue no direction is better than another."""
    if record.eigenvectors is None or record.vector_index is None:
        return []
    found = []
    places = record.vector_index[sample, column][:most]
    for place, vector in zip(places, record.eigenvectors[sample, column], strict=False):
        value, residual = (a[sample, column, place] for a in (record.eigenvalues, record.residuals))
        mark = "" if record.converged[sample, column, place] else " (not converged)"
        if value != 0:
            found.append((f"λ = {short(value)} ± {residual:.0e}{mark}", vector))
    return found


def _draw_line(axes: Axes, values: Array, unit: str) -> None:
    axes.plot(np.arange(len(values)), values, marker=".", linewidth=1)
    axes.axhline(0, color="gray", linewidth=0.5, zorder=0)
    axes.set(xlabel="input entry", ylabel=unit)


def _draw_image(axes: Axes, values: Array, unit: str, *, signed: bool) -> None:
    if not signed and len(values.shape) == 3 and len(values) == 3:
        low, high = float(values.min()), float(values.max())
        axes.imshow((values.transpose(1, 2, 0) - low) / max(high - low, 1e-12), interpolation="nearest")
        axes.set_xlabel(f"{short(low)} to {short(high)} shown as 0 to 1")
        return
    limit = float(np.abs(values).max()) or 1.0
    colours: dict[str, Any] = {"cmap": DIVERGING, "vmin": -limit, "vmax": limit} if signed else {"cmap": "gray"}
    image = axes.imshow(as_image(values), interpolation="nearest", **colours)
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(image, ax=axes, label=unit, shrink=0.8)
