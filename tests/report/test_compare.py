"""What `rlhf compare` says, against numbers worked out by hand."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli import cli
from rlhf_cli.errors import ConfigError
from rlhf_cli.report.compare import compare, count, duration, text


def made(path: Path, scores: list[float], *, status: str = "finished", seed: int = 1, **config: Any) -> Path:
    """A run whose held-out prompts p0, p1, ... score as given, after two steps of 30 s and 50 tokens each."""
    path.mkdir(parents=True)
    names = {"algo": config.pop("algo", "grpo"), "reward": config.pop("reward", "bleu"), "hardware": path.name}
    settings = {"seed": seed, "run": {"name": path.name}, "reward": {names["reward"]: {}}, "names": names, **config}
    (path / "config.yaml").write_text(json.dumps(settings))
    (path / "status.json").write_text(
        json.dumps({"status": status, "step": 2, "reason": "no\nluck", "time": path.name})
    )
    rows = [
        {"step": s, "score/mean": 0.1 * s, "time/step": 29.0, "time/between": 1.0, "count/response_tokens": 50}
        for s in (1, 2)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    mean = math.fsum(scores) / len(scores)
    last = {"step": 2, "eval/reward": mean, "eval/reward_low": mean - 0.1, "eval/reward_high": mean + 0.1}
    (path / "evaluations.jsonl").write_text(
        json.dumps({"step": 0, "eval/reward": 0.0}) + "\n" + json.dumps(last) + "\n"
    )
    heldout = [{"uid": f"p{i}", "sample": 0, "score": x} for i, x in enumerate(scores)]
    (path / "heldout-000000.jsonl").write_text('{"uid": "p0", "sample": 0, "score": 99}\n')
    (path / "heldout-000002.jsonl").write_text("".join(json.dumps(r) + "\n" for r in heldout))
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two methods with two seeds and three prompts each, a third with one seed, one that failed."""
    root = tmp_path / "runs"
    made(root / "a1", [1.0, 2.0, 0.0], seed=1)
    made(root / "a2", [2.0, 1.0, 0.0], seed=2)
    made(root / "b1", [2.0, 2.0, 5.0], seed=1, algo="rloo")
    made(root / "b2", [5.0, 5.0, 8.0], seed=2, algo="rloo")
    made(root / "c1", [1.0, 1.0, 1.0], seed=1, algo="rloo", optim={"lr": 0.5})
    made(root / "c2", [9.0, 9.0, 9.0], seed=2, algo="rloo", optim={"lr": 0.5}, status="failed")
    return root


def test_seeds_collapse_into_configurations_and_failures_are_not_averaged(runs: Path) -> None:
    found = compare([runs])
    assert [r.configuration.label for r in found.rows] == [
        "algo=grpo",
        "algo=rloo, optim.lr=null",
        "algo=rloo, optim.lr=0.5",
    ]
    grpo, rloo, other = found.rows
    assert found.metric == "eval/reward" and grpo.configuration.seeds == [1, 2]
    # seeds 1 and 2 of rloo score 3 and 6: mean 4.5, standard error 1.5, t(0.975, 1) = 12.7062
    assert rloo.value.mean == 4.5 and rloo.over == "seeds"
    assert rloo.value.high == pytest.approx(4.5 + 12.7062 * 1.5, rel=1e-5)
    assert (other.value.mean, other.value.low, other.value.high, other.over) == (1.0, 0.9, 1.1, "prompts")
    assert [r.path.name for r in other.configuration.others] == ["c2"]
    assert (rloo.cost("seconds"), rloo.cost("tokens"), rloo.cost("steps")) == (60.0, 100.0, 2.0)


def test_differences_are_paired_by_seed_and_prompt(runs: Path) -> None:
    _, rloo, other = compare([runs]).rows
    # rloo - grpo: seed 1 (1, 0, 5), seed 2 (3, 4, 8): the table of tests/report/test_student.py
    assert rloo.difference is not None and rloo.pairs == (2, 3)
    assert rloo.difference.mean == 3.5
    assert (rloo.difference.high - 3.5) == pytest.approx(3.5 - rloo.difference.low)
    df = 26.5**2 / (13.5**2 + 13.5**2 / 2 + 0.5**2 / 2)
    from rlhf_cli.report.student import quantile

    assert rloo.difference.high - 3.5 == pytest.approx(quantile(0.975, df) * math.sqrt(26.5 / 6))
    # one seed in common: (0, -1, 1) has mean 0, so p is 1
    assert other.difference is not None and other.pairs == (1, 3)
    assert other.difference.mean == 0 and other.difference.p == pytest.approx(1.0)


def test_the_baseline_is_named_by_run_or_settings(runs: Path) -> None:
    for asked in ("b2", "algo=rloo,optim.lr=null", "algo=rloo, optim.lr=null", str(runs / "b1")):
        rows = compare([runs], baseline=asked).rows
        assert rows[1].difference is None and rows[1].baseline is rows[1].configuration
        assert rows[0].difference is not None and rows[0].difference.mean == -3.5
    base = compare([runs], baseline="optim.lr=5e-1").rows[0].baseline
    assert base is not None and base.label == "algo=rloo, optim.lr=0.5"
    with pytest.raises(ConfigError, match=r"baseline=algo=ppo: no finished configuration; .* of: algo=grpo; algo=rloo"):
        compare([runs], baseline="algo=ppo")


