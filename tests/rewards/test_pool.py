"""Rewards in worker processes: the same numbers, and a sample that hangs or kills loses itself alone."""

import contextlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from rlhf_cli.config import build, check_node
from rlhf_cli.errors import GateError
from rlhf_cli.launch.stop import SIGNALS
from rlhf_cli.rewards.combine import Combined
from rlhf_cli.rewards.per_sample import Row
from rlhf_cli.rewards.pool import Pooled, Workers
from rlhf_cli.rewards.worker import attempt
from rlhf_cli.types import Sample

BLEU = {
    "_target_": "rlhf_cli.rewards.bleu.Bleu", "smooth": "exp", "smooth_value": None, "max_order": 4, "effective_order": True,
    "tokenize": "13a", "lowercase": False,
}  # fmt: skip
ROUGE = {"_target_": "rlhf_cli.rewards.rouge.Rouge", "variant": "rougeL", "stemmer": True}
MATH = {"_target_": "rlhf_cli.rewards.math_answer.MathAnswer", "method": "number", "extract": "any", "tolerance": 0.0}
WORDS = [
    "the",
    "of",
    "a",
    "model",
    "reward,",
    "learns",
    '"quoted"',
    "isn't",
    "3.14",
    "naïve",
    "über—dash",
    "東京",
    "policy\n",
    "slowly;",
    "token",
    "(why?)",
    "42",
]


def python(tmp_path, body, sees="sample"):
    file = tmp_path / "my_pool_rewards.py"
    file.write_text(f"import os, sys, time\n\ndef score(responses):\n{body}")
    return {"_target_": "rlhf_cli.rewards.python.Python", "path": f"{file}:score", "sees": sees, "workers": True}


def pooled(node, workers, name="x"):
    sig, settings = check_node(node, name)
    return Pooled(name, build(node, name), (sig.target, settings), workers)


def test_a_scorer_in_workers_brings_the_columns_that_it_brings_without() -> None:
    """Dropped, an objective that reads them would find none."""
    node = {"_target_": "rlhf_cli.rewards.levels.Levels", "format": "<answer>(.*?)</answer>", "answer": r"\d+"}
    scorer = pooled(node, Workers(0, 20.0))
    assert scorer.columns == "best" and pooled(BLEU, Workers(0, 20.0)).columns == ""
    found = scorer([Sample("p", f"<answer>{n}</answer>", references=("4",)) for n in (4, 5)], torch.zeros(2).long())
    assert found.components["best"].tolist() == [1, 0]


def running():
    """The worker processes of this process."""
    found = set()
    for p in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie counts as none
            found |= {p} if "rlhf_cli.rewards.worker" in " ".join(p.cmdline()) else set()
    return found


def wait_for(look, count):
    end = time.monotonic() + 30
    while len(found := look()) != count:
        assert time.monotonic() < end, f"{len(found)} workers, not {count}"
        time.sleep(0.01)
    return found


def texts(groups, k, seed=0):
    rng = random.Random(seed)
    samples = []
    for g in range(groups):
        references = tuple(" ".join(rng.choices(WORDS, k=rng.randrange(5, 60))) for _ in range(rng.randrange(3)))
        for _ in range(k):
            words = [w if rng.random() < 0.7 else rng.choice(WORDS) for r in references[:1] for w in r.split(" ")]
            samples.append(Sample(f"p{g}", " ".join(words), references, {"n": g}, f"u{g}"))
    return samples, torch.arange(groups).repeat_interleave(k)


def same(a, b):
    assert torch.equal(a.value.nan_to_num(-9), b.value.nan_to_num(-9)) and torch.equal(a.missing, b.missing)
    assert a.reasons == b.reasons and list(a.components) == list(b.components)
    for name, x in a.components.items():
        assert torch.equal(x.nan_to_num(-9), b.components[name].nan_to_num(-9)), name


@pytest.mark.parametrize("processes", [1, 3])
def test_the_numbers_are_those_of_scoring_in_place(processes):
    samples, group = texts(25, 8)
    workers = Workers(processes, 30.0)
    several = [pooled(node, workers, node["_target_"]) for node in (BLEU, ROUGE, MATH)]
    for node, scorer in zip((BLEU, ROUGE, MATH), several, strict=True):
        alone = build(node, "x")(samples, group)
        assert 0 < alone.missing.sum() < len(samples) and len(alone.value.unique()) > 1
        same(scorer(samples, group), alone)
        same(pooled(node, Workers(0, 30.0))(samples, group), alone)
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(1))
        dealt = pooled(node, Workers(0, 30.0))([samples[i] for i in order], group[order])
        assert torch.equal(dealt.value.nan_to_num(-9), alone.value[order].nan_to_num(-9))


