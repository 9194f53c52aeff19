"""`hydra/sweeper=optuna`: points that Optuna proposes, each a process and a run directory; bad ones are stopped early."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from rlhf_cli.catalog import must
from rlhf_cli.errors import ConfigError
from rlhf_cli.report.numbers import DEFAULTS, RunFiles, metric_of
from rlhf_cli.sweep.points import Command, Point, check, choices, is_here, name_of
from rlhf_cli.sweep.pool import Running, Share, work
from rlhf_cli.sweep.run import Sweep

STORE = "optuna.journal"  # beside sweep.json; read it with optuna.storages.JournalStorage
SAMPLERS = ("tpe", "random")
PRUNERS = ("median", "none")
DIRECTIONS = ("maximize", "minimize")


def prepare(command: Command) -> list[Point]:
    """Points at the ends of the searched space, each choice once: what can be checked before anything is proposed."""
    _optuna()
    if not command.swept:
        raise ConfigError("hydra/sweeper=optuna: nothing to search; e.g. 'optim.lr=tag(log,interval(1e-6,1e-4))'")
    ends = {o.get_key_element(): _ends(o, command.config_dir) for o in command.swept}
    base = {key: values[0] for key, values in ends.items()}
    rows = [base, *({**base, key: v} for key, values in ends.items() for v in values[1:])]
    return [command.point(r) for r in rows]


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError("hydra/sweeper=optuna: needs optuna; type: pip install 'rlhf-cli[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


# ---- the space ----


def _ends(o: Override, config_dir: str | None) -> list[str]:
    made = o.value()
    if isinstance(made, IntervalSweep):
        return [_number(made.start, o), _number(made.end, o)]
    found = list(choices(o, config_dir))
    return [found[0], found[-1]] if isinstance(made, RangeSweep) else found


def _number(value: Any, o: Override) -> str:
    return repr(int(value) if _whole(o) else float(value))


def _whole(o: Override) -> bool:
    """Whether an interval is of integers: int(interval(1, 8))."""
    made = o.value()
    return isinstance(made, IntervalSweep) and isinstance(made.start, int) and isinstance(made.end, int)


def propose(trial: Any, o: Override, config_dir: str | None) -> str:
    """Optuna's value for one swept key, as it is typed: an interval as a number, anything listed as a choice."""
    key, made = o.get_key_element(), o.value()
    log = "log" in getattr(made, "tags", ())
    if not isinstance(made, IntervalSweep):
        found = list(choices(o, config_dir))
        return (
            str(trial.suggest_categorical(key, found))
            if not isinstance(made, RangeSweep)
            else _ranged(trial, key, found)
        )
    assert made.start is not None and made.end is not None
    if _whole(o):
        return repr(trial.suggest_int(key, int(made.start), int(made.end), log=log))
    return repr(trial.suggest_float(key, float(made.start), float(made.end), log=log))


def _ranged(trial: Any, key: str, found: Sequence[str]) -> str:
    """A value of range(...): ordered, so that the sampler may learn that near ones are alike."""
    return found[trial.suggest_int(key, 0, len(found) - 1)]


def short(value: str) -> str:
    """A number with four digits, for a folder's name."""
    try:
        return value if "." not in value and "e" not in value else f"{float(value):.4g}"
    except ValueError:
        return value


# ---- the search ----


def search(opened: Sweep) -> None:
    """Ask, run, tell, until there are as many trials as asked for; unfinished ones of an earlier start go on first."""
    if not is_here(opened.cfg):
        raise ConfigError(
            "hydra/sweeper=optuna: a search needs a result before the next point; type launcher=local, inside a job"
        )
    made = Search(opened)
    work(made.begin, made.end, made.look, opened.slots, opened.wish)
    made.say_best()


