"""Every mistake in a dataset is one line that names file, line and column, and says what to type."""

import json
from dataclasses import replace

import pytest

from rlhf_cli.config import DatasetSection
from rlhf_cli.data import Record, check_lengths, check_references, load
from rlhf_cli.errors import ConfigError


def complaint(tmp_path, rows, split="train", name="train.jsonl", **settings) -> str:
    """The message of loading `rows` (objects, or the file's text or bytes)."""
    path = tmp_path / name
    if isinstance(rows, list):
        rows = "".join(json.dumps(r) + "\n" for r in rows)
    path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    cfg = DatasetSection(**{"format": "jsonl", "path": str(path), "heldout": "unused.jsonl"} | settings)
    with pytest.raises(ConfigError) as e:
        load(cfg, split)
    assert "\n" not in str(e.value)
    return str(e.value).replace(str(tmp_path), "DIR")


GOOD = {"prompt": "p", "references": ["r"]}
U, A = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "DIR/train.jsonl: holds no records; point dataset.path (or dataset.heldout) to a file that does"),
        ("\n\n", "DIR/train.jsonl: holds no records; point dataset.path (or dataset.heldout) to a file that does"),
        ('{"prompt": "p"}\n{"prompt": \n', "train.jsonl:2: broken JSON at character 11: Expecting value"),
        ('{"prompt": "p"}\n\n \n{"prompt": "q"}\n', "train.jsonl:2: is an empty line between records; remove it"),
        ('{"prompt": "p"}\n"text"\n', "train.jsonl:2: holds text, wanted an object with columns"),
        ('{"prompt": "p"}\n[1]\n', "train.jsonl:2: holds a list, wanted an object with columns"),
        (b'{"prompt": "p"}\n{"prompt": "\xe9"}\n', "train.jsonl:2: is not UTF-8 (byte 0xe9); convert the file"),
        (
            '{"prompt": "\\ud83d"}\n',
            "train.jsonl:1: column 'prompt' holds text that is not valid Unicode (half a surrogate pair); "
            "the file has prompt; map it with dataset.columns.prompt=NAME",
        ),
    ],
)
def test_broken_lines(tmp_path, text, expected):
    assert complaint(tmp_path, text) == expected


def test_tolerated_files(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "p"}\r\n{"prompt": "\xe2\x80\xa8"}\r\n{"prompt": "r"}\r\n\r\n\n')
    with pytest.raises(ConfigError, match=r"^train.jsonl:2: column 'prompt' gives an empty prompt"):
        load(DatasetSection(format="jsonl", path=str(path), heldout="x"), "train")
    path.write_bytes(path.read_bytes().replace(b'"\xe2', b'"a\xe2'))
    records = load(DatasetSection(format="jsonl", path=str(path), heldout="x"), "train")
    assert [r.prompt for r in records] == ["p", "a\u2028", "r"]


NAMED = {"prompt": "prompt", "references": "references"}
HAS = "the file has prompt, references; map it with dataset.columns.{}=NAME"


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        (
            {"question": "q"},
            NAMED,
            "column 'prompt' is missing; the file has question; map it with dataset.columns.prompt=NAME",
        ),
        (
            {"prompt": "p", "reference": "r"},
            NAMED,
            "column 'references' is missing; the file has prompt, reference; did you mean 'reference'?; "
            "map it with dataset.columns.references=NAME, or dataset.columns.references= to do without",
        ),
        (
            {"prompt": "p", "x": [{"out": "r"}]},
            {"references": "x[].output"},
            "column 'x[].output' is missing; the file has prompt, x; map it with dataset.columns.references=NAME, "
            "or dataset.columns.references= to do without",
        ),
        (
            GOOD,
            {"meta.id": "id"},
            "column 'id' is missing; the file has prompt, references; map it with dataset.columns.meta.id=NAME",
        ),
        (GOOD | {"prompt": 7}, NAMED, "column 'prompt' holds a number (7), wanted text; " + HAS.format("prompt")),
        (GOOD | {"prompt": None}, NAMED, "column 'prompt' holds null, wanted text; " + HAS.format("prompt")),
        (
            GOOD | {"prompt": True},
            NAMED,
            "column 'prompt' holds a boolean (true), wanted text; " + HAS.format("prompt"),
        ),
        (
            GOOD | {"prompt": " "},
            NAMED,
            "column 'prompt' gives an empty prompt; fill it, or remove that record from the data",
        ),
        (
            GOOD | {"references": {}},
            NAMED,
            "column 'references' holds an object, wanted text; " + HAS.format("references"),
        ),
        (
            GOOD | {"references": ["r", 5]},
            NAMED,
            "column 'references' holds a number (5) at position 1, wanted text; " + HAS.format("references"),
        ),
        (
            GOOD | {"references": ["r", ""]},
            NAMED,
            "column 'references' holds an empty reference at position 1; fill it, or write null for none",
        ),
    ],
)
def test_columns(tmp_path, row, columns, expected):
    assert complaint(tmp_path, [row], columns=columns) == "train.jsonl:1: " + expected


