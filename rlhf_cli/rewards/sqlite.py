"""Queries of a policy on a database of its own: read-only, limited in work, time, rows and memory."""

from __future__ import annotations

import contextlib
import gc
import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.sqlite_clock import stop_clock
from rlhf_cli.rewards.sqlite_trim import quick_trims

Compare = Literal["set", "multiset", "ordered"]
EVERY = 50  # virtual-machine instructions between two looks at the limits
LONGEST = 50_000  # bytes of one value, one sorted row and one query: instr and replace take up to its square, in one instruction
PATTERN = 1000  # bytes of a pattern of LIKE or GLOB
COLUMNS = 256  # of a result
RESULT = 100_000_000  # bytes of a result
HEAP = 1 << 29  # bytes that all of SQLite may take in this process, its sorting and its databases in memory too
_ALLOWED = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE})
_REFUSED = frozenset({"random", "randomblob", "load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"})
# Of all queries: a connection has one progress handler, and the clock's functions one connection.
_LOCK = threading.Lock()
_FENCE = re.compile(r"```sql[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class Limits(NamedTuple):
    """Of one query. The number of instructions does not depend on the machine; the seconds are a safety net."""

    instructions: int
    seconds: float
    rows: int


class Result(NamedTuple):
    """Rows of a query, or why there are none. `late`: the wall clock or the process's memory stopped it, not what it asks for."""

    rows: list[tuple[Any, ...]]
    error: str = ""
    late: bool = False


def run(connection: sqlite3.Connection, query: str, limits: Limits) -> Result:
    """Run one query. Whatever it does wrong is an error in words; nothing is ever written."""
    with _LOCK:
        try:
            return _run(connection, query, limits)
        except MemoryError:  # of the databases that this process met before, perhaps
            _forget()
        try:
            return _run(connection, query, limits)
        except MemoryError:  # others may still hold theirs, so that this too says nothing about the query
            return Result([], f"it takes over {HEAP >> 20} MB of memory", late=True)


def _forget() -> None:
    _made.cache_clear()
    _opened.cache_clear()
    gc.collect()  # a connection and its statements hold each other


def _run(connection: sqlite3.Connection, query: str, limits: Limits) -> Result:
    end, left = time.monotonic() + limits.seconds, limits.instructions // EVERY
    late = False

    def stop() -> int:
        nonlocal left, late
        left -= 1
        late = time.monotonic() > end
        return int(late or left < 0)

    cursor = connection.cursor()
    connection.set_progress_handler(stop, EVERY)
    try:
        return _fetched(cursor.execute(query), limits)
    except sqlite3.OperationalError as e:
        why = f"it takes over {limits.instructions} instructions" if left < 0 and not late else str(e)
        return Result([], f"it takes over {limits.seconds:g} s" if late else why, late)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as e:
        return Result([], str(e) or type(e).__name__)
    finally:
        cursor.close()
        connection.set_progress_handler(None, 0)


def _fetched(cursor: sqlite3.Cursor, limits: Limits) -> Result:
    """The rows, one by one, as long as there are not too many and they are not too large."""
    if cursor.description is None:  # an empty text, or a comment
        return Result([], "it is no query")
    rows: list[tuple[Any, ...]] = []
    left = RESULT
    for row in cursor:
        left -= sum(map(_size, row))
        if left < 0:
            return Result([], f"its result is too large, over {RESULT // 1_000_000} MB")
        if len(rows) == limits.rows:
            return Result([], f"it returns over {limits.rows} rows")
        rows.append(row)
    return Result(rows)


def _size(value: Any) -> int:
    """About its bytes in memory; the same on every machine."""
    if isinstance(value, str):
        return 32 + len(value) * (1 if value.isascii() else 4)
    return 32 + len(value) if isinstance(value, bytes) else 32


def same(a: Sequence[tuple[Any, ...]], b: Sequence[tuple[Any, ...]], compare: Compare) -> bool:
    """Whether two results are equal: as sets of rows, with duplicates, or in order too."""
    if compare == "set":
        return set(a) == set(b)
    return Counter(a) == Counter(b) if compare == "multiset" else list(a) == list(b)


def query_of(response: str) -> str:
    """The query in a response: its last ```sql block; else what its last <answer> holds; else all of it."""
    for found in (_FENCE.findall(response), _ANSWER.findall(response)):
        if found:
            return found[-1].strip().rstrip(";").strip()
    return response.strip().rstrip(";").strip()


def connect(meta: Mapping[str, Any], folder: str) -> sqlite3.Connection | str:
    """The database of a record, locked for reading; or why there is none.

    `meta.script` is SQL text that makes it; `meta.database` names a file under `folder`, an SQL script (.sql) or an
    SQLite database, of which nothing is ever written.
    """
    script, name = meta.get("script"), meta.get("database")
    if script:
        return _kept(_made, str(script))
    if not name:
        return "its record names no database: map dataset.columns.meta.database, or meta.script"
    root = Path(str(Path(__file__).parents[1] / "data" / "sql")) if folder == "packaged" else Path(folder).expanduser()
    file = root / str(name)
    if not file.is_file():
        return f"there is no database {str(file)!r}"
    made = file.suffix == ".sql"
    return _kept(_made, file.read_text(encoding="utf-8")) if made else _kept(_opened, str(file.resolve()))


def _kept(make: Callable[[str], sqlite3.Connection | str], what: str) -> sqlite3.Connection | str:
    """A database that is open already, or now; where memory is short, the others are closed first."""
    with contextlib.suppress(MemoryError):
        return make(what)
    _forget()
    with contextlib.suppress(MemoryError):
        return make(what)
    return f"its database takes over {HEAP >> 20} MB of memory; name a file of SQLite in meta.database"


@lru_cache(maxsize=32)
def _made(script: str) -> sqlite3.Connection | str:
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    try:
        with _LOCK:
            stop_clock(connection)
            quick_trims(connection)
            connection.executescript(script)
            connection.commit()
            return _locked(connection)
    except sqlite3.Error as e:
        return f"the script of its database fails: {e}"


@lru_cache(maxsize=32)
def _opened(file: str) -> sqlite3.Connection | str:
    try:
        with _LOCK:
            connection = sqlite3.connect(f"{Path(file).as_uri()}?mode=ro", uri=True, check_same_thread=False)
            stop_clock(connection)
            quick_trims(connection)
            return _locked(connection)
    except sqlite3.Error as e:
        return f"{file} cannot be read: {e}"


def _locked(connection: sqlite3.Connection) -> sqlite3.Connection:
    """Reading only, by an allow-list: no writes, no other files, no pragmas, no extensions, no huge values, no temporary files."""
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    connection.execute("PRAGMA temp_store = MEMORY").fetchall()  # where the limit of the next line holds
    connection.execute(f"PRAGMA hard_heap_limit = {HEAP}").fetchall()
    connection.execute("SELECT 1 FROM sqlite_master").fetchone()  # the schema, in which a table may have more columns
    for limit in (sqlite3.SQLITE_LIMIT_LENGTH, sqlite3.SQLITE_LIMIT_SQL_LENGTH):
        connection.setlimit(limit, LONGEST)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, PATTERN)
    connection.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, COLUMNS)
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)

    def authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
        fine = action in _ALLOWED and not (action == sqlite3.SQLITE_FUNCTION and second in _REFUSED)
        return sqlite3.SQLITE_OK if fine else sqlite3.SQLITE_DENY

    connection.set_authorizer(authorize)
    return connection


def limits_of(key: str, instructions: int, seconds: float, rows: int) -> Limits:
    """Checked limits."""
    if instructions < EVERY or seconds <= 0 or rows < 1:
        raise ConfigError(
            f"{key}: instructions={instructions}, seconds={seconds}, rows={rows} are not allowed; instructions start at "
            f"{EVERY}, seconds above 0, rows at 1"
        )
    return Limits(instructions, seconds, rows)
