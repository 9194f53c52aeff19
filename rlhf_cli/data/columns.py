"""One line of a dataset, read by our column names; every complaint names file, line and column."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_cli.config import nearest
from rlhf_cli.data.spec import Spec
from rlhf_cli.errors import ConfigError

MISSING = object()
ALL = object()
ROLES = ("system", "user", "assistant", "tool")

Turns = tuple[Mapping[str, str], ...]


def lookup(values: Any, path: str) -> Any:
    """The value at a path such as `answer`, `instances[0].output` or `responses[].text` (all of a list), or MISSING.

    A column whose own name looks like a path wins over the path.
    """
    if isinstance(values, Mapping) and path in values:
        return values[path]
    return _walk(values, _steps(path))


def _steps(path: str) -> tuple[Any, ...]:
    found = re.findall(r"([^.\[\]]+)|\[(\d*)\]", path)
    return tuple(name if name else int(index) if index else ALL for name, index in found)


def _walk(value: Any, steps: Sequence[Any]) -> Any:
    if not steps:
        return value
    step, rest = steps[0], steps[1:]
    if step is ALL:
        inner = [_walk(x, rest) for x in value] if isinstance(value, list) else [MISSING]
        return MISSING if any(x is MISSING for x in inner) else inner
    if isinstance(step, int):
        return _walk(value[step], rest) if isinstance(value, list) and step < len(value) else MISSING
    return _walk(value[step], rest) if isinstance(value, Mapping) and step in value else MISSING


def kind(value: Any) -> str:
    """The JSON name of a value, with the value where it is short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"a boolean ({str(value).lower()})"
    if isinstance(value, int | float):
        return f"a number ({value})"
    if isinstance(value, str):
        return "text"
    return "a list" if isinstance(value, list) else "an object" if isinstance(value, Mapping) else type(value).__name__


@dataclass(frozen=True)
class Row:
    """The values of one line, and where they were."""

    where: str
    values: Mapping[str, Any]
    spec: Spec

    def path(self, name: str) -> str:
        """The file's column behind our name; a template may use the file's own names directly."""
        return dict(self.spec.columns).get(name) or name

    def mapped(self, name: str) -> bool:
        return name in dict(self.spec.columns)

    def error(self, name: str, problem: str, hint: str = "") -> ConfigError:
        """The one-line complaint about a column; without `hint` it says which columns there are and how to map them."""
        if not hint:
            listed = ", ".join(map(str, self.values)) or "no columns"
            hint = f"the file has {listed}; map it with {self.spec.mapping(name)}"
        return ConfigError(f"{self.where}: column {self.path(name)!r} {problem}; {hint}")

    def take(self, name: str) -> Any:
        """The value of a column that must be there."""
        path = self.path(name)
        value = lookup(self.values, path)
        if value is MISSING:
            guess = nearest(path, (str(c) for c in self.values))
            listed = ", ".join(map(str, self.values)) or "no columns"
            unmap = f", or {self.spec.mapping(name, '')} to do without" if name in ("references", "margin") else ""
            raise self.error(
                name, "is missing", f"the file has {listed}{guess}; map it with {self.spec.mapping(name)}{unmap}"
            )
        return value

    def text(self, name: str) -> str:
        return self.as_text(name, self.take(name))

    def as_text(self, name: str, value: Any, place: str = "") -> str:
        """`value` if it is text that UTF-8 can hold; `place` says which part of the column it is."""
        if not isinstance(value, str):
            raise self.error(name, f"holds {kind(value)}{place}, wanted text")
        if value.encode("utf-8", "replace").decode() != value:
            raise self.error(name, f"holds text{place} that is not valid Unicode (half a surrogate pair)")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts."""
        value = self.take(name)
        if not isinstance(value, list):
            raise self.error(name, f"holds {kind(value)}, wanted a list of texts")
        return tuple(self.as_text(name, x, f" at position {i}") for i, x in enumerate(value))

    def number(self, name: str, value: Any, place: str = "") -> float:
        """`value` as a finite float."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, f"holds {kind(value)}{place}, wanted a number")
        if not math.isfinite(value):
            raise self.error(name, f"holds {value}{place}, wanted a finite number")
        return float(value)

    def turns(self, name: str) -> Turns:
        """A conversation: a list of {role, content} with text in both; other keys of a turn are not read."""
        value = self.take(name)
        if not isinstance(value, list) or not value:
            what = "an empty list" if value == [] else kind(value)
            raise self.error(name, f"holds {what}, wanted a list of {{role, content}} turns")
        return tuple(self._turn(name, x, i) for i, x in enumerate(value))

    def _turn(self, name: str, value: Any, i: int) -> Mapping[str, str]:
        if not isinstance(value, Mapping) or not {"role", "content"} <= value.keys():
            raise self.error(name, f"holds {kind(value)} at turn {i}, wanted {{role, content}}")
        role = self.as_text(name, value["role"], f" as role of turn {i}")
        if role not in ROLES:
            hint = f"allowed: {', '.join(ROLES)}{nearest(role, ROLES)}"
            raise self.error(name, f"has the role {role!r} at turn {i}", hint)
        if role == "system" and i:
            raise self.error(name, f"has a system turn at turn {i}", "it may only come first")
        return {"role": role, "content": self.as_text(name, value["content"], f" as content of turn {i}")}
