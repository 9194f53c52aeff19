"""A clock that stands still inside SQLite, so that what a query returns does not depend on when and where it runs."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from functools import lru_cache
from typing import Any

NOW = "2025-01-01 00:00:00"  # UTC
_MOMENTS = {  # which arguments are moments; the first may be left away, and is now
    "date": (0,), "time": (0,), "datetime": (0,), "julianday": (0,), "unixepoch": (0,), "strftime": (1,), "timediff": (0, 1),
}  # fmt: skip
_PRESENT = {"current_date": "date", "current_time": "time", "current_timestamp": "datetime"}
_ZONES = frozenset({"localtime", "utc"})  # modifiers that ask for the machine's time zone; it is UTC


def stop_clock(connection: sqlite3.Connection) -> None:
    """Have every function of time take `NOW` for now, and UTC for the local time."""
    for name, moments in _MOMENTS.items():
        if _known(name):
            connection.create_function(name, -1, _fixed(name, moments), deterministic=True)
    for name, function in _PRESENT.items():
        connection.create_function(name, 0, _fixed(function, (0,)), deterministic=True)


def _fixed(name: str, moments: tuple[int, ...]) -> Callable[..., Any]:
    def function(*given: Any) -> Any:
        args = [_read(a) for a in ([*given, "now"] if len(given) == moments[0] else given)]
        for i in moments:
            if i < len(args) and _word(args[i]) in ("now", "subsec", "subsecond"):
                args[i] = NOW
        args = [a for i, a in enumerate(args) if i <= moments[-1] or _word(a) not in _ZONES]
        return own().execute(f"SELECT {name}({', '.join('?' * len(args))})", args).fetchone()[0]

    return function


def _read(value: Any) -> Any:
    """As SQLite's functions of time read an argument: bytes as text, and a text up to its first NUL."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return text.partition("\0")[0] if isinstance(text, str) else value


def _word(value: Any) -> str:
    return value.lower() if isinstance(value, str) and len(value) < 10 else ""


@lru_cache(maxsize=1)
def own() -> sqlite3.Connection:
    """A connection whose functions are SQLite's; whoever runs a query holds the lock of all queries."""
    return sqlite3.connect(":memory:", check_same_thread=False)


@lru_cache(maxsize=16)
def _known(name: str) -> bool:
    """Whether this SQLite has the function: unixepoch came with 3.38, timediff with 3.43."""
    try:
        own().execute(f"SELECT {name}('2000-01-01', '2000-01-01')")
    except sqlite3.OperationalError:
        return False
    return True
