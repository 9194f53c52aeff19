"""Reading: from a file, or the Hub, to (where, values) in file order. Nothing is skipped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from rlhf_cli.config import nearest
from rlhf_cli.data.columns import kind
from rlhf_cli.data.spec import Spec
from rlhf_cli.errors import ConfigError

Line = tuple[str, Mapping[str, Any]]


def file_of(spec: Spec, part: str) -> Path | None:
    """The local file behind `part` (train | heldout), checked to be one; None for the Hub."""
    if spec.format == "hub":
        return None
    if spec.format == "packaged":
        return _packaged(spec.name or "quickstart", part)
    key, typed = ("path", spec.path) if part == "train" else ("heldout", spec.heldout)
    path = Path(typed).expanduser()
    if path.is_file():
        return path
    what = "is a folder" if path.is_dir() else "no such file"
    cut = ", or dataset.heldout= to cut records off the train file" if key == "heldout" else ""
    raise ConfigError(f"dataset.{key}={typed}: {what}; type dataset.{key}=FILE{cut}")


def _packaged(name: str, part: str) -> Path:
    """A file of a data set that is shipped with the package."""
    home = Path(str(files("rlhf_cli.data")))
    sets = sorted(p.parent.name for p in home.glob("*/train.jsonl"))
    if name not in sets:
        raise ConfigError(f"dataset.name={name}: not shipped; choose one of {', '.join(sets)}{nearest(name, sets)}")
    return home / name / f"{part}.jsonl"


def read(spec: Spec, part: str) -> Iterator[Line]:
    """Every line of `part`, and an error where there is none."""
    path = file_of(spec, part)
    if path is None:
        return _some(_hub(spec, spec.split if part == "train" else spec.heldout), spec.path)
    reader = {"json": _json, "parquet": _parquet}.get(spec.format, _jsonl)
    return _some(reader(path), str(path))


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _some(lines: Iterable[Line], what: str) -> Iterator[Line]:
    empty = True
    for line in lines:
        empty = False
        yield line
    if empty:
        raise ConfigError(f"{what}: holds no records; point dataset.path (or dataset.heldout) to a file that does")


def _jsonl(path: Path) -> Iterator[Line]:
    blank = 0
    with path.open("rb") as f:
        for number, raw in enumerate(f, 1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                blank = blank or number
                continue
            if blank:
                raise ConfigError(f"{path.name}:{blank}: is an empty line between records; remove it")
            where = f"{path.name}:{number}"
            yield where, _object(_decode(raw.rstrip(), path.name, number), where)


def _json(path: Path) -> Iterator[Line]:
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not raw.strip():
        return
    value = _decode(raw, path.name, 1)
    if isinstance(value, Mapping) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        hint = "for one object per line type dataset.format=jsonl"
        raise ConfigError(f'{path.name}: holds {kind(value)}, wanted a list of objects or {{"data": [...]}}; {hint}')
    for i, item in enumerate(value, 1):
        where = f"{path.name} record {i}"
        yield where, _object(item, where)


def _parquet(path: Path) -> Iterator[Line]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield f"{path.name} row {number}", values
    except (pa.ArrowException, OSError) as e:
        raise ConfigError(f"{path.name}: cannot be read as parquet after row {number}: {_first_line(e)}") from None


def _hub(spec: Spec, split: str) -> Iterator[Line]:
    name = "/".join(filter(None, (spec.path, spec.name)))
    try:
        from datasets import load_dataset

        data = load_dataset(spec.path, spec.name or None, split=split, revision=spec.revision or None)
    except Exception as e:  # whatever a download may raise: network, authentication, unknown names, broken files
        raise ConfigError(
            f"dataset.path={spec.path}: cannot load {name} split {split!r} from the Hub "
            f"({type(e).__name__}: {_first_line(e)}); without the Hub point to a local file: "
            "dataset.format=jsonl dataset.path=FILE dataset.heldout="
        ) from None
    for i, values in enumerate(data, 1):
        yield f"{name} {split} row {i}", values


def _decode(raw: bytes, name: str, first: int) -> Any:
    """JSON of bytes that begin at line `first` of a file."""
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as e:
        line = first + raw.count(b"\n", 0, e.start)
        raise ConfigError(f"{name}:{line}: is not UTF-8 (byte {raw[e.start]:#04x}); convert the file") from None
    except json.JSONDecodeError as e:
        raise ConfigError(f"{name}:{first + e.lineno - 1}: broken JSON at character {e.colno}: {e.msg}") from None


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: holds {kind(value)}, wanted an object with columns")
    return value


def _first_line(e: Exception) -> str:
    text = " ".join(str(e).split())
    return text if len(text) <= 160 else text[:157] + "..."
