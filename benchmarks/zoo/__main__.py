"""``python -m benchmarks.zoo FOLDER [SOURCE ...]``: judges all cases in processes of their own, and writes the page.

FOLDER holds what is done: after an interruption the same command goes on. ``--page`` only writes the page from it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import environment
from benchmarks.zoo.page import summary, write
from benchmarks.zoo.worker import SOURCES

AT_A_TIME = 2  # processes, with one thread each
SHARES = {"op_db": 2, "module_db": 1, "transformers": 2}
LIMIT = 3600.0  # seconds, all together
SILENCE = 400.0  # seconds without a result after which a process counts as hanging


def main(folder: Path, sources: list[str]) -> None:
    """At most an hour on two cores."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(source, share) for source in sources for share in range(SHARES[source])]
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    begin = time.monotonic()
    while (jobs or running) and time.monotonic() - begin < LIMIT:
        while jobs and len(running) < AT_A_TIME:
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
    finish(folder)


def finish(folder: Path) -> None:
    """Results and page, from all that is done; the exit status says whether anything was wrong or crashed."""
    lines = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    result = {"environment": environment(), **summary([line for line in lines if "verdict" in line])}
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
    names = [name for name in sys.argv[2:] if name != "--page"]
    if "--page" in sys.argv:
        finish(Path(sys.argv[1]))
    main(Path(sys.argv[1]), names or list(SOURCES))
