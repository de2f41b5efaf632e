"""Runs somebody's own suite with a monitor in every Trainer, and compares what each call leaves behind.

    python tools/every_trainer.py build/notes python -m pytest tests
    python tools/every_trainer.py --monitor my_package.curvature:monitor build/notes python train.py

The command runs three times: twice without the monitor, to see what is the same at each run anyway, and once with it.
No code changes: Lightning itself loads the monitor, through the entry point ``lightning.pytorch.callbacks_factory``.
After each ``fit``, ``validate``, ``test`` and ``predict``, also one that fails, these are compared: weights, gradients,
flags, plain attributes of the module, optimizers, schedulers, counters, other callbacks, metrics, random streams and
settings of torch. ``monitor`` is a function that returns an ``InputHessianMonitor``. Tests of pytest all start from the
same seeds; a script must seed itself. Exit code 1: something differs, or an exception of the monitor ended a call.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).parent
GROUP = "lightning.pytorch.callbacks_factory"
RUNS = ("without", "again", "with")


@dataclass(frozen=True)
class Notes:
    """What one run of the command noted."""

    calls: dict[str, dict[str, Any]]
    outcomes: dict[str, dict[str, str]]
    refused: list[str]
    warnings: list[dict[str, str]]


@dataclass
class Comparison:
    """Of a run with the monitor and two without."""

    calls: int = 0
    functions: Counter[str] = field(default_factory=Counter)
    measured: int = 0
    compared: int = 0  # calls that leave the same behind in both runs without
    partly_compared: int = 0  # those of which some kinds of state do
    differing: dict[str, list[str]] = field(default_factory=dict)
    exceptions: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)

    @property
    def is_clean(self) -> bool:
        """Whether the monitor changed nothing and raised nothing."""
        return not (self.differing or self.exceptions)


def main() -> None:
    """Runs, compares, prints, and writes ``comparison.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where notes are kept")
    parser.add_argument("--monitor", default="every_trainer_state:default_monitor", metavar="MODULE:FUNCTION")
    parser.add_argument("--only-compare", action="store_true", help="what was run before")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    folder: Path = arguments.folder.absolute()
    if not arguments.only_compare:
        for run in RUNS:
            execute(arguments.command, folder, run, arguments.monitor if run == "with" else "")
    found = compare(*(read(folder / run) for run in RUNS))
    (folder / "comparison.json").write_text(json.dumps(vars(found), indent=1) + "\n")
    report(found)
    sys.exit(not found.is_clean)


def execute(command: list[str], folder: Path, run: str, monitor: str) -> None:
    """Runs the command with what an installed package would declare as an entry point."""
    notes, declared = folder / run, folder / "declared" / "every_trainer-1.dist-info"
    declared.mkdir(parents=True, exist_ok=True)
    (declared / "METADATA").write_text("Metadata-Version: 2.1\nName: every-trainer\nVersion: 1\n")
    (declared / "entry_points.txt").write_text(f"[{GROUP}]\nevery_trainer = every_trainer_state:callbacks\n")
    notes.mkdir(parents=True, exist_ok=True)
    for old in notes.glob("*.jsonl"):
        old.unlink()
    paths = [str(TOOLS), str(declared.parent), os.environ.get("PYTHONPATH", "")]
    # the same basetemp: paths are part of what callbacks remember
    pytest_options = f"-p every_trainer_pytest --basetemp={folder / 'temporary'} {os.environ.get('PYTEST_ADDOPTS', '')}"
    print(f"--- {run}: {' '.join(command)}", flush=True)
    subprocess.run(
        command,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTEST_ADDOPTS": pytest_options,
            "EVERY_TRAINER_NOTES": str(notes),
            "EVERY_TRAINER_MONITOR": monitor,
        },
        check=False,
    )


def read(folder: Path) -> Notes:
    """The notes of all processes of a run."""

    def lines(kind: str) -> list[dict[str, Any]]:
        files = sorted(folder.glob(f"{kind}-*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]

    return Notes(
        calls={note["key"]: note for note in lines("calls")},
        outcomes={note["test"]: note for note in lines("outcomes")},
        refused=[note["message"] for note in lines("refused")],
        warnings=lines("warnings"),
    )


def compare(without: Notes, again: Notes, monitored: Notes) -> Comparison:
    """What the monitor changed, of what is the same in both runs without it."""
    found = Comparison(calls=len(monitored.calls), refused=Counter(monitored.refused))
    for key, call in monitored.calls.items():
        found.functions[str(call["function"])] += 1
        found.measured += call["measured"]
        if call["ours"]:
            found.exceptions[key] = call["error"]
        before, twice = without.calls.get(key), again.calls.get(key)
        if before is None or twice is None:
            continue  # a test that goes another way says so by its outcome
        stable = {kind for kind, value in before["state"].items() if twice["state"].get(kind) == value}
        found.compared += len(stable) == len(before["state"])
        found.partly_compared += 0 < len(stable) < len(before["state"])
        if parts := sorted(kind for kind in stable if call["state"].get(kind) != before["state"][kind]):
            found.differing[key] = parts
        if before["error"] != call["error"] and not call["ours"]:
            found.exceptions[key] = f"without: {before['error']}, with: {call['error']}"
    for test, note in monitored.outcomes.items():
        outcomes = [run.outcomes.get(test, {}).get("outcome") for run in (without, again)]
        if outcomes[0] == outcomes[1] != note["outcome"]:
            found.outcomes[test] = f"{outcomes[0]} without, {note['outcome']} with: {note['reason'][-500:]}"
    found.warnings.update(note["message"] for note in monitored.warnings)
    return found


def report(found: Comparison) -> None:
    """Prints it."""
    kinds = ", ".join(f"{number} {name}" for name, number in found.functions.most_common())
    print(f"\n{found.calls} calls of a Trainer with a monitor ({kinds}); measured in {found.measured}.")
    print(f"Refused for wrong settings: {sum(found.refused.values())}.")
    print(f"Compared whole: {found.compared}; in part, since the rest differs anyway: {found.partly_compared}.")
    for title, entries in (
        ("Calls that leave something else behind", found.differing),
        ("Calls that end differently", found.exceptions),
        ("Tests that end differently", found.outcomes),
        ("Refusals", found.refused),
        ("Warnings of the monitor", found.warnings),
    ):
        print(f"\n{title}: {len(entries)}")
        for name, value in entries.items():
            print(f"  {name}: {value}")


if __name__ == "__main__":
    main()
