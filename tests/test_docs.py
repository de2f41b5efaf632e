"""What the documentation shows runs: docstring examples, and the code of the README and of every page."""

import doctest
import html
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from support.quadratic import quadratic_record

from lightning_hessian.curvature.checks.diagnosis import MESSAGES
from lightning_hessian.curvature.checks.explanation import COUPLED, RANDOM
from lightning_hessian.training.trainer_run import NO_SAMPLES

ROOT = Path(__file__).parent.parent
MODULES = sorted(p for p in (ROOT / "lightning_hessian").rglob("*.py") if ">>>" in p.read_text())
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL


@pytest.mark.parametrize("path", MODULES, ids=lambda p: "/".join(p.relative_to(ROOT).parts[1:]))
def test_docstring_examples(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    record = quadratic_record(3.0, 1.0, -2.0)
    result = doctest.testmod(import_module(name), optionflags=FLAGS, extraglobs={"record": record})
    assert result.attempted > 0
    assert result.failed == 0


def with_code(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.md")) if "```python" in path.read_text()]


def program(path: Path) -> str:
    """The code of a page, one block after another, after what it takes for granted."""
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    return "\n".join([(ROOT / "tests" / "support" / "readme_setting.py").read_text(), *blocks])


# Each in a process of its own; pages of one folder share one, which saves most of the time.
PAGES = [ROOT / "README.md", *with_code(ROOT / "docs")]
FOLDERS = [folder for folder in sorted((ROOT / "docs").iterdir()) if folder.is_dir() and with_code(folder)]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_the_code_of_a_page_runs(path, tmp_path):
    """As a reader would run it."""
    subprocess.run([sys.executable, "-c", program(path)], check=True, cwd=tmp_path)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_the_code_of_every_page_of_a_folder_runs(folder, tmp_path):
    """Each page with names and a directory of its own."""
    run = "import os, sys\nfrom pathlib import Path\n"
    for path in with_code(folder):
        place = tmp_path / path.stem
        place.mkdir()
        (place / "page.py").write_text(program(path))
        run += f"os.chdir({str(place)!r})\nexec(compile(Path('page.py').read_text(), {str(path)!r}, 'exec'), {{}})\n"
    subprocess.run([sys.executable, "-c", run], check=True, cwd=tmp_path)


@pytest.fixture(scope="module")
def site_pages():
    """What ``make docs`` makes of the code."""
    spec = spec_from_file_location("site_pages", ROOT / "docs" / "site_pages.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_metric_has_a_note(site_pages):
    assert list(site_pages.metric_notes()) == [metric.name for metric in site_pages.shown_metrics()]


def test_each_metric_has_a_picture_with_a_caption(site_pages):
    names = {metric.name for metric in site_pages.shown_metrics()}
    pictures = list((ROOT / "docs" / "images" / "metrics").iterdir())
    assert {path.name for path in pictures} == {f"{name}.png" for name in names}
    assert all(path.stat().st_size <= 25_000 for path in pictures)
    for metric in site_pages.shown_metrics():
        page = site_pages.metric_page(metric)
        assert f"](../images/metrics/{metric.name}.png)" in page
        assert re.search(r"^\*Left: .*?Right: .*?\.\*$", page, re.MULTILINE | re.DOTALL), metric.name


def test_what_troubleshooting_quotes_is_what_the_package_says(site_pages):
    said = [sentence for _, sentence in site_pages.messages()]
    quoted = re.findall(r"^> (.*)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 20
    for quotation in quoted:
        assert any(quotation in sentence for sentence in said), quotation


def test_every_kind_of_zero_and_every_message_is_on_a_page(site_pages):
    page = (ROOT / "docs" / "concepts" / "zero.md").read_text()
    assert all(f"`{kind}`" in page for kind in MESSAGES)
    listed = html.unescape(site_pages.messages_page())
    for message in (*MESSAGES.values(), RANDOM, COUPLED, NO_SAMPLES):
        assert message in listed


def test_the_site_is_built_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]  # --quiet would undo --strict
    subprocess.run(build, check=True, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 40
    loaded = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\s(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not loaded.findall(text), page.name
        assert "arithmatex" not in text, page.name
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style.name


def test_every_example_is_in_the_gallery():
    """With a picture that is small enough for a page of many."""
    page = (ROOT / "docs" / "gallery.md").read_text()
    examples = [path for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".ipynb")]
    assert set(re.findall(r"\]\(\.\./examples/(.*?)\)", page)) == {path.name for path in examples}
    for path in examples:
        picture = ROOT / "docs" / "images" / "gallery" / f"{path.stem}.png"
        assert f"](images/gallery/{path.stem}.png)" in page
        assert 5_000 < picture.stat().st_size < 60_000
