"""Each public name is in a test, and on a page of the documentation."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
from lightning.pytorch import Callback

import lightning_hessian

ROOT = Path(__file__).parent.parent
NOT_A_USE = {Path(__file__), ROOT / "tests" / "support" / "consumer.py"}  # names that never run
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py") if path not in NOT_A_USE)
PAGES = "\n".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
# What mkdocstrings makes of the reference: a name, and whether the members of a class come with it.
DIRECTIVE = re.compile(r"^::: ([\w.]+)\n(\s+options:\n\s+members: \[\])?", re.MULTILINE)
REFERENCE = {path: not alone for path, alone in DIRECTIVE.findall(PAGES)}


def at(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


OBJECTS = {name: getattr(lightning_hessian, name) for name in lightning_hessian.__all__}
CLASSES = {found for found in [*OBJECTS.values(), *map(at, REFERENCE)] if isinstance(found, type)}


def methods(owner: type) -> list[str]:
    """Public ones of our own; the hooks that Lightning calls are not a user's."""
    own = {name for base in owner.__mro__ if base.__module__.startswith("lightning_hessian") for name in vars(base)}
    hooks = set(dir(Callback)) if issubclass(owner, Callback) else set()
    members = {name: inspect.getattr_static(owner, name) for name in sorted(own - hooks) if not name.startswith("_")}
    return [name for name, found in members.items() if not isinstance(found, (int, str, float, type(None)))]


METHODS = [(owner, name) for owner in sorted(CLASSES, key=lambda c: c.__name__) for name in methods(owner)]
IDS = [f"{owner.__name__}.{name}" for owner, name in METHODS]


@pytest.mark.parametrize("name", lightning_hessian.__all__)
def test_a_name_is_in_a_test_and_in_the_reference(name):
    assert re.search(rf"\b{name}\b", TESTS)
    assert name in {path.rpartition(".")[2] for path in REFERENCE}
    assert re.search(rf"\b{name}\b(?!\n)", DIRECTIVE.sub("", PAGES)), "the reference alone does not say what it is for"


@pytest.mark.parametrize(("owner", "name"), METHODS, ids=IDS)
def test_a_method_is_in_a_test_and_on_a_page(owner, name):
    assert re.search(rf"\.{name}\b", TESTS)
    listed = REFERENCE[f"{owner.__module__}.{owner.__name__}"] and inspect.getdoc(getattr(owner, name))
    assert listed or re.search(rf"\b{name}\b", PAGES)
