"""From a row to a record: one function per shape.

A prompt is text, or a list of {role, content} turns that ends with the user. A conversation that carries its own prompt
(`messages`; `chosen` and `rejected` as whole conversations) is split before its last turn, and a prompt column beside
it is not read. `template` writes the last user turn; blank space at the ends of a composed turn goes, since an input
may be empty.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from rlhf_cli.data.columns import Row, Turns, kind
from rlhf_cli.data.record import Record
from rlhf_cli.errors import ConfigError

THUMBS = {"up": 1.0, "down": 0.0, "yes": 1.0, "no": 0.0, "good": 1.0, "bad": 0.0, "true": 1.0, "false": 0.0}


Found = tuple[str, Turns, dict[str, Any]]
"""Our name of the column the prompt came from, its turns, and the other fields of the record."""


@dataclass(frozen=True)
class Parsed:
    """A record and the key that decides its side of the cut."""

    record: Record
    key: str


def parse(row: Row) -> Parsed:
    """The record of one row, by the shape of its dataset."""
    column, turns, found = _SHAPES[row.spec.shape](row)
    messages, text, key = _prompt(row, column, turns)
    meta = {name[5:]: row.take(name) for name, _ in row.spec.columns if name.startswith("meta.")}
    references = _references(row)
    if row.spec.shape == "demonstrations" and not row.mapped("references"):
        references = tuple(_answer(row, "response", x) for x in found["responses"])
    link = _link(row)
    record = Record(
        messages=messages, prompt=text, references=references, meta=meta, where=row.where, link=link, **found
    )
    return Parsed(record, link or key)


def _prompts(row: Row) -> Found:
    return "prompt", _prompt_column(row), {}


def _pairs(row: Row) -> Found:
    column, prompt, chosen, rejected = _pair_texts(row)
    if chosen == rejected:
        problem = f"equals {row.path('chosen')!r}, which prefers nothing"
        raise row.error("rejected", problem, "remove that record from the data")
    found: dict[str, Any] = {"responses": (chosen, rejected), "pairs": ((0, 1),)}
    if row.mapped("margin"):
        margin = row.number("margin", row.take("margin"))
        if margin < 0:
            hint = "swap chosen and rejected, or remove that record from the data"
            raise row.error("margin", f"is negative ({margin:g})", hint)
        found["margins"] = (margin,)
    return column, prompt, found


def _pair_texts(row: Row) -> tuple[str, Turns, str, str]:
    """Prompt's column, prompt, chosen, rejected: of three columns, or two conversations equal up to the last turn."""
    lists = [isinstance(row.take(name), list) for name in ("chosen", "rejected")]
    if not any(lists):
        return "prompt", _prompt_column(row), row.text("chosen"), row.text("rejected")
    if not all(lists):
        name, other = ("rejected", "chosen") if lists[0] else ("chosen", "rejected")
        raise row.error(name, f"holds {kind(row.take(name))} where {row.path(other)!r} holds a conversation")
    before, chosen = _split(row, "chosen")
    prompt, rejected = _split(row, "rejected")
    if before != prompt:
        hint = f"{row.path('chosen')!r} and {row.path('rejected')!r} must share every turn but the last"
        raise row.error("rejected", f"answers another prompt than {row.path('chosen')!r}", hint)
    if prompt:
        return "chosen", prompt, chosen, rejected
    return "prompt", _prompt_column(row), chosen, rejected


def _rankings(row: Row) -> Found:
    responses, values = row.texts("responses"), row.take("scores")
    if len(responses) < 2:
        raise row.error("responses", f"holds {len(responses)}, a ranking needs at least 2", "remove that record")
    if not isinstance(values, list):
        raise row.error("scores", f"holds {kind(values)}, wanted a list of numbers")
    if len(values) != len(responses):
        hint = f"there must be one for each of the {len(responses)} in {row.path('responses')!r}"
        raise row.error("scores", f"holds {len(values)}", hint)
    scores = tuple(row.number("scores", x, f" at position {i}") for i, x in enumerate(values))
    k = range(len(scores))
    pairs = tuple((i, j) for i in k for j in k if scores[i] > scores[j] and responses[i] != responses[j])
    margins = tuple(scores[i] - scores[j] for i, j in pairs)
    return "prompt", _prompt_column(row), {"responses": responses, "scores": scores, "pairs": pairs, "margins": margins}


def _thumbs(row: Row) -> Found:
    return "prompt", _prompt_column(row), {"responses": (row.text("response"),), "label": _label(row)}


def _demonstrations(row: Row) -> Found:
    column, name = ("messages", "messages") if row.mapped("messages") else ("prompt", "response")
    prompt, response = _split(row, name) if row.mapped("messages") else (_prompt_column(row), row.text(name))
    if not response.strip():
        raise row.error(name, "demonstrates an empty response", "remove that record from the data")
    return column, prompt, {"responses": (response,)}


