"""What is drawn in the shape of the input: the input itself, gradient, diagonal and eigenvectors of one sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from lightning_hessian.records.matrices import Array
from lightning_hessian.records.record import ClassId, Record

DIVERGING = "RdBu_r"  # red is positive, blue is negative, white is zero


@dataclass(frozen=True)
class InputMap:
    """One value per input entry, ready to be drawn.

    Attributes:
        label: what it is, in one word or two.
        title: the same with its numbers.
        brief: the title in some 16 letters.
        unit: of the values.
        values: ``[n]`` for a line, ``[H, W]`` for an image (channels side by side), ``[H, W, 3]`` for a color image.
        low, high: the smallest and largest value; of a signed map, the ends of its symmetric scale.
        cmap: of an image.
        num_channels: how many stand side by side.
    """

    label: str
    title: str
    brief: str
    unit: str
    values: Array
    low: float
    high: float
    cmap: str | None
    num_channels: int = 1


def input_map(record: Record, sample: int) -> InputMap:
    """The input: a line, a gray image, or with three channels a color image scaled to 0 to 1."""
    x = record.x[sample]
    title = about_outputs(record, sample)
    if x.ndim < 2:
        brief = f"input, ±{compact(np.abs(x).max(initial=0))}"
        return _signed("input", title, brief, "input units", x, x.shape)
    low, high = float(x.min()), float(x.max())
    brief = f"input, {compact(low)} to {compact(high)}"
    if x.ndim == 3 and len(x) == 3:
        colors = (x.transpose(1, 2, 0) - low) / max(high - low, 1e-12)
        return InputMap("input", title, brief, "input units", colors, low, high, None)
    return InputMap("input", title, brief, "input units", as_image(x), low, high, "gray", _num_channels(x.shape))


def about_outputs(record: Record, sample: int) -> str:
    """Label and prediction, where outputs are classes."""
    known = [("label", record.labels), ("predicted", record.predicted if record.has_classes else None)]
    return ", ".join(f"{word} {record.output_name(k[sample])}" for word, k in known if k is not None)


def gradient_map(record: Record, sample: int, class_id: ClassId | None) -> InputMap:
    """The gradient, with its norm."""
    index = record.indices(sample, class_id)
    norm = short(record.gradient_norm[index])
    title, brief, unit = f"gradient, ‖g‖ = {norm}", f"gradient, ‖g‖ {norm}", f"{record.target} per input unit"
    return _signed("gradient", title, brief, unit, record.gradient[index], record.x.shape[1:])


def diagonal_map(record: Record, sample: int, class_id: ClassId | None) -> InputMap:
    """The diagonal of the Hessian, with its largest standard error where it is an estimate."""
    index = record.indices(sample, class_id)
    error = float(record.diagonal_error[index].max())
    title = "diagonal of the Hessian" + (f"\nstandard error at most {error:.1g}" if error > 0 else "")
    unit = f"{record.target} per input unit²"
    return _signed("diagonal", title, "diagonal", unit, record.diagonal[index], record.x.shape[1:])


def eigenvector_maps(record: Record, sample: int, class_id: ClassId | None, most: int) -> Iterator[InputMap | None]:
    """Eigenvectors, largest |λ| first, each with its residual.

    None for an eigenvalue of zero: any vector is as good an eigenvector as another, and there is no direction to show.
    """
    if record.eigenvectors is None or record.vector_index is None:
        return
    index = record.indices(sample, class_id)
    vectors = zip(record.vector_index[index][:most], record.eigenvectors[index], strict=False)
    for rank, (number, vector) in enumerate(vectors, 1):
        value, residual, converged = (
            a[index][number] for a in (record.eigenvalues, record.residuals, record.converged)
        )
        mark = "" if converged else " (not converged)"
        label = f"eigenvector {rank}"
        title = f"{label} by |λ|\nλ = {short(value)} ± {residual:.0e}{mark}"
        brief = f"λ {compact(value, 3)} ± {compact(residual, 1)}{'' if converged else '*'}"
        yield _signed(label, title, brief, "unit length", vector, record.x.shape[1:]) if value != 0 else None


def short(value: float) -> str:
    """Three digits, with a true minus sign."""
    return f"{float(value):.3g}".replace("-", "−")


def compact(value: float, num_digits: int = 2) -> str:
    """A few digits in few letters: ``4.2e−4`` for 0.000421."""
    value = float(value)
    kind = "e" if value != 0 and not 1e-3 <= abs(value) < 1e4 else "g"
    text = f"{value:.{num_digits - (kind == 'e')}{kind}}"
    return text.replace("e-0", "e-").replace("e+0", "e").replace("e+", "e").replace("-", "−")


def as_image(values: Array) -> Array:
    """``[..., H, W]`` as one image: leading axes (channels) side by side."""
    return np.concatenate(values.reshape(-1, *values.shape[-2:]), axis=1)


def _num_channels(shape: tuple[int, ...]) -> int:
    return prod(shape[:-2])


def _signed(label: str, title: str, brief: str, unit: str, values: Array, shape: tuple[int, ...]) -> InputMap:
    limit = float(np.abs(values).max()) or 1.0
    shown = values.ravel() if len(shape) < 2 else as_image(values.reshape(shape))
    return InputMap(label, title, brief, unit, shown, -limit, limit, DIVERGING, _num_channels(shape))
