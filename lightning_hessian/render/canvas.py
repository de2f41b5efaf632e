"""Panels on one matplotlib axes: a tenth of the time of an axes and a color bar per panel."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lightning_hessian.records.record import Array
from lightning_hessian.render.maps import InputMap, short

BAR_HEIGHT = 0.12
BAR_GAP = 0.14
TITLE_GAP = 0.06


class Canvas:
    """A figure of ``width`` by ``height`` inches for images, lines and text, with y downwards."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width, height), dpi=100)
        FigureCanvasAgg(self.figure)
        self._axes = self.figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self._axes.set_axis_off()
        self._axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)

    def text(self, x: float, y: float, text: str, size: float = 9, **style: Any) -> None:
        """Text, by default centered above ``(x, y)``."""
        self._axes.text(x, y, text, fontsize=size, **{"ha": "center", "va": "bottom", **style})

    def blank(self, x: float, y: float, size: float, text: str) -> None:
        """A gray panel that says why nothing is shown."""
        self._axes.add_patch(Rectangle((x, y), size, size, facecolor="0.9", edgecolor="black", linewidth=0.6))
        self.text(x + size / 2, y + size / 2, text, va="center")

    def map(self, x: float, y: float, size: float, shown: InputMap) -> None:
        """A map with its title above and its scale below."""
        center, below = x + size / 2, y + size + 0.08
        self.text(center, y - TITLE_GAP, shown.title)
        if shown.values.ndim == 1:
            self._line(x, y, size, shown.values, shown.high)
            self.text(center, below, f"input entries, ±{short(shown.high)}", 8, va="top")
        elif shown.cmap is None:
            self._image(x, y, size, size, shown.values)
            self.text(center, below, f"{short(shown.low)} to {short(shown.high)} shown as 0 to 1", 8, va="top")
        else:
            self.image(x, y, size, shown.values, shown.low, shown.high, shown.cmap)

    def image(
        self, x: float, y: float, size: float, values: Array, low: float, high: float, cmap: str, clipped: bool = False
    ) -> None:
        """An image with its color bar below; ``clipped`` says that values lie beyond the ends."""
        self._image(x, y, size, size, values, cmap=cmap, vmin=low, vmax=high)
        top = y + size + BAR_GAP
        self._image(x, top, size, BAR_HEIGHT, np.linspace(0, 1, 64)[None], cmap=cmap)
        less, more = ("≤ ", "≥ ") if clipped else ("", "")
        below = top + BAR_HEIGHT + 0.05
        self.text(x, below, f"{less}{short(low)}", 8, ha="left", va="top")
        self.text(x + size / 2, below, short((low + high) / 2), 8, va="top")
        self.text(x + size, below, f"{more}{short(high)}", 8, ha="right", va="top")

    def _line(self, x: float, y: float, size: float, values: Array, limit: float) -> None:
        """Signed values as a line around zero, scaled to ``±limit``."""
        self._frame(x, y, size, size)
        across = x + size * (np.arange(len(values)) + 0.5) / len(values)
        middle = y + size / 2
        self._axes.plot([x, x + size], [middle, middle], color="gray", linewidth=0.5)
        self._axes.plot(across, middle - 0.95 * size / 2 * values / limit, marker=".", linewidth=1)

    def _image(self, x: float, y: float, width: float, height: float, values: Array, **colors: Any) -> None:
        self._axes.imshow(values, extent=(x, x + width, y + height, y), aspect="auto", **colors)
        self._frame(x, y, width, height)

    def _frame(self, x: float, y: float, width: float, height: float) -> None:
        self._axes.add_patch(Rectangle((x, y), width, height, fill=False, linewidth=0.6))


def to_image(figure: Figure) -> Array:
    """A figure as an RGB image, ``[H, W, 3]`` of uint8."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