def test_the_line_is_named(tmp_path):
    assert complaint(tmp_path, [GOOD, {"p": "x"}]).startswith(
        "train.jsonl:2: column 'prompt' is missing; the file has p;"
    )


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([], "column 'prompt' holds an empty list, wanted a list of {role, content} turns; the file has"),
        (["hi"], "column 'prompt' holds text at turn 0, wanted {role, content}; the file has"),
        ([{"role": "user"}], "column 'prompt' holds an object at turn 0, wanted {role, content}; the file has"),
        (
            [{"role": "usr", "content": "x"}],
            "has the role 'usr' at turn 0; allowed: system, user, assistant, tool; did you",
        ),
        ([U, {"role": "system", "content": "x"}, U], "has a system turn at turn 1; it may only come first"),
        ([{"role": "user", "content": ["x"]}], "holds a list as content of turn 0, wanted text"),
        (
            [U, A],
            "column 'prompt' ends with a turn of the assistant; the last turn must be the user's; conversations with "
            "answers: dataset.shape=demonstrations dataset.columns.messages=NAME",
        ),
    ],
)
def test_conversations(tmp_path, prompt, expected):
    assert expected in complaint(tmp_path, [{"prompt": prompt}])


def test_two_system_turns(tmp_path):
    message = complaint(tmp_path, [{"prompt": [{"role": "system", "content": "x"}, U]}], system="y")
    assert (
        message
        == "train.jsonl:1: column 'prompt' has a system turn already; type dataset.system= to keep the data's own"
    )


def test_template_columns(tmp_path):
    message = complaint(tmp_path, [GOOD], template="{prompt} {input}")
    assert message.startswith(
        "train.jsonl:1: column 'input' is missing; the file has prompt, references; map it with dataset.columns.input=NAME"
    )
    message = complaint(tmp_path, [{"a": "", "b": " "}], template="Do: {a} {b}")
    assert message.startswith("train.jsonl:1: column 'a' gives an empty prompt")


def test_answer_pattern(tmp_path):
    rows = [{"prompt": "p", "references": "#### 1"}, {"prompt": "p", "references": "none\nhere"}]
    message = complaint(tmp_path, rows, columns=NAMED, answer_pattern="#### (.+)")
    assert message == (
        "train.jsonl:2: column 'references' does not match dataset.answer_pattern='#### (.+)'; it is 'none here'"
    )


PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"rejected": "c"},
            "column 'rejected' equals 'chosen', which prefers nothing; remove that record from the data",
        ),
        ({"rejected": None}, "column 'rejected' holds null, wanted text; the file has prompt, chosen, rejected;"),
        ({"rejected": [U, A]}, "column 'chosen' holds text where 'rejected' holds a conversation;"),
        (
            {"chosen": [U, A], "rejected": [U | {"content": "v"}, A | {"content": "b"}]},
            "column 'rejected' answers another prompt than 'chosen'; 'chosen' and 'rejected' must share every turn",
        ),
        (
            {"chosen": [U], "rejected": [U]},
            "column 'chosen' ends with a turn of the user; the last turn must be the assis",
        ),
        (
            {"chosen": [A, A], "rejected": [A, A | {"content": "b"}]},
            "column 'chosen' has a turn of the assistant before its answer; the turn before the answer must be",
        ),
    ],
)
def test_pairs(tmp_path, change, expected):
    assert complaint(tmp_path, [PAIR, PAIR | change], shape="pairs").startswith("train.jsonl:2: " + expected)


@pytest.mark.parametrize(
    ("margin", "expected"),
    [
        (-1, "is negative (-1); swap chosen and"),
        ("1", "holds text, wanted a number"),
        (True, "holds a boolean (true), wa"),
    ],
)
def test_margin(tmp_path, margin, expected):
    message = complaint(tmp_path, [PAIR | {"m": margin}], shape="pairs", columns={"margin": "m"})
    assert message.startswith("train.jsonl:1: column 'm' " + expected)


RANKING = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"responses": ["a"]}, "column 'responses' holds 1, a ranking needs at least 2; remove that record"),
        ({"responses": "ab"}, "column 'responses' holds text, wanted a list of texts; the file has"),
        ({"responses": ["a", None]}, "column 'responses' holds null at position 1, wanted text; the file has"),
        ({"scores": [1]}, "column 'scores' holds 1; there must be one for each of the 2 in 'responses'"),
        ({"scores": 1}, "column 'scores' holds a number (1), wanted a list of numbers; the file has"),
        (
            {"scores": [1, float("nan")]},
            "column 'scores' holds nan at position 1, wanted a finite number; the file has",
        ),
        ({"scores": [1, "2"]}, "column 'scores' holds text at position 1, wanted a number; the file has"),
        ({"scores": [1, True]}, "column 'scores' holds a boolean (true) at position 1, wanted a number; the file has"),
    ],
)
def test_rankings(tmp_path, change, expected):
    assert complaint(tmp_path, [RANKING, RANKING | change], shape="rankings").startswith("train.jsonl:2: " + expected)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("great", "holds 'great'; allowed: a number, true, false, up, down, yes, no, good, bad, true, false"),
        (None, "holds null, wanted a number; the file has prompt, response, label; map it with"),
        (float("inf"), "holds inf, wanted a finite number; the file has"),
    ],
)
def test_thumbs(tmp_path, label, expected):
    message = complaint(tmp_path, [{"prompt": "p", "response": "r", "label": label}], shape="thumbs")
    assert message.startswith("train.jsonl:1: column 'label' " + expected)


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        (
            {"prompt": "p", "response": ""},
            {},
            "column 'response' demonstrates an empty response; remove that record from",
        ),
        (
            {"m": [A]},
            {"messages": "m"},
            "column 'm' has nothing before its answer; the turn before the answer must be the",
        ),
        (
            {"m": [U]},
            {"messages": "m"},
            "column 'm' ends with a turn of the user; the last turn must be the assistant's",
        ),
        (
            {"m": "x"},
            {"messages": "m"},
            "column 'm' holds text, wanted a list of {role, content} turns; the file has m; map",
        ),
    ],
)
def test_demonstrations(tmp_path, row, columns, expected):
    assert complaint(tmp_path, [row], shape="demonstrations", columns=columns).startswith("train.jsonl:1: " + expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"format": "jsonl "},
            "dataset.format=jsonl : unknown; choose one of packaged, jsonl, json, parquet, hub; did you mean",
        ),
        (
            {"shape": "pair"},
            "dataset.shape=pair: unknown; choose one of prompts, pairs, rankings, thumbs, demonstrations; did you mean",
        ),
        (
            {"columns": {"refrences": "r"}},
            "dataset.columns.refrences: unknown; it may be prompt, chosen, rejected, responses,",
        ),
        ({"path": ""}, "dataset.path is empty; type dataset.path=FILE"),
        ({"path": "", "format": "hub"}, "dataset.path is empty; type dataset.path=REPOSITORY, a Hub id"),
        ({"path": "none.jsonl"}, "dataset.path=none.jsonl: no such file; type dataset.path=FILE"),
        ({"path": "."}, "dataset.path=.: is a folder; type dataset.path=FILE"),
        (
            {"format": "packaged", "path": "a.jsonl"},
            "dataset.path=a.jsonl: dataset.format=packaged reads no other file; type",
        ),
        (
            {"path": "x", "heldout": "x"},
            "dataset.heldout=x is what is trained on; name another, or type dataset.heldout= to",
        ),
        ({"heldout_fraction": 1.0}, "dataset.heldout_fraction=1 must be at least 0 and below 1"),
        ({"limit": -1}, "dataset.limit=-1 must not be negative; 0 uses every record"),
        (
            {"answer_pattern": "("},
            "dataset.answer_pattern='(' is no regular expression: missing ), unterminated subpattern",
        ),
        ({"answer_pattern": "x"}, "dataset.answer_pattern='x' has no group; put what to keep in parentheses"),
        ({"template": "Hi"}, "dataset.template='Hi' uses no column; write one as {prompt}"),
        (
            {"template": "{prompt"},
            "dataset.template='{prompt': expected '}' before end of string; write a literal brace twice",
        ),
        (
            {"template": "{prompt.x}"},
            "dataset.template='{prompt.x}': {prompt.x} must be a plain name, such as {prompt}",
        ),
        ({"template": "{prompt!r}"}, "dataset.template='{prompt!r}': {prompt} must be a plain name, such as {prompt}"),
    ],
)
def test_settings(tmp_path, settings, expected):
    assert complaint(tmp_path, [GOOD], **settings).startswith(expected)


