"""The dataset section, checked: what `rlhf plan` may know before any file is opened."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from rlhf_cli.config import nearest
from rlhf_cli.errors import ConfigError

FORMATS = ("packaged", "jsonl", "json", "parquet", "hub")
REQUIRED: dict[str, tuple[str, ...]] = {
    "prompts": ("prompt",),
    "pairs": ("prompt", "chosen", "rejected"),
    "rankings": ("prompt", "responses", "scores"),
    "thumbs": ("prompt", "response", "label"),
    "demonstrations": ("prompt", "response"),
}
"""Shape -> the columns it reads; unless mapped otherwise, the file's columns of the same names."""

OPTIONAL = ("references", "margin", "messages", "link")
"""Read only where `dataset.columns` maps them."""

PROVIDES: dict[str, frozenset[str]] = {
    "prompts": frozenset(),
    "pairs": frozenset({"pairs", "responses"}),
    "rankings": frozenset(
        {"pairs", "margin", "label", "responses"}
    ),  # margin: the difference of the scores, the labels
    "thumbs": frozenset({"label", "responses"}),
    "demonstrations": frozenset({"references", "responses"}),
}


@dataclass(frozen=True)
class Spec:
    """A valid dataset section. Hashable, so that a file is parsed once per process."""

    format: str
    path: str
    heldout: str
    heldout_fraction: float
    name: str
    split: str
    revision: str
    shape: str
    columns: tuple[tuple[str, str], ...]  # our name -> path of the file's column; only those that are read
    answer_pattern: str
    system: str
    template: str
    limit: int

    @property
    def fields(self) -> tuple[str, ...]:
        """Names used by the template, in order."""
        return tuple(name for _, name, _, _ in Formatter().parse(self.template) if name is not None)

    def mapping(self, name: str, column: str = "NAME") -> str:
        """What to type to map `name`."""
        return f"dataset.columns.{name}={column}"


def spec_of(cfg: Any) -> Spec:
    """Check a `DatasetSection` (a DictConfig or any object with its attributes) without opening a file."""
    shape = _choice("shape", str(cfg.shape), REQUIRED)
    written = {str(k): str(v or "") for k, v in (cfg.columns or {}).items()}
    fields = _fields(str(cfg.template))
    columns = {**{name: name for name in REQUIRED[shape]}, **written}
    for name in columns:
        _known_column(name, fields)
    spec = Spec(
        format=_choice("format", str(cfg.format), FORMATS),
        path=str(cfg.path),
        heldout=str(cfg.heldout or ""),
        heldout_fraction=float(cfg.heldout_fraction),
        name=str(cfg.name or ""),
        split=str(cfg.split),
        revision=str(cfg.revision or ""),
        shape=shape,
        columns=tuple(sorted((k, v) for k, v in columns.items() if v)),
        answer_pattern=str(cfg.answer_pattern or ""),
        system=str(cfg.system or ""),
        template=str(cfg.template),
        limit=int(cfg.limit),
    )
    _check(spec)
    return spec


def gives(cfg: Any) -> frozenset[str]:
    """Which of references, link, pairs, margin, label, responses the configured dataset provides, from its shape and columns alone.

    A demonstration is its own reference, so that `reward=bleu` runs on demonstrations.
    """
    spec = spec_of(cfg)
    mapped = {"references", "link"} | ({"margin"} if spec.shape == "pairs" else set())
    return PROVIDES[spec.shape] | (mapped & dict(spec.columns).keys())


def _check(spec: Spec) -> None:
    _check_places(spec)
    if not 0 <= spec.heldout_fraction < 1:
        raise ConfigError(f"dataset.heldout_fraction={spec.heldout_fraction:g} must be at least 0 and below 1")
    if spec.limit < 0:
        raise ConfigError(f"dataset.limit={spec.limit} must not be negative; 0 uses every record")
    if spec.answer_pattern:
        _check_pattern(spec.answer_pattern)


def _check_places(spec: Spec) -> None:
    if spec.format == "packaged" and (spec.path or spec.heldout):
        key, value = ("path", spec.path) if spec.path else ("heldout", spec.heldout)
        raise ConfigError(
            f"dataset.{key}={value}: dataset.format=packaged reads no other file; "
            f"type dataset=jsonl dataset.{key}={value}"
        )
    if spec.format != "packaged" and not spec.path:
        what = "REPOSITORY, a Hub id" if spec.format == "hub" else "FILE"
        raise ConfigError(f"dataset.path is empty; type dataset.path={what}")
    same = spec.split if spec.format == "hub" else spec.path
    if spec.heldout and spec.heldout == same:
        raise ConfigError(
            f"dataset.heldout={spec.heldout} is what is trained on; name another, or type dataset.heldout= "
            "to cut off dataset.heldout_fraction"
        )


def _check_pattern(pattern: str) -> None:
    try:
        groups = re.compile(pattern).groups
    except re.error as e:
        raise ConfigError(f"dataset.answer_pattern={pattern!r} is no regular expression: {e}") from None
    if not groups:
        raise ConfigError(f"dataset.answer_pattern={pattern!r} has no group; put what to keep in parentheses")


def _fields(template: str) -> frozenset[str]:
    try:
        parts = [(name, spec, convert) for _, name, spec, convert in Formatter().parse(template) if name is not None]
    except ValueError as e:
        raise ConfigError(f"dataset.template={template!r}: {e}; write a literal brace twice") from None
    if not parts:
        raise ConfigError(f"dataset.template={template!r} uses no column; write one as {{prompt}}")
    for name, spec, convert in parts:
        if not name.isidentifier() or spec or convert:
            raise ConfigError(f"dataset.template={template!r}: {{{name}}} must be a plain name, such as {{prompt}}")
    return frozenset(name for name, _, _ in parts)


def _known_column(name: str, fields: frozenset[str]) -> None:
    names = list(dict.fromkeys([*(n for shape in REQUIRED.values() for n in shape), *OPTIONAL, *sorted(fields)]))
    if name in names or (name.startswith("meta.") and name != "meta."):
        return
    raise ConfigError(
        f"dataset.columns.{name}: unknown; it may be {', '.join(names)}, meta.NAME or a name that dataset.template uses"
        f"{nearest(name, names)}"
    )


def _choice(key: str, value: str, allowed: Mapping[str, Any] | tuple[str, ...]) -> str:
    if value in allowed:
        return value
    hint = nearest(value, allowed)
    raise ConfigError(f"dataset.{key}={value}: unknown; choose one of {', '.join(allowed)}{hint}")
