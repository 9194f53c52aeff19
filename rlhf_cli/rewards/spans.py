"""Character ranges of a response onto the policy's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.errors import GateError
from rlhf_cli.types import Experience

Span = tuple[int, int, int, float]  # row, first character, character after the last, value


def place(spans: Sequence[Span], exp: Experience, tokenizer: Any) -> Tensor:
    """[N, T]: each span's value on the last token that holds a part of it; a row's values keep their sum.

    The value of a piece of text is known when its last character is, which a later token of the same character decides. Characters
    are counted in `exp.samples[row].response`. Raises GateError for a range that the response does not have.
    """
    placed = torch.zeros(exp.ids.shape)
    by_row: dict[int, list[Span]] = {}
    for span in spans:
        by_row.setdefault(span[0], []).append(span)
    for row, mine in by_row.items():
        text, at = exp.samples[row].response, exp.mask[row].nonzero().flatten()
        ends = token_ends(exp.ids[row, at].tolist(), text, tokenizer)
        for _, first, stop, value in mine:
            if not 0 <= first < stop <= len(text):
                raise GateError(
                    f"a reward placed {value:g} on characters {first}:{stop} of a response of {len(text)} characters "
                    f"(sample {exp.samples[row].uid!r}); a range is first:stop with 0 <= first < stop <= {len(text)}"
                )
            token = next((i for i, end in enumerate(ends) if end >= stop), len(ends) - 1)
            placed[row, at[token]] += value
    return placed


def token_ends(ids: Sequence[int], text: str, tokenizer: Any) -> list[int]:
    """How many characters of `text` are complete after each token; `text` is what the tokens say, perhaps stripped, or cut at a stop."""
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    shift = whole.find(text)
    if shift < 0:
        raise GateError(
            "token rewards: a response is not what its tokens decode to, so characters cannot be found in tokens"
        )
    pieces = [tokenizer.decode([i], skip_special_tokens=True) for i in ids]
    exact = "".join(pieces) == whole and "\ufffd" not in whole
    lengths = [len(p) for p in pieces] if exact else _grown(ids, whole, tokenizer)
    ends, done = [], 0
    for n in lengths:
        done += n
        ends.append(min(max(done - shift, 0), len(text)))
    return ends


def _grown(ids: Sequence[int], whole: str, tokenizer: Any) -> list[int]:
    """Characters that each token completes, where one character may span several tokens: by decoding ever longer beginnings."""
    lengths, done = [], 0
    for n in range(1, len(ids) + 1):
        said = tokenizer.decode(ids[:n], skip_special_tokens=True)
        same = len(whole) if n == len(ids) else _common(said, whole)
        lengths.append(max(0, same - done))
        done = max(done, same)
    return lengths


def _common(a: str, b: str) -> int:
    """Length of the common beginning; a trailing replacement character may yet become another one."""
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    while n and n == len(a) and a[n - 1] == "\ufffd":
        a, n = a[:-1], n - 1
    return n
