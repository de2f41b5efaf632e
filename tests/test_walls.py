"""Imports run one way. Every file of the package is looked at, in its text and in a fresh process."""

import ast
import json
import subprocess
import sys
from fnmatch import fnmatch
from functools import cache
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "lightning_hessian"
SOURCE = Path(__file__).parent.parent / PACKAGE
ROOT_FILES = {
    "__init__.py",
    "_version.py",
    "callback.py",
    "cli.py",
    "errors.py",
    "functional.py",
    "linear_operators.py",
    "offline.py",
    "operator.py",
    "py.typed",
    "recorder.py",
}


class Wall(NamedTuple):
    """What a room may know: packages that come with it, its own rooms below, packages imported only when needed."""

    packages: str = ""
    rooms: str = ""
    when_needed: str = ""


# A module belongs to the room with the longest name that fits. Besides itself and errors, a room may import only what
# is listed (curvature.* are all rooms in that folder), inside functions and for type checking too.
WALLS = {
    "errors": Wall(),
    "_version": Wall(),
    "curvature": Wall("torch"),
    "curvature.operators": Wall("torch", "curvature"),
    "curvature.algorithms": Wall("torch", "curvature.operators"),
    "curvature.checks": Wall("torch", "curvature curvature.algorithms curvature.operators.*"),
    "curvature.cost_model": Wall("torch", "curvature curvature.algorithms curvature.checks curvature.operators.*"),
    "curvature.spectrum": Wall("torch", "curvature curvature.algorithms curvature.checks curvature.operators.*"),
    "curvature.analysis": Wall("torch", "curvature curvature.checks curvature.cost_model curvature.operators.*"),
    "curvature.methods": Wall(
        "torch",
        "curvature curvature.algorithms curvature.analysis curvature.checks curvature.cost_model curvature.operators "
        "curvature.spectrum",
    ),
    "model": Wall("numpy torch"),
    "model.differentiation_errors": Wall("torch", "curvature model"),
    "model.prepare": Wall(
        "torch", "curvature curvature.cost_model curvature.operators.* model model.differentiation_errors"
    ),
    "curvature.functions": Wall("torch", "curvature.*"),
    "linear_operators": Wall("torch", "curvature.* model.*", when_needed="scipy"),
    "operator": Wall("torch", "curvature.* linear_operators model.*", when_needed="typing_extensions"),
    "functional": Wall("torch", "curvature curvature.* model operator", when_needed="typing_extensions"),
    "records": Wall("numpy"),
    "records.payload": Wall("numpy safetensors", "records"),
    "records.event_format": Wall("numpy safetensors", "records records.payload"),
    "records.locations": Wall("numpy safetensors", "records records.payload", when_needed="fsspec"),
    "records.files": Wall("numpy safetensors", "records records.event_format records.locations records.payload"),
    "records.answers": Wall("numpy safetensors", "records records.event_format records.payload"),
    "records.dataframe": Wall("numpy", "records", when_needed="pandas"),
    "render": Wall("PIL matplotlib numpy", "records"),
    "writers": Wall("numpy", "records", when_needed="torch"),
    "writers.layout": Wall("numpy", "records writers", when_needed="tensorboard"),
    "writers.tensorboard": Wall(
        "PIL matplotlib numpy safetensors",
        "records records.event_format render writers writers.layout",
        when_needed="tensorboard tensorboardX",
    ),
    "writers.publisher": Wall(
        "PIL matplotlib safetensors",
        "records records.event_format records.files records.locations writers writers.layout writers.tensorboard",
    ),
    "tensorboard_plugin": Wall(
        "grpc numpy safetensors tensorboard werkzeug", "records records.answers records.event_format records.payload"
    ),
    "report": Wall("numpy plotly safetensors", "_version records.*"),
    "cli": Wall("plotly safetensors", "_version offline report"),
    "training": Wall(
        "numpy safetensors torch",
        "_version curvature.* model.* records records.locations training.distributed training.schedule",
    ),
    "training.places": Wall("numpy safetensors", "records records.files records.locations writers"),
    "training.sample_finder": Wall("numpy safetensors torch", "training training.trainer_access"),
    "training.checkpoints": Wall("torch", "training.schedule", when_needed="safetensors"),
    "training.sample_files": Wall("numpy torch", "training.checkpoints", when_needed="safetensors"),
    "training.distributed": Wall("torch", "curvature"),
    "training.progress": Wall(when_needed="tqdm"),
    "training.schedule": Wall(),
    "training.trainer_access": Wall("torch", "model training training.distributed training.schedule writers"),
    "training.resume": Wall(
        "safetensors torch", "curvature.checks model records records.files records.locations training training.schedule"
    ),
    "training.output": Wall(
        "PIL matplotlib safetensors torch",
        "records records.event_format records.files training training.schedule writers writers.publisher",
    ),
    "training.run": Wall(
        "PIL matplotlib safetensors torch",
        "curvature model records records.files records.locations training training.distributed training.output "
        "training.places training.progress training.resume training.schedule",
    ),
    "training.trainer_run": Wall("PIL matplotlib safetensors torch", "records training.*"),
    "recorder": Wall(
        "PIL matplotlib safetensors torch",
        "model records records.locations training training.distributed training.places training.progress training.run "
        "training.sample_finder training.schedule writers",
        when_needed="typing_extensions",
    ),
    "offline": Wall(
        "PIL matplotlib safetensors torch",
        "curvature recorder records.event_format records.files training training.checkpoints training.sample_files",
        when_needed="typing_extensions",
    ),
    "callback": Wall("PIL fsspec lightning matplotlib safetensors scipy torch", "curvature model records training.*"),
}