def test_other_rewards_are_never_subtracted(tmp_path: Path) -> None:
    for algo in ("grpo", "rloo"):
        for reward in ("bleu", "rouge"):
            made(tmp_path / f"{algo}-{reward}", [1.0, 2.0], algo=algo, reward=reward)
    rows = compare([tmp_path]).rows
    bases = {r.configuration.label: r.baseline.label for r in rows}
    assert bases["algo=rloo, reward=bleu"] == "algo=grpo, reward=bleu"
    assert bases["algo=rloo, reward=rouge"] == "algo=grpo, reward=rouge"
    alone = compare([tmp_path], baseline="algo=grpo,reward=bleu")
    assert [r.difference is None for r in alone.rows] == [True, True, False, True]
    assert "no baseline has the same reward" in text(alone)


def test_other_metrics_pair_over_seeds(runs: Path) -> None:
    found = compare([runs], metric="score/mean")
    assert [r.value.mean for r in found.rows] == pytest.approx([0.15] * 3)
    assert found.rows[1].pairs == (2, 0) and "mean of the last 10 steps" in text(found)
    with pytest.raises(ConfigError, match="metric=foo: no finished run has it; they have eval/reward"):
        compare([runs], metric="foo")


def test_other_metrics_stand_beside(runs: Path) -> None:
    head, *lines = text(compare([runs], also=["score/mean"])).split("\n")[3:7]
    assert head.split()[-1] == "score/mean"
    assert [line.split()[-1] for line in lines] == ["0.15"] * 3  # scores of 0.1 and 0.2 at the two steps


def test_a_repeated_seed_counts_once(runs: Path) -> None:
    made(runs / "z1", [1.0, 2.0, 0.0], seed=1)
    found = compare([runs])
    assert found.rows[0].configuration.seeds == [1, 2]
    assert f"{runs}/a1  finished, but a later run has its seed" in text(found)


def test_the_table(runs: Path) -> None:
    lines = text(compare([runs])).splitlines()
    row = next(x for x in lines if x.startswith("  algo=grpo"))
    assert row.split() == ["algo=grpo", "2", "1", "-", "baseline", "60", "s", "100"], "equal seeds have no interval"
    row = next(x for x in lines if "optim.lr=0.5" in x)
    assert "1, 1 failed" in row and "[0.9, 1.1]*" in row and "+0 [-2.484, +2.484] " in row and " 1.000 " in row
    assert f"  {runs}/c2  failed  at step 2: no luck" in lines
    assert (
        "Difference: paired by seed and prompt (2 x 3); t test with both random, Satterthwaite's degrees of freedom."
        in lines
    )


def test_a_sweep_is_read_from_its_record(tmp_path: Path) -> None:
    made(tmp_path / "s" / "seed=1", [1.0, 2.0])
    made(tmp_path / "s" / "seed=2", [5.0, 6.0], seed=2, status="preempted")
    points = [
        {"name": "seed=1", "status": "finished"},
        {"name": "seed=2", "status": "pruned", "error": "too low"},
        {"name": "seed=3", "status": "waiting"},
    ]
    (tmp_path / "s" / "sweep.json").write_text(json.dumps({"points": points}))
    found = compare([tmp_path])
    assert found.rows[0].configuration.seeds == [1] and found.rows[0].configuration.label == "all runs"
    shown = text(found)
    assert "1, 1 pruned" in shown and "seed=2  pruned  at step 2: too low" in shown and "seed=3  waiting" in shown


def test_csv_and_plot(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs pip install 'rlhf-cli[plot]'")
    table, picture = tmp_path / "out" / "t.csv", tmp_path / "out" / "c.png"
    assert cli.main(["compare", str(runs), f"csv={table}", f"plot={picture}"]) == 0
    assert f"the table is in {table}" in capsys.readouterr().out
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    assert [r["configuration"] for r in rows] == ["algo=grpo", "algo=rloo, optim.lr=null", "algo=rloo, optim.lr=0.5"]
    assert rows[1]["values"] == "3.0 6.0" and rows[1]["seeds"] == "1 2" and float(rows[1]["difference"]) == 3.5
    assert rows[2]["unfinished"] == "c2:failed" and rows[2]["optim.lr"] == "0.5" and rows[0]["difference"] == ""
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for words, said in {
        (): "compare: which runs? type rlhf compare DIR or RUN ..., e.g. rlhf compare runs/sweeps/NAME",
        ("nope",): "compare: nope: no such folder; give runs, sweeps, or a folder that holds them",
        ("empty",): "compare: empty: holds no run (no config.yaml, no sweep.json); give runs or a sweep",
        (
            "empty",
            "sort=x",
        ): "compare: sort=x: no such folder or setting; settings: baseline, metric, also, csv, plot, frontier",
    }.items():
        assert cli.main(["compare", *words]) == 2
        assert capsys.readouterr().err == f"rlhf: error: {said}\n"


def test_compare_imports_no_torch(runs: Path) -> None:
    code = f"import sys; from rlhf_cli import cli; cli.main(['compare', {str(runs)!r}]); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False"


def test_units() -> None:
    assert [duration(s) for s in (0.51, 12, 426, 8640)] == ["0.5 s", "12 s", "7.1 min", "2.4 h"]
    assert [count(n) for n in (812, 54_210, 3_123_000)] == ["812", "54.2k", "3.12M"]
