"""A question that is not answered, and why."""

from __future__ import annotations


class Refused(Exception):
    """Told to who asked, in words.

    Attributes:
        status: of HTTP: 400 where the question is wrong, 404 where there is nothing of the kind.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class DamagedFile(ValueError):
    """Bytes that are not a well-formed safetensors file of ours."""
