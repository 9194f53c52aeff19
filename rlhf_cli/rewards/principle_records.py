"""Preferences by principle, from pairs of responses and a judge: what trains the reward model of `reward=principles`.

    rlhf generate input=prompts.jsonl eval.samples=2 output=pairs.jsonl
    python -m rlhf_cli.rewards.principle_records pairs.jsonl preferences.jsonl judge.url=URL judge.model=NAME

See Sun et al., "SALMON: Self-Alignment with Instructable Reward Models", arXiv:2310.05910, section 3.2. Of its hard rules the one about
what a response calls itself is here; the one about answers in a wrong language is not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rlhf_cli.compose import compose
from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.judge import Judge, judge_of
from rlhf_cli.judges.questions import Compare
from rlhf_cli.judges.text import unit_hash
from rlhf_cli.rewards.judge_pairs import ask_pair, read_pair
from rlhf_cli.rewards.principle_list import Principle, principles_of
from rlhf_cli.rewards.principle_preferences import agreed, by_variance, preference
from rlhf_cli.rewards.principles import HEAD, body
from rlhf_cli.types import Sample

PASSES = 4  # over the pairs
RULED_BY, RULED = "as an ai language model", 0.5  # the response that says it loses, so often
AT_ONCE = 16  # pairs between two waits for the judge


class Pair(NamedTuple):
    """Two different responses to one prompt."""

    uid: str
    prompt: str
    first: str
    second: str


def pairs_of(path: Path) -> list[Pair]:
    """The first two different responses to each prompt of a file that `rlhf generate` wrote; prompts with one alone are left out."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; make it with rlhf generate eval.samples=2 output={path}")
    found: dict[tuple[str, str], list[str]] = {}
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            texts = found.setdefault((str(row.get("uid", row["prompt"])), str(row["prompt"])), [])
            texts += [str(row["response"])] if str(row["response"]) not in texts else []
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{path}, line {n}: wanted an object with prompt and response") from None
    return [Pair(uid, prompt, *texts[:2]) for (uid, prompt), texts in found.items() if len(texts) > 1]


def opinions(pairs: Sequence[Pair], principles: Sequence[Principle], judge: Judge) -> list[list[float] | None]:
    """For each pair the judge's log-odds by each principle, 0 where its two orders disagree; None where a reply cannot be read."""
    found: list[list[float] | None] = []
    questions = [Compare(p.text, "logits") for p in principles]
    each = 2 * len(questions)
    for at in range(0, len(pairs), AT_ONCE):
        some = pairs[at : at + AT_ONCE]
        asks = [
            ask
            for p in some
            for q in questions
            for ask in ask_pair(q, Sample(p.prompt, ""), p.first, p.second, votes=1)
        ]
        replies = judge.ask(asks)
        for n in range(len(some)):
            own = replies[n * each : (n + 1) * each]
            read = [read_pair(q, own[2 * i : 2 * i + 2])[0] for i, q in enumerate(questions)]
            whole = all(v is not None for v in read)
            found.append([agreed(v.ahead[0], v.behind[0]) for v in read if v is not None] if whole else None)
    return found


def ruled(pair: Pair, *where: object) -> bool | None:
    """Whether the first is preferred because the second alone calls itself a language model; None where no rule decides."""
    one, two = (RULED_BY in text.lower() for text in (pair.first, pair.second))
    return two if one != two and unit_hash("ruled", *where) < RULED else None


def records(
    pairs: Sequence[Pair], said: Sequence[Sequence[float]], principles: Sequence[Principle], seed: int
) -> Iterator[dict[str, str]]:
    """Chosen and rejected inputs of the reward model, as `reward.principles.render=turn` writes them."""
    scores = by_variance({p.name: [x[j] for x in said] for j, p in enumerate(principles)})
    wording = {p.name: p for p in principles}
    for n in range(PASSES):
        for i, pair in enumerate(pairs):
            where = (seed, pair.uid, pair.prompt, n)
            found = preference({name: x[i] for name, x in scores.items()}, *where, ruled=ruled(pair, *where))
            if found is None:
                continue
            shown = [wording[x].negative if x in found.negated else wording[x].text for x in found.shown]
            first, second = (body(Sample(pair.prompt, text), shown) for text in (pair.first, pair.second))
            best, worst = (first, second) if found.first else (second, first)
            yield {"prompt": HEAD, "chosen": best, "rejected": worst}


def main(words: Sequence[str]) -> int:
    """Read pairs, ask the judge, write records: IN OUT [KEY=VALUE ...]."""
    if len(words) < 2 or any("=" in w for w in words[:2]):
        raise ConfigError(
            "type python -m rlhf_cli.rewards.principle_records PAIRS.jsonl OUT.jsonl judge.url=URL judge.model=NAME"
        )
    cfg = compose("score", ["reward=principles", *words[2:]], None)
    principles = [p for p in principles_of(cfg.reward.principles.principles) if not p.always]
    bare = next((p.name for p in principles if not p.negative), "")
    if bare:
        raise ConfigError(f"reward.principles.principles: {bare} has no negative wording, which these preferences need")
    pairs, judge = pairs_of(Path(words[0])), judge_of(cfg)
    Path(words[1]).parent.mkdir(parents=True, exist_ok=True)  # what it cannot write to is told before anything is asked
    found = opinions(pairs, principles, judge)
    kept = [(p, x) for p, x in zip(pairs, found, strict=True) if x is not None]
    made = list(records([p for p, _ in kept], [x for _, x in kept], principles, cfg.seed))
    Path(words[1]).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in made), encoding="utf-8")
    print(
        f"{len(made)} preferences of {len(kept)} pairs are in {words[1]}; of {len(pairs) - len(kept)} pairs a reply could not be read"
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as e:
        sys.exit(str(e))
