"""Dialogues between the policy and an environment, as token rows: the policy's turns are trained, everybody else's are read.

Two forms. `episode`: a row is a whole dialogue; its tokens are exactly those that the policy read and wrote, one after the other, and
every dialogue goes its own way. `turn`: a row is one turn, its prompt the dialogue so far; of the responses to a prompt the best
rewarded one is continued.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from rlhf_cli.data.record import Record
from rlhf_cli.data.text import follow_up, render
from rlhf_cli.environments.episode import Episode, Message, Turn, steps
from rlhf_cli.errors import ConfigError
from rlhf_cli.rollout.sampler import Decoding
from rlhf_cli.sources.assemble import row_seed, texts_of
from rlhf_cli.types import Sample


@dataclass
class Played:
    """A row: tokens in pieces, the policy's and those of others in turn, and what each of the policy's turns earned."""

    record: Record
    episode: Episode  # where the next turn is taken
    seed: int
    prompt: list[int]
    group: int = 0  # rows that answer one prompt share it
    pieces: list[tuple[list[int], list[float] | None]] = field(
        default_factory=list
    )  # ids; log-probs of the policy's own
    turns: list[tuple[Episode, str, Turn]] = field(default_factory=list)  # before it, what was said, what came of it
    truncated: bool = False  # a turn reached rollout.max_tokens, or the next prompt is too long
    open: bool = True

    def context(self) -> list[int]:
        """Everything that the policy reads at its next turn."""
        return [*self.prompt, *(i for ids, _ in self.pieces for i in ids)]

    def take(self, ids: list[int], logp: list[float], cut: bool, text: str, turn: Turn) -> None:
        """A turn of the policy, and what the environment says to it."""
        self.pieces.append((ids, logp))
        self.turns.append((self.episode, text, turn))
        self.truncated |= cut
        self.open = not (turn.done or turn.reward is None)
        self.episode = turn.episode

    def sample(self) -> Sample:
        """The last turn as scorers see it; the dialogue before it and all turns travel in `meta`."""
        before, text, _ = self.turns[-1]
        turns = [{"response": said, "reward": t.reward, "parts": dict(t.parts)} for _, said, t in self.turns]
        reason = next((t.reason for _, _, t in self.turns if t.reward is None), "")
        meta = {
            **self.record.meta, "messages": [dict(m) for m in before.messages], "where": self.record.where, "turns": turns,
            "reason": reason,
        }  # fmt: skip
        asked = next(m["content"] for m in reversed(before.messages) if m["role"] != "assistant")
        return Sample(asked, text, self.record.references, meta, self.record.uid, self.record.link)


@dataclass(frozen=True)
class Player:
    """Plays dialogues.

    Args:
        environment: the other party.
        sampler: draws the policy's turns.
        chat: render with the tokenizer's chat template.
        rows: episode (a row per dialogue) or turn (a row per turn, the best of a group goes on).
        turns: most turns of the policy in a dialogue.
        prompt_tokens: longest prompt of a turn; a dialogue that is longer ends.
    """

    environment: Any
    sampler: Any
    chat: bool
    rows: str
    turns: int
    prompt_tokens: int

    def play(self, records: Sequence[Record], k: int, seeds: Sequence[int], decoding: Decoding) -> list[list[Played]]:
        """The rows of each record, from `seeds[i * k + j]` for its j-th response."""
        form = self._episodes if self.rows == "episode" else self._turns
        found: list[list[Played]] = [[] for _ in records]
        for i, row in form(records, k, seeds, decoding):
            found[i].append(row)
        return found

    def opening(self, record: Record, seed: int = 0) -> list[int]:
        """Ids of the first prompt."""
        return self._render(self.environment.reset(record, seed).messages)

    def _episodes(
        self, records: Sequence[Record], k: int, seeds: Sequence[int], decoding: Decoding
    ) -> Iterator[tuple[int, Played]]:
        rows = [self._open(records[n // k], seed) for n, seed in enumerate(seeds)]
        for t in range(self.turns):
            live = [r for r in rows if r.open]
            before = [r.episode for r in live]
            self._advance(live, t, decoding)
            for r, episode in zip(live, before, strict=True):
                if r.open and t + 1 < self.turns:
                    self._listen(r, episode)
        yield from ((n // k, r) for n, r in enumerate(rows))

    def _turns(
        self, records: Sequence[Record], k: int, seeds: Sequence[int], decoding: Decoding
    ) -> Iterator[tuple[int, Played]]:
        live = {i: self.environment.reset(r, seeds[i * k]) for i, r in enumerate(records)}
        for t in range(self.turns):
            rows: list[tuple[int, Played]] = []
            for i, episode in live.items():
                prompt = self._render(episode.messages)
                if t == 0 or len(prompt) <= self.prompt_tokens:
                    mine = seeds[i * k : (i + 1) * k]
                    rows += [(i, Played(records[i], episode, seed, prompt, group=t)) for seed in mine]
            self._advance([r for _, r in rows], t, decoding)
            yield from rows
            live = {}
            for i, group in groupby(rows, key=lambda pair: pair[0]):
                best = best_of([r for _, r in group])
                if best is not None and best.open:
                    live[i] = best.episode

    def _open(self, record: Record, seed: int) -> Played:
        episode = self.environment.reset(record, seed)
        return Played(record, episode, seed, self._render(episode.messages))

    def _advance(self, live: Sequence[Played], t: int, decoding: Decoding) -> None:
        """One turn of the policy for every row."""
        if not live:
            return
        contexts = [r.context() for r in live]
        prompts, k = shared(contexts)
        seeds = [row_seed(r.seed, t) if t else r.seed for r in live]
        drawn = self.sampler.sample(prompts, k, seeds, decoding)
        texts = texts_of(self.sampler, drawn.ids)
        made = steps(self.environment, [r.episode for r in live], texts)
        logp, cut = drawn.logp.tolist(), drawn.truncated.tolist()
        for n, r in enumerate(live):
            r.take(drawn.ids[n], logp[n][: len(drawn.ids[n])], bool(cut[n]), texts[n], made[n])

    def _listen(self, row: Played, before: Episode) -> None:
        """Append what the environment said; a row whose next prompt would be too long ends."""
        said = new_messages(before, row.turns[-1][1], row.episode)
        ended = row.pieces[-1][0][-1] in self.sampler.eos
        ids = follow_up(said, self.sampler.tokenizer, self.chat, ended=ended)
        if len(row.context()) + len(ids) > self.prompt_tokens:
            row.open, row.truncated = False, True
            return
        row.pieces.append((ids, None))

    def _render(self, messages: Sequence[Message]) -> list[int]:
        return render(messages, self.sampler.tokenizer, self.chat)


def shared(contexts: Sequence[list[int]]) -> tuple[list[list[int]], int]:
    """(prompts, k): the same rows as prompts with k responses each, where equal contexts come in runs of one length."""
    runs = [(ids, len(list(same))) for ids, same in groupby(contexts)]
    lengths = {n for _, n in runs}
    return ([ids for ids, _ in runs], lengths.pop()) if len(lengths) == 1 else (list(contexts), 1)


def best_of(rows: Sequence[Played]) -> Played | None:
    """The row whose turn earned most, the first of equals; None where no reward is known."""
    known = [r for r in rows if r.turns[-1][2].reward is not None]
    return max(known, key=lambda r: r.turns[-1][2].reward or 0.0, default=None)


def new_messages(before: Episode, response: str, after: Episode) -> Sequence[Message]:
    """What others said after a response. Refuses an environment that rewrote what the policy had read: its row could not hold that."""
    n = len(before.messages)
    answer: Mapping[str, str] = {"role": "assistant", "content": response}
    if after.messages[:n] != before.messages or after.messages[n : n + 1] != (answer,):
        raise ConfigError(
            "the environment changes earlier turns, and a row holds what the policy read; type environment.rows=turn, "
            "or turn that setting of the environment off"
        )
    return after.messages[n + 1 :]


def rewards_of(row: Played) -> list[float]:
    """The reward of each of the policy's turns; NaN where it is missing."""
    return [math.nan if t.reward is None else float(t.reward) for _, _, t in row.turns]


def with_wave(decoding: Decoding, rows: int) -> Decoding:
    """Decoding of a step that wants so many rows of all processes."""
    return replace(decoding, wave=rows)
