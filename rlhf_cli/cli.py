"""`rlhf VERB ...`: takes the verb and its flags off the command line and hands the rest to the verb.

Nothing heavy is imported before a verb needs it: `rlhf --help` answers at once.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.exits import DONE, FAILED, GATE, INTERRUPTED, WRONG_INPUT
from rlhf_cli.record.redact import hide_secrets
from rlhf_cli.usage import VERBS, main_help, verb_help

if TYPE_CHECKING:
    from omegaconf import DictConfig

WORKING = ("train", "resume", "eval", "generate", "score", "merge")  # verbs that do more than print


@dataclass(frozen=True)
class Request:
    """A verb's command line, taken apart."""

    verb: str
    words: list[str] = field(default_factory=list)  # overrides and positional words, in order
    config_dir: str | None = None
    cfg: bool = False
    multirun: bool = False
    script: bool = False  # --print-sbatch


# ---- verbs ----


def compose(request: Request, words: list[str] | None = None) -> DictConfig:
    from rlhf_cli.compose import compose as made

    return made(VERBS[request.verb].config, request.words if words is None else words, request.config_dir)


def print_config(cfg: DictConfig) -> int:
    from omegaconf import OmegaConf

    print(OmegaConf.to_yaml(cfg, resolve=True), end="")
    return DONE


def start(cfg: DictConfig) -> int:
    """Validate and launch one run."""
    from rlhf_cli.launch.local import launch
    from rlhf_cli.plan import validate

    validate(cfg)
    return launch(cfg) or DONE


def sweep_point(cfg: DictConfig) -> int:
    """One run of a sweep by Hydra; its failure must not stop the others."""
    return guard(lambda: start(cfg))


def many(request: Request) -> int:
    """`train -m`: our own sweep, or Hydra where one of its launchers or other sweepers is asked for."""
    from rlhf_cli.sweep.run import ours, sweep

    words = ours(request.words)
    if words is not None:
        return sweep(words, request.config_dir)
    from rlhf_cli.compose import multirun

    return multirun("train", request.words, request.config_dir, sweep_point)


def train(request: Request) -> int:
    if request.multirun and request.script:
        raise ConfigError("--print-sbatch: shows one run; leave -m away and give each key one value")
    if request.multirun and not request.cfg:
        return many(request)
    cfg = compose(request)
    if not (request.cfg or request.script):
        return start(cfg)
    from rlhf_cli.plan import validate

    validate(cfg)
    return print_script(cfg) if request.script else print_config(cfg)


def print_script(cfg: DictConfig) -> int:
    from rlhf_cli.launch.choose import launcher_of

    text = launcher_of(cfg).script(cfg)
    if not text:
        raise ConfigError("--print-sbatch: this launcher submits nothing; type launcher=slurm")
    print(text, end="")
    return DONE


def plan(request: Request) -> int:
    cfg = compose(request)
    if request.cfg:
        return print_config(cfg)
    from rlhf_cli.report.planned import describe

    print(describe(cfg))
    return DONE


def resume(request: Request) -> int:
    if not request.words or ("=" in request.words[0] and not Path(request.words[0]).exists()):
        raise ConfigError("resume: which run? type rlhf resume RUN, e.g. rlhf resume runs/NAME")
    run, *overrides = request.words
    from rlhf_cli.launch.local import resume as again

    return again(Path(run), overrides) or DONE


def with_model(words: list[str]) -> list[str]:
    """Turn a leading RUN_OR_MODEL into settings."""
    if not words or words[0].startswith(("-", "+", "~")) or ("=" in words[0] and not Path(words[0]).exists()):
        return words
    path = words[0].replace("\\", "\\\\").replace("'", "\\'")
    return ["model=path", f"model.path='{path}'", *words[1:]]


def on_model(request: Request) -> int:
    """eval, generate: a verb over a model or run."""
    return run_verb(request, with_model(request.words))


def inherited(cfg: DictConfig, words: list[str]) -> DictConfig:
    """What a run was trained on is what it is measured on, unless the command line says otherwise."""
    if not cfg.get("model") or not (Path(cfg.model.path or "-") / "config.yaml").exists():
        return cfg
    from rlhf_cli.config import load_config
    from rlhf_cli.override import inherit

    return inherit(cfg, load_config(Path(cfg.model.path)), words, ("dataset", "reward", "environment", "rollout"))


def run_verb(request: Request, words: list[str] | None = None) -> int:
    cfg = inherited(compose(request, words), request.words)
    if request.cfg:
        return print_config(cfg)
    from rlhf_cli.launch.local import run_verb as run

    return run(request.verb, cfg) or DONE


def compare(request: Request) -> int:
    from rlhf_cli.report.compare import main as compared

    return compared(request.words)


def merge(request: Request) -> int:
    from rlhf_cli.models.soup import main as merged

    return merged(request.words)


def list_options(request: Request) -> int:
    from rlhf_cli.describe import list_text

    print(list_text(at_most_one(request, "GROUP"), request.config_dir))
    return DONE


def show(request: Request) -> int:
    from rlhf_cli.describe import show_text

    if not request.words:
        raise ConfigError("show: which option? type rlhf show GROUP=OPTION, e.g. rlhf show algo=grpo")
    print("\n\n".join(show_text(word, request.config_dir) for word in request.words))
    return DONE


def runs(request: Request) -> int:
    from rlhf_cli.report.runs import show as show_runs

    words = [w for w in request.words if w != "--watch"]
    folder = at_most_one(Request(request.verb, words), "DIR")
    show_runs(Path(folder or "runs"), watch="--watch" in request.words)
    return DONE


