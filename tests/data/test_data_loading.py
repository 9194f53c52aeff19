"""Formats, the cut between train and held-out, fingerprints, the shipped options, and real files where they are."""

import hashlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rlhf_cli.config import DatasetSection
from rlhf_cli.data import check_references, counts, fingerprint, gives, load
from rlhf_cli.errors import ConfigError

ROOT = Path(__file__).parents[2]
OPTIONS = sorted((ROOT / "conf" / "dataset").glob("*.yaml"))
ROWS = [{"prompt": f"p{i}", "references": [f"r{i}"]} for i in range(200)]
COLUMNS = {"prompt": "prompt", "references": "references"}


def option(name: str, **settings):
    """A shipped option with overrides, as hydra composes it."""
    return OmegaConf.merge(
        OmegaConf.structured(DatasetSection), OmegaConf.load(ROOT / f"conf/dataset/{name}.yaml"), settings
    )


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def content(records) -> list:
    return [(r.messages, r.references, r.uid) for r in records]


def test_formats_agree(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "b.json").write_text(json.dumps({"data": ROWS, "version": 1}))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    files = {"a.jsonl": "jsonl", "a.json": "json", "b.json": "json", "a.parquet": "parquet"}
    write(tmp_path / "a.jsonl", ROWS)
    loaded = {}
    for name, form in files.items():
        cfg = DatasetSection(format=form, path=str(tmp_path / name), heldout="x", columns=COLUMNS)
        loaded[name] = load(cfg, "train")
        assert content(loaded[name]) == content(loaded["a.jsonl"]) and len(loaded[name]) == 200, name
    places = [loaded[name][2].where for name in files]
    assert places == ["a.jsonl:3", "a.json record 3", "b.json record 3", "a.parquet row 3"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[\n{"prompt": "p"},\n{"prompt" "q"}]', "a.json:3: broken JSON at character 11: Expecting ':' delimiter"),
        ('{"prompt": "p"}', 'a.json: holds an object, wanted a list of objects or {"data": [...]}; for one object per'),
        ("[]", "a.json: holds no records; point dataset.path"),
        ("", "a.json: holds no records; point dataset.path"),
        ('[{"prompt": "p"}, 3]', "a.json record 2: holds a number (3), wanted an object with columns"),
        ('[{"prompt": "p"}, {"q": "p"}]', "a.json record 2: column 'prompt' is missing; the file has q; map it with"),
    ],
)
def test_json_errors(tmp_path, text, expected):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError) as e:
        load(DatasetSection(format="json", path=str(tmp_path / "a.json"), heldout="x"), "train")
    assert str(e.value).removeprefix(f"{tmp_path}/").startswith(expected)


