"""What the documentation shows runs: docstring examples, the README's code, every example."""

import doctest
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from support.quadratic import quadratic_record

from lightning_hessian import load_records

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


PAGES = [
    path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in path.read_text()
]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_the_code_of_a_page_runs(path, tmp_path):
    """One block after another, as a reader would run them."""
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    setting = (ROOT / "tests" / "support" / "readme_setting.py").read_text()
    program = "\n".join([setting, *blocks])
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


SHORT = {  # of examples that take longer by default
    "mnist_cnn": ("--epochs", "1", "--classes", "3"),
    "curvature_and_errors": ("--epochs", "1", "--num-samples", "60"),
}
MEASURES_ONCE = {"curvature_and_errors"}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_every_example_runs(path, tmp_path):
    logs = ("--log-dir", tmp_path) if "--log-dir" in path.read_text() else ()
    command = [sys.executable, path, *SHORT.get(path.stem, ()), *logs]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert float(re.search(r"Held-out accuracy: ([\d.]+)%", told).group(1)) > 75
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
