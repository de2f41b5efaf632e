"""What is released: the contents of wheel and sdist, their metadata, and one version everywhere."""

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from lightning_hessian import __version__
from tools.check_dist import LOOK, about_sdist, about_wheel, files_of_checkout, sdist_files, wheel_files

ROOT = Path(__file__).parent.parent
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    if find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", folder], check=True, cwd=ROOT)
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(built):
    (wheel,) = built.glob(f"lightning_hessian-{__version__}-py3-none-any.whl")
    found = wheel_files(wheel)
    assert about_wheel(found) == []
    assert "lightning_hessian/py.typed" in found
    assert "lightning_hessian/tensorboard_plugin/static/views/curves.js" in found
    assert not [name for name in found if name.startswith(("tests", "examples", "benchmarks", "docs", "tools"))]


def test_the_sdist_holds_the_whole_checkout(built):
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    (sdist,) = built.glob(f"lightning_hessian-{__version__}.tar.gz")
    assert about_sdist(sdist_files(sdist), files_of_checkout()) == []


@pytest.mark.parametrize("name", ["lightning_hessian/model/seen.pyc", "tests/conftest.py"])
def test_a_file_too_many_or_too_few_is_found(built, name):
    (wheel,) = built.glob("*.whl")
    found = wheel_files(wheel)
    assert about_wheel(found | {name}) == [f"The wheel holds {name}, which does not belong there."]
    assert about_wheel(found - {"lightning_hessian/py.typed"}) == ["The wheel lacks lightning_hessian/py.typed."]
    assert about_sdist({"PKG-INFO", "a", "b"}, {"b", "c"}) == [
        "The sdist lacks c.",
        "The sdist holds a, which does not belong there.",
    ]


def test_looking_for_measurements_ends_where_there_are_none(tmp_path):
    look = [sys.executable, "-c", LOOK, str(tmp_path), "0.5"]
    found = subprocess.run(look, stderr=subprocess.PIPE, text=True, timeout=120)
    assert found.returncode == 1
    assert found.stderr.endswith(f"TensorBoard found no measurements in {tmp_path} within 0.5 seconds.\n")


def test_what_is_cited_is_this_version():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    readme = (ROOT / "README.md").read_text()
    cited = dict(re.findall(r"^  (\w+) +?= \{(.*)\},?$", readme, re.MULTILINE))
    assert CITATION["version"] == cited["version"] == __version__
    assert CITATION["title"] == cited["title"]
    assert [{"name": cited["author"].strip("{}")}] == CITATION["authors"] == project["authors"]
    assert str(CITATION["date-released"].year) == cited["year"]
    assert CITATION["license"] == project["license"]


def test_the_changelog_has_this_version():
    released = re.findall(r"^## \[(\S+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    version, date = released[0]
    assert (version, date) == (__version__, CITATION["date-released"].isoformat())


def test_the_command_of_the_bug_report_prints_versions():
    bug = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    (about,) = (part["attributes"]["description"] for part in bug["body"] if part.get("id") == "versions")
    (command,) = re.findall(r"```\npython (-c .*)\n```", about)
    told = subprocess.run([sys.executable, *shlex.split(command)], check=True, capture_output=True, text=True).stdout
    assert re.search(
        r"^lightning-hessian \d.*\ntorch \d.*\nlightning \d.*\ntensorboard \d.*\nnumpy \d", told, re.MULTILINE
    )