def test_parquet_errors(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    cfg = DatasetSection(format="parquet", path=str(path), heldout="x")
    path.write_text('{"prompt": "p"}')
    with pytest.raises(ConfigError, match=r"^a.parquet: cannot be read as parquet after row 0: .*magic bytes"):
        load(cfg, "train")
    pq.write_table(pa.table({"prompt": ["p", None]}), path)
    with pytest.raises(
        ConfigError, match=r"^a.parquet row 2: column 'prompt' holds null, wanted text; the file has prompt;"
    ):
        load(cfg, "train")


def fake_hub(monkeypatch, load_dataset) -> None:
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_hub(monkeypatch):
    asked = []

    def load_dataset(path, name, split, revision):
        asked.append((path, name, split, revision))
        return [{"question": f"{split}?", "answer": "so #### 1,024"}]

    fake_hub(monkeypatch, load_dataset)
    cfg = option("gsm8k", revision="abc")
    (train,), (heldout,) = load(cfg, "train"), load(cfg, "heldout")
    assert asked == [("openai/gsm8k", "main", "train", "abc"), ("openai/gsm8k", "main", "test", "abc")]
    assert (
        train.prompt == "train?" and train.references == ("1,024",) and train.where == "openai/gsm8k/main train row 1"
    )
    assert heldout.prompt == "test?"
    done = fingerprint(cfg)
    assert done["train"]["hub"] == "openai/gsm8k" and done["train"]["split"] == "train"
    assert done["heldout"]["split"] == "test" and len(done["train"]["sha256"]) == 64
    assert done["heldout"]["sha256"] != done["train"]["sha256"]


def test_hub_unreachable(monkeypatch):
    def load_dataset(path, name, split, revision):
        raise ConnectionError("Couldn't reach it\n(offline)")

    fake_hub(monkeypatch, load_dataset)
    with pytest.raises(ConfigError) as e:
        load(option("tulu3"), "train")
    assert str(e.value) == (
        "dataset.path=allenai/tulu-3-sft-mixture: cannot load allenai/tulu-3-sft-mixture split 'train' from the Hub "
        "(ConnectionError: Couldn't reach it (offline)); without the Hub point to a local file: dataset.format=jsonl "
        "dataset.path=FILE dataset.heldout="
    )


def test_hub_conversations(monkeypatch):
    turns = [{"role": "user", "content": "u"}]
    yes, no = ([*turns, {"role": "assistant", "content": x}] for x in ("yes", "no"))
    rows = {
        "ultrafeedback_binarized": {"prompt": "u", "chosen": yes, "rejected": no, "score_chosen": 8.0},
        "tulu3": {"id": "1", "messages": yes, "source": "s"},
    }
    fake_hub(monkeypatch, lambda path, name, split, revision: [rows[asked] | {}] * 3)
    for asked in rows:
        (r,) = load(option(asked, heldout="other", limit=1), "train")
        assert r.messages == tuple(turns) and r.responses[0] == "yes"


def test_cut_is_stable(tmp_path):
    cfg = DatasetSection(format="jsonl", path=write(tmp_path / "a.jsonl", ROWS), heldout_fraction=0.25)
    train, held = ({r.prompt for r in load(cfg, s)} for s in ("train", "heldout"))
    assert not train & held and len(train | held) == 200
    # binomial(200, 0.25): mean 50, standard deviation 6.1
    assert 30 < len(held) < 70
    changed = DatasetSection(
        format="jsonl",
        path=write(tmp_path / "b.jsonl", [*reversed(ROWS), {"prompt": "new"}]),
        heldout_fraction=0.25,
        system="s",
        template="Q: {prompt}",
    )
    again = {r.prompt.removeprefix("Q: ") for r in load(changed, "heldout")}
    assert again - {"new"} == held
    smaller = DatasetSection(format="jsonl", path=cfg.path, heldout_fraction=0.1)
    assert {r.prompt for r in load(smaller, "heldout")} < held


def test_repeated_prompts_stay_on_one_side(tmp_path):
    cfg = DatasetSection(format="jsonl", path=write(tmp_path / "a.jsonl", ROWS + ROWS), heldout_fraction=0.25)
    train, held = load(cfg, "train"), load(cfg, "heldout")
    assert not {r.prompt for r in train} & {r.prompt for r in held}
    assert counts(train)["repeated_prompts"] + counts(held)["repeated_prompts"] == 200
    assert len({r.uid for r in train + held}) == 400


def test_limit_cuts_train_only(tmp_path):
    cfg = DatasetSection(format="jsonl", path=write(tmp_path / "a.jsonl", ROWS), heldout_fraction=0.25)
    limited = DatasetSection(format="jsonl", path=cfg.path, heldout_fraction=0.25, limit=3)
    assert load(limited, "train") == load(cfg, "train")[:3]
    assert load(limited, "heldout") == load(cfg, "heldout")


def test_a_changed_file_is_read_again(tmp_path):
    cfg = DatasetSection(format="jsonl", path=write(tmp_path / "a.jsonl", ROWS[:1]), heldout="x")
    assert len(load(cfg, "train")) == 1
    write(tmp_path / "a.jsonl", ROWS[:2])
    assert len(load(cfg, "train")) == 2


def test_fingerprint(tmp_path):
    train, held = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", ROWS[:2])
    done = fingerprint(DatasetSection(format="jsonl", path=train, heldout=held, columns=COLUMNS))
    sums = {n: hashlib.sha256((tmp_path / n).read_bytes()).hexdigest() for n in ("a.jsonl", "b.jsonl")}
    assert done == {
        "format": "jsonl",
        "shape": "prompts",
        "train": {"file": "a.jsonl", "sha256": sums["a.jsonl"], "counts": {"records": 200, "references": 200}},
        "heldout": {"file": "b.jsonl", "sha256": sums["b.jsonl"], "counts": {"records": 2, "references": 2}},
        "heldout_prompts_in_train": 2,
    }
    cut = fingerprint(DatasetSection(format="jsonl", path=train, heldout_fraction=0.25))
    assert cut["heldout"]["heldout_fraction"] == 0.25 and cut["heldout_prompts_in_train"] == 0
    json.dumps(cut)


def test_packaged():
    cfg = option("quickstart")
    train, held = load(cfg, "train"), load(cfg, "heldout")
    assert train and held and not {r.prompt for r in train} & {r.prompt for r in held}
    check_references(train + held, "reward=bleu")


@pytest.mark.parametrize("path", OPTIONS, ids=lambda p: p.stem)
def test_options(path):
    """Each option fills only keys of the section, says what it is, and describes itself without a file."""
    assert path.read_text().startswith("# ") and len(path.read_text().splitlines()) <= 12
    cfg = option(path.stem)
    if not cfg.path and cfg.format != "packaged":
        with pytest.raises(ConfigError, match=r"^dataset.path is empty; type dataset.path=FILE$"):
            load(cfg, "train")
        cfg.path = "some.jsonl"
    expected = {"pairs": "pairs", "rankings": "pairs", "thumbs": "label"}.get(cfg.shape, "references")
    # What a dialogue, or a verdict on others' responses, is measured by stands in its meta.
    assert expected in gives(cfg) or path.stem in ("profiles", "ranked_lists", "scored_pairs", "thought_pairs")


def test_light_import():
    """Composing a configuration asks for `gives`, and must not pay for torch or datasets."""
    heavy = ("torch", "datasets", "pyarrow", "transformers", "numpy", "omegaconf")
    code = f"import sys, rlhf_cli.data, rlhf_cli.data.text; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def shared(name: str) -> str:
    path = ROOT.parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"REAL DATA NOT TESTED: no {path}")
    return str(path)


