"""Changes the package in random places, one at a time, and looks whether the tests notice: ``make mutants``.

Places are drawn with a seed in ``curvature/`` and ``model/``, by cosmic-ray's operators: other comparisons, arithmetic,
numbers, ``and`` for ``or``, loops that never run. Each mutant lives in a copy of the repository. It is killed if a test
fails or takes too long; survivors are listed with their change, and each wants a test or an explanation. One after the
other takes hours; two processes work at the same time, and a second call goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGE = "lightning_hessian"
ROOMS = ("curvature", "model")
TESTS = ("tests/curvature", "tests/model", "tests/test_functional.py", "tests/test_pitfalls.py")
AT_A_TIME = 2
LIMIT = 1200.0  # seconds of all tests of one mutant
# Changes that no test could notice: of types, and a name for another that means the same.
LEFT_OUT = ("RemoveDecorator", "VariableReplacer", "VariableInserter", "BitOr")


@dataclass(frozen=True)
class Mutant:
    """One change: the n-th place in a file where an operator fits."""

    path: str
    operator: str
    occurrence: int

    @property
    def name(self) -> str:
        """As in the results."""
        return f"{self.path} {self.operator} {self.occurrence}"


def all_mutants() -> list[Mutant]:
    """Every change that is possible, in a fixed order."""
    from cosmic_ray.ast import ast_nodes, get_ast_from_path
    from cosmic_ray.plugins import get_operator, operator_names

    found = []
    for room in ROOMS:
        for path in sorted((ROOT / PACKAGE / room).rglob("*.py")):
            nodes = list(ast_nodes(get_ast_from_path(path)))
            for name in sorted(operator_names()):
                if not any(part in name for part in LEFT_OUT):
                    operator = get_operator(name)()
                    number = sum(len(list(operator.mutation_positions(node))) for node in nodes)
                    found += [Mutant(str(path.relative_to(ROOT)), name, i) for i in range(number)]
    return found


def drawn(number: int, seed: int) -> list[Mutant]:
    """A sample of places: first a place, then one of the changes that fit there, so that no operator dominates."""
    by_file: dict[tuple[str, str], list[Mutant]] = {}
    for mutant in all_mutants():
        kind = mutant.operator.rsplit("_", 1)[0]  # the same place has a mutant for every other comparison
        by_file.setdefault((mutant.path, f"{kind} {mutant.occurrence}"), []).append(mutant)
    generator = random.Random(seed)
    places = sorted(by_file)
    return [generator.choice(by_file[place]) for place in generator.sample(places, min(number, len(places)))]


def tests_of(path: str) -> list[str]:
    """All tests of the rooms, those that mirror the changed file first."""
    mirror = ROOT / "tests" / Path(path).relative_to(PACKAGE).parent / f"test_{Path(path).name}"
    first = [str(mirror.relative_to(ROOT))] if mirror.exists() else []
    return [*first, *TESTS]


def tested(copy: Path, tests: list[str], limit: float | None) -> subprocess.CompletedProcess[str]:
    """Runs tests in a copy, until one fails."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    paths = [str(copy), str(copy / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=copy, env=environ, capture_output=True, text=True, timeout=limit)


def check_unchanged(copy: Path) -> None:
    """Raises unless the tests pass without any change: else every mutant would seem to be noticed."""
    ran = tested(copy, list(TESTS), None)
    if ran.returncode != 0:
        sys.exit(f"The tests fail without any change:\n{ran.stdout[-3000:]}")


def judged(mutant: Mutant, copy: Path) -> dict[str, Any]:
    """What the tests say about a mutant, made in a copy of the repository that is whole again afterwards."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    path = copy / mutant.path
    before = path.read_text()
    after = mutate_code(before, get_operator(mutant.operator)(), mutant.occurrence)
    change = list(difflib.unified_diff(before.split("\n"), after.split("\n"), n=0, lineterm=""))[3:]
    path.write_text(after)
    begin = time.monotonic()
    try:
        ran = tested(copy, tests_of(mutant.path), LIMIT)
        lines = ran.stdout.splitlines()
        failed = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), "")
        verdict = "survived" if ran.returncode == 0 else "killed"
    except subprocess.TimeoutExpired:
        verdict, failed = "killed", "took too long"
    finally:
        path.write_text(before)
    took = round(time.monotonic() - begin)
    return {"mutant": mutant.name, "verdict": verdict, "by": failed[:200], "seconds": took, "change": change}


def copied(folder: Path) -> Path:
    """A copy of what git knows of the repository, changed files included."""
    shutil.rmtree(folder, ignore_errors=True)
    known = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in known.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def main() -> None:
    """Judges what was drawn and not judged yet, and prints the survivors."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="of copies and results")
    parser.add_argument("--number", type=int, default=100)
    parser.add_argument("--first", type=int, help="of those drawn, only so many")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    results = chosen.folder / "mutants.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    names = {each["mutant"] for each in done}
    mutants = [m for m in drawn(chosen.number, chosen.seed)[: chosen.first] if m.name not in names]
    copies: Queue[Path] = Queue()
    for i in range(AT_A_TIME):
        copies.put(copied(chosen.folder / f"copy{i}"))

    if not done:
        check_unchanged(chosen.folder / "copy0")

    def work(mutant: Mutant) -> None:
        copy = copies.get()
        try:
            result = judged(mutant, copy)
        finally:
            copies.put(copy)
        done.append(result)
        print(f"{result['verdict']} after {result['seconds']} s: {result['mutant']}", flush=True)
        with results.open("a") as file:
            file.write(json.dumps(result) + "\n")

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        list(pool.map(work, mutants))
    report(done)


def report(done: list[dict[str, Any]]) -> None:
    """Counts, and the survivors with their changes."""
    survivors = [each for each in done if each["verdict"] == "survived"]
    print(f"\n{len(done) - len(survivors)} of {len(done)} mutants were noticed.")
    for each in survivors:
        print(f"\nsurvived: {each['mutant']}", *each["change"], sep="\n  ")


if __name__ == "__main__":
    main()
