"""Which tests execute which lines, and how long they take: a plugin of pytest, and the choice made from its records.

``-p support.tests_by_line --record FOLDER`` measures both. ``--time-limits FOLDER`` ends the process at a test that
takes several times what was recorded, as one with an endless loop does.
"""

from __future__ import annotations

import ast
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

COVERAGE, SECONDS = "coverage.sqlite", "seconds.json"
AT_IMPORT = ""  # coverage's name for what no test has executed
PHASES = ("setup", "call", "teardown")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path)
    parser.addoption("--time-limits", type=Path)
    parser.addoption("--of", nargs="*", default=[], help="folders whose lines are recorded")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("record"):
        config.pluginmanager.register(Recorder(config.getoption("record"), config.getoption("of")))
    if config.getoption("time_limits"):
        config.pluginmanager.register(TimeLimits(config.getoption("time_limits")))


class Recorder:
    """Lines and processor seconds of every test and phase."""

    def __init__(self, folder: Path, of: list[str]) -> None:
        from coverage import Coverage

        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.seconds = folder, dict[str, float]()
        self.coverage = Coverage(data_file=folder / COVERAGE, source=of, config_file=False, messages=False)
        self.coverage.erase()
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        begin = time.process_time()
        result = yield
        self.seconds[item.nodeid] = time.process_time() - begin
        return result

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.coverage.switch_context(f"{item.nodeid}|setup")

    def pytest_runtest_call(self, item: pytest.Item) -> None:
        self.coverage.switch_context(f"{item.nodeid}|call")

    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        self.coverage.switch_context(f"{item.nodeid}|teardown")

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        self.coverage.save()
        (self.folder / SECONDS).write_text(json.dumps(self.seconds))


class TimeLimits:
    """Ends the process by SIGPROF; processor time is the same on a busy machine."""

    def __init__(self, folder: Path) -> None:
        self.seconds = json.loads((folder / SECONDS).read_text())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        signal.setitimer(signal.ITIMER_PROF, 20 + 5 * self.seconds.get(item.nodeid, 60))
        result = yield
        signal.setitimer(signal.ITIMER_PROF, 0)
        return result


def tests_of(path: Path, changed: list[int], folder: Path) -> list[str]:
    """The tests that may notice a change of some lines of a file, the shortest first.

    Those that execute the statement. Where it is executed while a fixture is made, all tests of that file, which may
    share the fixture. Where it is executed at import (a constant, a default), all tests: those that execute anything
    of the file come first.
    """
    from coverage import CoverageData

    data = CoverageData(str(folder / COVERAGE))
    data.read()
    seconds: dict[str, float] = json.loads((folder / SECONDS).read_text())
    by_line = data.contexts_by_lineno(str(path))
    contexts = {c for line in statement_lines(path.read_text(), changed) for c in by_line.get(line, [])}

    def tests(contexts: set[str]) -> list[str]:
        during = {c.rpartition("|")[0] for c in contexts}
        shared = {c.partition("::")[0] for c in contexts if c.endswith(("|setup", "|teardown"))}
        chosen = [t for t in seconds if t in during or t.partition("::")[0] in shared]
        return sorted(chosen, key=seconds.__getitem__)

    found = tests(contexts)
    if AT_IMPORT in contexts:
        found += tests({c for some in by_line.values() for c in some})
        found += sorted(seconds, key=seconds.__getitem__)
    return list(dict.fromkeys(found))


def statement_lines(source: str, changed: list[int]) -> set[int]:
    """All lines of the innermost statements that hold some lines; of an ``if`` or a ``def`` its head alone."""
    found = set()
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    for line in changed:
        around = [(_first_line(s), s) for s in statements if _first_line(s) <= line <= (s.end_lineno or 0)]
        if around:
            first, statement = max(around, key=lambda each: each[0])
            body = getattr(statement, "body", None)
            last = body[0].lineno - 1 if body else statement.end_lineno
            if body and body[0].lineno == statement.lineno:  # in one line
                last = statement.lineno
            lines = range(first, (last or first) + 1)
            found |= set(lines) if line in lines else {line}  # ``except``, ``else``
    return found


def _first_line(statement: ast.stmt) -> int:
    return min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
