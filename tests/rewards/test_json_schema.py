import pytest
import torch

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.json_schema import JsonSchema
from rlhf_cli.types import Sample

SCHEMA = {
    "type": "object",
    "required": ["name", "age"],
    "properties": {"name": {"type": "string"}, "age": {"$ref": "#/$defs/count"}},
    "$defs": {"count": {"type": "integer", "minimum": 0}},
}


def make(schema=SCHEMA, graded=True, extract="whole"):
    return JsonSchema(schema=schema, graded=graded, extract=extract)


def values(scorer, *responses):
    return scorer([Sample("p", r) for r in responses], torch.zeros(len(responses), dtype=torch.int64)).value.tolist()


def test_valid_is_one_and_the_rest_is_half_the_share_of_required_keys():
    good, half, none = '{"name": "a", "age": 3}', '{"name": "a", "age": "3"}', '{"nme": "a"}'
    # Of two required keys one is right: 0.5 * 1/2. True is no integer. A list is no object.
    assert values(make(), good, half, none, '{"name": "a", "age": true}', "[]", "{", "") == [1, 0.25, 0, 0.25, 0, 0, 0]
    assert values(make(graded=False), good, half) == [1, 0]


def test_what_json_is_not():
    # Python would read all three.
    assert (
        values(make({"type": "object"}), '{"a": NaN}', '{"a": Infinity}', '{"a": 1, "a": 2}', "[" * 100_000) == [0] * 4
    )


def test_the_last_fenced_block_is_read():
    text = 'First:\n```json\n{}\n```\nbetter:\n```json\n{"name": "a", "age": 1}\n```\nDone.'
    assert values(make(extract="fenced"), text, '{"name": "a", "age": 1}') == [1, 1]
    assert values(make(extract="whole"), text) == [0]


def test_schemas_are_checked_before_anything_is_scored(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^reward\.json_schema\.schema: is no JSON schema: type: 'text' is not valid"
    ):
        make({"type": "text"})
    with pytest.raises(ConfigError, match=r"^reward\.json_schema\.schema: no file 'x\.json' in "):
        make("x.json")
    with pytest.raises(ConfigError, match=r"^reward\.json_schema\.schema is empty; type"):
        make("")
    (tmp_path / "s.json").write_text('{"type": "array", "type": "object"}')
    with pytest.raises(ConfigError, match=r"is no JSON: a key comes twice$"):
        make(str(tmp_path / "s.json"))


def test_a_remote_schema_is_not_fetched():
    from rlhf_cli.rewards.worker import attempt

    rows = list(attempt(make({"$ref": "https://example.invalid/s.json"}), [Sample("p", "{}")]))
    assert rows[0].value is None and "Unresolvable" in rows[0].reason


def test_a_schema_can_be_typed():
    from rlhf_cli.compose import compose
    from rlhf_cli.rewards.make import make_scorer

    words = [
        "reward=json_schema",
        "reward.json_schema.schema={type: object, required: [a]}",
        "reward_workers.processes=-1",
    ]
    scorer = make_scorer(compose("score", words, None))
    assert values(scorer, '{"a": 1}', '{"b": 1}') == [1, 0]
    assert values(make("object"), "{}", "[]") == [1, 0]
