"""Judges the cases of one share of the sources, one line of JSON each, in a process that may die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.zoo.judge import Case, Judgement, judge, truth_of

ROOT = Path(__file__).parents[2]  # which no message is to name
LIMIT = 120  # seconds of processor time for each measurement of a case
SOURCES = ("op_db", "module_db", "transformers")


def units(source: str) -> Iterator[tuple[str, Callable[[], Iterator[Case]]]]:
    """Names and cases of a source."""
    if source == "transformers":
        from benchmarks.zoo.transformer_cases import of_transformers

        return of_transformers()
    from benchmarks.zoo.sources import of_layers, of_operations

    return of_operations(2) if source == "op_db" else of_layers(6)


def ways(number: int) -> tuple[str, ...]:
    """How a case is measured: always two ways in float64, and by turns in a third."""
    extra = ("hessian 3 float32", "lanczos 3 float64", "spectrum 3 float32", "hessian 1 float32")[number % 4]
    return "spectrum 3 float64", "hessian 1 float64", extra


def work(source: str, number: int, of: int, path: Path) -> None:
    """Appends to ``path``; units that are in it are done. Each begins with a line, so that a death has a name."""
    torch.set_num_threads(1)
    found = list(units(source))
    # Importing torch's own test lists forbids to change these flags, which a user's process allows.
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
    signal.signal(signal.SIGPROF, _too_long)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    begun = Counter(line["begin"] for line in lines if "begin" in line)
    ended = {line["end"] for line in lines if "end" in line}
    with path.open("a") as file:

        def write(**line: Any) -> None:
            file.write(json.dumps(line).replace(f"{ROOT}{os.sep}", "") + "\n")
            file.flush()

        write(commit=_commit())
        total = 0
        for i, (name, cases) in enumerate(found):
            if i % of != number or name in ended:
                continue
            if begun[name] > 1:  # the process died here, twice
                write(**asdict(Judgement(name, "all", "crashed", "the process died")), end=name)
                continue
            write(begin=name)
            for judgement in _of_unit(name, cases, total):
                write(**asdict(judgement))
                total += 1
            write(end=name)


def _of_unit(name: str, cases: Callable[[], Iterator[Case]], total: int) -> Iterator[Judgement]:
    """All judgements of a unit; what goes wrong before anything is measured is no judgement about the package."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = list(cases())
    except Exception as error:
        print(f"{name} cannot be made: {type(error).__name__}: {error}", file=sys.stderr)
        return
    for case in found:
        for how in ("truth", *ways(total)):
            signal.setitimer(signal.ITIMER_PROF, LIMIT)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    if how == "truth":
                        truth = truth_of(case)
                        continue
                    yield judge(case, truth, how)
            except _TooLongError:
                if how == "truth":
                    print(f"{case.key}: no truth within {LIMIT} s", file=sys.stderr)
                    break
                yield Judgement(case.key, how, "crashed", f"took longer than {LIMIT} s")
                break
            except Exception:
                print(f"{case.key} {how}: {traceback.format_exc(limit=-3)}", file=sys.stderr)
                break
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        total += 1


def _commit() -> str:
    """Of the package that is measured, marked where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


class _TooLongError(BaseException):
    """Not an ``Exception``: nothing that is measured may catch it."""


def _too_long(number: int, frame: types.FrameType | None) -> None:
    raise _TooLongError


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
