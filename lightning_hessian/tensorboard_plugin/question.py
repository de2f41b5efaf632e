"""What a request asks for, checked: nothing of it is used before."""

from __future__ import annotations

import re
from typing import Any

from lightning_hessian.tensorboard_plugin.refusal import Refused

NUMBER = re.compile(r"[0-9]{1,12}", re.ASCII)


def text(request: Any, name: str) -> str:
    """A parameter that must be there.

    Raises:
        Refused: it is not.
    """
    value = request.args.get(name)
    if value is None:
        raise Refused(400, f"The request does not say which {name}.")
    return str(value)


def number(request: Any, name: str, end: int, *, least: int = 0, default: int | None = None) -> int:
    """A whole number from ``least`` up to, not including, ``end``.

    Raises:
        Refused: it is not one.
    """
    if default is not None and name not in request.args:
        return default
    value = text(request, name)
    if not NUMBER.fullmatch(value) or not least <= int(value) < end:
        raise Refused(400, f"{name}={value[:40]!r} must be a whole number from {least} to {end - 1}.")
    return int(value)
