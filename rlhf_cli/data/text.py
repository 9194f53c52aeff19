"""Text to token ids: a prompt, a recorded response, and the token that ends a turn.

A training row is always `render(prompt) + response_ids(response)`, tokenised apart, as a sampler produces it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from rlhf_cli.errors import ConfigError, GateError

SENTINEL = "SENTINEL"


def render(messages: Sequence[Mapping[str, str]], tokenizer: Any, chat: bool) -> list[int]:
    """Ids of the prompt up to where the assistant speaks.

    Through the tokenizer's chat template if `chat` and it has one; else the plain texts of the turns with blank
    lines between them.
    """
    if chat and tokenizer.chat_template:
        # The template writes BOS itself where the model wants one; adding special tokens would write a second.
        ids = _encode(tokenizer, _template(tokenizer, messages, True))
    else:
        ids = [*_prefix(tokenizer), *_encode(tokenizer, "\n\n".join(m["content"] for m in messages))]
    check_bos(ids, tokenizer)
    return ids


def response_ids(text: str, tokenizer: Any, chat: bool = True) -> list[int]:
    """Ids of an assistant's turn and of the token that ends it."""
    return [*_encode(tokenizer, text), end_id(tokenizer, chat)]


def follow_up(messages: Sequence[Mapping[str, str]], tokenizer: Any, chat: bool, *, ended: bool) -> list[int]:
    """Ids between a turn of the assistant and its next one: the end of its turn, what others say, and where it speaks again.

    `ended`: the assistant's turn has its end token already. What stands before is never written again, so a dialogue's ids only grow.
    """
    if not (chat and tokenizer.chat_template):
        return _encode(tokenizer, "".join(f"\n\n{m['content']}" for m in messages))
    spoken = [{"role": "user", "content": "x"}, {"role": "assistant", "content": SENTINEL}]
    ids = _encode(tokenizer, _template(tokenizer, [*spoken, *messages], True).partition(SENTINEL)[2])
    closing = _encode(tokenizer, _template(tokenizer, spoken, False).partition(SENTINEL)[2])
    end = end_id(tokenizer, chat)
    return ids[closing.index(end) + 1 :] if ended and end in closing else ids


def check_dialogue(tokenizer: Any, chat: bool) -> None:
    """Refuse a chat template that does not write a dialogue turn by turn: rows would hold what no later chat reads."""
    if not (chat and tokenizer.chat_template):
        return
    turns: list[dict[str, str]] = []
    grown = ""
    for n in range(3):
        asked = {"role": "user", "content": f"x{n}"}
        whole = _template(tokenizer, [*turns, asked], True)
        if not whole.startswith(grown):
            raise GateError(
                "the chat template rewrites earlier turns of a dialogue, so that a row of several turns is not what a later chat reads; "
                "type model.chat_template=FILE for another one, or environment.rows=turn"
            )
        turns += [asked, {"role": "assistant", "content": f"{SENTINEL}{n}"}]
        grown = whole + f"{SENTINEL}{n}"


def end_id(tokenizer: Any, chat: bool = True) -> int:
    """The token that ends an assistant's turn: what the chat template writes after it, or else EOS."""
    return _end_id(tokenizer, tokenizer.chat_template if chat else None)


def check_bos(ids: Sequence[int], tokenizer: Any) -> None:
    """Refuse a prompt that starts with BOS twice, which a model has never seen and which shifts every log-prob."""
    bos = tokenizer.bos_token_id
    n = next((i for i, x in enumerate(ids) if x != bos), len(ids)) if bos is not None else 0
    if n > 1:
        raise GateError(
            f"a prompt starts with {n} BOS tokens ({tokenizer.bos_token!r}, id {bos}), wanted at most one; "
            "take it out of the data, or out of the chat template (model.chat_template=FILE)"
        )


@lru_cache(maxsize=8)
def _end_id(tokenizer: Any, template: str | None) -> int:
    if template:
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": SENTINEL}]
        tail = _template(tokenizer, turns, False).rpartition(SENTINEL)[2]
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        written = [i for i in _encode(tokenizer, tail) if i in special]
        if written:
            return written[0]
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no EOS token and its chat template ends no turn with one; use another model.path"
        )
    return int(tokenizer.eos_token_id)


def _template(tokenizer: Any, messages: Sequence[Mapping[str, str]], prompt: bool) -> str:
    from jinja2.exceptions import TemplateError

    turns = [dict(m) for m in messages]
    try:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=prompt, tokenize=False)
    except TemplateError as e:
        roles = ", ".join(m["role"] for m in turns)
        raise ConfigError(
            f"the chat template refuses turns of {roles}: {e}; change dataset.system, or type dataset.chat=false"
        ) from None


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _prefix(tokenizer: Any) -> list[int]:
    """BOS where the tokenizer puts one before plain text; never the EOS that some put after it."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and bos in tokenizer("a")["input_ids"][:1] else []
