"""Tab completion: `rlhf completion --complete "LINE"` prints candidates for the last word of a command line.

Reads file names and the schema's source; Hydra is not imported, so that a key press stays cheap.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlhf_cli import catalog
from rlhf_cli.usage import VERBS

SHELLS: dict[str, str] = {
    # Bash replaces only what follows the last = or : of a word, so that part is cut off the candidates.
    "bash": """_rlhf() {
    local line="${COMP_LINE:0:COMP_POINT}" IFS=$'\\n'
    local word="${line##*[[:space:]]}"
    local head="${word%"${word##*[=:]}"}"
    COMPREPLY=($(rlhf completion --complete "$line" 2>/dev/null))
    COMPREPLY=("${COMPREPLY[@]#"$head"}")
    [[ ${COMPREPLY[0]-} == *[=./] ]] && compopt -o nospace
}
complete -F _rlhf rlhf
""",
    "zsh": """_rlhf() {
    local -a found
    found=("${(@f)$(rlhf completion --complete "${BUFFER[1,CURSOR]}" 2>/dev/null)}")
    compadd -U -S '' -- $found
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _rlhf rlhf
""",
    "fish": """complete -c rlhf -f -a '(rlhf completion --complete (commandline -cp) 2>/dev/null)'
""",
}


_NOT_TYPED = ("names", "updates", "debug")  # filled by options, not by hand


def script(shell: str) -> str:
    """The script that a shell evaluates."""
    catalog.must(
        shell,
        SHELLS,
        f"completion {shell}: no such shell" if shell else "completion: which shell?",
        "type rlhf completion SHELL; shells",
    )
    return SHELLS[shell]


def complete(line: str) -> list[str]:
    """Candidates for the last word of `line`; an empty last word when it ends in a space."""
    before = line.split()
    word = before.pop() if before and not line[-1:].isspace() else ""
    if len(before) < 2:
        return _matching([*VERBS, "--help"], word)
    verb = before[1]
    if verb not in VERBS:
        return []
    config_dir = next((b for a, b in pairwise(before) if a == "--config-dir" and Path(b).is_dir()), None)
    if before[-1] == "--config-dir":
        return _folders(word)
    return sorted(set(_matching(_candidates(verb, VERBS[verb].config, before[2:], word, config_dir), word)))


def _matching(words: Iterable[str], start: str) -> list[str]:
    return [w for w in words if w.startswith(start)]


def _candidates(verb: str, config: str, before: list[str], word: str, config_dir: str | None) -> Iterator[str]:
    known = catalog.groups(config_dir)
    if config:
        yield from _settings(config, before, word, known)
    if verb in ("resume", "eval", "generate", "runs", "logs", "cancel") and not before and "=" not in word:
        yield from _folders(word or "runs/")
    if verb == "compare":
        yield from ("baseline=", "metric=", "also=", "csv=", "plot=", "frontier=")
        yield from _folders(word or "runs/")
    yield from {"train": ["--print-sbatch"], "runs": ["--watch"], "logs": ["-f", "rank="]}.get(verb, [])
    if verb == "list":
        yield from known
    if verb == "show":
        yield from _group_words({g: None for g in known}, word, known)
    if verb == "completion":
        yield from SHELLS


def _settings(
    config: str, before: list[str], word: str, known: Mapping[str, Mapping[str, catalog.Option]]
) -> Iterator[str]:
    default = catalog.defaults(config)
    yield from _group_words(default, word, known)
    if word.startswith("-"):
        yield from ("--cfg", "--config-dir", "--multirun", "--help")
    chosen = {g: name for g, name in default.items() if name} | dict(w.split("=", 1) for w in before if "=" in w)
    keys = {
        k: (f.type, f.doc)
        for k, f in catalog.fields().items()
        if f.default and "*" not in k and k not in _NOT_TYPED and f.type != "Any"
    }
    for group in default:
        for name in chosen.get(group, "").strip("[]").split(","):
            if name in known.get(group, {}):
                keys |= {k: ("", "") for k in _keys_of(known[group][name])}
    key = word.partition("=")[0]
    if "=" in word and key in keys:
        yield from (f"{key}={value}" for value in _values(*keys[key]))
    elif "=" not in word:
        yield from _next_level(keys, word)


def _group_words(groups: Iterable[str], word: str, known: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    group, equals, typed = word.partition("=")
    if not equals:
        yield from (f"{g}=" for g in groups)
    elif group in groups:
        done = typed[: max(typed.rfind(","), typed.rfind("[")) + 1]  # reward=[bleu,<TAB>
        yield from (f"{group}={done}{name}" for name in known.get(group, {}))


def _next_level(keys: Iterable[str], word: str) -> Iterator[str]:
    """Keys below the section that is typed so far: `optim.` first, then `optim.lr=`."""
    depth = word.count(".")
    for key in keys:
        parts = key.split(".")
        if key.startswith(word):
            yield ".".join(parts[: depth + 1]) + ("." if len(parts) > depth + 1 else "=")


def _values(kind: str, doc: str) -> list[str]:
    """The values that a key's comment enumerates: `constant | linear | cosine, ...`."""
    if kind == "bool":
        return ["true", "false"]
    pieces = [re.match(r"[\w-]+", piece.strip()) for piece in doc.split(" | ")]
    return [m.group() for m in pieces if m] if len(pieces) > 1 else []


def _keys_of(chosen: catalog.Option) -> Iterator[str]:
    """Dotted keys that an option's file sets."""
    import yaml

    text = chosen.path.read_text(encoding="utf-8")
    prefix = "" if chosen.package == "_global_" else f"{chosen.package}."
    return _leaves(yaml.safe_load(text) or {}, prefix)


def _leaves(node: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in node.items():
        if key in ("defaults", "_target_"):
            continue
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _folders(word: str) -> list[str]:
    parent = Path(word) if word.endswith("/") else Path(word).parent
    if not parent.is_dir():
        return []
    shown = "" if parent == Path(".") and not word.startswith("./") else f"{parent}/"
    found = [f"{shown}{p.name}" for p in sorted(parent.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    return _matching(found, word)
