"""The verbs and their help texts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """What `rlhf --help` and `rlhf VERB --help` print about a verb."""

    line: str
    usage: str
    examples: tuple[str, ...]
    keys: tuple[str, ...] = ()  # the settings that its help shows
    more: str = ""
    config: str = ""  # primary config; empty for verbs that compose nothing


_SIZES = ("steps", "seed", "batch.prompts", "batch.samples")
_MODEL = ("model.path", "model.lora.r", "dataset.path", "hardware.processes", "hardware.micro_batch_tokens")
_DRAW = ("rollout.max_tokens", "rollout.temperature", "rollout.top_p")
_COMPOSING = """\
  --cfg job         print the composed configuration and stop
  --config-dir DIR  add your own groups and options, e.g. DIR/algo/mine.yaml"""
_SWEEP = """
  -m, --multirun    run every combination of comma-separated values: algo=grpo,rloo seed=1,2; typed again it goes on;
                    hydra/sweeper=optuna searches instead: 'optim.lr=tag(log,interval(1e-6,1e-4))' sweep.trials=20"""
_SCRIPT = """
  --print-sbatch    with launcher=slurm: print the batch script and submit nothing"""
_TRAIN_KEYS = (
    *_SIZES,
    "optim.lr",
    *_DRAW[:2],
    *_MODEL,
    "eval.every",
    "checkpoint.every",
    "run.dir",
    "run.name",
    "resume",
    "sweep.parallel",
    "sweep.retry",
)

VERBS: dict[str, Verb] = {
    "train": Verb(
        "train a model by a reward or by recorded feedback",
        "rlhf train [GROUP=OPTION ...] [KEY=VALUE ...]",
        (
            "rlhf train algo=grpo reward=bleu",
            "rlhf train algo=dpo dataset=jsonl dataset.path=pairs.jsonl",
            "rlhf train debug=tiny steps=3",
        ),
        _TRAIN_KEYS,
        _COMPOSING + _SWEEP + _SCRIPT,
        "train",
    ),
    "resume": Verb(
        "go on with an interrupted run, bit for bit",
        "rlhf resume RUN [KEY=VALUE ...]",
        ("rlhf resume runs/NAME", "rlhf resume runs/NAME steps=80"),
        more="  RUN is a run's folder. Its own configuration is used; a changed key is said aloud.",
    ),
    "eval": Verb(
        "measure a model or run on held-out prompts",
        "rlhf eval [RUN_OR_MODEL] [GROUP=OPTION ...] [KEY=VALUE ...]",
        ("rlhf eval runs/NAME reward=bleu", "rlhf eval path/to/model reward=rouge eval.samples=4"),
        ("eval.prompts", "eval.samples", "eval.bootstrap", *_DRAW, *_MODEL, "seed"),
        _COMPOSING,
        "eval",
    ),
    "generate": Verb(
        "write responses to a file of prompts",
        "rlhf generate [RUN_OR_MODEL] input=FILE [output=FILE] [KEY=VALUE ...]",
        (
            "rlhf generate input=prompts.jsonl output=responses.jsonl",
            "rlhf generate runs/NAME input=prompts.jsonl rollout.temperature=0",
        ),
        ("input", "output", *_DRAW, "rollout.stop", *_MODEL, "seed"),
        _COMPOSING,
        "generate",
    ),
    "score": Verb(
        "run a reward over a file of responses, before any training",
        "rlhf score input=FILE [reward=OPTION] [KEY=VALUE ...]",
        (
            "rlhf score input=responses.jsonl reward=bleu",
            "rlhf score input=responses.jsonl reward=[bleu,length] output=scores.jsonl",
        ),
        ("input", "output", "dataset.columns", "hardware.device"),
        _COMPOSING,
        "score",
    ),
    "compare": Verb(
        "compare runs or the points of a sweep, seeds collapsed",
        "rlhf compare DIR|RUN ... [baseline=NAME|SETTINGS] [metric=NAME] [also=NAME,...] [csv=FILE] [plot=FILE] [frontier=FILE]",
        (
            "rlhf compare runs/sweeps/NAME baseline=algo=grpo",
            "rlhf compare runs/first runs/second metric=score/mean csv=table.csv plot=curves.png",
        ),
        more="""\
  DIR holds runs or is a sweep. Runs that differ only in their seed are one row; unfinished runs are named, not counted.
  baseline          a run's name, or settings that its row has; default: the first row of each reward
  metric            a number of evaluations.jsonl or metrics.jsonl; default: eval/reward, else score/mean
  also              more of them, whose means stand beside""",
    ),
    "merge": Verb(
        "average the weights of two fine-tunes of one base model",
        "rlhf merge A B --output DIR [--weight 0.5] [--dtype fp32|bf16]",
        ("rlhf merge runs/first runs/second --weight 0.5 --output soups/both",),
        more="""\
  A and B are runs, Hugging Face folders or Hub ids with the same weights, configuration and tokenizer; adapters are merged first.
  --weight          B's share, from 0 to 1
  --output          the new folder; use it as model.path=DIR, model.reference=DIR or reward.model.path=DIR
  --dtype           of the written weights; they are averaged in fp32""",
    ),
    "list": Verb(
        "list the groups, or the options of one",
        "rlhf list [GROUP]",
        ("rlhf list", "rlhf list algo", "rlhf list algo --config-dir my_conf"),
    ),
    "show": Verb(
        "explain an option: its resolved settings and their meaning",
        "rlhf show GROUP=OPTION ...",
        ("rlhf show algo=grpo", "rlhf show hardware=zero3"),
    ),
    "plan": Verb(
        "tell what a training run would do, without loading weights",
        "rlhf plan [GROUP=OPTION ...] [KEY=VALUE ...]",
        ("rlhf plan algo=ppo hardware=zero3 hardware.processes=8",),
        _TRAIN_KEYS,
        _COMPOSING,
        "train",
    ),
    "runs": Verb(
        "list runs: status, step, reward, job, age, time left",
        "rlhf runs [DIR] [--watch]",
        ("rlhf runs", "rlhf runs --watch", "rlhf runs runs/sweeps"),
        more="  --watch           refresh every 5 s until Ctrl-C\n\n  DIR is searched for runs; without it: runs. Newest first.",
    ),
    "logs": Verb(
        "print what a run printed, or is printing",
        "rlhf logs RUN [-f] [rank=N]",
        ("rlhf logs runs/NAME", "rlhf logs runs/NAME -f", "rlhf logs runs/NAME rank=1"),
        more="  -f, --follow      go on printing until the run ends",
    ),
    "cancel": Verb(
        "stop a run after a checkpoint, in the queue or on this machine",
        "rlhf cancel RUN",
        ("rlhf cancel runs/NAME",),
        more="  rlhf resume RUN goes on later.",
    ),
    "doctor": Verb(
        "check the installation and the machine, and say what to type",
        "rlhf doctor",
        ("rlhf doctor",),
        more="  Exits with 1 when something required is missing or has the wrong version.",
    ),
    "completion": Verb(
        "print the tab completion script of a shell",
        "rlhf completion bash|zsh|fish",
        ('eval "$(rlhf completion bash)"', "rlhf completion fish | source"),
        more="  Put the line of your shell into its start-up file.",
    ),
}


def main_help() -> str:
    """`rlhf --help`."""
    verbs = "\n".join(f"  {name:<12}{verb.line}" for name, verb in VERBS.items())
    return f"""usage: rlhf VERB [GROUP=OPTION ...] [KEY=VALUE ...]

