"""A plugin of pytest for ``every_trainer.py``: each test starts from the same seeds, and its outcome is noted."""

from __future__ import annotations

import json
import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Makes runs comparable."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Notes what came out."""
    if report.when == "call" or report.outcome != "passed":
        reason = report.longreprtext[-2000:] if report.failed else ""
        _write("outcomes", {"test": report.nodeid, "outcome": report.outcome, "reason": reason})


def pytest_warning_recorded(warning_message: warnings.WarningMessage, nodeid: str) -> None:
    """Notes what the monitor says."""
    if str(warning_message.message).startswith("InputHessianMonitor"):
        _write("warnings", {"test": nodeid, "message": str(warning_message.message)})


def _write(kind: str, note: dict[str, str]) -> None:
    # not that of every_trainer_state, which imports Lightning: a suite's own conftest may want to be first
    with open(Path(os.environ["EVERY_TRAINER_NOTES"]) / f"{kind}-{os.getpid()}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(note) + "\n")