def module_name(path: Path) -> str:
    """``curvature.methods.plan``; the package itself is the empty name, a folder is its ``__init__``."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def room_of(module: str) -> str:
    """The room with the longest name that is the module's or a folder's around it; ``""`` if there is none."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in names if name in WALLS), "")


def imports_of(module: str, text: str) -> set[str]:
    """Full names of what a module's text imports anywhere: submodules where a name is one, else where it comes from."""
    package = f"{PACKAGE}.{module}" if MODULES[module].stem == "__init__" else f"{PACKAGE}.{module}".rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package.rstrip("."))
            names = {f"{source}.{alias.name}" for alias in node.names}
            inner = {name for name in names if name.removeprefix(f"{PACKAGE}.") in MODULES}
            found |= inner | ({source} if names - inner else set())
    return found


@cache
def imports(module: str) -> tuple[frozenset[str], frozenset[str]]:
    """The modules of this package, and the packages of others outside the standard library, that a module imports."""
    found = imports_of(module, MODULES[module].read_text())
    own = {name for name in found if name.split(".")[0] == PACKAGE}
    others = {name.split(".")[0] for name in found - own} - sys.stdlib_module_names - {"_typeshed"}
    return frozenset(name.removeprefix(PACKAGE).lstrip(".") for name in own), frozenset(others)


def expand(rooms: str) -> set[str]:
    """The rooms of a list."""
    return {room for pattern in rooms.split() for room in WALLS if fnmatch(room, pattern) or f"{room}.*" == pattern}


def trespasses(module: str, own: frozenset[str], others: frozenset[str]) -> set[str]:
    """What a module imports although its room may not."""
    room = room_of(module)
    wall = WALLS.get(room, Wall())
    rooms = {room, "errors", *expand(wall.rooms)}
    packages = {*wall.packages.split(), *wall.when_needed.split()}
    return {name for name in own if room_of(name) not in rooms} | (others - packages)


