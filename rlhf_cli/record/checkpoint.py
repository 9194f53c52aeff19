"""Checkpoints that are whole or absent: written aside, hashed, flushed, renamed; refused when a byte differs.

`folder` is a run's checkpoints/. A checkpoint is step-000050/: any files, and manifest.json with sizes and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ConfigError
from rlhf_cli.pulse import alive
from rlhf_cli.record.files import sync_folder, write_json_atomic

VERSION = 1
MANIFEST = "manifest.json"
HASHERS = 2  # files read at a time
# .old-...: the previous checkpoint of the same step, in the instant in which it is replaced.
_NAME = re.compile(r"(?P<old>\.old-)?step-(?P<step>\d{6,})(-\d+)?")


def save(folder: Path, step: int, write: Callable[[Path], None], keep: int) -> Path:
    """Save what `write(path)` puts into an empty folder, by one process. Keeps the newest `keep`; returns the path."""
    aside = begin(folder, step)
    try:
        write(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return commit(aside, step, keep)


def begin(folder: Path, step: int) -> Path:
    """An empty folder to write into.

    With several ranks: rank 0 begins and sends the path to the others, all write, barrier, rank 0 commits.

    Folders left by killed saves are removed, so the run must be claimed by this process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    aside = folder / f".tmp-{step_name(step)}-{os.getpid()}"
    aside.mkdir()
    return aside


def commit(aside: Path, step: int, keep: int) -> Path:
    """Hash, flush and rename a written folder, then remove all but the newest `keep` of the steps up to this one."""
    assert keep >= 1
    folder, final = aside.parent, aside.parent / step_name(step)
    names = sorted(_files(aside))
    assert names, f"{aside} is empty"
    with ThreadPoolExecutor(HASHERS) as pool:
        found = dict(zip(names, pool.map(lambda n: _measure(aside / n), names), strict=True))
    write_json_atomic(aside / MANIFEST, {"version": VERSION, "step": step, "files": found})
    for inner in {p.parent for p in aside.rglob("*")}:
        sync_folder(inner)
    if final.exists():
        old = folder / f".old-{final.name}-{os.getpid()}"
        shutil.rmtree(old, ignore_errors=True)  # of a process that was killed here and had the same number
        os.rename(final, old)
    os.rename(aside, final)
    sync_folder(folder)
    _prune(folder, step, keep)
    return final


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every byte is as it was written, and a note for each newer one that was refused.

    None where there is no checkpoint at all. Raises ConfigError where there are some and none is valid.
    """
    refused: list[tuple[str, str]] = []
    for path in _checkpoints(folder):
        problem = verify(path)
        if problem is None:
            return path, [f"checkpoint {name} refused: {why}; using {path.name}" for name, why in refused]
        refused.append((path.name, problem))
    if refused:
        listed = "; ".join(f"{name}: {why}" for name, why in refused)
        raise ConfigError(f"no valid checkpoint in {folder}: {listed}; restore one, or start over with resume=never")
    return None, []


def starting_point(folder: Path, asked: str) -> tuple[Path | None, list[str]]:
    """Where a run begins, and what to say: the newest valid checkpoint (auto), none (never), or the folder that was asked for.

    On purpose everything that belongs to the line that is left is set aside, so that no later start takes it.
    """
    if asked == "auto":
        return newest_valid(folder)
    if asked == "never":
        return None, set_aside_after(folder, -1)
    path = Path(asked)
    problem = verify(path)
    if problem:
        raise ConfigError(f"resume={asked}: {problem}; type resume=auto for the newest valid checkpoint")
    return path, set_aside_after(folder, step_of(path) if is_in(path, folder) else -1)


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, valid or not; -1 where there is none."""
    return max(map(_step, _checkpoints(folder)), default=-1)


def is_in(path: Path, folder: Path) -> bool:
    """Whether a checkpoint is one of this run's own."""
    return path.resolve().parent == folder.resolve()


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return _compare(path, manifest)
    except FileNotFoundError as e:
        return f"{Path(e.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    except OSError as e:
        return f"{Path(e.filename or path).name} cannot be read: {e.strerror}"


def step_of(path: Path) -> int:
    """The step that a checkpoint was saved at."""
    return int(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["step"])


def step_name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step-{step:06d}"


def set_aside_after(folder: Path, step: int) -> list[str]:
    """Rename checkpoints later than `step` (-1: all), which a start from it abandons, and say so: no later resume takes them."""
    notes = []
    for path in _checkpoints(folder):
        if _step(path) > step:
            n = 1
            while (aside := folder / f"discarded-{n}-{path.name.lstrip('.')}").exists():
                n += 1
            os.rename(path, aside)
            left = f"is later than the resumed step {step}" if step >= 0 else "belongs to the line that is left"
            notes.append(f"checkpoint {path.name} {left}; set aside as {aside.name}")
    return notes


def _compare(path: Path, manifest: dict[str, Any]) -> str | None:
    listed: dict[str, dict[str, Any]] = manifest["files"]
    match = _NAME.fullmatch(path.name)
    if match and int(match["step"]) != manifest["step"]:
        return f"{MANIFEST} says step {manifest['step']}"
    if manifest["version"] != VERSION:
        return f"{MANIFEST} has version {manifest['version']}, this program reads {VERSION}"
    there = _files(path) - {MANIFEST}
    for name in sorted(listed.keys() - there):
        return f"{name} is missing"
    for name in sorted(there - listed.keys()):
        return f"{name} is not in the manifest"
    for name, want in listed.items():
        size = (path / name).stat().st_size
        if size != want["size"]:
            return f"{name} has {size} bytes, manifest says {want['size']}"
    with ThreadPoolExecutor(HASHERS) as pool:
        hashes = dict(zip(listed, pool.map(lambda n: _sha256(path / n), listed), strict=True))
    for name, want in listed.items():
        if hashes[name] != want["sha256"]:
            return f"{name} has sha256 {hashes[name][:12]}.., manifest says {want['sha256'][:12]}.."
    return None


def _files(path: Path) -> set[str]:
    return {p.relative_to(path).as_posix() for p in path.rglob("*") if not p.is_dir()}


def _measure(path: Path) -> dict[str, Any]:
    """Size and hash of a file, after it reached the disk."""
    with path.open("rb") as f:
        os.fsync(f.fileno())
    alive()
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match
    return int(match["step"])


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first; a replaced one after the one that replaces it."""
    found = [p for p in folder.glob("*") if p.is_dir() and _NAME.fullmatch(p.name)] if folder.exists() else []
    return sorted(found, key=lambda p: (_step(p), not p.name.startswith(".")), reverse=True)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Remove older checkpoints; those later than `step` belong to an abandoned line and must not push this one out."""
    current = [p for p in _checkpoints(folder) if _step(p) <= step]
    whole = [p for p in current if not p.name.startswith(".")]
    for path in [p for p in current if p not in whole[:keep]]:
        gone = folder / f".tmp-pruned-{path.name.lstrip('.')}"  # a half removed checkpoint must not look like one
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)
