"""What the documentation shows runs: docstring examples, the README's code, every example."""

import doctest
import re
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


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    setting = (ROOT / "tests" / "support" / "readme_setting.py").read_text()
    program = "\n".join([setting, *blocks])
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


SHORT = {  # of examples that take longer by default
    "mnist_cnn": ("--epochs", "1", "--classes", "3"),
    "curvature_and_errors": ("--epochs", "1", "--num-samples", "60"),
}


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_every_example_runs(path, tmp_path):
    command = [sys.executable, path, *SHORT.get(path.stem, ()), "--log-dir", tmp_path]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    accuracy = float(re.search(r"Held-out accuracy: ([\d.]+)%", told).group(1))
    assert accuracy > 80
    assert f"tensorboard --logdir {tmp_path}, then open" in told
    assert list(tmp_path.rglob("step_*.safetensors"))


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
