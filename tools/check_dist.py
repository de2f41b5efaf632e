"""Checks a wheel and an sdist, and what a user has of the wheel in an environment without this checkout.

    python -m tools.check_dist dist  # borrows the packages of this environment
    python -m tools.check_dist dist --packages-of OTHER_ENVIRONMENT/bin/python
    python -m tools.check_dist dist --install oldest --python python3.10 --keep build/oldest
    python -m tools.check_dist dist --install newest --python python3.13 --keep build/newest

The wheel is installed in a new environment, by default one that finds all other packages in an existing environment.
With ``--install``, pip gets them, several GB where it finds a CUDA build of torch: ``newest``, or ``oldest``, where
what ``pyproject.toml`` names is at its lower bound. There, outside of the checkout, the demo trains for an epoch,
TensorBoard shows its measurements, and, where mypy is installed here, it checks the code of a user
(``tests/support/consumer.py``) in strict mode.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from tools.compat import requirements

ROOT = Path(__file__).parents[1]
PACKAGE = "lightning_hessian"
KINDS = {".py", ".js", ".css", ".md", ".typed"}
PATIENCE = 120.0  # seconds for TensorBoard to read a small event file on a busy machine
IN_DIST_INFO = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
WHERE = """
import sys
from pathlib import Path
import lightning_hessian

place = Path(lightning_hessian.__file__)
assert place.is_relative_to(sys.prefix), f"{place} is not that of the wheel"
"""
LOOK = """
import json, sys, time
from urllib.request import urlopen
from tensorboard import default, program

logdir, patience = sys.argv[1], float(sys.argv[2])
board = program.TensorBoard(plugins=default.get_plugins())
board.configure(logdir=logdir, load_fast="false", port=0)
address = board.launch()
listing = json.load(urlopen(f"{address}data/plugins_listing"))
assert listing["input_hessian"]["tab_name"] == "Input Hessian", sorted(listing)
ours = f"{address}data/plugin/input_hessian"
deadline = time.monotonic() + patience
while not (runs := json.load(urlopen(f"{ours}/runs", timeout=patience))["runs"]):
    if time.monotonic() > deadline:
        sys.exit(f"TensorBoard found no measurements in {logdir} within {patience:g} seconds.")
    time.sleep(0.1)
(tag,) = runs[0]["tags"]
assert tag["files"] and len(tag["steps"]) > 1, tag
for name in ("index.js", "style.css", "views/curves.js", "plotly.min.js"):
    assert urlopen(f"{ours}/{name}").status == 200
print(f"TensorBoard shows {len(tag['steps'])} measurements of {tag['num_samples']} samples.")
"""


def main() -> None:
    """Checks, and says what it did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--packages-of", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--install", choices=("oldest", "newest"))
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the new environment is left")
    arguments = parser.parse_args()
    (wheel,), (sdist,) = arguments.folder.glob("*.whl"), arguments.folder.glob("*.tar.gz")
    complaints = [*about_wheel(wheel_files(wheel)), *about_sdist(sdist_files(sdist), files_of_checkout())]
    if complaints:
        sys.exit("\n".join(complaints))
    print(f"{wheel.name} and {sdist.name} hold what they should.")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        environment = arguments.keep or place / "environment"
        if arguments.install:
            python = install(wheel, environment, arguments.python, oldest=arguments.install == "oldest")
        else:
            python = borrow(wheel, environment, arguments.packages_of)
        use(python, place)


def wheel_files(wheel: Path) -> set[str]:
    """The names in it."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def sdist_files(sdist: Path) -> set[str]:
    """The names in it, without the folder that all are in."""
    with tarfile.open(sdist) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def files_of_checkout() -> set[str]:
    """All that git does not ignore."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listed, cwd=ROOT, text=True).splitlines()
    return {name for name in names if (ROOT / name).exists()}


def about_wheel(found: set[str]) -> list[str]:
    """What is missing in a wheel, and what should not be there."""
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / PACKAGE).rglob("*") if path.is_file()}
    wanted = {name for name in package if "__pycache__" not in name}
    (info,) = {name.split("/")[0] for name in found if ".dist-info/" in name}
    wanted |= {f"{info}/{name}" for name in IN_DIST_INFO}
    kinds = {name for name in found if name.startswith(f"{PACKAGE}/") and PurePosixPath(name).suffix not in KINDS}
    return _about("The wheel", wanted - found, found - wanted | kinds)


def about_sdist(found: set[str], checkout: set[str]) -> list[str]:
    """The same of an sdist, which holds the whole checkout: what the tests need too."""
    return _about("The sdist", checkout - found, found - checkout - {"PKG-INFO"})


def _about(what: str, missing: set[str], unexpected: set[str]) -> list[str]:
    complaints = [f"{what} lacks {name}." for name in sorted(missing)]
    return complaints + [f"{what} holds {name}, which does not belong there." for name in sorted(unexpected)]


def borrow(wheel: Path, environment: Path, of: str) -> Path:
    """A new environment with the wheel, which finds all else in that of another Python."""
    ask = "import sys, sysconfig; print(sys.base_prefix, '%d.%d' % sys.version_info[:2], sysconfig.get_path('purelib'))"
    prefix, version, packages = subprocess.check_output([of, "-c", ask], text=True).split()
    subprocess.run([f"{prefix}/bin/python{version}", "-m", "venv", environment], check=True)
    python = environment.absolute() / "bin" / "python"
    Path(subprocess.check_output([python, "-c", ask], text=True).split()[2], "borrowed.pth").write_text(packages)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--ignore-installed", wheel], check=True)
    return python


def install(wheel: Path, environment: Path, base: str, *, oldest: bool) -> Path:
    """An empty environment into which pip installs the wheel, what it depends on, and the digits of the demo."""
    subprocess.run([base, "-m", "venv", environment], check=True)
    python = environment.absolute() / "bin" / "python"
    constraints = environment / "constraints.txt"
    bounds = {name: bound for name, (_, bound) in requirements().items()}
    constraints.write_text("\n".join(f"{name}=={bound}" for name, bound in bounds.items()) if oldest else "")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--constraint", constraints, wheel, "mlxtend"], check=True)
    return python


def use(python: Path, place: Path) -> None:
    """What a user does, in a folder without this checkout."""

    def run(*command: str | Path) -> str:
        return subprocess.run(command, cwd=place, check=True, stdout=subprocess.PIPE, text=True).stdout

    print(run(python.parent / "lightning-hessian", "--version").strip(), flush=True)
    shutil.copy(ROOT / "examples" / "mnist_cnn.py", place)
    demo = run(python, "mnist_cnn.py", "--epochs", "1", "--classes", "3", "--log-dir", "logs")
    print(re.search("Held-out accuracy.*", demo).group(), flush=True)
    run(python, "-c", WHERE)
    print(run(python, "-c", LOOK, "logs", str(PATIENCE)).strip(), flush=True)
    if find_spec("mypy") is None:
        print("mypy is not installed: types are not checked.")
        return
    shutil.copy(ROOT / "tests" / "support" / "consumer.py", place)
    print(run(sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "consumer.py").strip())


if __name__ == "__main__":
    main()