def test_real_rankings():
    cfg = option("alpaca_eval", path=shared("alpaca_eval/rankings.jsonl"))
    train, held = load(cfg, "train"), load(cfg, "heldout")
    rows = [json.loads(line) for line in Path(cfg.path).read_bytes().splitlines()]
    assert len(train) + len(held) == len(rows) == 600 and held
    check_references(train + held, "reward=bleu")
    by = {r.prompt: r for r in train + held}
    for row in rows:
        r = by[row["prompt"]]
        assert list(r.responses) == row["responses"] and list(r.references) == row["references"]
        assert all(row["scores"][i] > row["scores"][j] for i, j in r.pairs)
        assert r.meta == {"source": row["source"]}
    total = sum(len(r.pairs) for r in by.values())
    assert total + counts([*by.values()]).get("ties", 0) + counts([*by.values()]).get("identical", 0) == 600 * 28


def test_real_gsm8k():
    cfg = option("gsm8k", format="jsonl", path=shared("gsm8k/train.jsonl"), heldout="")
    records = load(cfg, "train") + load(cfg, "heldout")
    answers = {row["question"]: row["answer"] for row in map(json.loads, Path(cfg.path).read_bytes().splitlines())}
    assert len(records) == len(answers) == 7473
    assert all(r.references == (answers[r.prompt].split("#### ")[1],) for r in records)


def test_real_nested_instances():
    columns = {"input": "instances[0].input", "references": "instances[].output", "meta.name": "name"}
    path = shared("self_instruct/seed_tasks.jsonl")
    cfg = option("jsonl", path=path, columns=columns, template="{instruction}\n\n{input}")
    records = load(cfg, "train") + load(cfg, "heldout")
    assert len(records) == 175 and all(len(r.references) == 1 and r.meta["name"] for r in records)
