"""Lets mkdocstrings read ``Example:`` in docstrings as the section that it calls ``Examples:``."""

from typing import Any

from griffe import Extension, Object


class OneExample(Extension):
    """Renames the section before docstrings are parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Griffe calls this for every object that it loads."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
