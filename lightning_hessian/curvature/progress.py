"""How far a measurement is, told through a plain callable: the numerics know of no bar."""

from collections.abc import Callable

Progress = Callable[[str, int, int | None], None]
"""What is counted, how many of them are done, and of how many (None: that shows while working)."""


def silent(what: str, done: int, total: int | None) -> None:
    """Tells nobody."""
