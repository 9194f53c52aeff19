"""Responses of the initial policy before training: once, in the middle of which a run may die, and for nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli import prepass
from rlhf_cli.checks import check_numbers
from rlhf_cli.compose import compose
from rlhf_cli.data.record import Record
from rlhf_cli.engine.comm import Comm
from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.models.tiny import tiny_tokenizer
from rlhf_cli.prepass import Prepass, References, fingerprint, read, refuse
from rlhf_cli.record.rundir import PREPASS
from rlhf_cli.rewards.combine import Combined
from rlhf_cli.rollout.choose import Decoding
from rlhf_cli.rollout.sampler import Rollout
from rlhf_cli.types import Sample, Scores

COMM = Comm(torch.device("cpu"))
RECORDS = [Record(({"role": "user", "content": f"q{i}"},), f"q{i}", uid=f"u{i}") for i in range(5)]
HEADER: dict[str, Any] = {"samples": 3, "model": {"weights": 1}, "reward": {"a": 1}, "decoding": {"t": 1}}


class Echo:
    """Writes two letters that follow from the seed."""

    tokenizer = tiny_tokenizer()
    decoding = Decoding(max_tokens=2)

    def __init__(self) -> None:
        self.asked: list[int] = []

    def sample(self, prompts: Any, k: int, seeds: Any, decoding: Any, done: Any = None) -> Rollout:
        self.asked += list(seeds)
        assert decoding.wave == prepass.CHUNK * 3, "the same whatever is left to do"
        ids = [[97 + s % 26, 97 + s // 26 % 26] for s in seeds]
        return Rollout(ids, torch.zeros(len(ids), 2), torch.zeros(len(ids), dtype=torch.bool))


def letters(samples: list[Sample], group: torch.Tensor) -> Scores:
    value = torch.tensor([float(ord(s.response[0]) - 97) for s in samples])
    value[value == 7] = float("nan")
    return Scores(value, value.isnan(), {"a": value, "b": -value})


def make(folder: Path, **changes: Any) -> Prepass:
    settings: dict[str, Any] = {"samples": 3, "seed": 5, "path": folder / PREPASS, "header": HEADER}
    return Prepass(RECORDS, [[1]] * 5, Echo(), letters, COMM, **settings | changes)


def go(made: Prepass, at: int = 0) -> list[str]:
    notes: list[str] = []
    assert made.run(at, lambda: False, notes.append)
    return notes


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepass, "CHUNK", 2)


@pytest.mark.usefixtures("small")
def test_a_run_killed_in_the_middle_goes_on_and_ends_with_the_same_file(tmp_path: Path) -> None:
    whole, other = make(tmp_path), tmp_path / "other"
    assert go(whole) == ["prepass: 3 responses of the initial policy to each of 5 prompts"]
    text = (tmp_path / PREPASS).read_bytes()
    lines = text.splitlines(keepends=True)
    other.mkdir()
    (other / PREPASS).write_bytes(b"".join(lines[:3]) + lines[3][:9])  # header, two prompts, half a line
    again = make(other)
    assert go(again) == ["prepass: 3 responses of the initial policy to each of 3 prompts; 2 are there already"]
    assert (other / PREPASS).read_bytes() == text and len(again.sampler.asked) == 9
    assert go(make(other), at=7) == [], "nothing is left to do"


@pytest.mark.usefixtures("small")
def test_a_signal_stops_between_chunks(tmp_path: Path) -> None:
    answers = iter([False, True])
    made = make(tmp_path)
    assert not made.run(0, lambda: next(answers), lambda text: None)
    assert len((tmp_path / PREPASS).read_text().splitlines()) == 3, "header and a chunk of two"


def test_lookup_by_prompt_with_missing_scores(tmp_path: Path) -> None:
    made = make(tmp_path)
    go(made)
    lines = {line["uid"]: line for line in read(tmp_path / PREPASS)}
    found = made.references().lookup([Sample("", "", uid="u3"), Sample("", "", uid="u0")], ["b", "a"])
    for row, uid in enumerate(("u3", "u0")):
        want = [float("nan") if x is None else x for x in lines[uid]["scores"]["a"]]
        assert found.values[row, :, 1].tolist() == pytest.approx(want, nan_ok=True)
        assert found.values[row, :, 0].tolist() == pytest.approx([-x for x in want], nan_ok=True)
        assert found.length[row].tolist() == [2, 2, 2]
    with pytest.raises(GateError, match="holds no responses to the prompt 'other'"):
        made.references().lookup([Sample("", "", uid="other")], ["a"])


def test_the_prepass_may_be_drawn_otherwise_than_the_training(tmp_path: Path) -> None:
    words = ["experiment=bleuberi", "model=tiny_random", "rollout.temperature=0.9"]
    cfg = compose("train", words, None)
    asked: list[Decoding] = []

    class Watched(Echo):
        def sample(self, prompts: Any, k: int, seeds: Any, decoding: Any, done: Any = None) -> Rollout:
            asked.append(decoding)
            return super().sample(prompts, k, seeds, decoding, done)

    made = make(tmp_path, drawing=prepass.drawing(cfg))
    made.sampler = Watched()
    go(made)
    assert [(d.temperature, d.top_p, d.max_tokens) for d in asked] == [(0.7, 0.9, 2)]
    assert fingerprint(cfg)["decoding"]["temperature"] == 0.7
    plain = compose("train", [*words, "prepass.temperature=null", "prepass.top_p=null"], None)
    assert prepass.drawing(plain) == {} and fingerprint(plain)["decoding"]["temperature"] == 0.9
    for word, said in (("temperature=0", "must be above 0; null"), ("top_p=1.5", "must be above 0 and at most 1")):
        with pytest.raises(ConfigError, match=f"^prepass.{word}(.0)?: {said}"):
            check_numbers(compose("train", [*words, f"prepass.{word}"], None))


def test_spread_is_around_the_prompts_mean() -> None:
    lines = [{"uid": u, "tokens": [1, 1], "scores": {"a": s}} for u, s in (("x", [0.0, 2.0]), ("y", [100.0, 104.0]))]
    # deviations 1, 1, 2, 2: sqrt(10 / 4)
    assert References(lines, 2).spread(["a"]).tolist() == pytest.approx([2.5**0.5])


def test_another_runs_file_is_read_and_never_written(tmp_path: Path) -> None:
    go(make(tmp_path))
    text = (tmp_path / PREPASS).read_bytes()
    fewer = make(tmp_path, given=True, samples=2, header={**HEADER, "samples": 2})
    assert go(fewer) == [] and fewer.references().length.shape == (5, 2) and not fewer.sampler.asked
    assert (tmp_path / PREPASS).read_bytes() == text
    with pytest.raises(ConfigError, match=r"lacks 1 of 6 training prompts; type prepass\.path= to make it anew"):
        made = make(tmp_path, given=True)
        made.records = [*RECORDS, Record((), "", uid="u9")]
        go(made)


def test_what_made_the_file_must_be_what_the_run_has(tmp_path: Path) -> None:
    path = tmp_path / PREPASS
    for key, word in (("model", "weights"), ("reward", "a"), ("decoding", "t")):
        with pytest.raises(ConfigError) as e:
            refuse({**HEADER, key: {word: 2}}, HEADER, path)
        assert (
            str(e.value) == f"{path} was made with another {key} ({word}); type prepass.path= to make one for this run"
        )
    with pytest.raises(ConfigError, match=r"holds 2 responses per prompt; type prepass\.samples=2 or fewer"):
        refuse({**HEADER, "samples": 2}, HEADER, path)
    refuse({**HEADER, "samples": 9}, HEADER, path)
    with pytest.raises(ConfigError, match=r"^prepass\.path: no file"):
        go(make(tmp_path / "nowhere", given=True))


def test_a_file_that_is_gone_after_training_began_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lacks 5 of 5 training prompts, and the initial policy is gone"):
        go(make(tmp_path), at=3)


def test_the_fingerprint_follows_what_decides_and_nothing_else(tmp_path: Path) -> None:
    def of(*words: str) -> dict[str, Any]:
        return json.loads(json.dumps(fingerprint(compose("train", ["model=tiny_random", *words], None))))

    base = of()
    assert base == of("steps=9", "shaping=par", "reward.bleu.weight=3", "combine=min", "prepass.samples=10")
    for words, key in (
        ("seed=1", "model"),
        ("reward.bleu.lowercase=true", "reward"),
        ("rollout.temperature=1", "decoding"),
    ):
        assert of(words)[key] != base[key]
    file = tmp_path / "mine.py"
    file.write_text("def score(responses): return [0.0] * len(responses)\n")
    mine = of("reward=python", f"reward.python.path={file}:score")
    file.write_text("def score(responses): return [1.0] * len(responses)\n")
    assert of("reward=python", f"reward.python.path={file}:score")["reward"] != mine["reward"], "the function changed"


def test_a_canned_answer_is_scored_once_per_prompt_and_nothing_else_is_drawn(tmp_path: Path) -> None:
    """`letters` scores the place of the first letter: "d" is worth 3."""
    header = {**HEADER, "samples": 0, "canned": "denied"}
    made = make(tmp_path, samples=0, canned="denied", header=header)
    go(made)
    assert not made.sampler.asked
    head, *lines = [json.loads(x) for x in (tmp_path / PREPASS).read_text().splitlines()]
    assert (
        head == header
        and all(x["canned"] == {"a": 3.0, "b": -3.0} and x["responses"] == [] for x in lines)
        and len(lines) == 5
    )
    found = made.references().lookup([Sample("", "", uid=r.uid) for r in RECORDS[:2]], ["a"])
    assert found.canned is not None and found.canned.tolist() == [[3.0], [3.0]] and found.length.shape == (2, 0)
    both = make(tmp_path / "both", canned="denied", header={**HEADER, "canned": "denied"})
    (tmp_path / "both").mkdir()
    go(both)
    found = both.references().lookup([Sample("", "", uid=RECORDS[0].uid)], ["a"])
    assert found.canned is not None and found.canned.tolist() == [[3.0]] and found.length.shape == (1, 3)
    with pytest.raises(
        ConfigError, match=r"scored another canned answer; type prepass\.path= to make one for this run$"
    ):
        refuse(header, {**header, "canned": "no"}, tmp_path / PREPASS)
    refuse({**HEADER, "canned": "denied"}, HEADER, tmp_path / PREPASS)  # a run that compares with none may use it


def test_a_function_with_a_memory_is_no_measure_of_references(tmp_path: Path) -> None:
    class Remembers:
        def state_dict(self) -> dict[str, Any]:
            return {}

    cfg = compose("train", ["model=tiny_random", "shaping=par", "run.name=x"], None)
    scorer: Any = Combined({"bleu": (1.0, Remembers())})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"^reward\.bleu changes while the policy trains"):
        prepass.make_prepass(cfg, RECORDS, [[1]] * 5, Echo(), scorer, COMM, tmp_path, lambda: None)
