"""The entry point of the data layer: the records of a split, and their fingerprint."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any, Literal

from rlhf_cli.data.columns import Row
from rlhf_cli.data.files import file_of, read, sha256
from rlhf_cli.data.record import Record, counts, leading
from rlhf_cli.data.shapes import digest, parse, uid_of
from rlhf_cli.data.spec import Spec, spec_of
from rlhf_cli.errors import ConfigError

Split = Literal["train", "heldout"]


def load(cfg: Any, split: Split) -> list[Record]:
    """The records of a split, in file order. Raises ConfigError naming file, line and column.

    Held-out records come from their own file or Hub split; without one, the prompts whose hash falls below
    `heldout_fraction` are cut off, which depends on no order, no seed and no wording of the template; linked records stay
    on one side.
    `limit` then applies to train.
    """
    spec = spec_of(cfg)
    own = spec.heldout or spec.format == "packaged"
    records = _records(spec, split if own else "train", _stamp(spec, split if own else "train"))
    chosen = [r for r, _ in records] if own else _cut(spec, records, split)
    return leading(chosen, spec.limit) if split == "train" else chosen


def load_whole(cfg: Any) -> list[Record]:
    """Every record of `path`, nothing held out: for files that are read and not trained on."""
    spec = spec_of(cfg)
    records = [r for r, _ in _records(spec, "train", _stamp(spec, "train"))]
    return records[: spec.limit] if spec.limit else records


def fingerprint(cfg: Any) -> dict[str, Any]:
    """What was loaded, for provenance: names, sha256 of content and counts of both splits."""
    spec = spec_of(cfg)
    train, heldout = load(cfg, "train"), load(cfg, "heldout")
    seen = {r.uid.partition("-")[0] for r in train}
    return {
        "format": spec.format,
        "shape": spec.shape,
        "train": _content(spec, "train", train),
        "heldout": _content(spec, "heldout", heldout),
        "heldout_prompts_in_train": sum(r.uid.partition("-")[0] in seen for r in heldout),
    }


def _content(spec: Spec, split: Split, records: list[Record]) -> dict[str, Any]:
    own = spec.heldout or spec.format == "packaged"
    path = file_of(spec, split if own else "train")
    if path is not None:
        source = {"file": path.name, "sha256": sha256(path)}
    else:
        names = {"hub": spec.path, "name": spec.name, "revision": spec.revision}
        part = spec.heldout if split == "heldout" and own else spec.split
        source = {**names, "split": part, "sha256": _hash(records)}
    cut = {} if own else {"heldout_fraction": spec.heldout_fraction}
    return {**source, **cut, "counts": counts(records)}


def _hash(records: list[Record]) -> str:
    total = hashlib.sha256()
    for r in records:
        total.update(digest(asdict(replace(r, where=""))).encode())
    return total.hexdigest()


def _stamp(spec: Spec, part: Split) -> tuple[int, int]:
    """Size and time of the file, so that a changed file is read again."""
    path = file_of(spec, part)
    stat = path.stat() if path else None
    return (stat.st_size, stat.st_mtime_ns) if stat else (0, 0)


@lru_cache(maxsize=2)
def _records(spec: Spec, part: Split, stamp: tuple[int, int]) -> tuple[tuple[Record, float], ...]:
    """Every record of a file, and its place in [0, 1) for the cut."""
    seen: Counter[str] = Counter()
    done = []
    for where, values in read(spec, part):
        parsed = parse(Row(where, values, spec))
        uid = uid_of(parsed.record.messages)
        seen[uid] += 1
        again = f"-{seen[uid]}" if seen[uid] > 1 else ""
        place = int(hashlib.sha256(parsed.key.encode()).hexdigest()[:13], 16) / 16**13
        done.append((replace(parsed.record, uid=uid + again), place))
    return tuple(done)


def _cut(spec: Spec, records: tuple[tuple[Record, float], ...], split: Split) -> list[Record]:
    held = [r for r, place in records if place < spec.heldout_fraction]
    train = [r for r, place in records if place >= spec.heldout_fraction]
    if not held or not train:
        side = "held-out" if not held else "train"
        change = "raise" if not held else "lower"
        raise ConfigError(
            f"dataset.heldout_fraction={spec.heldout_fraction:g} leaves no {side} record of the {len(records)} in "
            f"{spec.path}; {change} it, or type dataset.heldout={'SPLIT' if spec.format == 'hub' else 'FILE'}"
        )
    return held if split == "heldout" else train
