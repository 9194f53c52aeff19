"""The table of kills says what the file of figures says."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reliability.md"


def row(setup: dict) -> list[str]:
    """A line of the table: setup 2x3 is two processes under ZeRO-3; kills `of one rank` count among all of their moment."""
    processes, zero = setup["setup"].split("x")
    struck: dict[str, int] = {}
    for name, n in setup["where"].items():
        moment = name.removesuffix(" of one rank")
        struck[moment] = struck.get(moment, 0) + n
    alone = sum(n for name, n in setup["where"].items() if name.endswith(" of one rank"))
    moments = ", ".join(f"{k} {n}" for k, n in sorted(struck.items()))
    return [f"{processes}, ZeRO-{zero}", str(setup["kills"]), str(setup["exact"]), moments, str(alone)]


def test_the_table_of_kills_and_its_sentence_are_the_figures() -> None:
    text = PAGE.read_text(encoding="utf-8")
    link = re.search(r"\[figures\]\(([^)]+)\)", text)
    assert link
    found = json.loads((PAGE.parent / link[1]).read_text(encoding="utf-8"))
    said = f"**{found['kills']} kills, {found['exact']} exact resumes**, in {found['minutes']} minutes "
    assert said in text and f"with commit {found['commit'][:7]}" in text
    body = text.split("| processes, stage |", 1)[1].split("\n\n")[0].splitlines()[2:]
    assert [[c.strip() for c in line.strip("|").split("|")] for line in body] == [row(s) for s in found["setups"]]
    assert sum(s["kills"] for s in found["setups"]) == found["kills"]


def test_every_test_that_the_page_names_exists() -> None:
    names = set(re.findall(r"`(test_\w+)`", PAGE.read_text(encoding="utf-8")))
    source = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py"))
    assert names and not [n for n in names if f"def {n}(" not in source]
