"""The parameters of a request, checked before anything of them is used."""

from __future__ import annotations

import re
from typing import Any

from lightning_hessian.records.event_format import Summary

NUMBER = re.compile(r"[0-9]{1,12}", re.ASCII)


class RequestError(Exception):
    """A request that has no answer; the message says why.

    Attributes:
        status: of HTTP: 400 where the request is wrong, 404 where there is nothing of the kind.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def text(request: Any, name: str) -> str:
    """A required parameter.

    Raises:
        RequestError: it is missing.
    """
    value = request.args.get(name)
    if value is None:
        raise RequestError(400, f"The request lacks the parameter {name}.")
    return str(value)


def number(request: Any, name: str, end: int, *, least: int = 0, default: int | None = None) -> int:
    """A whole number from ``least`` up to, not including, ``end``.

    Raises:
        RequestError: it is not one.
    """
    if default is not None and name not in request.args:
        return default
    value = text(request, name)
    if not NUMBER.fullmatch(value) or not least <= int(value) < end:
        raise RequestError(400, f"{name}={value[:40]!r} must be a whole number from {least} to {end - 1}.")
    return int(value)


def class_index(request: Any, summary: Summary) -> int:
    """The position of the parameter ``class_id`` among the classes of a measurement.

    Raises:
        RequestError: it is none of them.
    """
    value, known = text(request, "class_id"), [str(class_id) for class_id in summary.class_ids]
    if value not in known:
        raise RequestError(400, f"class_id={value[:40]!r} must be one of {', '.join(known)}.")
    return known.index(value)
