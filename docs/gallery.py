"""Makes the pictures of gallery.md by running the examples: ``.venv/bin/python docs/gallery.py [NAME ...]``.

All of them take about five minutes on two cores. ``gallery_pictures.py`` has a function for each.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

import gallery_pictures
import matplotlib
from matplotlib.figure import Figure
from PIL import Image

IMAGES = Path(__file__).parent / "images" / "gallery"
NAMES = sorted(path.stem for path in gallery_pictures.EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb"))
MAX_BYTES = 60_000
WIDTH = 900  # pixels, for 600 on a page


def save(picture: Figure | Image.Image, path: Path, max_bytes: int = MAX_BYTES) -> None:
    """Saves, 900 pixels across, and as many colors as the size allows."""
    if isinstance(picture, Figure):
        buffer = io.BytesIO()
        picture.savefig(buffer, format="png", dpi=WIDTH / gallery_pictures.SIZE[0])
        picture = Image.open(buffer).convert("RGB")
    else:
        picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
    for colors in (256, 128, 64, 32):
        picture.quantize(colors, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= max_bytes:
            return
    raise ValueError(f"{path} has {path.stat().st_size} bytes, more than {max_bytes}.")


def main() -> None:
    """Makes the pictures named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *NAMES], help=", ".join(NAMES))
    names = parser.parse_args().names or NAMES
    matplotlib.use("agg")
    IMAGES.mkdir(exist_ok=True, parents=True)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            save(getattr(gallery_pictures, name)(Path(folder)), IMAGES / f"{name}.png")
        print(f"{name}: {(IMAGES / f'{name}.png').stat().st_size} bytes")


if __name__ == "__main__":
    main()
