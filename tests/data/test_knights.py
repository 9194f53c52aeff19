"""The shipped puzzles: made again byte for byte, and each solved by another way of reading it."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "rlhf_cli" / "data" / "knights"


def maker() -> Any:
    spec = importlib.util.spec_from_file_location("knights", ROOT / "scripts" / "knights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_are_what_the_script_makes(tmp_path: Path) -> None:
    maker().main(tmp_path)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes()


def holds(text: str, world: dict[str, bool]) -> bool:
    """A sentence in a world, by its words alone."""
    same = re.fullmatch(r"(\w+) and (\w+) are of the same kind", text)
    if same:
        return world[same[1]] == world[same[2]]
    facts = [world[name] == (kind == "knight") for name, kind in re.findall(r"(\w+) is a (knight|knave)", text)]
    if text.startswith("If "):
        return not facts[0] or facts[1]
    return any(facts) if " or " in text else all(facts)


def test_every_answer_is_the_only_one() -> None:
    for line in (SHIPPED / "train.jsonl").read_text().splitlines() + (
        SHIPPED / "heldout.jsonl"
    ).read_text().splitlines():
        row = json.loads(line)
        said = re.findall(r'(\w+) (?:says|claims|tells you|states|remarks): "(.*?)\."', row["prompt"])
        people = [p for p, _ in said]
        worlds = [dict(zip(people, w, strict=True)) for w in itertools.product((True, False), repeat=len(people))]
        fits = [w for w in worlds if all(w[p] == holds(text, w) for p, text in said)]
        answer = {name: kind == "knight" for name, kind in re.findall(r"(\w+) is a (knight|knave)", row["answer"])}
        assert fits == [answer], row["prompt"]
