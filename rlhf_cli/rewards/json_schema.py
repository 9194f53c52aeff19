"""Whether a response is JSON that satisfies a schema, and how nearly."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.per_sample import Row, scored

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.sample import Sample
    from rlhf_cli.types import Scores

_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL)


class JsonSchema:
    """1 where the response is JSON valid under a schema (draft 2020-12); graded, else half the share of required keys.

    A required key counts where it is there and valid by itself; text that is no JSON scores 0, and so does JSON that is
    no object under a schema that requires keys. NaN, infinities and keys that come twice are no JSON, and a remote
    $ref is never fetched. Parts: `parses`, `valid`.
    See Wright et al., JSON Schema: A Media Type for Describing JSON Documents, draft 2020-12.
    """

    pooled = True

    def __init__(self, *, schema: Any, graded: bool, extract: Literal["whole", "fenced"]) -> None:
        """Args:
        schema: a JSON file, the schema itself, or the word object for any JSON object
        graded: half the share of required keys for JSON that is not valid; off, such JSON scores 0
        extract: whole (the response is JSON) or fenced (the last ``` block, where there is one)
        """
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import SchemaError
        from referencing import Registry

        self.schema = _read(schema)
        try:
            Draft202012Validator.check_schema(self.schema)
        except SchemaError as e:
            where = "/".join(map(str, e.absolute_path)) or "its root"
            raise ConfigError(f"reward.json_schema.schema: is no JSON schema: {where}: {e.message[:200]}") from None
        self.validator = Draft202012Validator(self.schema, registry=Registry())
        self.graded, self.extract = graded, extract

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(self.rows(samples))

    def rows(self, samples: Sequence[Sample]) -> Iterator[Row]:
        """One score per response, in order."""
        return (self._row(s.response) for s in samples)

    def _row(self, response: str) -> Row:
        blocks = _FENCE.findall(response) if self.extract == "fenced" else []
        try:
            value = parse(blocks[-1] if blocks else response)
        except (ValueError, RecursionError):  # the latter: brackets thousands deep
            return Row(0.0, {"parses": 0.0, "valid": 0.0})
        valid = self.validator.is_valid(value)
        part = 0.5 * self._required(value) if self.graded else 0.0
        return Row(1.0 if valid else part, {"parses": 1.0, "valid": float(valid)})

    def _required(self, value: Any) -> float:
        """The share of required keys that are there with a valid value."""
        needed = self.schema.get("required", []) if isinstance(self.schema, Mapping) else []
        if not needed or not isinstance(value, Mapping):
            return 0.0
        wrong = {e.absolute_path[0] for e in self.validator.iter_errors(value) if e.absolute_path}
        right = [k in value and k not in wrong for k in needed]
        return sum(right) / len(right)


def parse(text: str) -> Any:
    """The value of strict JSON. Raises ValueError for anything else, NaN and repeated keys included."""
    return json.loads(text, parse_constant=_refuse, object_pairs_hook=_once)


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key comes twice")
    return made


def _read(schema: Any) -> Any:
    if isinstance(schema, Mapping) and schema:
        return dict(schema)
    if schema == "object":
        return {"type": "object"}
    if not isinstance(schema, str) or not schema:
        raise ConfigError(
            "reward.json_schema.schema is empty; type reward.json_schema.schema=FILE.json, or the schema itself"
        )
    file = Path(schema).expanduser()
    if not file.is_file():
        raise ConfigError(f"reward.json_schema.schema: no file {schema!r} in {Path.cwd()}; give a JSON file")
    try:
        return parse(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ConfigError(f"reward.json_schema.schema: {schema} is no JSON: {e}") from None
