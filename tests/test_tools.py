"""The tools that are run by hand still run, and would find what they look for."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tools import compat, every_trainer
from tools.every_trainer import Notes

ROOT = Path(__file__).parent.parent
SCRIPT = """
from pathlib import Path
import torch
from lightning.pytorch import Trainer
from support.training import Classifier, digits
from torch.utils.data import DataLoader

torch.manual_seed(0)
trainer = Trainer(accelerator="cpu", max_steps=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
                  enable_checkpointing=False)
trainer.fit(Classifier(), DataLoader(digits(0, 32), 16), DataLoader(digits(0, 16), 16))
trainer.validate(trainer.lightning_module, DataLoader(digits(0, 16), 16), verbose=False)
"""
FACTORY = """
import torch
from lightning_hessian import InputHessianMonitor

class Draws(InputHessianMonitor):
    def on_train_end(self, trainer, pl_module):
        torch.rand(1)

def draws():
    return Draws("all", num_samples=1, heatmap_samples=0)
"""


def test_every_package_of_the_oldest_environment_has_a_bound():
    wanted = compat.requirements()
    assert wanted["torch"] == ("torch>=2.6", "2.6")
    assert "ruff" not in wanted
    assert all(bound for _, bound in wanted.values())


def test_somebody_elses_script(tmp_path, monkeypatch):
    """With a monitor that draws from torch's stream, which is all that may differ."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "factories.py").write_text(FACTORY)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}:{ROOT / 'tests'}")
    tool = [sys.executable, ROOT / "tools" / "every_trainer.py", "--monitor", "factories:draws"]
    command = [*tool, tmp_path / "notes", sys.executable, tmp_path / "script.py"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    found = json.loads((tmp_path / "notes" / "comparison.json").read_text())
    assert found["functions"] == {"fit": 1, "validate": 1}, ended.stderr
    assert (found["measured"], found["compared"] + found["partly_compared"]) == (2, 2)
    assert list(found["differing"].values()) == [["stream of torch"]] * 2
    assert ended.returncode == 1


def call(state, **more):
    return {"function": "fit", "measured": True, "error": None, "ours": False, "state": state, **more}


def notes(*calls, **outcomes):
    numbered = {f"call {n}": each for n, each in enumerate(calls)}
    return Notes(numbered, {t: {"outcome": o, "reason": ""} for t, o in outcomes.items()}, [], [])


def test_what_differs_in_runs_without_the_monitor_is_not_compared():
    without = notes(call({"weights": "1", "time": "1"}), test="passed")
    again = notes(call({"weights": "1", "time": "2"}), test="passed")
    found = every_trainer.compare(without, again, notes(call({"weights": "1", "time": "3"}), test="failed"))
    assert (found.compared, found.partly_compared, found.differing) == (0, 1, {})
    assert list(found.outcomes) == ["test"]
    found = every_trainer.compare(without, again, notes(call({"weights": "2", "time": "1"})))
    assert found.differing == {"call 0": ["weights"]}


def test_an_exception_of_the_monitor_is_found():
    failed = notes(call({"weights": "1"}, error="TypeError: …", ours=True))
    assert not every_trainer.compare(notes(), notes(), failed).is_clean


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["w"].add_(1),
        lambda s: s["n"].append(3),
        lambda s: s["a"].__setitem__(0, 1.0),
        lambda s: s.update(b=None),
    ],
)
def test_a_digest_sees_values(change):
    from tools.every_trainer_state import digest

    state = {"w": torch.zeros(3, dtype=torch.bfloat16), "n": [1, {2}], "a": np.zeros(2), "b": object()}
    state["n"].append(state)  # a cycle
    before = digest(state)
    assert digest(state) == before
    change(state)
    assert digest(state) != before
