"""A sheet of panels on one matplotlib axes: a tenth of the time of one axes and colour bar per panel."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lightning_hessian.records.record import Array

DIVERGING = "RdBu_r"  # red is positive, blue is negative, white is zero
BAR_HEIGHT = 0.12
BAR_GAP = 0.14


class Sheet:
    """A figure of ``width`` by ``height`` inches on which images, lines and words are placed, y downwards."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width, height), dpi=100)
        FigureCanvasAgg(self.figure)
        self._axes = self.figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self._axes.set_axis_off()
        self._axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)

    def text(self, x: float, y: float, words: str, size: float = 9, **style: Any) -> None:
        """Words, by default centred over ``(x, y)``."""
        self._axes.text(x, y, words, fontsize=size, **{"ha": "center", "va": "bottom", **style})

    def image(self, x: float, y: float, width: float, height: float, values: Array, **colours: Any) -> None:
        """An image inside a thin frame."""
        extent = (x, x + width, y + height, y)
        self._axes.imshow(values, extent=extent, aspect="auto", **colours)
        self._frame(x, y, width, height)

    def signed_image(self, x: float, y: float, width: float, height: float, values: Array, limit: float) -> None:
        """Signed values on a colour scale that is symmetric around zero."""
        self.image(x, y, width, height, values, cmap=DIVERGING, vmin=-limit, vmax=limit)

    def line(self, x: float, y: float, width: float, height: float, values: Array, limit: float) -> None:
        """Signed values as a line around zero, scaled to ``±limit``."""
        self._frame(x, y, width, height)
        across = x + width * (np.arange(len(values)) + 0.5) / len(values)
        middle = y + height / 2
        self._axes.plot([x, x + width], [middle, middle], color="gray", linewidth=0.5)
        self._axes.plot(across, middle - 0.95 * height / 2 * values / limit, marker=".", linewidth=1)

    def bar(
        self, x: float, y: float, width: float, low: float, high: float, cmap: str, *, clipped: bool = False
    ) -> None:
        """A colour bar with its ends and middle; ``clipped`` says that values lie beyond the ends."""
        self.image(x, y + BAR_GAP, width, BAR_HEIGHT, np.linspace(0, 1, 64)[None], cmap=cmap)
        less, more = ("≤ ", "≥ ") if clipped else ("", "")
        below = y + BAR_GAP + BAR_HEIGHT + 0.05
        self.text(x, below, f"{less}{short(low)}", 8, ha="left", va="top")
        self.text(x + width / 2, below, short((low + high) / 2), 8, va="top")
        self.text(x + width, below, f"{more}{short(high)}", 8, ha="right", va="top")

    def _frame(self, x: float, y: float, width: float, height: float) -> None:
        self._axes.add_patch(Rectangle((x, y), width, height, fill=False, linewidth=0.6))


def short(value: float) -> str:
    """Three digits, with a true minus sign."""
    return f"{float(value):.3g}".replace("-", "−")


def as_image(values: Array) -> Array:
    """``[..., H, W]`` as one image: leading axes (channels) side by side."""
    return np.concatenate(values.reshape(-1, *values.shape[-2:]), axis=1)


def to_image(figure: Figure) -> Array:
    """A figure as an RGB image, ``[H, W, 3]`` of uint8."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