class Search:
    """A study in the sweep's folder, and the points of its open trials."""

    def __init__(self, opened: Sweep) -> None:
        self.opened, self.record, self.settings = opened, opened.record, opened.settings
        self.states = _optuna().trial.TrialState
        self.study = _study(opened)
        self.trials: dict[str, Any] = {}  # point -> open trial
        self.seen: dict[str, int] = {}  # point -> step up to which its metric was reported
        self.record.settle()
        self.todo = self._left_over()
        s = self.settings
        self.record.data["search"] = {
            k: s[k] for k in ("metric", "direction", "sampler", "pruner", "startup", "seed", "trials")
        }
        self.record.save()
        opened.board.say(
            f"rlhf: search {self.record.path}: {s.trials} trials, {len(self.study.trials) - len(self.todo)} before"
        )
        if s.pruner != "none" and not opened.cfg.eval.every and (not s.metric or s.metric.startswith("eval/")):
            opened.board.say("rlhf: no trial will be pruned: nothing is evaluated on the way; type eval.every=N")

    # -- what the pool calls --

    def begin(self, share: Share) -> Running | None:
        """The next trial that is left over or proposed; None when there are as many as asked for."""
        while self.todo or len(self.study.trials) < self.settings.trials:
            point = self.todo.pop(0) if self.todo else self._ask()
            if point is not None:
                return self.opened.begin(point, share)
        return None

    def look(self, running: Mapping[int, Running]) -> None:
        """Report the metric of running trials, and stop those that the pruner gives up."""
        self.opened.look(running)
        for r in running.values():
            trial = self.trials[r.name]
            for step, value in self._news(r.name):
                trial.report(value, step)
                if not r.pruned and trial.should_prune():
                    r.pruned = step
                    r.stop()

    def end(self, running: Running, code: int) -> None:
        """Note in the record and in the study how a trial ended; an interrupted one stays open."""
        name, tell = running.name, self.study.tell
        state = self.opened.end(running, code)
        value, number = metric_of(self.record.path / name, self.settings.metric), self.trials[name].number
        if state == "finished" and math.isnan(value):
            state, wanted = "failed", self.settings.metric or "eval/reward or score/mean"
            self.record.set(name, status=state, error=f"it has no {wanted}")
        if state == "finished":
            self.record.set(name, value=value)
            tell(number, value)
        elif running.pruned and state == "interrupted":
            why = f"worse than the median of the others at step {running.pruned}"
            self.record.set(name, status="pruned", value=None if math.isnan(value) else value, error=why)
            self.opened.board.say(f"       {name} pruned: {why}")
            tell(number, state=self.states.PRUNED)
        elif state == "failed":
            tell(number, state=self.states.FAIL)

    # -- trials --

    def _ask(self) -> Point | None:
        """A new trial and its point. None: what was proposed cannot be composed, and the trial failed."""
        trial = self.study.ask()
        values = self._propose(trial)
        name = name_of([f"trial={trial.number:03d}", *(f"{k}={short(v)}" for k, v in values.items())])
        point = self.opened.command.point(values, name)
        self.record.add([point], [["rlhf", *self.opened.argv(point)]])
        self.record.set(name, trial=trial.number, words=list(point.words), value=None)
        try:
            check([point], self.opened.command.config_dir)
        except ConfigError as e:
            self.record.set(name, status="failed", error=str(e))
            self.study.tell(trial.number, state=self.states.FAIL)
            self.opened.board.say(f"       {name} failed: {e}")
            return None
        self.trials[name] = trial
        return point

    def _propose(self, trial: Any) -> dict[str, str]:
        command = self.opened.command
        return {o.get_key_element(): propose(trial, o, command.config_dir) for o in command.swept}

    def _left_over(self) -> list[Point]:
        """Points whose trial is open: stopped, killed, or asked for just before that; with sweep.retry the failed ones too."""
        entries = [e for e in self.record.data["points"] if "trial" in e]
        known = {e["trial"] for e in entries}
        for frozen in self.study.get_trials(states=(self.states.RUNNING,)):
            if frozen.number not in known:  # the process died before the point of this trial was noted
                self.study.tell(frozen.number, state=self.states.FAIL)
        found = []
        for e in entries:
            frozen = self.study.trials[e["trial"]]
            if e["status"] == "failed" and self.settings.retry:
                self.study.enqueue_trial(frozen.params)  # Optuna reopens no trial: a new one takes its place
                trial = self.study.ask()
                self._propose(trial)
                self.record.set(e["name"], trial=trial.number)
            elif e["status"] in ("waiting", "interrupted", "finished") and not frozen.state.is_finished():
                trial = _optuna().trial.Trial(self.study, frozen._trial_id)
            else:
                continue
            self.trials[e["name"]] = trial
            self.seen[e["name"]] = max(frozen.intermediate_values, default=0)
            found.append(Point(e["name"], tuple(e["overrides"]), tuple(e["words"])))
        return found

    def _news(self, name: str) -> list[tuple[int, float]]:
        """The metric after steps not yet reported. The evaluation before the first step is the same for all."""
        run = RunFiles(self.record.path / name)
        metrics = [self.settings.metric] if self.settings.metric else DEFAULTS
        series = next((s for m in metrics if (s := run.series(m))), [])
        found = [(step, value) for step, value in series if step > self.seen.get(name, 0)]
        self.seen[name] = max([self.seen.get(name, 0), *(step for step, _ in found)])
        return found

    def say_best(self) -> None:
        """The best finished trial."""
        done = [e for e in self.record.data["points"] if e["status"] == "finished" and e.get("value") is not None]
        if done:
            pick = max if self.settings.direction == "maximize" else min
            best = pick(done, key=lambda e: e["value"])
            self.record.data["best"] = best["name"]
            self.record.save()
            line = f"best of {len(done)} finished trials: {best['value']:.4g} with {' '.join(best['overrides'])}"
            self.opened.board.say(f"rlhf: {line}")


def _study(opened: Sweep) -> Any:
    """The study in the sweep's folder, new or continued."""
    optuna, s = _optuna(), opened.settings
    must(s.sampler, SAMPLERS, f"sweep.sampler={s.sampler}: no such sampler", "samplers")
    must(s.pruner, PRUNERS, f"sweep.pruner={s.pruner}: no such pruner", "pruners")
    must(s.direction, DIRECTIONS, f"sweep.direction={s.direction}: wrong", "directions")
    seed = s.seed + 7919 * len(opened.record.data["points"])  # a continued search must not draw its first numbers again
    made = {
        "tpe": lambda: optuna.samplers.TPESampler(
            n_startup_trials=s.startup, seed=seed, constant_liar=len(opened.slots) > 1
        ),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    prune = {
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=s.startup),
        "none": optuna.pruners.NopPruner,
    }
    backend = optuna.storages.journal.JournalFileBackend(str(opened.record.path / STORE))
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(backend), study_name="sweep", load_if_exists=True,
        direction=s.direction, sampler=made[s.sampler](), pruner=prune[s.pruner](),
    )  # fmt: skip