def test_early_groups_are_scored_once(tmp_path):
    log = tmp_path / "log"
    node = python(
        tmp_path, f"    open({str(log)!r}, 'a').write(responses[0] + '\\n')\n    return [len(responses[0])]\n"
    )
    scorer = pooled(node, Workers(1, 30.0))
    samples = [Sample("p", "x" * i, uid=f"u{i // 2}") for i in range(1, 7)]
    scorer.begin(samples[1:3])
    scorer.begin(samples[3:5])
    got = scorer(samples, torch.tensor([0, 1, 1, 2, 2, 3]))
    assert got.value.tolist() == [1, 2, 3, 4, 5, 6]
    assert sorted(map(len, log.read_text().split())) == [1, 2, 3, 4, 5, 6]
    other = [Sample("p", "xx", ("r",), uid="u1"), Sample("p", "xxx", ("r",), uid="u1")]
    scorer.begin(samples[1:3])
    scorer(other, torch.tensor([0, 0]))
    assert len(log.read_text().split()) == 10, "the early group has other references: it is not the same"


TROUBLE = (
    "    r = responses[0]\n"
    "    while r == 'hang': pass\n"
    "    if r == 'die': os._exit(3)\n"
    "    if r == 'abort': os.abort()\n"
    "    if r == 'leave': sys.exit(4)\n"
    "    if r == 'raise': raise KeyError('no such thing')\n"
    "    return [float('nan') if r == 'nan' else None if r == 'none' else len(r)]\n"
)
REASONS = {
    "hang": "it took over 0.4 s (reward_workers.timeout=0.4)",
    "die": "its worker process ended by itself, exit status 3",
    "abort": "its worker process ended by itself, signal SIGABRT",
    "leave": "its worker process ended by itself, exit status 4",
    "raise": "my_pool_rewards.py:9: KeyError: 'no such thing'",
    "nan": "returned nan",
    "none": "returned None",
}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sample_that_fails_loses_itself_alone(tmp_path, processes):
    good = ["a", "bb", "ccc", "dddd"]
    responses = [r for bad in REASONS for r in (*good, bad)] + good
    samples = [Sample("p", r, uid=f"u{i}") for i, r in enumerate(responses)]
    scorer = pooled(python(tmp_path, TROUBLE), Workers(processes, 0.4))
    got = scorer(samples, torch.arange(len(samples)) // 5)
    for i, r in enumerate(responses):
        assert bool(got.missing[i]) == (r in REASONS) == bool(got.value[i].isnan())
        if r in REASONS:
            assert got.reasons[i].endswith(REASONS[r])
        else:
            assert got.value[i] == len(r)
    assert sorted(got.reasons) == [i for i, r in enumerate(responses) if r in REASONS]


def test_a_group_is_seen_whole_and_lost_whole(tmp_path):
    body = "    while 'hang' in responses: pass\n    return [len(responses)] * len(responses)\n"
    scorer = pooled(python(tmp_path, body, sees="group"), Workers(1, 0.2))
    samples = [Sample("p", r) for r in ("a", "b", "hang", "c", "d", "e")]
    got = scorer(samples, torch.tensor([0, 0, 1, 1, 1, 0]))
    assert got.missing.tolist() == [False, False, True, True, True, False]
    assert got.value[[0, 1, 5]].tolist() == [3, 3, 3]
    assert set(got.reasons.values()) == {"it took over 0.6 s (reward_workers.timeout=0.2)"}


def test_a_worker_killed_from_outside_costs_nothing(tmp_path):
    before = running()
    body = f"    open({str(tmp_path / 'begun')!r}, 'w').close()\n    time.sleep(0.3)\n    return [1] * len(responses)\n"
    scorer = pooled(python(tmp_path, body), Workers(1, 30.0))
    job = scorer.submit([Sample("p", "a"), Sample("p", "b")], torch.tensor([0, 0]))
    (worker,) = wait_for(lambda: running() - before, 1)
    wait_for(lambda: list(tmp_path.glob("begun")), 1)
    worker.kill()
    assert job().value.tolist() == [1, 1]


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize(
    "body, message",
    [
        ("    return [1, 2]\n", "returned 2 values for 1 samples"),
        ("    return ['much']\n", "a value must be a number"),
    ],
)
def test_a_function_that_breaks_its_contract_stops_the_run(tmp_path, processes, body, message):
    scorer = pooled(python(tmp_path, body), Workers(processes, 30.0))
    with pytest.raises(GateError, match=message):
        scorer([Sample("p", "a")], torch.tensor([0]))


class TooMany:
    """Gives a value more than it should."""

    pooled = True

    def rows(self, samples):
        return (Row(1.0) for _ in range(len(samples) + 1))


@pytest.mark.parametrize("processes", [0, 1])
def test_a_value_too_many_is_told_and_not_given_to_the_next_job(processes):
    pool = Pooled("many", TooMany(), (f"{__name__}.TooMany", {}), Workers(processes, 20.0))
    with pytest.raises(GateError, match=r"a reward returned more values than the 1 samples that it got"):
        pool([Sample("p", "x")], torch.zeros(1, dtype=torch.int64))


def test_an_import_that_fails_only_in_a_worker_is_told(tmp_path):
    node = python(tmp_path, "    return [1]\n")
    scorer = pooled(node, Workers(1, 30.0))
    (tmp_path / "my_pool_rewards.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(GateError, match=r"worker could not start: .*nothing_of_that_name"):
        scorer([Sample("p", "a")], torch.tensor([0]))


def test_rows_after_one_that_raises_are_scored():
    class Odd:
        def rows(self, samples):
            for s in samples:
                yield Row(1 / len(s.response))

    rows = list(attempt(Odd(), [Sample("p", r) for r in ("", "ab", "", "a")]))
    assert [r.value for r in rows] == [None, 0.5, None, 1] and rows[0].reason == "ZeroDivisionError: division by zero"


def test_the_sum_waits_for_the_pool_and_says_why_rows_are_missing(tmp_path):
    workers = Workers(1, 0.4)
    parts = {"mine": (1.0, pooled(python(tmp_path, TROUBLE), workers, "mine")), "m": (0.5, pooled(MATH, workers, "m"))}
    combined = Combined(parts)
    samples = [Sample("p", r, ("42",)) for r in ("is 42", "raise", "41")]
    combined.begin(samples)
    got = combined(samples, torch.zeros(3, dtype=torch.int64))
    assert got.value[[0, 2]].tolist() == [5.5, 2] and got.missing.tolist() == [False, True, False]
    assert got.components["m/found"].tolist() == [1, 0, 1]
    assert list(got.reasons) == [1] and got.reasons[1].startswith("mine: ") and combined.seconds["m"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads the signals of a process from /proc")
def test_workers_and_what_they_start_ignore_every_signal_that_stops_a_run(tmp_path):
    # An ignored signal stays ignored in programs that a process starts: the bits of SigIgn, signal n at n - 1.
    read = "open('/proc/self/status').read().split('SigIgn:')[1].split()[0]"
    body = (
        f"    import subprocess\n    child = subprocess.check_output([sys.executable, '-c', \"print({read})\"], text=True)\n"
        f"    both = int(child, 16) & int({read}, 16)\n"
        f"    return [float(sum(both >> (n - 1) & 1 for n in {[int(n) for n in SIGNALS]}))]"
    )
    got = pooled(python(tmp_path, body), Workers(1, 60.0))([Sample("p", "x")], torch.zeros(1, dtype=torch.int64))
    assert got.value.tolist() == [len(SIGNALS)], got.reasons


def test_the_metrics_need_no_torch():
    names = ["worker", "bleu", "bleuberi", "chrf", "rouge", "math_answer", "rules", "python"]
    code = "import sys; from importlib import import_module as load\n" + "".join(
        f"load('rlhf_cli.rewards.{n}')\n" for n in names
    )
    subprocess.run([sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"], check=True)


PARENT = """
import sys, torch
from test_pool import *
scorer = pooled(python(Path(sys.argv[1]), "    os.write(1, b'%d\\\\n' % os.getpid())\\n    while True: pass\\n"), Workers(2, 60.0))
scorer([Sample("p", "a"), Sample("p", "b" * 40)] + [Sample("p", "c")] * 40, torch.arange(42))
"""


def test_workers_die_with_a_killed_parent_even_while_they_hang(tmp_path):
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})
    assert parent.stdout is not None
    family = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
    assert all(p.ppid() == parent.pid and p.nice() == 10 for p in family)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_workers_end_with_the_pool():
    before = running()
    workers = Workers(2, 30.0)
    scorer = pooled(ROUGE, workers)
    workers.start()
    mine = wait_for(lambda: running() - before, 2)
    scorer(*texts(4, 8))
    del workers, scorer
    wait_for(lambda: running() & mine, 0)