def logs(request: Request) -> int:
    from rlhf_cli.report import logs as of

    rank = next((w for w in request.words if w.startswith("rank=")), "rank=0").removeprefix("rank=")
    if not rank.isdigit():
        raise ConfigError(f"logs: rank={rank}: type a number, e.g. rank=1")
    words = [w for w in request.words if w not in ("-f", "--follow") and not w.startswith("rank=")]
    of.show(
        of.run_at("logs", one_run("logs", words)), int(rank), follow=len(set(request.words) & {"-f", "--follow"}) > 0
    )
    return DONE


def cancel(request: Request) -> int:
    from rlhf_cli.launch.cancel import cancel as end
    from rlhf_cli.report.logs import run_at

    print(f"rlhf: {end(run_at('cancel', one_run('cancel', request.words)))}")
    return DONE


def one_run(verb: str, words: list[str]) -> Path:
    if len(words) != 1 or words[0].startswith("-"):
        raise ConfigError(f"{verb}: takes one run; type rlhf {verb} RUN, e.g. rlhf {verb} runs/NAME")
    return Path(words[0])


def doctor(request: Request) -> int:
    from rlhf_cli.doctor import report

    at_most_one(Request(request.verb, [*request.words, ""]), "")
    text, healthy = report()
    print(text)
    return DONE if healthy else FAILED


def completion(request: Request) -> int:
    from rlhf_cli.completion import complete, script

    if request.words[:1] == ["--complete"]:
        print("\n".join(complete(" ".join(request.words[1:]))))
        return DONE
    print(script(at_most_one(request, "SHELL") or ""), end="")
    return DONE


def at_most_one(request: Request, name: str) -> str | None:
    if len(request.words) > 1:
        allowed = f"one {name} at most" if name else "nothing"
        raise ConfigError(f"{request.verb}: takes {allowed}, got {' '.join(request.words).strip()}")
    return request.words[0] if request.words else None


RUN: dict[str, Callable[[Request], int]] = {
    "train": train,
    "resume": resume,
    "eval": on_model,
    "generate": on_model,
    "score": run_verb,
    "compare": compare,
    "merge": merge,
    "list": list_options,
    "show": show,
    "plan": plan,
    "runs": runs,
    "logs": logs,
    "cancel": cancel,
    "doctor": doctor,
    "completion": completion,
}

# ---- the command line ----


def parse(argv: list[str]) -> Request:
    """Take the flags that every verb shares off its words."""
    verb, *rest = argv
    if verb not in VERBS:
        from rlhf_cli.config import nearest

        raise ConfigError(f"{verb}: no such verb{nearest(verb, VERBS) or ';'} verbs: {', '.join(VERBS)}")
    words: list[str] = []
    config_dir, cfg, multirun, script = None, False, False, False
    queue = [part for word in rest for part in split_flag(word)]
    while queue:
        word = queue.pop(0)
        if word == "--config-dir":
            config_dir = following(queue, word, "DIR")
        elif word == "--cfg":
            cfg = following(queue, word, "job") == "job" or wrong_cfg()
        elif word in ("-m", "--multirun"):
            multirun = True
        elif word == "--print-sbatch" and verb == "train":
            script = True
        else:
            words.append(word)
    if multirun and verb != "train":
        raise ConfigError(f"{verb}: -m works with train only")
    if cfg and not VERBS[verb].config:
        raise ConfigError(f"{verb}: --cfg works with {', '.join(v for v in VERBS if VERBS[v].config)} only")
    return Request(verb, words, config_dir, cfg, multirun, script)


def split_flag(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith(("--config-dir=", "--cfg=")) else [word]


def following(queue: list[str], flag: str, name: str) -> str:
    if not queue:
        raise ConfigError(f"{flag}: needs a value; type {flag} {name}")
    return queue.pop(0)


def wrong_cfg() -> bool:
    raise ConfigError("--cfg: only job is known; type --cfg job")


def run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(main_help())
        return DONE
    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("rlhf-cli"))
        return DONE
    if argv[:2] == ["completion", "--complete"]:
        return completion(Request("completion", argv[1:]))
    asks_help = any(word in ("-h", "--help") for word in argv[1:])
    request = parse([word for word in argv if word not in ("-h", "--help")])
    if asks_help:
        print(verb_help(request.verb, request.config_dir))
        return DONE
    return RUN[request.verb](request)


def guard(work: Callable[[], int]) -> int:
    """Run `work`; an error that the user can act on leaves as one line."""
    try:
        return work()
    except (ConfigError, GateError) as e:
        if os.environ.get("RLHF_TRACEBACK") == "1":
            print(hide_secrets(traceback.format_exc()), file=sys.stderr, flush=True)
        print(f"rlhf: error: {' '.join(hide_secrets(str(e)).split())}", file=sys.stderr, flush=True)
        return GATE if isinstance(e, GateError) else WRONG_INPUT


def only_prints(words: list[str]) -> bool:
    return not words or words[0] not in WORKING or any(word in ("-h", "--help") for word in words)


def main(argv: list[str] | None = None) -> int:
    """The `rlhf` command."""
    words = sys.argv[1:] if argv is None else argv
    if argv is None:
        gc.set_threshold(
            50_000, 20, 20
        )  # composing makes objects that stay; looking for cycles among them was 6 % of `rlhf plan`
    if argv is None and hasattr(signal, "SIGPIPE") and only_prints(words):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `rlhf list | head` ends quietly
    try:
        return guard(lambda: run(words))
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
