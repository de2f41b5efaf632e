"""The files of the tab's page: what the content policy forbids is not in them, and they find each other."""

import re
from pathlib import Path

import pytest

import lightning_hessian

STATIC = Path(lightning_hessian.__file__).parent / "tensorboard_plugin" / "static"
MODULES = sorted(STATIC.rglob("*.js"))
IMPORT = re.compile(r'^import [^"]*"([^"]+)";$', re.MULTILINE)
VIEWS = ("curves", "distribution", "spectrum", "evolution", "hessian", "maps", "table", "cost")
TEST_IDS = (
    *("run-select", "class-select", "sample-select", "step-slider", "metric-select", "error"),
    *("heatmap", "heatmap-readout", "input-map", "row-map"),
)

# What may not be in a script, and why.
FORBIDDEN = {
    r"\beval\(|new Function\(": "the content policy is about to forbid it",
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write": "names of runs and classes are not to become elements",
    r"https?://|[\"'`]//": "nothing leaves the machine",
    r"[\"'`(]/(?!/)[a-z_]+[/?\"'`]": "an absolute address breaks under --path_prefix",
    r"new Worker|blob:": "the content policy forbids workers that are not files of the same origin",
}


def test_there_are_modules_and_each_view_has_its_own():
    assert {path.stem for path in (STATIC / "views").glob("*.js")} == {*VIEWS, "controls"}
    assert (STATIC / "style.css").is_file()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(STATIC).as_posix())
def test_a_module_holds_nothing_that_is_forbidden(path):
    source = path.read_text(encoding="utf-8")
    for pattern, why in FORBIDDEN.items():
        assert not re.findall(pattern, source), why


@pytest.mark.parametrize(
    "line",
    [
        "eval('1')",
        "box.innerHTML = name;",
        'import "https://cdn.example/x.js";',
        'fetch("/data/plugin/input_hessian/runs")',
        "new Worker(url)",
    ],
)
def test_what_is_forbidden_would_be_found(line):
    assert any(re.findall(pattern, line) for pattern in FORBIDDEN)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(STATIC).as_posix())
def test_a_module_imports_files_that_are_there_by_relative_names(path):
    source = path.read_text(encoding="utf-8")
    names = IMPORT.findall(source)
    assert len(names) == len(re.findall(r"^import ", source, re.MULTILINE))
    for name in names:
        assert name.startswith(("./", "../"))
        assert (path.parent / name).is_file()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(STATIC).as_posix())
def test_what_is_imported_is_exported(path):
    source = path.read_text(encoding="utf-8")
    for names, file in re.findall(r'^import \{([^}]*)\} from "([^"]+)";$', source, re.MULTILINE):
        exporter = (path.parent / file).read_text(encoding="utf-8")
        for name in names.replace(",", " ").split():
            assert re.search(rf"^export (async )?(function|const|class) {name}\b", exporter, re.MULTILINE), name


def test_the_page_has_the_names_that_tests_in_a_browser_look_for():
    sources = "\n".join(path.read_text(encoding="utf-8") for path in MODULES)
    for name in TEST_IDS:
        assert re.search(rf'(named|choice|say)\(\s*"{name}"', sources), name
    for name in VIEWS:
        assert re.search(rf'panel\(\s*"{name}"', sources), name
