"""Every record shape, from files written here."""

import json
from pathlib import Path

import pytest

from rlhf_cli.config import DatasetSection
from rlhf_cli.data import as_demonstrations, counts, gives, load
from rlhf_cli.data.columns import MISSING, lookup
from rlhf_cli.errors import ConfigError


def section(tmp_path: Path, rows: list, **settings) -> DatasetSection:
    """A dataset of `rows` as train and one more prompt as held-out file."""
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return DatasetSection(
        **{"format": "jsonl", "path": str(path), "heldout": str(path.with_name("other.jsonl"))} | settings
    )


def one(tmp_path: Path, row: dict, **settings):
    return load(section(tmp_path, [row], **settings), "train")[0]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def test_plain_prompt_with_references(tmp_path):
    rows = [{"q": "Hi?", "a": "Yes."}, {"q": "Ho?", "a": ["1", "2"]}, {"q": "Hi?", "a": None}]
    records = load(section(tmp_path, rows, columns={"prompt": "q", "references": "a"}), "train")
    assert [r.messages for r in records] == [(user("Hi?"),), (user("Ho?"),), (user("Hi?"),)]
    assert [r.prompt for r in records] == ["Hi?", "Ho?", "Hi?"]
    assert [r.references for r in records] == [("Yes.",), ("1", "2"), ()]
    assert [r.where for r in records] == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3"]
    assert records[2].uid == records[0].uid + "-2" and records[1].uid != records[0].uid
    assert records[0].responses == records[0].pairs == records[0].scores == () and records[0].label is None
    assert counts(records) == {"records": 3, "without_reference": 1, "references": 3, "repeated_prompts": 1}


def test_unmapped_references_are_not_read(tmp_path):
    row = {"prompt": "p", "references": ["r"]}
    assert one(tmp_path, row).references == ()
    assert one(tmp_path, row, columns={"references": ""}).references == ()
    assert one(tmp_path, row, columns={"references": "references"}).references == ("r",)


def test_conversational_prompt_system_and_template(tmp_path):
    turns = [user("a"), assistant("b"), user(" c ")]
    r = one(tmp_path, {"prompt": turns}, system="Be brief.", template="Q: {prompt}\nA:")
    assert r.messages == ({"role": "system", "content": "Be brief."}, user("a"), assistant("b"), user("Q:  c \nA:"))
    assert r.prompt == "Q:  c \nA:"
    assert one(tmp_path, {"prompt": " kept "}).prompt == " kept "


def test_own_system_turn_is_kept(tmp_path):
    r = one(tmp_path, {"prompt": [{"role": "system", "content": "s"}, user("u")]})
    assert [m["role"] for m in r.messages] == ["system", "user"]


def test_nested_columns_template_and_meta(tmp_path):
    row = {"id": 7, "task": "Add.", "instances": [{"input": "1 1", "output": "2"}, {"input": "", "output": "3"}]}
    columns = {"input": "instances[0].input", "references": "instances[].output", "meta.id": "id"}
    r = one(tmp_path, row, columns=columns, template="{task}\n\n{input}{{}}")
    assert r.prompt == "Add.\n\n1 1{}" and r.references == ("2", "3") and r.meta == {"id": 7}
    empty = one(tmp_path, row, columns={"input": "instances[1].input"}, template="{task}\n\n{input}")
    assert empty.prompt == "Add."


def test_lookup():
    row = {"a.b": 1, "a": {"b": 2, "c": [{"d": 3}, {"d": 4}, {}]}, "l": [[5, 6], [7]]}
    assert lookup(row, "a.b") == 1
    assert lookup(row, "a.c[1].d") == 4
    assert lookup(row, "l[0][1]") == 6 and lookup(row, "l[]") == [[5, 6], [7]]
    for path in ("a.c[].d", "a.c[3]", "x", "a.x", "l.x", "a[0]", "a[]"):
        assert lookup(row, path) is MISSING, path


def test_answer_pattern(tmp_path):
    r = one(tmp_path, {"prompt": "p", "r": "so\n#### 1,000"}, columns={"references": "r"}, answer_pattern=r"#### (.+)")
    assert r.references == ("1,000",)


