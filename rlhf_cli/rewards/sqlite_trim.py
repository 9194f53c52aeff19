"""SQLite's trim in a time that grows with the text, where its own grows with the text times the characters to drop."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

from rlhf_cli.rewards.sqlite_clock import own

_ENDS = {"trim": (True, True), "ltrim": (True, False), "rtrim": (False, True)}


def quick_trims(connection: sqlite3.Connection) -> None:
    """Replace trim, ltrim and rtrim of two arguments: one instruction each, so that nothing else stops a long one."""
    for name, (left, right) in _ENDS.items():
        connection.create_function(name, 2, _trim(left, right), deterministic=True)


def _trim(left: bool, right: bool) -> Callable[[Any, Any], str | None]:
    def function(value: Any, characters: Any) -> str | None:
        if value is None or characters is None:
            return None
        text, drop = _text(value), set(_text(characters).partition("\0")[0])
        start, end = 0, len(text)
        while left and start < end and text[start] in drop:
            start += 1
        while right and start < end and text[end - 1] in drop:
            end -= 1
        return text[start:end]

    return function


def _text(value: Any) -> str:
    """As SQLite writes it; whoever runs a query holds the lock of all queries."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(own().execute("SELECT CAST(? AS TEXT)", (value,)).fetchone()[0])
