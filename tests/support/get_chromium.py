"""Finds Chromium for the tests in a browser. Run as a script (``make test`` does), it gets one where there is none."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (  # what a test wants of a browser: no sandbox for root, nothing that calls home
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
NONE_FOUND = (
    "There is no Chromium for the tests in a browser (tests/browser). Install Chromium or Chrome so that one of "
    f"{', '.join(COMMANDS)} is on PATH, or let the variable CHROMIUM name the program, or run "
    "`.venv/bin/python -m playwright install --with-deps chromium` where there is a network; then `make test` again."
)


def find_chromium() -> str | None:
    """The browser that CHROMIUM names, else the system's, else Playwright's own; only one that runs."""
    named = os.environ.get("CHROMIUM")
    if named:
        return named if _runs(named) else None
    for command in COMMANDS:
        path = shutil.which(command)
        if path and _runs(path):
            return path
    path = _of_playwright()
    return path if path and _runs(path) else None


def get_chromium() -> str | None:
    """The same, after having installed one where there was none."""
    found = find_chromium()
    if found or os.environ.get("CHROMIUM"):
        return found
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root and _is_debian():
        _try("apt-get", "update")
        _try("apt-get", "install", "--yes", "--no-install-recommends", "chromium")
        found = find_chromium()
    if not found:
        with_libraries = ["--with-deps"] if root else []
        _try(sys.executable, "-m", "playwright", "install", *with_libraries, "chromium")
        found = find_chromium()
    return found


def _runs(path: str) -> bool:
    """Whether it is a browser that starts: Ubuntu's package, for one, may be a script that only tells about another."""
    try:
        told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return told.returncode == 0 and "Chrom" in told.stdout


def _of_playwright() -> str | None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else None


def _is_debian() -> bool:
    try:
        return platform.freedesktop_os_release().get("ID") == "debian"  # Ubuntu's package needs snap
    except OSError:
        return False


def _try(*command: str) -> None:
    """Runs a command, and says what is done; what fails is seen by what is missing afterwards."""
    print("No Chromium yet:", " ".join(command), flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        subprocess.run(command, check=False, env=environment, timeout=900)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(error, flush=True)


if __name__ == "__main__":
    if get_chromium() is None:
        print(NONE_FOUND, file=sys.stderr)  # all other tests can run; those in the browser fail with this sentence