_SHAPES: dict[str, Callable[[Row], Found]] = {
    "prompts": _prompts,
    "pairs": _pairs,
    "rankings": _rankings,
    "thumbs": _thumbs,
    "demonstrations": _demonstrations,
}


def _split(row: Row, name: str) -> tuple[Turns, str]:
    """A conversation before its last turn, and the text of that turn, which must be the assistant's."""
    turns = row.turns(name)
    if turns[-1]["role"] != "assistant":
        raise row.error(name, f"ends with a turn of the {turns[-1]['role']}", "the last turn must be the assistant's")
    return turns[:-1], turns[-1]["content"]


def _prompt_column(row: Row) -> Turns:
    if "prompt" not in row.spec.fields:
        return ({"role": "user", "content": ""},)  # the template writes it from other columns
    value = row.take("prompt")
    return row.turns("prompt") if isinstance(value, list) else ({"role": "user", "content": row.text("prompt")},)


def _prompt(row: Row, column: str, turns: Turns) -> tuple[Turns, str, str]:
    """Messages, text of the last user turn, and the key of the cut, which depends on data only, not on the template."""
    if not turns or turns[-1]["role"] != "user":
        raise _no_user_turn(row, column, turns)
    values = {name: turns[-1]["content"] if name == "prompt" else row.text(name) for name in row.spec.fields}
    text = "".join(
        literal + (values[name] if name is not None else "")
        for literal, name, _, _ in Formatter().parse(row.spec.template)
    )
    if row.spec.template != "{prompt}":
        text = text.strip()
    if not "".join(values.values()).strip():
        name = row.spec.fields[0]
        raise row.error(
            column if name == "prompt" else name,
            "gives an empty prompt",
            "fill it, or remove that record from the data",
        )
    said = [dict(t) for t in turns[:-1] if t["role"] != "system"]
    key = json.dumps([said, [values[name] for name in sorted(values)]])
    return (*_system(row, column, turns), {"role": "user", "content": text}), text, key


def _no_user_turn(row: Row, column: str, turns: Turns) -> ConfigError:
    last = f"a turn of the {turns[-1]['role']}" if turns else "nothing"
    if column != "prompt":
        return row.error(column, f"has {last} before its answer", "the turn before the answer must be the user's")
    whole = row.spec.mapping("messages")
    hint = f"the last turn must be the user's; conversations with answers: dataset.shape=demonstrations {whole}"
    return row.error(column, f"ends with {last}", hint)


def _system(row: Row, column: str, turns: Turns) -> Turns:
    if not row.spec.system:
        return turns[:-1]
    if turns[0]["role"] == "system":
        raise row.error(column, "has a system turn already", "type dataset.system= to keep the data's own")
    return ({"role": "system", "content": row.spec.system}, *turns[:-1])


def _link(row: Row) -> str:
    """What joins a record to others: text, or a whole number; empty where nothing is mapped or the row holds null."""
    value = row.take("link") if row.mapped("link") else None
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise row.error(
            "link", f"holds {kind(value) if value != '' else 'an empty text'}", "wanted text or a whole number"
        )
    return str(value)


def _references(row: Row) -> tuple[str, ...]:
    if not row.mapped("references"):
        return ()
    value = row.take("references")
    if value is None:
        return ()
    texts = row.texts("references") if isinstance(value, list) else (row.text("references"),)
    for i, text in enumerate(texts):
        if not text.strip():
            place = f" at position {i}" if isinstance(value, list) else ""
            raise row.error("references", f"holds an empty reference{place}", "fill it, or write null for none")
    return tuple(_answer(row, "references", text) for text in texts)


def _answer(row: Row, name: str, text: str) -> str:
    """The first group of `answer_pattern` in a reference, or the reference."""
    if not row.spec.answer_pattern:
        return text
    match = re.search(row.spec.answer_pattern, text)
    if match is None or not match.group(1):
        name = "messages" if name == "response" and row.mapped("messages") else name
        raise row.error(
            name, f"does not match dataset.answer_pattern={row.spec.answer_pattern!r}", f"it is {_short(text)!r}"
        )
    return match.group(1)


def _label(row: Row) -> float:
    value = row.take("label")
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        if value.strip().lower() not in THUMBS:
            raise row.error("label", f"holds {_short(value)!r}", f"allowed: a number, true, false, {', '.join(THUMBS)}")
        return THUMBS[value.strip().lower()]
    return row.number("label", value)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:25]} ... {line[-25:]}"


def uid_of(messages: Turns) -> str:
    """A stable name for a prompt."""
    return digest([dict(m) for m in messages])[:16]


def digest(value: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)
