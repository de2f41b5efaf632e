"""Every example runs, and what it prints is what it claims."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from lightning_hessian import load_records

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SHORT = {  # of examples that take longer by default
    "mnist_cnn": ("--epochs", "1", "--classes", "3"),
    "curvature_and_errors": ("--epochs", "1", "--num-samples", "60"),
    "regularization": ("--seeds", "2", "--epochs", "4"),
    "known_results": ("--quick", "--output", "."),
}
MEASURES_ONCE = {"curvature_and_errors"}
ENVIRONMENT = {**os.environ, "MPLBACKEND": "agg", "GLOO_SOCKET_IFNAME": "lo"}


def numbers(pattern, told):
    """Those in the groups of the only place that fits."""
    (found,) = re.findall(pattern, told)
    return [float(each) for each in ([found] if isinstance(found, str) else found)]


def check_accuracy(told):
    found = re.findall(r"Held-out accuracy: ([\d.]+)%", told)
    assert found
    assert all(float(each) > 75 for each in found)


def check_zero_hessian(told):
    check_accuracy(told)
    assert "ReLU, logit: max |λ| 0 (mean of 8 digits), no curvature to share" in told
    assert "piecewise_linear: The target is piecewise linear in the input at these samples" in told
    (largest,) = numbers(r"GELU, logit: max \|λ\| ([\d.]+) ", told)
    assert largest > 1
    largest, share = numbers(r"ReLU, prob: max \|λ\| ([\d.]+) .* share ([\d.]+),", told)
    assert largest > 0.1
    assert share == 1


def check_digits_mlp(told):
    check_accuracy(told)
    lines = re.findall(r"eigenvalues from +(\S+) to (\S+), linear radius (\S+) ", told)
    (down, _, radius), *_, (last_down, last_up, last_radius) = [tuple(map(float, line)) for line in lines]
    assert len(lines) == 9
    assert last_down < 10 * down
    assert -last_down > 5 * last_up
    assert last_radius < radius


def check_text(told):
    check_accuracy(told)
    assert len(re.findall(r"^(numpy|torch): (?:[a-z]+ ?){16}$", told, re.MULTILINE)) == 3
    assert len(re.findall(r"^  [a-z]+ - [a-z]+: [\d.e-]+$", told, re.MULTILINE)) == 9


def check_pinn(told):
    (value,), (laplacian,), (mixed,) = (numbers(rf"  {name} +(\S+)", told) for name in ("u", "Lap.* trace", "mixed .*"))
    assert value < laplacian < 0.02
    assert value < mixed < 0.02


def check_molecule(told):
    assert numbers("relative error of a frequency: (.*)", told)[0] < 1e-9
    assert numbers(r"\|λ\| up to (.*) of the largest", told)[0] < 1e-9


def check_two_processes(told):
    check_accuracy(told)
    first, second = re.findall(r"Process (\d): (\S+ \d+\.\d+)", told)  # the lines of two processes may run together
    assert {first[0], second[0]} == {"0", "1"}
    assert first[1] == second[1]
    assert numbers("Largest difference to one process, of the largest eigenvalue: (.*)", told)[0] < 1e-5


def check_early_stopping(told):
    check_accuracy(told)
    number = r"([\d.]+)"
    (epochs, radius, curvature), (all_epochs, last_radius, last_curvature) = (
        numbers(rf"{run} +(\d+) epochs\..*radius {number}, max \|λ\| {number}", told)
        for run in ("stopped early", "to the end")
    )
    assert epochs < all_epochs == 20
    assert last_radius < radius < 2.5
    assert curvature < last_curvature


def check_lightning_cli(told):
    check_accuracy(told)
    tags = re.findall(r"^(hessian_lambda_\S+) -?[\d.]+$", told, re.MULTILINE)
    assert tags == [f"hessian_lambda_{end}/logit_class_{k}" for end in ("max", "min") for k in (2, 3)]


def check_regularization(told):
    """All settings and quantities; that two seeds of four epochs tell nothing more is as it should be."""
    check_accuracy(told)
    assert len(re.findall(r"^\w+ +(?:-?[\d.]+ ± [\d.]+ *){7}$", told, re.MULTILINE)) == 5
    assert len(re.findall(r"^  \w+ .* (?:lower|higher|not distinguishable)$", told, re.MULTILINE)) == 28


def check_known_results(told):
    """What holds for any seed, however short."""
    check_accuracy(told)
    assert "ReLU: zero: exactly 0 for 2 of 2 seeds, as expected" in told
    assert "of it, relatively, as expected" in told
    assert "ReLU: the share is 1: within 0, as expected" in told


CHECKS = {  # of the main claim; of all others, that the network has learned
    "zero_hessian": check_zero_hessian,
    "digits_mlp": check_digits_mlp,
    "text_at_embedding": check_text,
    "pinn_laplacian": check_pinn,
    "molecule_modes": check_molecule,
    "two_processes_ddp": check_two_processes,
    "early_stopping_on_curvature": check_early_stopping,
    "lightning_cli": check_lightning_cli,
    "regularization": check_regularization,
    "known_results": check_known_results,
}


def output(*command, cwd):
    return subprocess.run(
        [sys.executable, *command], check=True, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT
    ).stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_every_example_runs(path, tmp_path):
    code = path.read_text()
    arguments = SHORT.get(path.stem, ())
    if "--log-dir" in code:
        arguments = (*arguments, "--log-dir", tmp_path)
    if "LightningCLI(" in code:
        arguments = ("fit", "--config", path.with_suffix(".yaml"), "--trainer.logger.init_args.save_dir", tmp_path)
    told = output(path, *arguments, cwd=tmp_path)
    CHECKS.get(path.stem, check_accuracy)(told)
    if "--output" in code:
        page = (tmp_path / f"{path.stem}.md").read_text()
        pictures = re.findall(r"\]\((images/.*?)\)", page)
        assert len(pictures) == page.count("\n## ") == 4
        assert all((tmp_path / picture).stat().st_size > 5_000 for picture in pictures)
    elif "tensorboard --logdir" in code:
        assert f"tensorboard --logdir {tmp_path}, then open" in told
        assert len(list(tmp_path.rglob("step_*.safetensors"))) >= (1 if path.stem in MEASURES_ONCE else 2)
        assert list(tmp_path.rglob("events*"))
    else:
        assert not list(tmp_path.iterdir())


def test_a_pair_of_words_that_occurs_twice_has_the_larger_block(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    strongest = import_module("text_at_embedding").strongest
    passage = [*"ab", *"cdefghijklmn", *"ba"]
    blocks = np.zeros((16, 16))
    blocks[0, 1], blocks[14, 15], blocks[0, 14], blocks[2, 3] = 3, 2, 1, 2.5
    assert strongest(passage, blocks)[:2] == [(("a", "b"), 3), (("c", "d"), 2.5)]
    assert all(size == 0 for _, size in strongest(passage, blocks)[2:])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_notebook_runs(path, tmp_path):
    """Its code, one cell after another; outputs are not committed."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    told = output("-c", "\n".join("".join(cell["source"]) for cell in cells), cwd=tmp_path)
    check_accuracy(told)
    linear, quadratic = numbers(r"error of the linear picture ([\d.]+), with curvature ([\d.]+)", told)
    assert quadratic < linear / 3
    assert "so its Hessian is exactly zero there. This is correct." in told


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
