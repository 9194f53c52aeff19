"""Reading a judge's reply. Only the reply is read, as a whole, and only in the form that was asked for.

No search for something that looks like a score: a judge may quote a response that holds one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rlhf_cli.judges.ask import Ask, Reply


class Unreadable(ValueError):
    """Why a reply is no answer; the row becomes missing."""


LEAST = -87.0  # nats: the smallest probability that a float32 holds; servers write -9999 or -inf for what lies below

_FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.S)


def json_reply(reply: Reply, keys: Sequence[str]) -> dict[str, Any]:
    """The JSON object that is the whole reply, with exactly these keys.

    A reasoning model's `<think>...</think>` before it, and a code fence around it, are allowed; text beside it is not.
    """
    found = parse_object(whole(reply))
    if set(found) != set(keys):
        raise Unreadable(f"the judge's reply has the keys {_listed(found)}, wanted {_listed(keys)}")
    return found


def whole(reply: Reply) -> str:
    """The text of a complete reply, without its reasoning."""
    if reply.error:
        raise Unreadable(reply.error)
    if reply.finish == "length":
        raise Unreadable("the judge's reply was cut at its token limit; raise judge.max_tokens")
    if reply.finish not in ("stop", "eos"):
        raise Unreadable(f"the judge's reply ended by {reply.finish!r}")
    text = reply.text.strip()
    if text.startswith("<think>"):
        text = text.rpartition("</think>")[2].strip()
    if not text:
        raise Unreadable("the judge's reply is empty")
    return text


def parse_object(text: str) -> dict[str, Any]:
    """One JSON object, every key once."""
    inside = _FENCE.fullmatch(text)
    text = inside[1] if inside else text
    try:
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        if isinstance(e, Unreadable):
            raise
        raise Unreadable(f"the judge's reply is no JSON: {text[:60]!r}") from None
    if not isinstance(found, dict):
        raise Unreadable(f"the judge's reply is no JSON object: {text[:60]!r}")
    return found


def repeated(reply: Reply, ask: Ask) -> bool:
    """Whether the JSON of a reply stands word for word in the texts of its question: a response that holds a verdict, copied, is none.

    Told only of forms with free text, where a verdict of the judge's own cannot be the same by chance.
    """
    if reply.error or ask.schema is None or not _has_free_text(ask.schema):
        return False
    text = reply.text.rpartition("</think>")[2]
    found = "".join(text[text.find("{") : text.rfind("}") + 1].split())
    return bool(found) and found in "".join(ask.user.split())


def _has_free_text(schema: Mapping[str, Any]) -> bool:
    if schema.get("type") == "string":
        return "enum" not in schema
    return any(map(_has_free_text, schema.get("properties", {}).values()))


def integer(value: Any, low: int, high: int, what: str = "score") -> int:
    """An integer in [low, high]; true, "3" and 3.5 are none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise Unreadable(f"the judge's {what} is {_short(value)}, wanted an integer from {low} to {high}")
    if not low <= value <= high:
        raise Unreadable(f"the judge's {what} {_short(value)} is not from {low} to {high}")
    return value


def number(value: Any, low: float, high: float, what: str = "score") -> float:
    """A number in [low, high]; an integer may be too large for a float."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise Unreadable(f"the judge's {what} is {_short(value)}, wanted a number from {low:g} to {high:g}")
    if not low <= value <= high:
        raise Unreadable(f"the judge's {what} {_short(value)} is not from {low:g} to {high:g}")
    return float(value)


def one_of(value: Any, allowed: Collection[str], what: str) -> str:
    """A text among those allowed."""
    if not isinstance(value, str) or value not in allowed:
        raise Unreadable(f"the judge's {what} is {_short(value)}, wanted one of {_listed(allowed)}")
    return value


def permutation(value: Any, names: Sequence[str], what: str = "ranking") -> list[str]:
    """A list that holds every name once."""
    if not isinstance(value, list) or any(not isinstance(x, str) for x in value) or sorted(value) != sorted(names):
        raise Unreadable(f"the judge's {what} does not name each of {_listed(names)} once")
    return value


def token_odds(reply: Reply, legal: Mapping[str, Collection[str]]) -> tuple[dict[str, float], float]:
    """Log-probability of each legal answer from the first token's alternatives, and their mass together.

    `legal`: answer -> the spellings that count as it, compared without blanks around. Spellings add up. An answer among
    none of the alternatives has at most the probability of the least of them, and gets that. An alternative at `LEAST` or
    below is as good as not listed.
    """
    if reply.error:
        raise Unreadable(reply.error)
    if not reply.top:
        raise Unreadable("the judge gave no log-probabilities; its endpoint must support logprobs")
    top = [(token.strip(), min(0.0, max(LEAST, p))) for token, p in reply.top]
    found = {answer: [p for token, p in top if token in spellings and p > LEAST] for answer, spellings in legal.items()}
    if not any(found.values()):
        likeliest = max(reply.top, key=lambda x: x[1])[0]
        raise Unreadable(f"the judge's first token is none of {_listed(legal)}; likeliest is {likeliest[:20]!r}")
    floor = min(p for _, p in top)
    odds = {a: _log_sum(ps) if ps else floor for a, ps in found.items()}
    return odds, sum(math.exp(p) for ps in found.values() for p in ps)


def _log_sum(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [k for k, _ in pairs]
    if len(set(keys)) != len(keys):
        twice = next(k for k in keys if keys.count(k) > 1)
        raise Unreadable(f"the judge's reply has the key {twice!r} more than once")
    return dict(pairs)


def _no_constant(text: str) -> Any:
    raise Unreadable(f"the judge's reply holds {text}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _listed(names: Collection[str]) -> str:
    return ", ".join(list(map(str, names))[:6]) or "none"
