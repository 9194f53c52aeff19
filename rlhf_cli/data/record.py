"""A record of a dataset, whatever its shape, and the checks that need no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_cli.errors import ConfigError


@dataclass(frozen=True)
class Record:
    """A prompt with what was recorded about it. Pairs are edges over `responses`, as everywhere."""

    messages: tuple[Mapping[str, str], ...]  # the prompt as chat turns, system first if any, ending with a user turn
    prompt: str  # text of the last user turn: what scorers see as Sample.prompt
    references: tuple[str, ...] = ()
    responses: tuple[str, ...] = ()  # chosen and rejected; the ranked ones; or the single one
    scores: tuple[float, ...] = ()  # of the responses, where recorded
    pairs: tuple[tuple[int, int], ...] = ()  # (winner, loser)
    margins: tuple[float, ...] = ()  # per pair: difference of scores, or the file's margin
    label: float | None = None  # thumbs: 1 up, 0 down; or a rating
    meta: Mapping[str, Any] = field(default_factory=dict)
    uid: str = ""  # hash of the messages, with a counter for a prompt that comes again
    where: str = ""  # train.jsonl:17
    link: str = ""  # records that share it are sampled in one step and scored together


def counts(records: Sequence[Record]) -> dict[str, int]:
    """What is in the records, and what is odd about them; zeros are left out, `records` is always there.

    `ties` are pairs of responses with equal scores, `identical` those with equal texts and different scores: neither
    gives an edge.
    """
    couples = [_couples(r) for r in records]
    found = {
        "without_reference": sum(not r.references for r in records),
        "references": sum(len(r.references) for r in records),
        "responses": sum(len(r.responses) for r in records),
        "empty_responses": sum(not text.strip() for r in records for text in r.responses),
        "pairs": sum(len(r.pairs) for r in records),
        "ties": sum(t for t, _ in couples),
        "identical": sum(i for _, i in couples),
        "repeated_prompts": sum("-" in r.uid for r in records),
    }
    return {"records": len(records)} | {k: v for k, v in found.items() if v}


def _couples(r: Record) -> tuple[int, int]:
    """How many pairs of responses have equal scores; how many of the others have equal texts."""
    couples = [(i, j) for i in range(len(r.scores)) for j in range(i)]
    ties = sum(r.scores[i] == r.scores[j] for i, j in couples)
    return ties, sum(r.scores[i] != r.scores[j] and r.responses[i] == r.responses[j] for i, j in couples)


def units(records: Sequence[Record]) -> list[list[int]]:
    """Indices of the records that belong together, by their link, in the order in which they first appear; others stand alone."""
    members: dict[Any, list[int]] = {}
    for i, r in enumerate(records):
        members.setdefault(r.link or i, []).append(i)
    return list(members.values())


def check_links(records: Sequence[Record], prompts: int) -> None:
    """Refuse links that join different numbers of records, and steps of `prompts` records that would cut one."""
    groups = units(records)
    sizes = sorted({len(u) for u in groups})
    if len(sizes) > 1:
        odd = records[next(u for u in groups if len(u) == sizes[0])[0]]
        raise ConfigError(
            f"{odd.where}: column 'link' joins {sizes[0]} record(s) as {odd.link!r} and {sizes[-1]} elsewhere; "
            "every link must join the same number of records"
        )
    if sizes and prompts % sizes[0]:
        raise ConfigError(
            f"batch.prompts={prompts} would cut linked records apart: every link joins {sizes[0]}; "
            f"type batch.prompts={-(-prompts // sizes[0]) * sizes[0]}"
        )


def leading(records: Sequence[Record], n: int) -> list[Record]:
    """The first `n` records, or all for 0, without those whose linked partners would be cut off."""
    if not n or n >= len(records):
        return list(records)
    kept = {i for unit in units(records) if max(unit) < n for i in unit}
    return [r for i, r in enumerate(records) if i in kept]


def check_references(records: Sequence[Record], what: str) -> None:
    """Refuse records without reference where `what` (for example `reward=bleu`) needs one."""
    bare = [r for r in records if not r.references]
    if bare:
        raise ConfigError(
            f"{bare[0].where}: column 'references' gives no reference, and {what} needs one "
            f"({len(bare)} of {len(records)} records have none); map the column with "
            "dataset.columns.references=NAME, remove those lines, or choose another reward"
        )


def check_lengths(
    records: Sequence[Record], lengths: Sequence[int], limit: int, key: str = "dataset.max_prompt_tokens"
) -> None:
    """Refuse prompts of more than `limit` tokens; `key` is the setting to change."""
    long = [(r, n) for r, n in zip(records, lengths, strict=True) if n > limit]
    if long:
        first, n = long[0]
        raise ConfigError(
            f"{first.where}: column 'prompt' has {n} tokens, the limit is {limit} "
            f"({len(long)} of {len(records)} prompts are longer); type {key}={max(n for _, n in long)}, or shorten them"
        )


def as_demonstrations(records: Sequence[Record]) -> list[Record]:
    """The same records with one response each, to be imitated.

    That is the recorded demonstration, or the winner of a chosen/rejected pair, or else the first reference.
    """
    return [replace(r, responses=(_demonstration(r),), scores=(), pairs=(), margins=()) for r in records]


def _demonstration(r: Record) -> str:
    if len(r.responses) == 1 and r.label is None:
        return r.responses[0]
    if len(r.pairs) == 1 and not r.scores:
        return r.responses[r.pairs[0][0]]
    if r.references:
        return r.references[0]
    raise ConfigError(
        f"{r.where}: holds no demonstration; use dataset.shape=demonstrations or pairs, "
        "or map a column with dataset.columns.references=NAME"
    )
