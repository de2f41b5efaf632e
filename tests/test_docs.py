"""What the documentation shows runs: docstring examples, the README's code, every example."""

import doctest
import html
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
from support.quadratic import quadratic_record

from lightning_hessian import load_records
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
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
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


SHORT = {  # of examples that take longer by default
    "mnist_cnn": ("--epochs", "1", "--classes", "3"),
    "curvature_and_errors": ("--epochs", "1", "--num-samples", "60"),
    "regularization": ("--seeds", "2", "--epochs", "4"),
    "known_results": ("--quick",),
}
SAYS = {  # what holds however short they are
    "regularization": ("gradient_penalty  max |λ| ", "dropout           FGSM "),
    "known_results": (
        "ReLU: zero: exactly 0 for 2 of 2 seeds, as expected",
        "of it, relatively, as expected",
        "ReLU: the share is 1: within 0, as expected",
    ),
}
MEASURES_ONCE = {"curvature_and_errors"}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_every_example_runs(path, tmp_path):
    logs = ("--log-dir", tmp_path) if "--log-dir" in path.read_text() else ()
    output = ("--output", tmp_path) if "--output" in path.read_text() else ()
    command = [sys.executable, path, *SHORT.get(path.stem, ()), *logs, *output]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert float(re.search(r"Held-out accuracy: ([\d.]+)%", told).group(1)) > 75
    assert all(words in told for words in SAYS.get(path.stem, ()))
    if output:
        page = (tmp_path / f"{path.stem}.md").read_text()
        pictures = re.findall(r"\]\((images/.*?)\)", page)
        assert len(pictures) == page.count("\n## ") == 4
        assert all((tmp_path / picture).stat().st_size > 5_000 for picture in pictures)
    if logs:
        assert f"tensorboard --logdir {tmp_path}, then open" in told
        assert len(list(tmp_path.rglob("step_*.safetensors"))) >= (1 if path.stem in MEASURES_ONCE else 2)
        assert list(tmp_path.rglob("events*"))


def test_the_demo_is_measured_again_from_its_checkpoints(tmp_path):
    """By the command that it prints."""
    demo = [sys.executable, ROOT / "examples" / "mnist_cnn.py", *SHORT["mnist_cnn"], "--activation", "relu"]
    told = subprocess.run(
        [*demo, "--checkpoints", "--log-dir", tmp_path], check=True, capture_output=True, text=True
    ).stdout
    (words,) = re.findall(r"Measure them: \.venv/bin/lightning-hessian (.*)", told)
    subprocess.run([sys.executable, "-m", "lightning_hessian.cli", *shlex.split(words)], check=True, cwd=ROOT)
    (run,) = (path.parent for path in tmp_path.rglob("checkpoints"))
    *_, theirs = load_records(run)
    (ours,) = load_records(tmp_path / "from_checkpoints")
    assert np.array_equal(ours.eigenvalues, theirs.eigenvalues)
    assert (ours.step, ours.logged_step, ours.target) == (theirs.step, theirs.logged_step, "prob")


def test_curvature_and_errors_of_a_gelu_network(tmp_path):
    short = ("--epochs", "1", "--num-samples", "30", "--activation", "gelu", "--log-dir", tmp_path)
    command = [sys.executable, ROOT / "examples" / "curvature_and_errors.py", *short]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    right, wrong = re.search(r"digits: (\d+) right, (\d+) wrong", told).groups()
    (record,) = load_records(tmp_path)
    assert int(right) + int(wrong) == (record.valid[:, 0] & np.isfinite(record.normalized_curvature[:, 0])).sum()
    assert (record.method, record.target) == ("lanczos", "margin")
    assert "distance of the flip, given the margin: " in told
    assert "One may not conclude that curvature causes errors" in told
    assert (tmp_path / "curvature_and_errors.png").stat().st_size > 10_000
