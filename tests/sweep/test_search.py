"""A search with the real Optuna over a stand-in for `rlhf train`: proposals, pruning, failures, going on."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from test_sweep import STUB, held, stop_when

from rlhf_cli.errors import ConfigError
from rlhf_cli.sweep import run

optuna = pytest.importorskip("optuna", reason="needs pip install 'rlhf-cli[sweep]'")
SMALL = ("steps=8", "eval.every=1", "sweep.trials=4", "sweep.startup=1", "sweep.sampler=random")
# With this seed Optuna's random sampler proposes good, good, bad rate, bad rate with the unlucky seed.
SPACE = ("optim.lr=choice(1e-2,1e-4)", "seed=choice(1,13)", "sweep.seed=4")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "start_command", lambda argv: [sys.executable, str(STUB), *argv])


def search(*words: str) -> int:
    return run.sweep(["hydra/sweeper=optuna", "sweep.name=s", *words], None)


def points() -> list[dict[str, Any]]:
    return json.loads(Path("runs/sweeps/s/sweep.json").read_text())["points"]


def study() -> Any:
    backend = optuna.storages.journal.JournalFileBackend("runs/sweeps/s/optuna.journal")
    return optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(backend))


def test_pruned_and_failed_trials_are_told_as_such(capfd: pytest.CaptureFixture[str]) -> None:
    assert search(*SPACE, *SMALL, "sweep.direction=maximize") == 1, "one trial failed"
    expected = ["COMPLETE", "COMPLETE", "PRUNED", "FAIL"]
    assert [t.state.name for t in study().trials] == expected
    assert [p["status"] for p in points()] == ["finished", "finished", "pruned", "failed"]
    assert [p["name"].split(",")[0] for p in points()] == ["trial=000", "trial=001", "trial=002", "trial=003"]
    assert study().best_value == pytest.approx(1000 * 1e-2 * 8 + 0.01) == points()[0]["value"]
    assert study().trials[0].intermediate_values[3] == pytest.approx(30.01)
    out = capfd.readouterr().out
    assert "best of 2 finished trials: 80.01 with optim.lr=0.01 seed=1" in out
    assert "trial=002,optim.lr=0.0001,seed=1 pruned: worse than the median of the others at step 1" in out
    assert "4 points: 2 finished, 1 pruned, 1 failed" in out and "seed 13 is unlucky" in out


def test_a_failed_trial_is_tried_again_on_request() -> None:
    assert search(*SPACE, *SMALL, "sweep.pruner=none") == 1
    Path("runs/sweeps/s/mended").touch()
    assert search(*SPACE, *SMALL, "sweep.pruner=none", "sweep.retry=true") == 0
    assert [p["status"] for p in points()] == ["finished"] * 4
    assert [t.state.name for t in study().trials] == ["COMPLETE"] * 3 + ["FAIL", "COMPLETE"]
    assert points()[3]["tries"] == 2 and points()[3]["trial"] == 4


def test_an_interrupted_search_goes_on_with_its_trial() -> None:
    space = ("optim.lr=tag(log,interval(1e-4,1e-2))", "rollout.top_k=int(interval(0,50))")
    hold = held()
    thread = stop_when("starts.jsonl", signal.SIGINT)
    assert search(*space, *SMALL, "sweep.trials=2") == 75
    thread.join()
    hold.unlink()
    first = points()[0]
    assert first["status"] == "interrupted" and study().trials[0].state.name == "RUNNING"
    assert search(*space, *SMALL, "sweep.trials=2") == 0
    assert study().trials[0].state.name == "COMPLETE"
    assert points()[0]["overrides"] == first["overrides"] and points()[0]["tries"] == 2
    rates = [float(p["overrides"][0].removeprefix("optim.lr=")) for p in points()]
    assert len(set(rates)) == 2 and all(1e-4 <= r <= 1e-2 for r in rates)
    assert all(0 <= int(p["overrides"][1].removeprefix("rollout.top_k=")) <= 50 for p in points())


def test_what_a_search_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="nothing to search"):
        search("steps=3")
    with pytest.raises(ConfigError, match=r"rollout.temperature=cold: wanted float"):
        search("rollout.temperature=choice(0.7,cold)")
    with pytest.raises(ConfigError, match=r"sweep.sampler=tpa: no such sampler; did you mean 'tpe'"):
        search("seed=1,2", "sweep.sampler=tpa")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"needs optuna; type: pip install 'rlhf-cli\[sweep\]'"):
        search("seed=1,2")
