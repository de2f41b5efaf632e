"""Changes the package in random places, one at a time, and looks whether the tests notice: ``make mutants``.

Places are drawn with a seed in ``curvature/`` and ``model/``, by cosmic-ray's operators: other comparisons, arithmetic,
numbers, ``and`` for ``or``, loops that never run. Each mutant lives in a copy of the repository. It is killed if a test
fails or takes too long. All tests run once without any change, to see which lines each of them executes; after that,
a mutant meets the tests that can notice it, until one does. Survivors want a test, or an explanation in
``survivors.py``. A second call goes on where the first was stopped. What came out at each commit is in
``benchmarks/results/mutants.json``, and on the page that is made of it, ``docs/mutants.md``.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.survivors import KINDS, explanation_of
from support.tests_by_line import SECONDS, tests_of

ROOT = Path(__file__).parents[2]
PACKAGE = "lightning_hessian"
ROOMS = ("curvature", "model")
TESTS = ("tests/curvature", "tests/model", "tests/test_errors.py", "tests/test_functional.py", "tests/test_pitfalls.py")
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "mutants.json", ROOT / "docs" / "mutants.md"
SINCE = " (written since)"  # of tests that did not exist when the mutant was drawn
LIMIT = 1800.0  # seconds of all tests of one mutant, should a process hang
INTRODUCTION = """\
# Mutants

Would the tests notice a mistake in the numerics? `make mutants` makes one random change at a time to the code in
`curvature/` and `model/` (a *mutant*), and runs the tests that execute the changed line. This page is generated from
`benchmarks/results/mutants.json`.

