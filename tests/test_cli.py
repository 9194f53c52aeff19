"""The command line: verbs, flags, overrides, and the exact text of every error that a user can cause here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import OmegaConf

from rlhf_cli import catalog, cli, completion
from rlhf_cli.compose import compose
from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.launch.local import Local
from rlhf_cli.usage import VERBS


def options(group: str) -> str:
    return ", ".join(catalog.groups()[group])


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Stand-ins for what the verbs call; each notes its name and arguments."""
    calls: list[tuple] = []
    local, plan, planned = ModuleType("local"), ModuleType("plan"), ModuleType("planned")
    local.launch = lambda cfg: calls.append(("launch", cfg))  # type: ignore[attr-defined]
    local.resume = lambda run, overrides: calls.append(("resume", run, overrides)) or 0  # type: ignore[attr-defined]
    local.run_verb = lambda verb, cfg: calls.append((verb, cfg)) or 0  # type: ignore[attr-defined]
    local.Local = Local  # type: ignore[attr-defined]
    plan.validate = lambda cfg: calls.append(("validate", cfg))  # type: ignore[attr-defined]
    planned.describe = lambda cfg: f"plan of {cfg.names.algo}"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rlhf_cli.launch.local", local)
    monkeypatch.setitem(sys.modules, "rlhf_cli.plan", plan)
    monkeypatch.setitem(sys.modules, "rlhf_cli.report.planned", planned)
    return calls


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A user's own groups: one good recipe and one of each mistake."""
    folder = tmp_path / "my_conf" / "algo"
    folder.mkdir(parents=True)
    head = "# @package _global_\n# My method. Me, 2026\n"
    (folder / "mine.yaml").write_text(head + "defaults: [grpo]\nsteps: 9\n")
    (folder / "badkey.yaml").write_text(head + "stepz: 7\n")
    (folder / "badtype.yaml").write_text(head + "optim: {lr: abc}\n")
    (folder / "badoption.yaml").write_text(head + "defaults:\n  - override /reward: bluu\n")
    (folder / "badgroup.yaml").write_text(head + "defaults:\n  - override /rewardz: bleu\n")
    (folder / "badyaml.yaml").write_text(head + "a: [\nb")
    return folder.parent


def error(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """The text after `rlhf: error: `, which must be all there is."""
    assert cli.main(list(argv)) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("rlhf: error: ") and err.count("\n") == 1
    return err.removeprefix("rlhf: error: ").rstrip("\n")


# ---- help ----


def test_help_lists_every_verb_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["-h"]):
        assert cli.main(argv) == 0
        out = capsys.readouterr().out
        assert "rlhf train algo=grpo reward=bleu" in out
        for name, verb in VERBS.items():
            assert f"  {name:<12}{verb.line}\n" in out
    assert set(VERBS) == set(cli.RUN)
    assert (
        " ".join(VERBS)
        == "train resume eval generate score compare merge list show plan runs logs cancel doctor completion"
    )


@pytest.mark.parametrize("verb", list(VERBS))
def test_verb_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: rlhf {verb}")
    assert all(f"  {example}\n" in out for example in VERBS[verb].examples)
    if VERBS[verb].config:
        default = catalog.defaults(VERBS[verb].config)
        assert all(f"  {g}={name or ''}" in out for g, name in default.items())
        assert all(f"  {key}=" in out for key in VERBS[verb].keys)


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    took = []
    for _ in range(5):
        start = time.perf_counter()
        out = subprocess.run(
            [sys.executable, "-m", "rlhf_cli.cli", "--help"], capture_output=True, text=True, check=True
        )
        took.append(time.perf_counter() - start)
    assert out.stdout.startswith("usage: rlhf VERB")
    assert min(took) <= 0.2
    code = "import sys, rlhf_cli.cli as c; c.main(['--help']); c.main(['list']); c.main(['train', '-h'])"
    code += "; print([m for m in ('torch', 'hydra', 'omegaconf', 'transformers') if m in sys.modules], file=sys.stderr)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr == "[]\n"


