"""The files of the tab's page: each by its exact name, read when requested."""

from __future__ import annotations

import gzip
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from lightning_hessian.tensorboard_plugin.request import RequestError

FOLDER = Path(__file__).parent / "static"
CONTENT_TYPES = {".js": "text/javascript", ".css": "text/css"}


def static_files() -> dict[str, tuple[Path, str]]:
    """Name, with folders -> file and content type. Only these exist: no name from a request becomes a path."""
    return {
        path.relative_to(FOLDER).as_posix(): (path, CONTENT_TYPES[path.suffix])
        for path in sorted(FOLDER.rglob("*"))
        if path.suffix in CONTENT_TYPES and path.is_file() and not path.is_symlink()
    }


@cache
def plotly_script() -> bytes:
    """Plotly's own script out of the ``plotly`` package, gzipped.

    It is what ``plotly.offline.get_plotlyjs()`` returns, without loading the package.

    Raises:
        RequestError: the package is not installed.
    """
    found = find_spec("plotly")
    for folder in (found.submodule_search_locations if found else None) or ():
        path = Path(folder) / "package_data" / "plotly.min.js"
        if path.is_file():
            return gzip.compress(path.read_bytes(), 6, mtime=0)
    raise RequestError(404, "The package plotly is not installed where TensorBoard runs: pip install plotly.")
