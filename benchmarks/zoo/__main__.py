"""``python -m benchmarks.zoo FOLDER [SOURCE ...]``: judges all cases in processes of their own, and writes the page.

FOLDER holds what is done: after an interruption the same command goes on, and ``--again crashed alarmed`` repeats what
came out so, for instance after a fix. ``--page`` only writes the page.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.common import environment
from benchmarks.zoo.judge import VERDICTS
from benchmarks.zoo.page import summary, write
from benchmarks.zoo.worker import SOURCES, units

SHARES = {"op_db": 2, "module_db": 1, "transformers": 2}
LIMIT = 3.0  # hours, all together
SILENCE = 400.0  # seconds without a result after which a process counts as hanging


def main() -> None:
    """At most an hour on two cores."""
    parser = argparse.ArgumentParser(prog="benchmarks.zoo")
    parser.add_argument("folder", type=Path)
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help=", ".join(SOURCES))
    parser.add_argument("--processes", type=int, default=2, help="at a time, with one thread each")
    parser.add_argument("--again", nargs="+", choices=VERDICTS, default=[], metavar="VERDICT")
    parser.add_argument("--page", action="store_true")
    chosen = parser.parse_args()
    if not chosen.page:
        chosen.folder.mkdir(parents=True, exist_ok=True)
        for path in chosen.folder.glob("*.jsonl"):
            path.write_text(without(chosen.again, path.read_text()))
        judge_all(chosen.folder, chosen.sources or list(SOURCES), chosen.processes)
    finish(chosen.folder)


def without(verdicts: list[str], text: str) -> str:
    """The lines of a file of results, less those of every unit (operation, layer or network) with such a verdict."""
    found: list[list[dict[str, Any]]] = [[]]
    for line in map(json.loads, text.splitlines()):
        if "begin" in line or "commit" in line:
            found.append([])
        found[-1].append(line)
    # One that died begins more than once.
    repeated = {_name(unit) for unit in found if any(line.get("verdict") in verdicts for line in unit)}
    return "".join(f"{json.dumps(line)}\n" for unit in found if _name(unit) not in repeated for line in unit)


def _name(unit: list[dict[str, Any]]) -> str | None:
    return next((line[key] for line in unit for key in ("begin", "end") if key in line), None)


def judge_all(folder: Path, sources: list[str], at_a_time: int) -> None:
    """Runs a process for each share of the sources until all is judged, or the time is over."""
    jobs = [(source, share) for source in sources for share in range(SHARES[source])]
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    begin = time.monotonic()
    while (jobs or running) and time.monotonic() - begin < 3600 * LIMIT:
        while jobs and len(running) < at_a_time:
            job = jobs.pop(0)
            running[job] = _start(*job, folder)
        time.sleep(1)
        for job, process in list(running.items()):
            if time.time() - _path(*job, folder).stat().st_mtime > SILENCE:
                process.kill()
            code = process.poll()
            if code is not None:
                del running[job]
                if code != 0:  # it died at a case, which is tried once more and then counts as a crash
                    jobs.insert(0, job)
    for process in running.values():
        process.kill()


def finish(folder: Path) -> None:
    """Results and page, from all that is done; the exit status says whether anything was wrong or crashed."""
    lines = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    commits = list(dict.fromkeys(line["commit"] for line in lines if "commit" in line))
    judgements = [line for line in lines if "verdict" in line]
    ended = Counter(name.split(".")[0] for name in {line["end"] for line in lines if "end" in line})
    judged = {source: [count, len(list(units(source)))] for source, count in ended.items()}
    result = {"environment": environment(), "commits": commits, "judged": judged, **summary(judgements)}
    write(result)
    bad = {
        source: {v: n for v, n in counts.items() if v in ("wrong", "crashed")}
        for source, counts in result["counts"].items()
    }
    print("zoo:", result["counts"], flush=True)
    sys.exit(any(bad.values()))


def _start(source: str, share: int, folder: Path) -> subprocess.Popen[bytes]:
    path = _path(source, share, folder)
    path.touch()
    command = [sys.executable, "-m", "benchmarks.zoo.worker", source, str(share), str(SHARES[source]), str(path)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with path.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, env=environ, stdout=log, stderr=log)


def _path(source: str, share: int, folder: Path) -> Path:
    return folder / f"{source}.{share}.jsonl"


if __name__ == "__main__":
    main()
