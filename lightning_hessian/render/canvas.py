"""A picture in pixels, drawn with Pillow: a figure of matplotlib takes up to forty times as long, mostly for text."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lightning_hessian.records.matrices import Array

BLACK, GRAY, PALE, RED, BLUE = (20, 20, 20), (110, 110, 110), (232, 232, 232), (178, 24, 43), (33, 102, 172)
Box = tuple[float, float, float, float]


class Canvas:
    """A white picture of ``width`` by ``height`` units, at ``scale`` pixels a unit.

    Attributes:
        words: every text on it.
    """

    def __init__(self, width: int, height: int, scale: int = 1) -> None:
        self._scale = scale
        self._image = Image.new("RGB", (width * scale, height * scale), "white")
        self._draw = ImageDraw.Draw(self._image)
        self.words: list[str] = []

    def to_array(self) -> Array:
        """The picture ``[H, W, 3]`` of uint8."""
        return np.asarray(self._image).copy()

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 10,
        bold: bool = False,
        anchor: str = "la",
        color: tuple[int, int, int] = BLACK,
        width: float | None = None,
    ) -> None:
        """Text at ``(x, y)``, by default its upper left corner; cut off with "…" where it is wider than ``width``."""
        font = _font(size * self._scale, bold)
        if width is not None and font.getlength(text) > width * self._scale:
            while text and font.getlength(f"{text}…") > width * self._scale:
                text = text[:-1]
            text = f"{text.rstrip()}…"
        self.words.append(text)
        at = (x * self._scale, y * self._scale)
        self._draw.text(at, text, fill=color, font=font, anchor=anchor)

    def note(self, box: Box, text: str, fill: tuple[int, int, int] | None = None) -> None:
        """A framed panel with words instead of a picture."""
        self._draw.rectangle(self._pixels(box), fill=fill, outline=GRAY)
        left, top, right, bottom = box
        lines = text.split("\n")
        for number, line in enumerate(lines):
            middle = (top + bottom) / 2 + 13 * (number - (len(lines) - 1) / 2)
            self.text((left + right) / 2, middle, line, anchor="mm", width=right - left - 4)

    def image(self, box: Box, colors: Array) -> None:
        """An image that fills the box; small pixels are averaged, large ones stay sharp.

        Args:
            box: left, top, right, bottom.
            colors: ``[h, w, 3]`` of uint8.
        """
        left, top, right, bottom = self._pixels(box)
        size = right - left, bottom - top
        repeats = [
            -(-pixels // entries) for pixels, entries in zip(size, (colors.shape[1], colors.shape[0]), strict=True)
        ]
        whole = Image.fromarray(np.ascontiguousarray(colors.repeat(repeats[1], axis=0).repeat(repeats[0], axis=1)))
        self._image.paste(whole.resize(size, Image.Resampling.BOX), (left, top))
        self._draw.rectangle((left - 1, top - 1, right, bottom), outline=GRAY)

    def bars(self, box: Box, values: Array, limit: float) -> None:
        """Signed values as bars around zero, red where positive and blue where negative, scaled to ``±limit``."""
        left, top, right, bottom = self._pixels(box)
        self._draw.rectangle((left - 1, top - 1, right, bottom), outline=GRAY)
        middle, half = (top + bottom) / 2, (bottom - top) / 2 - 1
        edges = left + (right - left) * np.arange(len(values) + 1) / len(values)
        gap = 1 if edges[1] - edges[0] >= 4 else 0
        for value, begin, end in zip(values, edges[:-1], edges[1:], strict=True):
            tip = middle - half * value / limit
            box_of_bar = (int(begin), min(tip, middle), max(int(begin), int(end) - 1 - gap), max(tip, middle))
            self._draw.rectangle(box_of_bar, fill=RED if value > 0 else BLUE)
        self._draw.line((left, middle, right - 1, middle), fill=GRAY)

    def _pixels(self, box: Box) -> tuple[int, int, int, int]:
        left, top, right, bottom = (round(edge * self._scale) for edge in box)
        return left, top, right, bottom


def colored(values: Array, low: float, high: float, cmap: str) -> Array:
    """Values as colors ``[..., 3]`` of uint8; those beyond ``low`` and ``high`` get the colors of the ends."""
    table = matplotlib.colormaps[cmap](np.arange(256), bytes=True)[:, :3]
    levels = (values - low) * (256 / ((high - low) or 1.0))
    shown: Array = table[levels.clip(0, 255).astype(np.uint8)]
    return shown


@cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """The font that matplotlib brings with it."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