def test_unknown_column_suggests(tmp_path):
    message = complaint(tmp_path, [GOOD], columns={"refrences": "r"})
    assert message.endswith(
        "messages, link, meta.NAME or a name that dataset.template uses; did you mean 'references'?"
    )


def test_absent_heldout_file(tmp_path):
    assert complaint(tmp_path, [GOOD], split="heldout", heldout="test") == (
        "dataset.heldout=test: no such file; type dataset.heldout=FILE, or dataset.heldout= "
        "to cut records off the train file"
    )


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.0, "=0 leaves no held-out record of the 1 in DIR/train.jsonl; raise it, or type dataset.heldout=FILE"),
        (
            0.999999,
            "=0.999999 leaves no train record of the 1 in DIR/train.jsonl; lower it, or type dataset.heldout=FILE",
        ),
    ],
)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_cut_leaves_a_side_empty(tmp_path, fraction, expected, split):
    message = complaint(tmp_path, [GOOD], split=split, heldout="", heldout_fraction=fraction)
    assert message == "dataset.heldout_fraction" + expected


def test_check_references():
    with_one = Record(messages=(U,), prompt="u", references=("r",), where="a.jsonl:1")
    without = replace(with_one, references=(), where="a.jsonl:2")
    check_references([with_one], "reward=bleu")
    with pytest.raises(ConfigError) as e:
        check_references([with_one, without, without], "reward=bleu")
    assert str(e.value) == (
        "a.jsonl:2: column 'references' gives no reference, and reward=bleu needs one (2 of 3 records have none); "
        "map the column with dataset.columns.references=NAME, remove those lines, or choose another reward"
    )


def test_check_lengths():
    records = [Record(messages=(U,), prompt="u", where=f"a.jsonl:{i}") for i in (1, 2, 3)]
    check_lengths(records, [5, 512, 1], 512)
    with pytest.raises(ConfigError) as e:
        check_lengths(records, [5, 600, 700], 512)
    assert str(e.value) == (
        "a.jsonl:2: column 'prompt' has 600 tokens, the limit is 512 (2 of 3 prompts are longer); "
        "type dataset.max_prompt_tokens=700, or shorten them"
    )