@pytest.mark.parametrize("module", [m for m in MODULES if m])
def test_a_module_imports_only_what_its_room_may(module):
    assert trespasses(module, *imports(module)) == set()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def f():\n    from lightning_hessian.records.record import Record", {"records.record"}),
        ("if TYPE_CHECKING:\n    from ..records import record", {"records.record"}),
        ("from .. import training", {"training"}),
        ("import lightning_hessian", {""}),
        ("from lightning_hessian import __version__", {""}),
        ("import lightning.pytorch as pl", {"lightning"}),
        ("from pandas import DataFrame", {"pandas"}),
        ("import os, math, torch\nfrom lightning_hessian.errors import MeasurementError", set()),
    ],
)
def test_the_check_of_imports_can_fail(text, found, monkeypatch):
    """Whatever form the import has."""
    module = "curvature.cost_model"
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    assert trespasses(module, *imports.__wrapped__(module)) == found


def test_the_walls_lead_one_way():
    graph = {room: expand(wall.rooms) - {room} for room, wall in WALLS.items()}
    assert set(TopologicalSorter(graph).static_order()) == set(WALLS)


def importers(name: str) -> set[str]:
    return {module for module in MODULES if name in set().union(*imports(module))}


def test_only_the_callback_knows_lightning_and_nothing_knows_the_callback():
    assert importers("lightning") == {"callback"}
    assert importers("pytorch_lightning") == set()
    assert importers("callback") == {""}  # the package itself, by name


def test_no_module_imports_the_package_itself():
    assert importers("") == set()


def test_modules_are_imported_by_statements():
    """The package itself loads its public names when they are used, and checkpoints need the user's own modules.

    Elsewhere the checks above would miss it.
    """
    dynamic = {m for m, path in MODULES.items() if {"import_module", "__import__"} & names_in(path.read_text())}
    assert dynamic == {"", "training.checkpoints"}


def names_in(text: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(text)))
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}


def test_every_file_belongs_to_a_room():
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == {room.split(".")[0] for room in WALLS} - {Path(name).stem for name in ROOT_FILES}
    assert {path.name for path in SOURCE.iterdir() if path.is_file()} == ROOT_FILES
    assert {room for room in WALLS if room not in map(room_of, MODULES)} == set()


# Each module is imported by a fresh process that has loaded nothing but modules of the same packages.

LOOK = """
import importlib, json, sys
*modules, watched = json.loads(sys.argv[1])
loaded = {}
for module in modules:
    before = set(sys.modules)
    importlib.import_module(module)
    loaded[module] = sorted(set(watched) & (set(sys.modules) - before))
print(json.dumps(loaded))
"""
WATCHED = {name for wall in WALLS.values() for name in f"{wall.packages} {wall.when_needed}".split()}
WATCHED = WATCHED - {"numpy", "tqdm", "typing_extensions"} | {
    "jsonargparse",
    "pytorch_lightning",
}  # torch brings those three


def loaded_by(*modules: str) -> dict[str, list[str]]:
    """What each of these brings along that those before it have not."""
    given = json.dumps([*modules, sorted(WATCHED)])
    return json.loads(subprocess.run([sys.executable, "-c", LOOK, given], check=True, stdout=subprocess.PIPE).stdout)


def packages_of(module: str) -> tuple[str, ...]:
    return tuple(name for name in WALLS.get(room_of(module), Wall()).packages.split() if name in WATCHED)


@pytest.mark.parametrize("packages", sorted({packages_of(module) for module in MODULES}), ids=" ".join)
def test_a_module_loads_only_what_its_room_may(packages):
    modules = [f"{PACKAGE}.{m}".rstrip(".") for m in MODULES if packages_of(m) == packages]
    loaded = loaded_by(*modules)
    assert {m: names for m, names in loaded.items() if not set(names) <= set(packages)} == {}


def test_the_check_of_what_is_loaded_can_fail():
    modules = ("lightning_hessian", "tensorboard", "lightning_hessian.records.files")
    assert list(loaded_by(*modules).values()) == [[], ["tensorboard"], ["safetensors"]]


def test_public_names_are_attributes_and_others_are_not():
    import lightning_hessian

    assert lightning_hessian.InputHessianMonitor.__module__ == "lightning_hessian.callback"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lightning_hessian.nothing
    assert set(lightning_hessian.__all__) <= set(dir(lightning_hessian))
