"""What is done with a run or a model: eval, generate, score, and the verbs that only print."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import e2e_support as e2e
import pytest
from e2e_support import TINY, Done

from rlhf_cli import catalog, cli
from rlhf_cli.record.rundir import RunDir

Rlhf = Callable[..., Done]
SMALL = ("rollout.max_tokens=6", "dataset.max_prompt_tokens=4096", "hardware.threads=1", "hardware.precision=fp32")
NUMBER = r"-?\d+\.\d{4}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run."""
    folder = tmp_path_factory.mktemp("verbs")
    assert cli.main(["train", *TINY, "reward=length", "optim.lr=0.01", f"run.dir={folder}", "run.name=r"]) == 0
    return folder / "r"


def test_eval_of_a_run_stands_beside_its_base(run: Path, rlhf: Rlhf, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    words = (*SMALL, "reward=length", "eval.prompts=4", "eval.samples=2", "eval.bootstrap=200", f"output={out}")
    done = rlhf("eval", str(run), *words)
    assert done.code == 0, done.err
    for column in ("base, greedy", "base, sampled", "run, greedy", "run, sampled"):
        assert re.search(rf"  {column} +{NUMBER}  \[{NUMBER}, {NUMBER}\]", done.out), done.out
    assert re.search(r"run - base, greedy: [+-]\d\.\d{4} \[[+-]\d\.\d{4}, [+-]\d\.\d{4}\]  paired by prompt", done.out)
    rows = e2e.jsonl(out)
    assert len(rows) == 2 * (4 + 4 * 2)
    texts = {c: [r["response"] for r in rows if r["column"] == f"{c}, greedy"] for c in ("base", "run")}
    assert texts["base"] != texts["run"], "the run's own weights were read"


def test_eval_of_a_model(rlhf: Rlhf) -> None:
    done = rlhf("eval", "model=tiny_random", *SMALL, "reward=[bleu,length]", "eval.prompts=3", "eval.bootstrap=100")
    assert done.code == 0, done.err
    assert "held-out bleu+length on 3 prompts, 95 % bootstrap intervals" in done.out
    assert re.search(rf"  model, greedy +{NUMBER}  \[", done.out) and re.search(
        rf"    bleu +{NUMBER}\n    length +", done.out
    )


def test_generate_from_lines_and_records(run: Path, rlhf: Rlhf, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("One?\n\nTwo?\n")
    done = rlhf("generate", str(run), *SMALL, f"input={tmp_path / 'p.txt'}")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [r["prompt"] for r in rows] == ["One?", "Two?"] and all(1 <= r["tokens"] <= 6 for r in rows)
    records = e2e.write_rows(tmp_path / "p.jsonl", [{"q": "One?"}, {"q": "Two?"}])
    out = tmp_path / "answers.jsonl"
    mapped = ("dataset.columns.prompt=q", "dataset.columns.references=")
    again = rlhf("generate", str(run), *SMALL, *mapped, f"input={records}", f"output={out}", "seed=0")
    assert again.code == 0, again.err
    assert again.out == f"2 responses to 2 prompts are in {out}\n"
    assert [r["response"] for r in e2e.jsonl(out)] == [r["response"] for r in rows], "the same seed draws the same"


def test_score_of_recorded_responses(rlhf: Rlhf, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "response": "a b c d", "references": ["a b c d" if i % 2 else "x y"]} for i in range(6)]
    file, out = e2e.write_rows(tmp_path / "r.jsonl", rows), tmp_path / "scores.jsonl"
    done = rlhf("score", "reward=bleu", f"input={file}", f"output={out}")
    assert done.code == 0, done.err
    assert "bleu" in done.out and done.out.endswith(f"scores are in {out}\n")
    found = [r["score"] for r in e2e.jsonl(out)]
    assert found[1::2] == pytest.approx([1.0] * 3) and max(found[::2]) < 0.3


def test_score_warns_of_a_constant_reward(rlhf: Rlhf, tmp_path: Path) -> None:
    file = e2e.demonstrations(tmp_path / "r.jsonl")
    reward = e2e.python_reward(tmp_path / "mine.py", "values = [0.5] * len(responses)")
    done = rlhf("score", "reward=python", reward, f"input={file}", "dataset.columns.references=")
    assert done.code == 0 and "constant" in done.out, done.out + done.err


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (("eval", "nowhere"), "nowhere"),
        (("generate", "model=tiny_random", "input=absent.txt"), "input=absent.txt: no such file"),
        (("score", "input=absent.jsonl"), "absent.jsonl"),
        (("eval", "model=tiny_random", "reward=none"), "eval: no reward; type reward=bleu (rlhf list reward)"),
    ],
)
def test_mistakes_are_one_line(
    argv: tuple[str, ...], text: str, rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = rlhf(*argv)
    assert done.code == 2 and done.err.startswith("rlhf: error: ") and done.err.count("\n") == 1, done.err
    assert text in done.err


def test_verbs_that_print(rlhf: Rlhf) -> None:
    assert "ppo_clip" in rlhf("plan", "algo=grpo", "model=tiny_random").out
    listed = rlhf("list").out
    assert all(group in listed for group in catalog.groups())
    assert "GRPO" in rlhf("list", "algo").out and "arXiv:2402.03300" in rlhf("show", "algo=grpo").out
    assert rlhf("completion", "--complete", "rlhf train algo=gr").out == "algo=grpo\n"
    doctor = rlhf("doctor")
    assert doctor.code in (0, 1) and "torch" in doctor.out


@pytest.mark.slow
def test_the_installed_command_trains_and_reports(tmp_path: Path) -> None:
    done = e2e.shell("train", *TINY, "reward=length", f"run.dir={tmp_path}", "run.name=r", cwd=tmp_path)
    assert done.code == 0, done.err
    for text in (
        "Held-out length on 4 prompts (greedy), 95 % intervals",
        "Before and after",
        f"rlhf eval {tmp_path}/r",
    ):
        assert text in done.out
    assert "Traceback" not in done.out + done.err


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path, rlhf: Rlhf) -> None:
    words = ("train", *TINY, "reward=length", "optim.lr=0.001", f"run.dir={tmp_path}")
    one = rlhf(*words, "run.name=one")
    two = e2e.shell(*words, "run.name=two", "hardware.processes=2")
    assert one.code == 0 and two.code == 0, two.out + two.err
    assert "[INFO]" not in two.out, "the launcher is quiet"
    first, second = (e2e.numbers(tmp_path / n)["metrics.jsonl"] for n in ("one", "two"))
    for r, s in zip(first, second, strict=True):
        assert r.keys() == s.keys()
        assert all(s[k] == pytest.approx(v, rel=1e-3, abs=1e-5) for k, v in r.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code"), [("values = ['boom on one'] * len(responses)", 3), ("os.kill(os.getpid(), 9)", 1)]
)
def test_one_failing_rank_stops_the_other(error: str, code: int, tmp_path: Path) -> None:
    body = f"values = [1.0] * len(responses)\n    if os.environ['RANK'] == '1' and os.path.exists('{tmp_path}/r/samples.jsonl'):\n        {error}"
    reward = e2e.python_reward(tmp_path / "mine.py", body)
    words = (
        "reward=python",
        reward,
        "reward.python.workers=false",
        "hardware.processes=2",
        "steps=50",
        f"run.dir={tmp_path}",
        "run.name=r",
    )
    done = e2e.shell("train", *TINY, *words)
    assert done.code == code, done.out + done.err
    assert done.err.startswith("rlhf: error: ") and done.err.count("\n") == 1, done.err
    if code == 3:
        assert "rank 1: " in done.err and "boom on one" in done.err
    assert e2e.status(tmp_path / "r")["status"] == "failed"
    assert RunDir(tmp_path / "r").writer() is None, "both ranks are gone: the next try may write the run"