def test_pairs(tmp_path):
    row = {"prompt": "p", "chosen": "good", "rejected": "", "m": 2}
    r = one(tmp_path, row, shape="pairs", columns={"margin": "m"})
    assert r.responses == ("good", "") and r.pairs == ((0, 1),) and r.margins == (2.0,) and r.scores == ()
    assert one(tmp_path, row, shape="pairs").margins == ()
    assert counts([r])["empty_responses"] == 1


def test_pairs_of_conversations(tmp_path):
    before = [user("a"), assistant("b"), user("c")]
    row = {"prompt": "not read", "chosen": [*before, assistant("yes")], "rejected": [*before, assistant("no")]}
    r = one(tmp_path, row, shape="pairs")
    assert r.messages == tuple(before) and r.prompt == "c" and r.responses == ("yes", "no")
    row = {"prompt": "p", "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    assert one(tmp_path, row, shape="pairs").messages == (user("p"),)


def test_rankings(tmp_path):
    # scores 1 3 1 2, the last two texts equal: edges 1>0, 1>2, 1>3, 3>0; 3>2 has one text; 0 and 2 tie
    row = {"prompt": "p", "responses": ["a", "b", "c", "c"], "scores": [1, 3, 1, 2]}
    r = one(tmp_path, row, shape="rankings")
    assert r.responses == ("a", "b", "c", "c") and r.scores == (1.0, 3.0, 1.0, 2.0)
    assert r.pairs == ((1, 0), (1, 2), (1, 3), (3, 0)) and r.margins == (2.0, 2.0, 1.0, 1.0)
    assert counts([r]) == {"records": 1, "without_reference": 1, "responses": 4, "pairs": 4, "ties": 1, "identical": 1}


def test_rankings_of_objects(tmp_path):
    row = {"prompt": "p", "responses": [{"text": "a", "score": 0.5}, {"text": "b", "score": 1}]}
    columns = {"responses": "responses[].text", "scores": "responses[].score"}
    r = one(tmp_path, row, shape="rankings", columns=columns)
    assert r.responses == ("a", "b") and r.pairs == ((1, 0),) and r.margins == (0.5,)


@pytest.mark.parametrize(
    ("value", "label"),
    [(True, 1.0), (False, 0.0), (1, 1.0), (0, 0.0), (3.5, 3.5), ("up", 1.0), ("Down", 0.0), ("no", 0.0)],
)
def test_thumbs(tmp_path, value, label):
    r = one(tmp_path, {"prompt": "p", "response": "r", "label": value}, shape="thumbs")
    assert r.label == label and r.responses == ("r",)


def test_demonstrations(tmp_path):
    r = one(tmp_path, {"prompt": "p", "response": "r"}, shape="demonstrations")
    assert r.responses == r.references == ("r",)
    talk = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c"), assistant("d")]
    r = one(tmp_path, {"messages": talk}, shape="demonstrations", columns={"messages": "messages"})
    assert r.messages == tuple(talk[:-1]) and r.prompt == "c" and r.responses == ("d",)


def test_as_demonstrations(tmp_path):
    row = {"prompt": "p", "chosen": "w", "rejected": "l", "response": "r", "label": 1, "a": ["x", "y"]}
    row |= {"responses": ["u", "v"], "scores": [1, 2]}
    by = {"prompts": "x", "pairs": "w", "demonstrations": "r", "rankings": "x", "thumbs": "x"}
    for shape, expected in by.items():
        (d,) = as_demonstrations([one(tmp_path, row, shape=shape, columns={"references": "a"})])
        assert d.responses == (expected,) and d.pairs == () and d.scores == () and d.margins == (), shape
    with pytest.raises(ConfigError, match=r"^train.jsonl:1: holds no demonstration; use dataset.shape=demonstrations"):
        as_demonstrations([one(tmp_path, row, shape="thumbs")])


def test_gives():
    def of(shape, columns=None):
        return gives(DatasetSection(format="jsonl", path="x", shape=shape, columns=columns or {}))

    assert of("prompts") == frozenset()
    assert of("prompts", {"references": "r"}) == {"references"}
    assert of("prompts", {"references": ""}) == frozenset()
    assert of("pairs") == of("pairs", {"margin": ""}) == {"pairs", "responses"}
    assert of("pairs", {"margin": "m"}) == of("rankings") - {"label"} == {"pairs", "margin", "responses"}
    assert of("rankings", {"references": "r"}) == {"pairs", "margin", "label", "responses", "references"}
    assert of("thumbs") == {"label", "responses"}
    assert of("demonstrations") == {"references", "responses"}
