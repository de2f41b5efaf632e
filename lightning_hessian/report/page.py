"""From the records of one or several runs to one standalone page: no network, no TensorBoard, no server.

The page holds the modules of the "Input Hessian" tab, Plotly, the style and the data, and shows the same views.
Knows no torch, no Lightning and no TensorBoard.
"""

from __future__ import annotations

import base64
import html
import json
import os
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from lightning_hessian._version import __version__
from lightning_hessian.records.answers.history import describe, metric_table
from lightning_hessian.records.event_format import EVENT_FORMAT_VERSION
from lightning_hessian.records.locations import write_whole
from lightning_hessian.report.contents import Store, Tag, find_runs, gather

STATIC = Path(__file__).parent.parent / "tensorboard_plugin" / "static"
ENTRY = "report.js"
MAX_SIZE = 50.0  # MB: the limit of many journals for a supplement

# Nothing may be fetched, and only what is in the page may run.
POLICY = "default-src 'none'; script-src 'unsafe-inline' data:; style-src 'unsafe-inline'; img-src data: blob:"

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="lightning-hessian {version}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}
</style>
<script type="importmap">
{imports}
</script>
</head>
<body>
<noscript>This page draws its charts with JavaScript, which is disabled here.</noscript>
<div id="root"></div>
<script type="application/json" id="catalog">
{catalog}
</script>
{blocks}
<script>
{plotly}
</script>
<script type="module">
import {{ render }} from "{entry}";
await render();
</script>
</body>
</html>
"""


def write_report(
    log_dirs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] = "report.html",
    *,
    max_size: float = MAX_SIZE,
) -> Path:
    """Writes one HTML file with everything that the "Input Hessian" tab shows about some runs.

    It opens in any browser from 2023 or later, without a network, so it can be mailed or used as a supplement. An
    existing file is replaced completely or not at all.

    Args:
        log_dirs: directories of runs, or above them, as for ``tensorboard --logdir``.
        output: the file to write.
        max_size: of the file, in MB (10⁶ bytes). If the data is larger, matrices, then maps of input space, and
            finally whole measurements are left out, and the page says how many. The last measurement stays.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: there is no such directory, or no records in it.
        ValueError: a record is damaged, or ``max_size`` is less than the page itself takes.

    Example:
        >>> from lightning_hessian import write_report
        >>> write_report("not_there")
        Traceback (most recent call last):
        ...
        FileNotFoundError: There is no directory not_there: ...
    """
    given = [log_dirs] if isinstance(log_dirs, (str, os.PathLike)) else list(log_dirs)
    runs = find_runs(given)
    frame = _page(_title(list(runs)), [], Store(0))
    max_data = int(max_size * 1e6) - len(frame.encode())
    if max_data <= 0:
        raise ValueError(
            f"max_size is {max_size:g} MB, but the page without any data takes {len(frame) / 1e6:.1f} MB: allow more."
        )
    tags, store = gather(runs, max_data)
    path = Path(output)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no directory {path.parent} to write {path.name} into: make it first.")
    write_whole(_page(_title(list(runs)), tags, store).encode(), path)
    return path


def _page(title: str, tags: Sequence[Tag], store: Store) -> str:
    return PAGE.format(
        policy=html.escape(POLICY, quote=True),
        version=__version__,
        title=html.escape(title),
        style=(STATIC / "style.css").read_text("utf-8"),
        imports=json.dumps({"imports": import_map()}),
        catalog=json.dumps(_catalog(title, tags), ensure_ascii=False).replace("<", "\\u003c"),
        blocks="\n".join(
            f'<script type="text/plain" id="block-{name}">{block}</script>' for name, block in store.blocks.items()
        ),
        plotly=_script(get_plotlyjs()),
        entry=_bare(ENTRY),
    )


def _title(runs: Sequence[str]) -> str:
    return f"Input Hessian: {', '.join(runs[:3])}{f' and {len(runs) - 3} more' if len(runs) > 3 else ''}"


def import_map() -> dict[str, str]:
    """Every module of the frontend as a ``data:`` URL, by a name that does not depend on where the page is."""
    found = {}
    for path in sorted(STATIC.rglob("*.js")):
        name = path.relative_to(STATIC).as_posix()
        text = _with_bare_imports(name, path.read_text("utf-8"))
        found[_bare(name)] = f"data:text/javascript;base64,{base64.b64encode(text.encode()).decode()}"
    return found


def _bare(module: str) -> str:
    return f"input_hessian/{module}"


def _with_bare_imports(module: str, text: str) -> str:
    """``text`` with ``"./other.js"`` as a bare name: nothing is relative to a ``data:`` URL."""

    def bare(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(module), match["path"]))
        return f'{match["before"]}"{_bare(target)}"'

    return re.sub(r'(?P<before>\b(?:from|import)\s*\(?\s*)"(?P<path>\.{1,2}/[^"]+)"', bare, text)


def _script(text: str) -> str:
    """A script that may stand between ``<script>`` and ``</script>``."""
    return re.sub(r"</(?=[sS][cC][rR][iI][pP][tT])", r"<\\/", text).replace("<!--", r"<\!--")


def _catalog(title: str, tags: Sequence[Tag]) -> dict[str, Any]:
    """What the page knows before it opens a block: the answer to ``runs()``, and which block answers what."""
    entries = [(tag.run, {**describe(tag.measured, tag.name), "files": True, "why_no_files": None}) for tag in tags]
    return {
        "title": title,
        "version": __version__,
        "runs": {
            "format": EVENT_FORMAT_VERSION,
            "metrics": metric_table(),
            "runs": [
                {"run": run, "tags": [entry for name, entry in entries if name == run]}
                for run in dict.fromkeys(tag.run for tag in tags)
            ],
        },
        "blocks": [{"run": tag.run, "tag": tag.name, "answers": tag.blocks} for tag in tags],
    }
