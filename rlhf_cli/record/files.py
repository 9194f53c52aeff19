"""Files that are whole or absent: written aside, flushed to the disk, renamed."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_text_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text`; after a crash at any moment the file holds the old text or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with aside.open("w", encoding="utf-8", errors="backslashreplace") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)


def write_json_atomic(path: Path, obj: Any) -> None:
    """Replace `path` by `obj` as strict JSON; non-finite numbers become null."""
    write_text_atomic(path, json.dumps(strict(obj), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def strict(value: Any) -> Any:
    """`value` with every NaN and infinity replaced by None, and paths and other foreign leaves by their text."""
    if isinstance(value, Mapping):
        return {str(k): strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [strict(v) for v in value]
    value = plain(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def plain(value: Any) -> Any:
    """A zero-dimensional tensor or array as the number it holds, exactly; anything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def redirect(path: Path) -> None:
    """Send this process's output to a file, append, unbuffered by line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    f = path.open("a", encoding="utf-8", buffering=1)
    os.dup2(f.fileno(), 1)
    os.dup2(f.fileno(), 2)
    sys.stdout = sys.stderr = f


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
