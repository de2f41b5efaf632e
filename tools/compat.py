"""Runs the tests, browser aside, in a fresh environment of the oldest or of the newest packages.

    python tools/compat.py oldest build/compat/oldest --python python3.10
    python tools/compat.py newest build/compat/newest --python python3.13 [-- tests/model ...]

``oldest``: every package that ``pyproject.toml`` names at its lower bound; what those need in turn is as new as they
allow. ``newest``: the newest of everything. Both take several GB where pip finds a CUDA build of torch. The last line
is the row for ``docs/compatibility.md``. Warnings are errors here too, but for deprecations, which old packages meet
in new ones.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest needs there

ROOT = Path(__file__).parents[1]
EXTRAS = ("dev", "docs", "examples", "models", "notebook", "zoo")
NOT_FOR_TESTS = ("mypy", "ruff", "lightning-hessian")  # of lint, and ourselves
SHOWN = ("torch", "lightning", "tensorboard", "numpy", "matplotlib", "transformers")
NO_ERRORS = (
    "default::DeprecationWarning",
    "default::FutureWarning",
    "default::PendingDeprecationWarning",
    "default:Guards may run slower:RuntimeWarning",  # of torch.compile, on Python 3.13.0
)


def main() -> None:
    """Makes the environment if there is none, and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("oldest", "newest"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default=sys.executable)
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    arguments = parser.parse_args(given[:end])
    python = arguments.folder.absolute() / "bin" / "python"
    if not python.exists():
        install(python, arguments.python, oldest=arguments.which == "oldest")
    quiet = [part for warning in NO_ERRORS for part in ("-W", warning)]
    tests = given[end + 1 :] or ["--ignore=tests/browser", "--numprocesses=auto", "--dist=loadfile"]
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *quiet, *tests]
    print(" ".join(map(str, command)), flush=True)
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    print(result.stdout)
    print(f"| {' | '.join([datetime.date.today().isoformat(), *versions(python), result.stdout.splitlines()[-1]])} |")
    sys.exit(result.returncode)


def install(python: Path, base: str, *, oldest: bool) -> None:
    """A fresh environment; the lower bounds are pip's constraints, so that it finds what goes with them."""
    folder = python.parents[1]
    subprocess.run([base, "-m", "venv", folder], check=True)
    wanted = requirements()
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(f"{name}=={bound}" for name, (_, bound) in wanted.items()) if oldest else "")
    packages = [full for full, _ in wanted.values()]
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--constraint", constraints, *packages], check=True)
    subprocess.run([*pip, "--no-deps", "--editable", ROOT], check=True)


def requirements() -> dict[str, tuple[str, str]]:
    """By name: as ``pyproject.toml`` has it, and its lower bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in EXTRAS)]
    found = {}
    for text in (text for group in groups for text in group):
        match = re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?(?:>=([\w.]+))?(?:,<\d+)?", text)
        if match is None:
            sys.exit(f"{text!r} in pyproject.toml is not of the form name>=bound or name>=bound,<bound.")
        name, bound = match.groups()
        if name not in NOT_FOR_TESTS:
            found[name] = (text, bound)
    return found


def versions(python: Path) -> list[str]:
    """Of Python and of the packages that matter."""
    program = (
        "import json, platform; from importlib.metadata import version; "
        f"print(json.dumps([platform.python_version(), *map(version, {SHOWN!r})]))"
    )
    found: list[str] = json.loads(subprocess.check_output([python, "-c", program], text=True))
    return found


if __name__ == "__main__":
    main()