- **noticed at once**: an existing test failed.
- **noticed since**: no test failed at first; one that does was written afterwards.
- **equivalent**: the change cannot affect anything that the code computes or says.
- **choice**: a constant that could just as well have the other value, such as when a method gives up.
- **removed**: the code was unused, and has been removed.
- **unexplained**: everything else. A mistake there would go unnoticed."""
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


def tested(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs tests in a copy, until one fails."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "support.tests_by_line"]
    paths = [str(copy), str(copy / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], cwd=copy, env=environ, capture_output=True, text=True, timeout=LIMIT)


def record(copy: Path, folder: Path) -> None:
    """Lines and times of all tests, which must pass without any change: else every mutant would seem to be noticed."""
    rooms = [str(copy / PACKAGE / room) for room in ROOMS]
    ran = tested(copy, "--record", str(folder), *TESTS, "--of", *rooms)
    if ran.returncode != 0:
        (folder / SECONDS).unlink(missing_ok=True)
        sys.exit(f"The tests fail without any change:\n{ran.stdout[-3000:]}{ran.stderr[-1000:]}")


def judged(mutant: Mutant, copy: Path, recorded: Path, folder: Path) -> dict[str, Any]:
    """What the tests say about a mutant, made in ``copy``, which is whole again afterwards.

    The tests of a line are known for the copy that was ``recorded``.
    """
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    path = copy / mutant.path
    before = path.read_text()
    after = mutate_code(before, get_operator(mutant.operator)(), mutant.occurrence)
    old, new = before.split("\n"), after.split("\n")
    change = list(difflib.unified_diff(old, new, n=0, lineterm=""))[3:]
    parts = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    lines = [line + 1 for kind, i, j, *_ in parts if kind != "equal" for line in range(i, max(j, i + 1))]
    tests = tests_of(recorded / mutant.path, lines, folder)
    result = {"mutant": mutant.name, "change": [line for line in change if not line.startswith("@@")]}
    if not tests:
        return {**result, "verdict": "survived", "by": "no test executes this line", "seconds": 0}
    chosen = copy / "tests.txt"
    chosen.write_text("\n".join(tests))
    begin = time.monotonic()
    path.write_text(after)
    try:
        ran = tested(copy, "--time-limits", str(folder), f"@{chosen}")
        failed = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        verdict = "survived" if ran.returncode == 0 else "killed"
        by = (
            "" if ran.returncode == 0 else (failed or ["took too long" if ran.returncode < 0 else ran.stderr[-200:]])[0]
        )
    except subprocess.TimeoutExpired:
        verdict, by = "killed", "took too long"
    finally:
        path.write_text(before)
    return {**result, "verdict": verdict, "by": by[:200], "seconds": round(time.monotonic() - begin)}


def copied(folder: Path) -> Path:
    """A copy of what git knows of the repository, changed files included."""
    shutil.rmtree(folder, ignore_errors=True)
    known = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in known.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def all_judged(mutants: Sequence[Mutant], copies: Sequence[Path], folder: Path) -> Iterator[dict[str, Any]]:
    """What the tests say about mutants, as many at a time as there are copies, the first of which was recorded."""
    free = queue.SimpleQueue[Path]()
    for copy in copies:
        free.put(copy)

    def judge(mutant: Mutant) -> dict[str, Any]:
        copy = free.get()
        try:
            return judged(mutant, copy, copies[0], folder)
        finally:
            free.put(copy)

    with ThreadPoolExecutor(len(copies)) as pool:
        yield from pool.map(judge, mutants)


def main() -> None:
    """Judges what was drawn and not judged yet, and prints the survivors."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="of the copy and the results")
    parser.add_argument("--number", type=int, default=100)
    parser.add_argument("--first", type=int, help="of those drawn, only so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="the survivors, with tests written in the meantime")
    chosen = parser.parse_args()
    folder = chosen.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results, copy = folder / "mutants.jsonl", copied(folder / "copy")
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    survived = {each["mutant"] for each in done if each["verdict"] == "survived"} if chosen.again else set()
    if chosen.again:
        done = [each for each in done if each["verdict"] == "killed"]
        results.write_text("".join(json.dumps(each) + "\n" for each in done))
        (folder / SECONDS).unlink(missing_ok=True)
    if not (folder / SECONDS).exists():
        record(copy, folder)
    names = {each["mutant"] for each in done}
    waiting = [each for each in drawn(chosen.number, chosen.seed)[: chosen.first] if each.name not in names]
    copies = [copy, *(copied(folder / f"copy_{i}") for i in range(1, chosen.processes))]
    for result in all_judged(waiting, copies, folder):
        if result["mutant"] in survived and result["verdict"] == "killed":
            result["by"] += SINCE
        done.append(result)
        print(f"{result['verdict']} after {result['seconds']} s: {result['mutant']}", flush=True)
        with results.open("a") as file:
            file.write(json.dumps(result) + "\n")
    report(done, chosen.number, chosen.seed)


def report(done: list[dict[str, Any]], number: int, seed: int) -> None:
    """Counts, and the survivors with their changes and explanations: here, in the results, and on the page."""
    survivors = [each for each in done if each["verdict"] == "survived"]
    for each in survivors:
        each["kind"], each["explanation"] = explanation_of(each["mutant"].split()[0], each["change"])
        print(f"\nsurvived: {each['mutant']}", *each["change"], each["explanation"], sep="\n  ")
    killed = {each["mutant"]: each["by"] for each in done if each["verdict"] == "killed"}
    head = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    result = {
        "commit": head.stdout.strip(),
        "seed": seed,
        "drawn": number,
        "run": len(done),
        "noticed_at_once": sum(not by.endswith(SINCE) for by in killed.values()),
        "noticed_since": sum(by.endswith(SINCE) for by in killed.values()),
        "survivors": [{k: each[k] for k in ("mutant", "change", "kind", "explanation")} for each in survivors],
        "killed": killed,
    }
    others = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    results = [*(each for each in others if each["commit"] != result["commit"]), result]
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(results))
    print(f"\n{len(killed)} of {len(done)} mutants were noticed.")


def page(results: list[dict[str, Any]]) -> str:
    """The results in words: counts for each commit, and every survivor."""
    kinds = (*KINDS, "unexplained")
    rows = [
        [each["commit"], f"{each['run']} of {each['drawn']}", each["noticed_at_once"], each["noticed_since"]]
        + [sum(survivor["kind"] == kind for survivor in each["survivors"]) for kind in kinds]
        for each in results
    ]
    lines = [
        *INTRODUCTION.splitlines(),
        "",
        f"| commit | mutants run | noticed at once | noticed since | {' | '.join(kinds)} |",
        "|" + "---|" * (4 + len(kinds)),
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
    ]
    for each in results:
        lines += ["", f"## Survivors at {each['commit']}"]
        for survivor in each["survivors"]:
            lines += ["", f"`{survivor['mutant'].split()[0]}`, {survivor['kind']}: {survivor['explanation'] or '?'}"]
            lines += ["```diff", *(line for line in survivor["change"] if line[1:].strip()), "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
