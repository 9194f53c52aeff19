"""Secrets never reach a file: keys, values and texts that hold one become `<redacted>`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

MARK = "<redacted>"
_SECRET_KEY = re.compile(
    r"(?i)(api[_-]?key|(access|private)[_-]?key|token$|secret|password|passwd|credential|authorization)"
)
# Names that only look like secrets: a tokenizer's special tokens, names of the variable or file that holds a secret.
_PLAIN_KEY = re.compile(
    r"(?i)((^|_)(pad|bos|eos|unk|sep|cls|mask|stop|start|end|special|image|video|audio|next|per|max|min|first|last)_?token$"
    r"|_(env|var|variable|file|path)$)"
)
_DIGEST_KEY = re.compile(r"(?i)(revision|commit|sha|hash|digest|fingerprint)")
_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bwandb_v1_\w{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\bxox[abprs]-[\w-]{10,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+"
    r"|(?<=Bearer )\S{8,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_HEX40 = re.compile(r"(?<![0-9A-Fa-f])[0-9a-f]{40}(?![0-9A-Fa-f])")  # a W&B key, or a git commit: the key tells which
_NUMBER = re.compile(r"[-+]?[\d._]+([eE][-+]?\d+)?|true|false|null|none|\?\?\?|", re.IGNORECASE)
_PAIR = re.compile(r"""(?P<key>[\w.-]+)(?P<middle>["']?\s*[=:]\s*["']?)(?P<value>[^\s,{}\[\]"']+)""")


_named: set[str] = set()  # environment variables that hold a secret whatever they are called


def keep_secret(variable: str) -> None:
    """From now on the value of this environment variable is a secret, as `judge.key_env=NAME` says of NAME."""
    _named.add(variable)


def is_secret_key(key: str) -> bool:
    """Whether a text under this key is a secret: `judge.api_key` is, `pad_token` and `max_tokens` are not."""
    leaf = key.rpartition(".")[2]
    return bool(_SECRET_KEY.search(leaf)) and not _PLAIN_KEY.search(leaf)


def redact(value: Any, key: str = "") -> Any:
    """A copy of a config tree without secrets. Numbers, booleans and empty texts always stay."""
    if isinstance(value, Mapping):
        inside = key if is_secret_key(key) else ""
        return {k: redact(v, inside or str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(v, key) for v in value]
    if not isinstance(value, str) or not value:
        return value
    return MARK if is_secret_key(key) else _redact_value(value, key)


def redact_text(text: str) -> str:
    """`text` without secrets: known shapes, values of secret environment variables, `api_key=...` or `api_key: ...`."""

    def pair(m: re.Match[str]) -> str:
        hide = is_secret_key(m["key"]) and not _NUMBER.fullmatch(m["value"])
        return m["key"] + m["middle"] + (MARK if hide else _PAIR.sub(pair, m["value"]))

    return _redact_value(_PAIR.sub(pair, text), "")


def hide_secrets(text: str) -> str:
    """`text` without values of secret environment variables and known shapes; code and paths in it stay as they are."""
    return _redact_value(text, "")


def redact_argv(argv: Sequence[str]) -> list[str]:
    """A command line without secrets: `key=VALUE`, `--api-key VALUE`, `--token=VALUE`, `key={api_key: VALUE}`."""
    done: list[str] = []
    for i, word in enumerate(argv):
        before = argv[i - 1] if i else ""
        key, equals, value = word.partition("=")
        named = before.startswith("--") and "=" not in before and is_secret_key(before)
        if named and not word.startswith("--"):
            done.append(MARK)
        elif equals and is_secret_key(key) and not _NUMBER.fullmatch(value):
            done.append(f"{key}={MARK}")
        else:
            done.append(redact_text(word))
    return done


def _redact_value(value: str, key: str) -> str:
    exact, inside = _environment_secrets(tuple(sorted(os.environ.items())), frozenset(_named))
    if value in exact:
        return MARK
    for secret in inside:
        value = value.replace(secret, MARK)
    return _HEX40.sub(lambda m: _hex40(m, key), _SHAPES.sub(MARK, value))


def _hex40(m: re.Match[str], key: str) -> str:
    """Keep a digest: what stands before it, or its key, says that it is one."""
    before = m.string[max(0, m.start() - 24) : m.start()]
    return m.group() if _DIGEST_KEY.search(key) or _DIGEST_KEY.search(before) else MARK


@lru_cache(maxsize=4)
def _environment_secrets(
    environment: tuple[tuple[str, str], ...], named: frozenset[str]
) -> tuple[frozenset[str], tuple[str, ...]]:
    """Values of secret variables: those replaced when equal, and those long enough to be replaced inside texts."""
    found = {
        v
        for k, raw in environment
        for v in (raw.strip(),)  # a file leaves a newline behind
        if (k in named or is_secret_key(k)) and len(v) >= 4 and not _NUMBER.fullmatch(v) and not v.startswith("/")
    }
    return frozenset(found), tuple(sorted((v for v in found if len(v) >= 8), key=len, reverse=True))
