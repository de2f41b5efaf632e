"""Where the records of a run are: a local path, a URL of any file system that fsspec knows, or memory."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_hessian.records.payload import ArrayFile, open_arrays

MEMORY = "memory://lightning-hessian"  # of this process, for runs for which Lightning has no directory

LogDir = str | os.PathLike[str] | None


@dataclass(frozen=True)
class Url:
    """A file or folder of a file system that fsspec knows, with the methods of ``pathlib.Path`` that are used here."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.url.rstrip('/')}/{name}") if name else self

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> Url:
        """The folder that holds it."""
        return Url(self.url.rstrip("/").rpartition("/")[0])

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Makes the folder, and those above it."""
        self._files.makedirs(self._inside, exist_ok=True)

    def glob(self, pattern: str) -> list[Url]:
        """The files inside that match a pattern."""
        self._files.invalidate_cache()
        return [Url(self._files.unstrip_protocol(found)) for found in self._files.glob(f"{self._inside}/{pattern}")]

    def __fspath__(self) -> str:
        return self.url

    def stat(self) -> os.stat_result:
        """Its size, and zeros."""
        return os.stat_result((0, 0, 0, 0, 0, 0, self._files.size(self._inside) or 0, 0, 0, 0))

    def read_bytes(self) -> bytes:
        """Its content."""
        return self._files.cat_file(self._inside)

    def write_bytes(self, content: bytes) -> None:
        """Writes it; object stores show a file only once it is complete."""
        self._files.pipe_file(self._inside, content)

    def replace(self, target: Url) -> None:
        """Moves it."""
        self._files.mv(self._inside, target._inside)

    def unlink(self) -> None:
        """Removes it."""
        self._files.rm(self._inside)

    @property
    def _files(self) -> Any:
        import fsspec  # Lightning and torch bring it; a run with local files does not need it

        return fsspec.core.url_to_fs(self.url)[0]

    @property
    def _inside(self) -> str:
        return self._files._strip_protocol(self.url)


Location = Path | Url


def location(log_dir: LogDir) -> Location:
    """A directory as Lightning names it; None, where Lightning has none, is a place in memory."""
    if log_dir is None:
        return in_memory(None)
    text = re.sub("^(file|local):/*(?=/)", "", os.fspath(log_dir))
    return Url(text) if "://" in text else Path(text)


def in_memory(log_dir: LogDir) -> Url:
    """Where this process keeps the records of a run that has no files, under the directory that it would have had."""
    key = "none" if log_dir is None else str(absolute(location(log_dir)))
    return Url(MEMORY) / re.sub(r"[^\w.-]+", "_", key)


def is_in_memory(folder: LogDir | Location) -> bool:
    """Whether a folder is one of ``in_memory``."""
    return str(folder).startswith(MEMORY)


def absolute(place: Location) -> Location:
    """The same, independent of the working directory."""
    return place if isinstance(place, Url) else Path(os.path.abspath(place))


def write_whole(content: bytes, path: Location) -> None:
    """Writes a file completely or not at all: what was there before stays where writing fails."""
    if isinstance(path, Url):
        path.write_bytes(content)
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextmanager
def arrays_at(path: Location) -> Iterator[ArrayFile]:
    """A file for reading arrays; one that is not local is copied to a temporary file first."""
    if isinstance(path, Path):
        with open_arrays(path) as arrays:
            yield arrays
        return
    with tempfile.TemporaryFile() as file:
        file.write(path.read_bytes())
        file.seek(0)
        yield ArrayFile(file)
