"""`rlhf list` and `rlhf show`: what can be chosen, and what an option does, with the docs of its target's source."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_cli.catalog import GROUPS, Option, defaults, field_of, fields, groups, must, short, table, typed, width
from rlhf_cli.errors import ConfigError
from rlhf_cli.signature import REQUIRED, Param, Signature, signature

TERM_KEYS: dict[str, str] = {
    "weight": "coefficient of this reward in the sum",
    "coef": "coefficient of this term in the loss",
    "starts_at": "first step at which this learner is updated",
}


def list_text(group: str | None, config_dir: str | None = None) -> str:
    """`rlhf list [GROUP]`."""
    known = groups(config_dir)
    if group is None:
        rows = [(f"{name} ({len(options)})", GROUPS.get(name, "")) for name, options in known.items()]
        return "\n".join(
            [
                "groups (number of options):",
                *table(rows),
                "",
                "rlhf list GROUP prints its options, rlhf show GROUP=OPTION one of them.",
            ]
        )
    chosen = known[must(group, known, f"{group}: no such group", "groups")]
    default = defaults("train").get(group)
    rows = [(name + (" *" if name == default else ""), o.line) for name, o in chosen.items()]
    mark = ["", f"* the default of rlhf train; rlhf show {group}={next(iter(chosen))} explains one."]
    return "\n".join([f"{group}: {GROUPS.get(group, 'your own group')}", *table(rows), *mark])


def show_text(choice: str, config_dir: str | None = None) -> str:
    """`rlhf show GROUP=OPTION`: the option inside a composed train config, each parameter with its doc line."""
    group, _, name = choice.partition("=")
    known = groups(config_dir)
    must(group, known, f"{group}: no such group", "groups")
    if not name:
        raise ConfigError(
            f"show {choice}: which option? type rlhf show {group}=OPTION; options: {', '.join(known[group])}"
        )
    chosen = known[group][must(name, known[group], f"{group}={name}: no such option", "options")]
    shown = _shown(chosen, known, config_dir)
    body = "\n".join(_tree(shown, "", 0))
    return "\n".join(
        [
            f"{group}={name}",
            *textwrap.wrap(chosen.line, width()),
            f"file: {short(chosen.path)}",
            "",
            body or "  (changes nothing)",
        ]
    )


def _shown(chosen: Option, known: Mapping[str, Mapping[str, Option]], config_dir: str | None) -> dict[str, Any]:
    """The part of a composed train config that this option fills."""
    from omegaconf import OmegaConf

    from rlhf_cli.compose import compose

    if chosen.group not in defaults("train"):
        raw = OmegaConf.to_container(OmegaConf.load(chosen.path))
        return {chosen.group: {str(k): v for k, v in raw.items() if k != "defaults"}} if isinstance(raw, dict) else {}
    composed = OmegaConf.to_container(compose("train", [f"{chosen.group}={chosen.name}"], config_dir), resolve=True)
    assert isinstance(composed, dict), "the root is a mapping"
    whole = {str(k): v for k, v in composed.items()}
    return (
        _cut(whole, touched(chosen, known)) if chosen.package == "_global_" else _part(whole, chosen.package.split("."))
    )


def _part(tree: Mapping[str, Any], path: list[str]) -> dict[str, Any]:
    head, *rest = path
    value = tree.get(head)
    return {head: _part(value, rest) if rest and isinstance(value, Mapping) else value}


def touched(chosen: Option, known: Mapping[str, Mapping[str, Option]]) -> dict[str, Any]:
    """What a recipe sets: its own keys and its parents', and the groups that it chooses (True: the whole group)."""
    import yaml

    raw = yaml.safe_load(chosen.path.read_text(encoding="utf-8")) or {}
    keys: dict[str, Any] = {}
    for entry in raw.pop("defaults", []):
        if isinstance(entry, dict):
            keys |= {k.removeprefix("override ").strip("/ "): True for k in entry if "@" not in k}
        elif entry in known[chosen.group]:
            keys |= touched(known[chosen.group][entry], known)
    return keys | raw


def _cut(tree: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """Keep whole groups and open mappings, but of typed sections only the keys that were set."""
    kept: dict[str, Any] = {}
    for key, sub in keys.items():
        value = tree.get(key)
        section = (field := fields().get(key)) is not None and field.type.endswith("Section")
        kept[key] = (
            {k: value.get(k) for k in sub}
            if section and isinstance(sub, dict) and isinstance(value, Mapping)
            else value
        )
    return kept


def _tree(node: Mapping[str, Any], key: str, depth: int) -> Iterator[str]:
    """One block: its settings as a table, then its inner blocks."""
    indent = "  " * depth
    sig = signature(node["_target_"]) if isinstance(node.get("_target_"), str) else None
    leaves = {k: v for k, v in node.items() if k != "_target_" and not (isinstance(v, Mapping) and v)}
    yield from table([(f"{k}: {typed(v)}", _doc(f"{key}.{k}".lstrip("."), k, sig)) for k, v in leaves.items()], indent)
    for k, v in node.items():
        if not (isinstance(v, Mapping) and v):
            continue
        inner = f"{key}.{k}".lstrip(".")
        yield f"{indent}{k}:" + (f"  {v['_target_']}" if "_target_" in v else "")
        yield from _about(v, depth + 1)
        yield from _tree(v, inner, depth + 1)


def _about(node: Mapping[str, Any], depth: int) -> Iterator[str]:
    """The target's summary and the columns it reads and gives."""
    if not isinstance(node.get("_target_"), str):
        return
    sig = signature(node["_target_"])
    first = re.split(r"\n\s*\n|\n\s*Args:", sig.doc)[0]
    reads = f"reads {', '.join(sig.columns)}" if sig.columns and sig.columns[0] != "exp" else ""
    for text in filter(None, [" ".join(first.split()), reads]):
        pad = "  " * depth + "# "
        yield from textwrap.wrap(
            text, width(), initial_indent=pad, subsequent_indent=pad, break_long_words=False, break_on_hyphens=False
        )


def _doc(key: str, name: str, sig: Signature | None) -> str:
    param = sig.params.get(name) if sig else None
    if param is not None:
        return f"({_kind(param)})  {param.doc}".rstrip()
    field = field_of(key)
    if field is not None and field.type == "Any":
        return GROUPS.get(key, "")
    if field is not None:
        return f"({field.type})  {field.doc}".rstrip()
    return TERM_KEYS.get(name, "")


def _kind(param: Param) -> str:
    kind = " | ".join(map(str, param.choices)) if param.choices else param.type
    return kind if param.default is REQUIRED else f"{kind}, optional"
