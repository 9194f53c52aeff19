"""From a command line to points: their order, names and checks."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_cli.errors import ConfigError
from rlhf_cli.record.rundir import RunDir
from rlhf_cli.sweep import points
from rlhf_cli.sweep.points import LONGEST, check, expand, name_of, read
from rlhf_cli.sweep.record import state


def names(*words: str) -> list[str]:
    return [p.name for p in expand(read(words, None))]


def test_points_come_in_the_order_typed_with_the_last_key_fastest() -> None:
    found = expand(read(["algo=grpo,rloo", "steps=3", "seed=1,2"], None))
    assert [p.name for p in found] == ["algo=grpo,seed=1", "algo=grpo,seed=2", "algo=rloo,seed=1", "algo=rloo,seed=2"]
    assert found[1].words == ("algo=grpo", "steps=3", "seed=2")
    assert found[1].overrides == ("algo=grpo", "seed=2")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("seed=range(1,4)", ["seed=1", "seed=2", "seed=3"]),
        ("seed=choice(5,2)", ["seed=5", "seed=2"]),
        ("seed=sort(5,2)", ["seed=2", "seed=5"]),
        ("rollout.temperature=range(0.5,1.1,0.25)", [f"rollout.temperature={t}" for t in (0.5, 0.75, 1.0)]),
        ("algo=glob(*po,exclude=[d*,g*])", ["algo=cispo", "algo=ppo"]),
        ("reward=bleu,[bleu,length]", ["reward=bleu", "reward=bleu+length"]),
        ("dataset.system='a b',c", ["dataset.system=_a_b", "dataset.system=c"]),
        ("+reward.bleu.weight=1,2", ["reward.bleu.weight=1", "reward.bleu.weight=2"]),
        ("seed=4", ["point"]),
    ],
)
def test_every_kind_of_sweep_that_hydra_lists(word: str, expected: list[str]) -> None:
    assert names(word) == expected


def test_names_are_safe_bounded_and_distinct() -> None:
    assert name_of(["model.path=/data/my model:v2", "seed=1"]) == "model.path=_data_my_model_v2,seed=1"
    long = name_of([f"dataset.system={'x' * 300}"])
    assert len(long) == LONGEST and long != name_of([f"dataset.system={'x' * 301}"])
    same = names("dataset.system='a b','a:b'")
    assert len(set(same)) == 2 and all(n.startswith("dataset.system=_a_b-") for n in same)
    folded = names("dataset.system=Ab,aB")  # one folder where file systems ignore case
    assert len({n.lower() for n in folded}) == 2
    assert names("seed=1,1") == ["seed=1"]


def test_the_name_of_a_sweep_follows_from_what_is_swept() -> None:
    first = read(["algo=grpo,rloo", "seed=1,2", "steps=3"], None)
    assert first.name.startswith("algo-seed-")
    assert read(["steps=3", "seed=1,2", "algo=grpo,rloo"], None).name == first.name, "the order of words is no matter"
    assert (
        read(["algo=grpo,rloo", "seed=1,2", "steps=3", "sweep.parallel=2", "sweep.retry=true"], None).name == first.name
    )
    assert read(["algo=grpo,rloo", "seed=1,2", "steps=4"], None).name != first.name
    assert read(["algo=grpo,rloo", "seed=1,3", "steps=3"], None).name != first.name


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sweep.parallel=1,2", "sweep.parallel=1,2: a setting of the sweep itself; type one value"),
        ("run.name=x", "run.name=x: points are named by their overrides and continue by themselves; sweep.name=NAME"),
        ("resume=never", "resume=never: points are named by their overrides and continue by themselves; leave it away"),
        ("seed=interval(1,5)", "seed=interval(1,5): an interval has no list of values; add hydra/sweeper=optuna"),
        ("algo=glob(zzz*)", "algo=glob(zzz*): matches nothing; give at least one value"),
        ("algo=grpo,grop", "algo=grop: no such option; did you mean 'grpo'?"),
    ],
)
def test_what_cannot_be_swept_is_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as e:
        expand(read([word], None))
    assert str(e.value).startswith(message)


def test_all_that_is_wrong_is_said_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    found = expand(read(["seed=1,x", "optim.lr=1e-5,fast"], None))
    with pytest.raises(ConfigError, match="3 of 4 points are wrong; nothing was started"):
        check(found, None)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("rlhf: error: optim.lr=fast: wanted float")
    assert lines[0].endswith("(in seed=1,optim.lr=fast)")
    assert lines[1].startswith("rlhf: error: seed=x: wanted int") and "seed=x,optim.lr=fast" in lines[1]


def test_one_fault_is_one_line() -> None:
    with pytest.raises(ConfigError) as e:
        check(expand(read(["seed=1,2", "stepz=3"], None)), None)
    assert str(e.value).startswith("stepz: unknown key") and "(in" not in str(e.value), "wrong in every point"


def test_a_plan_that_cannot_run_is_found_too() -> None:
    with pytest.raises(ConfigError, match=r"value.*\(in credit=gae\)"):
        check(expand(read(["algo=grpo", "credit=group_norm,gae"], None)), None)
    assert [c.seed for c in check(expand(read(["seed=3,4"], None)), None)] == [3, 4]
    assert points.is_here(check(expand(read(["seed=3"], None)), None)[0])


def test_a_status_of_an_earlier_job_is_not_the_points_state(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "point").create()
    run.write_json("status.json", {"status": "failed", "job": "7"})
    assert state("running", run) == "failed"  # no job.json: the run's own word
    run.write_json("job.json", {"job": "8"})
    assert (state("submitted", run), state("running", run)) == ("submitted", "submitted")
    run.write_json("status.json", {"status": "running", "job": "8"})
    run.claim()  # its job is at work
    assert (state("submitted", RunDir(run.path)), state("waiting", RunDir(run.path))) == ("submitted", "running")
    run.release()
    run.write_json("status.json", {"status": "preempted", "job": "8"})
    assert state("submitted", run) == "submitted", "cancelled: again only when that is asked for"
    run.write_json("status.json", {"status": "finished", "job": "8"})
    assert state("submitted", run) == "finished"