Post-training of language models by reward: any method by name, from one command line.

verbs:
{verbs}

examples:
  rlhf train algo=grpo reward=bleu      the default experiment; runs on a CPU without any download
  rlhf list algo                        the methods; rlhf show algo=grpo explains one
  rlhf plan algo=ppo reward=rouge       what would run, before anything is loaded
  rlhf eval runs/NAME reward=bleu       measure a finished run

rlhf VERB --help tells more. Exit codes: 0 done, 1 failed, 2 wrong input, 3 a gate stopped the run, 75 stopped on the
way (rlhf resume goes on), 130 interrupted.
RLHF_TRACEBACK=1 shows where an error came from."""


def verb_help(name: str, config_dir: str | None) -> str:
    """`rlhf VERB --help`."""
    verb = VERBS[name]
    parts = [
        f"usage: {verb.usage}",
        "",
        verb.line[0].upper() + verb.line[1:] + ".",
        "",
        "examples:",
        *(f"  {e}" for e in verb.examples),
    ]
    if verb.config:
        parts += ["", *_settings(verb, config_dir)]
    if verb.more:
        parts += ["", verb.more]
    return "\n".join(parts)


def _settings(verb: Verb, config_dir: str | None) -> list[str]:
    from rlhf_cli import catalog

    known, default = catalog.groups(config_dir), catalog.defaults(verb.config)
    chosen = [
        (f"{g}={default[g]}" if default[g] else f"{g}=", ", ".join(known.get(g, {})) or "none yet") for g in default
    ]
    fields = catalog.fields()
    keys = [(f"{k}={fields[k].default}", fields[k].doc) for k in verb.keys]
    return [
        "groups, with their defaults and options (rlhf list GROUP, rlhf show GROUP=OPTION):",
        *catalog.table(chosen),
        "",
        "some keys, with the schema's defaults (an option may set another; --cfg job prints all):",
        *catalog.table(keys),
    ]
