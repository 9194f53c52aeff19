"""The shipped data set `knights`: puzzles of knights, who tell the truth, and knaves, who lie, each with exactly one solution.

python scripts/knights.py rlhf_cli/data/knights    # train.jsonl and heldout.jsonl; the same bytes every time
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

NAMES = ("Ada", "Ben", "Cleo", "Dov", "Emma", "Finn", "Gita", "Hugo", "Iris", "Jonas")
SAYS = ("says", "claims", "tells you", "states", "remarks")
Claim = tuple[str, Callable[[dict[str, bool]], bool]]  # a sentence, and whether it holds: name -> is a knight


def kind(knight: bool) -> str:
    return "knight" if knight else "knave"


def claim(speaker: str, people: Sequence[str], r: random.Random) -> Claim:
    """What somebody says of the others, and perhaps of themselves."""
    a, b = r.choice([p for p in people if p != speaker]), r.choice(people)
    one, two = r.random() < 0.5, r.random() < 0.5
    if a == b:
        return f"{a} is a {kind(one)}", lambda w: w[a] == one
    first, second = f"{a} is a {kind(one)}", f"{b} is a {kind(two)}"
    return r.choice([
        (first, lambda w: w[a] == one),
        (f"{first} and {second}", lambda w: w[a] == one and w[b] == two),
        (f"{first} or {second}", lambda w: w[a] == one or w[b] == two),
        (f"If {first}, then {second}", lambda w: w[a] != one or w[b] == two),
        (f"{a} and {b} are of the same kind", lambda w: w[a] == w[b]),
    ])  # fmt: skip


def puzzle(n: int, r: random.Random) -> dict[str, str]:
    """A puzzle of n people that has one solution."""
    while True:
        people = r.sample(NAMES, n)
        claims = [claim(p, people, r) for p in people]
        worlds = [dict(zip(people, w, strict=True)) for w in itertools.product((True, False), repeat=n)]
        fits = [w for w in worlds if all(w[p] == holds(w) for p, (_, holds) in zip(people, claims, strict=True))]
        if len(fits) == 1:
            said = " ".join(f'{p} {r.choice(SAYS)}: "{text}."' for p, (text, _) in zip(people, claims, strict=True))
            listed = f"{', '.join(people[:-1])} and {people[-1]}"
            prompt = f"On an island, knights always tell the truth and knaves always lie. You meet {listed}. {said} Who is what?"
            return {"prompt": prompt, "answer": ", ".join(f"{p} is a {kind(fits[0][p])}" for p in people)}


def main(folder: Path) -> None:
    """Puzzles of two and three people, no prompt twice."""
    r = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, dict[str, str]] = {}
    while len(made) < 200:
        found = puzzle(2 + len(made) % 2, r)
        made.setdefault(found["prompt"], found)
    for name, part in (("train", list(made.values())[:160]), ("heldout", list(made.values())[160:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in part), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
