"""The frontier: which KL belongs to which score, seeds collapsed, and the picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rlhf_cli import cli
from rlhf_cli.errors import ConfigError
from rlhf_cli.report.compare import compare
from rlhf_cli.report.frontier import curve, draw, points
from rlhf_cli.report.numbers import RunFiles


def made(
    path: Path, kl: list[float], scores: list[float], evals: dict[int, float] | None = None, **config: object
) -> Path:
    """A finished run of len(kl) steps; no KL where the list is shorter than the scores."""
    path.mkdir(parents=True)
    names = {"algo": config.pop("algo", "grpo"), "reward": "bleu"}
    (path / "config.yaml").write_text(
        json.dumps({"seed": config.pop("seed", 1), "names": names, "reward": {"bleu": {}}})
    )
    (path / "status.json").write_text(json.dumps({"status": "finished", "step": len(scores)}))
    rows = [
        {"step": i + 1, "score/mean": x} | ({"hack/kl": kl[i]} if i < len(kl) else {}) for i, x in enumerate(scores)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = [{"step": s, "eval/reward": x} for s, x in (evals or {}).items()]
    (path / "evaluations.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    return path


def test_a_row_tells_of_the_policy_that_sampled_it_and_an_evaluation_of_the_next(tmp_path: Path) -> None:
    run = RunFiles(made(tmp_path / "a", [0.0, 1.0, 4.0], [0.1, 0.2, 0.3], {0: 0.0, 1: 0.5, 3: 0.7}))
    assert points(run, "score/mean") == [(1, 0.0, 0.1), (2, 1.0, 0.2), (3, 4.0, 0.3)]
    # before training: row 1; after one step: row 2; after the last there is no later row, so its own
    assert points(run, "eval/reward") == [(0, 0.0, 0.0), (1, 1.0, 0.5), (3, 4.0, 0.7)]


def test_an_estimate_below_zero_is_zero(tmp_path: Path) -> None:
    assert points(RunFiles(made(tmp_path / "a", [-0.1], [1.0])), "score/mean") == [(1, 0.0, 1.0)]


def test_seeds_collapse_at_the_steps_that_all_have(tmp_path: Path) -> None:
    one = made(tmp_path / "a", [0.0, 1.0, 9.0], [0.0, 1.0, 5.0])
    two = made(tmp_path / "b", [0.0, 3.0], [0.5, 2.0], seed=2)
    assert curve([RunFiles(one), RunFiles(two)], "score/mean") == [(1, 0.0, 0.25), (2, 2.0, 1.5)]


def test_the_picture_and_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs pip install 'rlhf-cli[plot]'")
    for algo, best in (("grpo", 3.0), ("rloo", 2.0)):
        for seed in (1, 2):
            kl = [(0.2 * i) ** 2 for i in range(12)]
            made(
                tmp_path / f"{algo}{seed}",
                kl,
                [math.sqrt(x) * (best - math.sqrt(x)) + 0.1 * seed for x in kl],
                algo=algo,
                seed=seed,
            )
    made(tmp_path / "ppo", [], [0.1, 0.2], algo="ppo")
    picture = tmp_path / "out" / "f.png"
    assert cli.main(["compare", str(tmp_path), "metric=score/mean", f"frontier={picture}"]) == 0
    said = capsys.readouterr().out
    assert f"the frontier is in {picture}" in said and said.endswith(
        "left out, it logged no KL from a reference: algo=ppo\n"
    )
    assert picture.read_bytes()[:4] == b"\x89PNG"
    alone = [r.configuration for r in compare([tmp_path / "ppo"]).rows]
    with pytest.raises(
        ConfigError, match=r"^frontier=f\.png: no finished run logged hack/kl, the KL from the reference; it is there"
    ):
        draw(alone, "score/mean", Path("f.png"))
