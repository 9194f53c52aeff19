"""Every recipe runs at the size of a test: two steps, the same bits when resumed after the first, the same numbers on two processes, gates on.

Runs are in this process, and those of two processes in one pair of processes for all recipes, which work while this one does.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import e2e_support as e2e
import pytest
import torch
from e2e_support import TINY, Done
from omegaconf import OmegaConf
from safetensors.torch import load_file

from rlhf_cli import catalog
from rlhf_cli.compose import compose
from rlhf_cli.errors import ConfigError
from rlhf_cli.hardware import free_port
from rlhf_cli.launch.choose import launcher_of
from rlhf_cli.launch.local import prepare

# State between steps, and a step of several rollouts: half of all responses hold such a letter.
VARIANTS = [
    "algo=ppo shaping=adaptive_kl shaping.adaptive_kl.target=0.001",
    "algo=reinforce credit=running_mean",
    'algo=dapo select=drop_zero_variance_mask_truncated batch.resample=10 reward=regex reward.regex.mode=search reward.regex.pattern="[a-t]"',
    # Several updates a rollout, which debug=tiny has one of, and a judge's groups replaced.
    "experiment=nlpo batch.minibatches=2",
    "algo=gspo batch.minibatches=2",
    "experiment=writing_zero batch.resample=4",
]
RECIPES = VARIANTS + [
    f"{group}={name}" for group in ("algo", "experiment") for name in sorted(catalog.groups().get(group, {}))
]
# Two processes at ZeRO-3 for one of each kind of learner; the others shard nothing.
ZERO3 = ("algo=ppo", "algo=ppo_shared")
# A small learning rate: the order of sums moves last bits, and an update of 1e-4 would let the second step draw other tokens.
SMALL = ("reward_workers.processes=-1", "optim.lr=1e-6", "checkpoint.export=true")
STEPPED = ("policy/accuracy", "reward/accuracy", "eval/policy/accuracy")  # shares of signs, which a last bit may turn
# ReMax's advantage is 0 but for a rounded KL where a response is as good as the greedy one; that last bit decides whether the row is
# forwarded, and surprise is of the forwarded rows.
FORWARDED = {"algo=remax": ("policy/surprise", "eval/policy/surprise")}
LIMIT = 300  # seconds that a pair of processes may take for one recipe

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("recipes")]


def words(recipe: str, name: str, folder: Path) -> list[str]:
    # Equal scores, which BLEU gives to random bytes, would leave whitened rounding errors to compare.
    reward = ["reward=length"] if recipe.startswith("algo=") and "reward=" not in recipe else []
    reward += ["reward=[pair_verdict,length]"] if recipe == "experiment=stable_reinforce" else []
    return [*recipe.split(), *TINY, *SMALL, *reward, f"run.dir={folder}", f"run.name={name}"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def folder_of(recipe: str, place: Path) -> Path:
    return place / f"two-{name_of(recipe)}"


def name_of(recipe: str) -> str:
    """A folder's name."""
    return re.sub(r"\W+", "-", recipe).strip("-")


class Pair:
    """Two processes that train frozen runs in turn; a run that fails ends them, and the next one starts them anew."""

    def __init__(self, place: Path, folders: list[Path]) -> None:
        self.place, self.todo = place, folders
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self.end()
        ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        argv = [sys.executable, str(Path(__file__).parent / "recipes_ranks.py"), *map(str, self.todo)]
        for rank in ("0", "1"):
            env = e2e.environment(RANK=rank, LOCAL_RANK=rank, **ranks)
            env.pop("RLHF_WRITER", None)
            with self.log(rank).open("ab") as log:
                self.processes.append(subprocess.Popen(argv, stdout=log, stderr=log, env=env))

    def log(self, rank: str) -> Path:
        return self.place / f"rank-{rank}.log"

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes = []

    def finish(self, run: Path) -> None:
        """Wait until both processes have ended this run."""
        assert run in self.todo, "the run of two processes does not compose"
        end = time.monotonic() + LIMIT
        while not all((run / f"done-of-two-{rank}").exists() for rank in (0, 1)):
            failure = run / "failed-of-two.txt"
            if failure.exists():
                self.todo = self.todo[self.todo.index(run) + 1 :]
                self.start()
                raise AssertionError(f"two processes: {failure.read_text()}")
            logs = "\n".join(self.log(rank).read_text()[-2000:] for rank in ("0", "1"))
            codes = [p.poll() for p in self.processes]
            assert not all(codes) and time.monotonic() < end, f"two processes: {codes}\n{logs}"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def pair(place: Path, request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Two processes at work on every chosen recipe that composes."""
    chosen = {item.callspec.params["recipe"] for item in request.session.items if item.fspath == request.node.path}
    pair = Pair(place, [])
    for recipe in (r for r in RECIPES if r in chosen):
        more = ["hardware.processes=2", *(["hardware.zero=3"] if recipe in ZERO3 else [])]
        run = folder_of(recipe, place)
        with suppress(ConfigError):  # its own test says why
            cfg = compose("train", [*words(recipe, run.name, place), *more], None)
            OmegaConf.update(cfg, "hardware", launcher_of(cfg).hardware(cfg), merge=True)
            prepare(cfg).release()
            pair.todo.append(run)
    pair.start()
    yield pair
    pair.end()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_resumes_and_shards(recipe: str, pair: Pair, place: Path, rlhf: Callable[..., Done]) -> None:
    name = name_of(recipe)
    done = rlhf("train", *words(recipe, name, place))
    if done.code and "not installed" in done.err:
        pytest.skip(f"{recipe} NEEDS A PACKAGE THAT IS NOT HERE: {done.err.splitlines()[-1]}")
    assert done.code == 0, done.err
    run = place / name
    assert len(e2e.jsonl(run / "metrics.jsonl")) == 2 and "gate: " in e2e.notes(run)

    shutil.copytree(run, place / f"{name}-again")
    (place / f"{name}-again" / ".lock").unlink(missing_ok=True)
    shutil.rmtree(place / f"{name}-again" / "checkpoints" / "step-000002")
    done = rlhf("train", *words(recipe, f"{name}-again", place))
    assert done.code == 0, done.err
    assert "resumed from step-000001" in e2e.notes(place / f"{name}-again")
    e2e.assert_same(run, place / f"{name}-again")

    pair.finish(folder_of(recipe, place))
    nearly_same(run, folder_of(recipe, place), (*STEPPED, *FORWARDED.get(recipe, ())))
    for used in (run, place / f"{name}-again", folder_of(recipe, place)):
        shutil.rmtree(used / "checkpoints")  # forty recipes would fill a small disk


def nearly_same(one: Path, two: Path, turning: Sequence[str]) -> None:
    """Every logged number and exported weight, up to the order of sums."""
    for name, rows in e2e.numbers(one).items():
        others = e2e.numbers(two)[name]
        assert len(rows) == len(others), f"{name}: {len(rows)} rows and {len(others)}"
        for r, s in zip(rows, others, strict=True):
            wrong = {k: (r.get(k), s.get(k)) for k in {**r, **s} if k not in turning and not close(r.get(k), s.get(k))}
            assert not wrong, f"{name} at step {r.get('step')}: {wrong}"
    first, second = (load_file(run / "export" / "model.safetensors") for run in (one, two))
    assert first.keys() == second.keys()
    for key, value in first.items():
        away = float((value.float() - second[key].float()).abs().max())
        assert torch.isfinite(value).all() and away < 5e-5, f"{key} differs by {away}"


def close(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, float | int) and isinstance(b, float | int):
        return a == pytest.approx(b, rel=2e-2, abs=1e-3, nan_ok=True)
    return a == b