def test_compose_and_validate_within_its_budget() -> None:
    took = []
    for _ in range(3):
        before = os.times()
        argv = [sys.executable, "-m", "rlhf_cli.cli", "train", "--cfg", "job"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        after = os.times()  # processor time: the other test processes do not count
        took.append(after.children_user - before.children_user + after.children_system - before.children_system)
        assert done.returncode == 0, done.stderr
    assert "algo: grpo" in done.stdout
    assert min(took) <= 0.8


def test_a_closed_pipe_ends_quietly() -> None:
    line = f"{sys.executable} -m rlhf_cli.cli train --help | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout == "usage: rlhf train [GROUP=OPTION ...] [KEY=VALUE ...]\n" and done.stderr == ""


# ---- verbs ----


def test_train_validates_then_launches(called: list[tuple]) -> None:
    assert cli.main(["train", "algo=grpo", "reward=bleu", "seed=7"]) == 0
    assert [name for name, *_ in called] == ["validate", "launch"]
    cfg = called[1][1]
    assert (cfg.seed, cfg.names.algo, cfg.names.reward, "experiment" in cfg.names) == (7, "grpo", "bleu", False)
    assert "hydra" not in cfg


def test_cfg_job_prints_resolved_yaml_and_stops(called: list[tuple], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--cfg", "job", "run.name=s-${seed}", "seed=5"]) == 0
    assert [name for name, *_ in called] == ["validate"]
    assert OmegaConf.create(capsys.readouterr().out).run.name == "s-5"


def test_plan_prints(called: list[tuple], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "algo=dpo"]) == 0
    assert capsys.readouterr().out == "plan of dpo\n"
    assert not [c for c in called if c[0] == "launch"]


def test_resume_passes_the_run_and_overrides(called: list[tuple], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["resume", "runs/a", "steps=80"]) == 0
    assert called == [("resume", Path("runs/a"), ["steps=80"])]
    assert error(capsys, "resume", "steps=80") == "resume: which run? type rlhf resume RUN, e.g. rlhf resume runs/NAME"


def test_eval_generate_score(called: list[tuple]) -> None:
    assert cli.main(["eval", "runs/it's=1", "reward=bleu"]) == 2, "a word with = that is no folder is a setting"
    assert cli.main(["eval", "runs/it's", "reward=bleu", "eval.samples=2"]) == 0
    assert cli.main(["generate", "input=prompts.jsonl", "output=out.jsonl"]) == 0
    assert cli.main(["score", "input=r.jsonl", "reward=[bleu,length]"]) == 0
    (_, ev), (_, gen), (_, sc) = called
    assert [name for name, _ in called] == ["eval", "generate", "score"]
    assert (ev.model.path, ev.names.model, ev["eval"].samples) == ("runs/it's", "path", 2)
    assert (gen.input, gen.output) == ("prompts.jsonl", "out.jsonl")
    assert sc.names.reward == "bleu+length" and set(sc.reward) == {"bleu", "length"}


HYDRA = "hydra/launcher=basic"  # any launcher of Hydra's hands the sweep to Hydra


def test_multirun_by_hydra_runs_every_point(
    called: list[tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    before = list(sys.argv)
    assert cli.main(["train", "-m", HYDRA, "seed=1,2", "reward=bleu,[bleu,length]"]) == 0
    points = [(cfg.seed, cfg.names.reward) for name, cfg in called if name == "launch"]
    assert points == [(1, "bleu"), (1, "bleu+length"), (2, "bleu"), (2, "bleu+length")]
    assert sys.argv == before


def test_multirun_by_hydra_outlives_a_failed_point(
    called: list[tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(cfg: object) -> None:
        if cfg.seed == 1:  # type: ignore[attr-defined]
            raise GateError("rank 0, step 3: no")
        called.append(("launch", cfg))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys.modules["rlhf_cli.launch.local"], "launch", refuse)
    assert cli.main(["train", "-m", HYDRA, "seed=1,2"]) == 3
    assert [cfg.seed for name, cfg in called if name == "launch"] == [2]
    assert capsys.readouterr().err == "rlhf: error: rank 0, step 3: no\n"


@pytest.mark.parametrize("words", [(), (HYDRA,)])
def test_multirun_checks_what_it_is_given(
    words: tuple[str, ...],
    called: list[tuple],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    assert error(capsys, "train", "-m", *words, "seed=1,x").startswith("seed=x: wanted int, e.g. seed=0; it is: ")
    wrong = error(capsys, "train", "-m", *words, "algo=grpo,grop")
    assert wrong.startswith("algo=grop: no such option; did you mean 'grpo'?")
    assert not [name for name, _ in called if name == "launch"]


def test_config_dir_adds_options(called: list[tuple], mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--config-dir", str(mine), "algo=mine"]) == 0
    assert cli.main(["train", f"--config-dir={mine}", "algo=mine", "steps=3"]) == 0
    steps = [(cfg.names.algo, cfg.steps) for name, cfg in called if name == "launch"]
    assert steps == [("mine", 9), ("mine", 3)]
    capsys.readouterr()
    assert error(capsys, "train", "algo=mine").startswith("algo=mine: no such option")
    (mine / "algo" / "grpo.yaml").write_text("# mine too\n")
    twin = error(capsys, "train", "--config-dir", str(mine))
    theirs, ours = f"{mine}/algo/grpo.yaml", f"{catalog.conf_dir()}/algo/grpo.yaml"
    assert twin == f"{theirs}: algo=grpo exists already ({ours}); give yours another name"


def test_exit_codes(called: list[tuple], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def end_with(problem: BaseException) -> int:
        def launch(cfg: object) -> None:
            raise problem

        monkeypatch.setattr(sys.modules["rlhf_cli.launch.local"], "launch", launch)
        return cli.main(["train"])

    assert end_with(GateError("rank 1, step 3: reward is constant\n(gates.constant_steps)")) == 3
    assert capsys.readouterr().err == "rlhf: error: rank 1, step 3: reward is constant (gates.constant_steps)\n"
    assert end_with(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):
        end_with(ZeroDivisionError())


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RLHF_TRACEBACK", "1")
    assert cli.main(["tran"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.splitlines()[-1].startswith("rlhf: error: tran: no such verb")


# ---- mistakes ----

LIST = "rlhf list prints the groups, rlhf train --help the keys"
MISTAKES = {
    "rewrd=bleu": "rewrd: unknown key or group; did you mean 'reward'?",
    "zzz=1": f"zzz: unknown key or group; {LIST}",
    "~zzz": f"zzz: unknown key or group; {LIST}",
    "rollout.temprature=1": "rollout.temprature: unknown key; did you mean 'temperature'?",
    "optim.zzz=1": "optim.zzz: unknown key; optim has lr, betas, eps, weight_decay, clip, warmup, schedule",
    "reward.bleu.wight=1": "reward.bleu.wight: unknown key; did you mean 'weight'?",
    "reward.length.weight=1": "reward.length.weight: length is not chosen; type reward=[bleu,length] to add it",
    "credit.gae.lam=1": "credit.gae.lam: gae is not chosen; type credit=gae first",
    "optim.lr.x=1": "optim.lr.x: optim.lr is a value, not a section; type optim.lr=VALUE",
    "rollout.stop.x=1": "rollout.stop.x: rollout.stop is a list; type rollout.stop=[a,b]",
    "+foo=1": "foo: unknown key; keys cannot be added to the root",
    "++optim.lrr=1": "optim.lrr: unknown key; did you mean 'lr'?; keys cannot be added to optim",
    "~seed": "seed: a key of the schema cannot be deleted; give it a value",
    "optim.lr=abc": "optim.lr=abc: wanted float, e.g. optim.lr=1e-06; it is: peak learning rate",
    "optim.betas=[a,1]": "optim.betas=[a,1]: wanted tuple[float, float], e.g. optim.betas=[0.9,0.999]; "
    "it is: AdamW moments",
    "optim=3": "optim=3: optim is a section; type optim.KEY=VALUE",
    "optim={lrr: 1}": "optim={lrr: 1}: Key 'lrr' not in 'OptimSection'",
    "steps=???": "steps: must be given; type steps=VALUE",
    "run.name=${nope}": "run.name: cannot be resolved: Interpolation key 'nope' not found",
    "--steps=3": "--steps=3: no such option; settings are typed key=value, e.g. steps=VALUE",
    "grpo": "grpo: not a setting; type key=value, e.g. algo=grpo",
    "=1": "=1: no key before '='; type key=value, e.g. algo=grpo",
    "reward=[bleu": "reward=[bleu: cannot be read; type key=value, and quote special characters: 'reward=\"a, b\"'",
    "seed=1,2": "seed=1,2: several values; add -m to run each of them, or type seed=[a,b] for a list",
    "+reward=length": "+reward=length: reward has an option already; type reward=OPTION, or reward=[a,b] for several",
    "+learners.p.lr=1": "+learners.p.lr=1: cannot be added here; put it into an option's file (--config-dir DIR)",
}


@pytest.mark.parametrize("override", list(MISTAKES))
def test_mistakes_in_overrides(override: str, called: list[tuple], capsys: pytest.CaptureFixture[str]) -> None:
    assert error(capsys, "train", override) == MISTAKES[override]
    assert called == []


def test_the_wrong_one_of_several_is_named(called: list[tuple], capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "seed=1", "reward=length", "reward.length.weight=2", "optim.lr=x", "steps=3"]
    assert error(capsys, *argv).startswith("optim.lr=x: wanted float")


def test_mistakes_in_options(called: list[tuple], capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        error(capsys, "train", "algo=grop")
        == f"algo=grop: no such option; did you mean 'grpo'? options: {options('algo')}"
    )
    assert error(capsys, "train", "reward=[bleu,zz]") == f"reward=zz: no such option; options: {options('reward')}"
    assert error(capsys, "train", "reward=null") == f"reward=null: no such option; options: {options('reward')}"
    groups = "model, dataset, reward, environment, combine, rollout, hardware"
    assert error(capsys, "eval", "algo=grpo") == f"algo=grpo: rlhf eval has no group 'algo'; its groups: {groups}"
    assert cli.main(["train", "experiment=null"]) == 0


def test_mistakes_in_a_users_files(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(name: str) -> str:
        return error(capsys, "train", "--config-dir", str(mine), f"algo={name}")

    assert wrong("badkey") == f"{mine}/algo/badkey.yaml: stepz: unknown key; did you mean 'steps'?"
    assert wrong("badtype").startswith(f"{mine}/algo/badtype.yaml: optim.lr: Value 'abc'")
    assert wrong("badtype").endswith("; wanted float")
    assert wrong("badoption") == f"reward=bluu: no such option; did you mean 'bleu'? options: {options('reward')}"
    assert (
        wrong("badgroup") == f"{mine}/algo/badgroup.yaml: Could not override 'rewardz'. No match in the defaults list"
    )
    assert wrong("badyaml").startswith("broken YAML: ") and "badyaml.yaml" in wrong("badyaml")


def test_mistakes_in_verbs_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    verbs = ", ".join(VERBS)
    assert error(capsys, "tran") == f"tran: no such verb; did you mean 'train'? verbs: {verbs}"
    assert error(capsys, "xyz") == f"xyz: no such verb; verbs: {verbs}"
    assert error(capsys, "eval", "-m", "seed=1,2") == "eval: -m works with train only"
    assert error(capsys, "train", "--cfg") == "--cfg: needs a value; type --cfg job"
    assert error(capsys, "train", "--cfg", "hydra") == "--cfg: only job is known; type --cfg job"
    assert error(capsys, "list", "--cfg", "job") == "list: --cfg works with train, eval, generate, score, plan only"
    assert error(capsys, "train", "--config-dir", "nope") == (
        "--config-dir nope: no such folder; give the one that holds your groups, e.g. DIR/algo/mine.yaml"
    )
    assert error(capsys, "list", "a", "b") == "list: takes one GROUP at most, got a b"
    assert error(capsys, "doctor", "now") == "doctor: takes nothing, got now"


# ---- composing ----


def test_precedence_command_line_over_debug_over_recipe_over_schema(mine: Path) -> None:
    assert compose("train", [], None).batch.prompts == 8
    assert compose("train", ["algo=mine"], str(mine)).steps == 9
    tiny = compose("train", ["algo=mine", "debug=tiny"], str(mine))
    assert (tiny.steps, tiny.batch.prompts, tiny.names.model, tiny.names.tracker) == (2, 2, "tiny_random", "none")
    assert compose("train", ["algo=mine", "debug=tiny", "steps=5"], str(mine)).steps == 5
    assert compose("train", ["debug=tiny", "model=smollm2_135m"], None).names.model == "smollm2_135m"


@pytest.mark.parametrize("name", list(catalog.groups()["hardware"]))
def test_hardware_options(name: str) -> None:
    stage = int(name[4]) if name.startswith("zero") else 0
    offload = {"zero3_offload": "cpu", "zero3_offload_nvme": "nvme"}.get(name, "none")
    hardware = compose("train", [f"hardware={name}"], None).hardware
    assert (hardware.zero, hardware.offload) == (stage, offload)


def test_interpolations_stay_as_written() -> None:
    cfg = compose("train", ["run.name=s-${seed}"], None)
    assert OmegaConf.to_container(cfg)["run"]["name"] == "s-${seed}"  # type: ignore[index,call-overload]


def test_works_after_installation_from_any_folder(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    argv = [sys.executable, "-m", "rlhf_cli.cli", "list"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "algo (" in done.stdout, done.stderr


# ---- completion ----


def words(line: str) -> list[str]:
    return completion.complete(line)


def test_completes_verbs_groups_options_and_keys(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert words("rlhf ") == [*VERBS, "--help"]
    assert words("rlhf tr") == ["train"]
    assert words("rlhf train al") == ["algo=", "allow_targets="]
    assert words("rlhf train algo=gr") == ["algo=grpo"]
    assert words("rlhf train reward=[bleu,le") == [
        "reward=[bleu,length",
        "reward=[bleu,levels",
        "reward=[bleu,levels_knights",
    ]
    assert words("rlhf train optim.w") == ["optim.warmup=", "optim.weight_decay="]
    assert words("rlhf train opt") == ["optim."]
    assert words("rlhf train model.lora.") == [f"model.lora.{k}=" for k in ("alpha", "merge_export", "r", "targets")]
    assert words("rlhf train optim.schedule=") == [f"optim.schedule={v}" for v in ("constant", "cosine", "linear")]
    assert words("rlhf train model.packing=") == ["model.packing=false", "model.packing=true"]
    assert words("rlhf train credit=gae credit.l") == ["credit.lam="]
    assert words("rlhf train reward=[bleu,length] reward.length.w") == ["reward.length.weight="]
    assert words("rlhf train --c") == ["--cfg", "--config-dir"]
    assert words(f"rlhf train --config-dir {mine} algo=mi") == ["algo=mine"]
    assert words("rlhf eval al") == ["allow_targets="], "eval has no algo"
    assert words("rlhf list al") == ["algo"]
    assert words("rlhf show algo=gr") == ["algo=grpo"]
    assert words("rlhf completion ") == ["bash", "fish", "zsh"]
    assert words("rlhf bogus ") == []
    (tmp_path / "runs" / "one").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert words("rlhf resume ") == words("rlhf eval runs/o") == ["runs/one"]
    assert words("rlhf train --config-dir my") == ["my_conf"]


def test_bash_script_completes() -> None:
    lines = 'rlhf() { "$PYTHON" -m rlhf_cli.cli "$@"; }\n' + completion.script("bash")
    lines += 'try() { COMP_LINE="$1"; COMP_POINT=${#1}; _rlhf 2>/dev/null; echo "${COMPREPLY[@]}"; }\n'
    lines += 'try "rlhf train algo=gr"; try "rlhf train opt"; try "rlhf zzz"\n'
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(["bash", "-c", lines], env=environment, capture_output=True, text=True, check=True)
    # Bash itself keeps `algo=`; the reply is only what follows.
    assert done.stdout.splitlines() == ["grpo", "optim.", ""]


def test_scripts_are_for_known_shells(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert cli.main(["completion", shell]) == 0
        assert "rlhf completion --complete" in capsys.readouterr().out
    shells = "type rlhf completion SHELL; shells: bash, zsh, fish"
    assert error(capsys, "completion", "bas") == f"completion bas: no such shell; did you mean 'bash'? {shells}"
    assert error(capsys, "completion") == f"completion: which shell?; {shells}"


def test_completion_answers_through_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "--complete", "rlhf train algo=grp"]) == 0
    assert capsys.readouterr().out == "algo=grpo\n"


def test_config_errors_are_value_errors() -> None:
    with pytest.raises(ConfigError):
        compose("train", ["foo"], None)
