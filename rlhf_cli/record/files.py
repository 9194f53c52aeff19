"""Files that are whole or absent: written aside, flushed to the disk, renamed."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ConfigError


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


def size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def full_disk(e: BaseException, path: Path) -> ConfigError | None:
    """What to say when `e` means that the disk behind the run `path` takes no more; None when it means something else."""
    number, what = getattr(e, "errno", None), str(e)
    rust = re.search(r"os error (\d+)", what)  # safetensors
    number = int(rust[1]) if number is None and rust else number
    if number not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        return None
    name = getattr(e, "filename", None) or path
    return ConfigError(
        f"cannot write {name}: {os.strerror(number)}; everything up to the newest checkpoint is kept: make room, then rlhf resume {path}"
    )


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


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
