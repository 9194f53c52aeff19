"""The proof before anything loads: every method on the data that fits it, and each refusal by its text."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from rlhf_cli import hardware
from rlhf_cli.compose import compose
from rlhf_cli.errors import ConfigError
from rlhf_cli.hardware import resolve_hardware
from rlhf_cli.plan import learner_sections, validate
from rlhf_cli.report.planned import describe

ALGOS = sorted(p.stem for p in (Path(__file__).parents[1] / "conf" / "algo").glob("*.yaml"))
SAMPLED = [
    [],
    ["dataset=jsonl", "dataset.path=x.jsonl"],
    ["dataset=gsm8k", "reward=math_answer"],
    ["reward=[bleu,length]"],
]
PAIRS = ["dataset=preferences", "dataset.path=x.jsonl"]
RANKINGS = ["dataset=alpaca_eval", "dataset.path=x.jsonl"]
DEMONSTRATIONS = ["dataset=demonstrations", "dataset.path=x.jsonl"]
NO_REFERENCES = ["dataset=jsonl", "dataset.path=x.jsonl", "dataset.columns.references="]


def config(*overrides: str) -> Any:
    return compose("train", ["model=tiny_random", *overrides], None)


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as e:
        validate(config(*overrides))
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("algo", ALGOS)
def test_every_method_plans_on_prompts_with_references(algo: str) -> None:
    for data in SAMPLED if algo != "sft" else SAMPLED[:2]:
        made = validate(config(f"algo={algo}", *data))
        assert made.learners and made.stages[0].name == "source"
        produced: set[str] = {"old_logp", "logp", "entropy", "value_new", "score_new"}
        for stage in made.stages:  # every column is made before it is taken
            assert stage.needs <= produced, stage
            produced |= set(stage.gives)


@pytest.mark.parametrize(
    ("overrides", "source", "learners", "models", "filled"),
    [
        (["algo=grpo"], "sampled", {"policy": "policy"}, ["policy", "reference"], ("ref_logp",)),
        (["algo=grpo", "batch.minibatches=2"], "sampled", {"policy": "policy"}, ["policy", "reference"], ("old_logp", "ref_logp")),
        (["algo=dr_grpo"], "sampled", {"policy": "policy"}, ["policy"], ()),
        (["algo=ppo"], "sampled", {"policy": "policy", "critic": "value"}, ["critic", "policy", "reference"], ("old_logp", "ref_logp", "value")),
        (["algo=dpo", *PAIRS], "recorded", {"policy": "policy"}, ["policy", "reference"], ("ref_logp",)),
        (["algo=dpo", *RANKINGS], "recorded", {"policy": "policy"}, ["policy", "reference"], ("ref_logp",)),
        (["algo=dpo"], "sampled", {"policy": "policy"}, ["policy", "reference"], ("ref_logp",)),
        (["algo=reward_model", *PAIRS], "recorded", {"reward": "score"}, ["reward"], ()),
        (["algo=reward_model"], "sampled", {"reward": "score"}, ["policy", "reward"], ()),
        (["algo=sft", *DEMONSTRATIONS], "recorded", {"policy": "policy"}, ["policy"], ()),
        (["algo=sft"], "recorded", {"policy": "policy"}, ["policy"], ()),
        (["algo=sft", *PAIRS], "recorded", {"policy": "policy"}, ["policy"], ()),
    ],
    ids=lambda x: "-".join(v.partition("=")[2] for v in x[:2]) if isinstance(x, list) and x and "=" in x[0] else "",
)  # fmt: skip
def test_what_is_loaded_follows_from_the_columns(
    overrides: list[str], source: str, learners: dict[str, str], models: list[str], filled: tuple[str, ...]
) -> None:
    made = validate(config(*overrides))
    assert (made.source, made.learners, sorted(made.models), made.annotate) == (source, learners, models, filled)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward=none"], "credit: group_norm needs score; no reward gives a score: type reward=bleu (rlhf list reward)"),
        (["reward=none", "algo=ppo"], "credit: gae needs reward; no reward gives a score: type reward=bleu (rlhf list reward)"),
        (
            ["algo=ppo", "updates.critic=null", "~learners.critic"],
            "credit: gae needs value; no critic in updates: add a learner with head=value, as algo=ppo does",
        ),
        (
            ["algo=dpo", "select=keep_all"],
            "updates.policy.preference.objective: dpo needs pairs; no stage makes pairs: choose a dataset with preferences "
            "(dataset=preferences), or a reward and select=best_vs_worst",
        ),
        (["algo=dpo", "reward=none"], "select: best_vs_worst needs score; no reward gives a score: type reward=bleu (rlhf list reward)"),
        (
            NO_REFERENCES,
            "reward=bleu compares with references, and this dataset maps none; type dataset.columns.references=COLUMN, or another reward",
        ),
        (
            ["batch.samples=1"],
            "credit: group_norm compares the responses to one prompt, and batch.samples=1; type batch.samples=4 or more",
        ),
        (
            ["algo=dpo", "batch.samples=1"],
            "select: best_vs_worst compares the responses to one prompt, and batch.samples=1; type batch.samples=4 or more",
        ),
        (
            ["algo=dapo", "reward=[bleu,length]", "select.metric=lenght"],
            "select.metric=lenght: no such reward; there are bleu, length; did you mean 'length'?; one that is only judged: "
            "reward=[a,b] reward.b.weight=0 select.metric=b",
        ),
        (
            ["experiment=trpa", "reward=bleu"],
            "updates.policy.preference.objective: trpa needs best; a reward with levels brings it: type reward=levels, "
            "or reward=levels_knights",
        ),
        (["rollout.min_tokens=9", "rollout.max_tokens=8"], "rollout.min_tokens=9 is above rollout.max_tokens=8"),
        (
            ["model.lora.r=8", "model.reference=other/model"],
            "model.reference loads a second full model, and under LoRA the disabled adapter is the reference; drop one of the two",
        ),
        (
            ["batch.prompts=8", "batch.minibatches=3"],
            "batch.prompts=8 does not divide into batch.minibatches=3 of whole groups; choose a divisor",
        ),
        (
            ["algo=ppo", "learners.critic.head=valeu"],
            "learners.critic.head: 'valeu' is not allowed; choose one of policy, policy_value, value, score; did you mean 'value'?",
        ),
        (
            ["shaping=kl"],
            "shaping.kl gives token rewards, and no stage reads them: choose a credit that takes `reward` "
            "(credit=group_norm_to_go, credit=gae)",
        ),
        (["hardware.offload=cpu"], "hardware.offload=cpu needs hardware.zero=2 or 3; it is 0"),
        (["hardware.zero=4"], "hardware.zero: 4 is not allowed; choose one of 0, 1, 2, 3"),
        (["hardware.precision=fp16"], "hardware.precision: 'fp16' is not allowed; choose one of auto, fp32, bf16; did you mean 'bf16'?"),
        (["hardware.device=gpu"], "hardware.device: 'gpu' is not allowed; choose one of auto, cpu, cuda; did you mean 'cpu'?"),
        (["optim.schedule=cosin"], "optim.schedule: 'cosin' is not allowed; choose one of constant, linear, cosine; did you mean 'cosine'?"),
        (["batch.prompts=0"], "batch.prompts=0: must be at least 1"),
        (["batch.samples=0"], "batch.samples=0: must be at least 1"),
        (["batch.epochs=0"], "batch.epochs=0: must be at least 1"),
        (["steps=-1"], "steps=-1: must be at least 0"),
        (
            ["source.kind=sampeld"],
            "source.kind: 'sampeld' is not allowed; choose one of auto, sampled, recorded; did you mean 'sampled'?",
        ),
        (["updates.policy=null"], "updates is empty: no learner has a term; choose an algorithm (rlhf list algo)"),
        (
            ["algo=sft", "reward=length", *NO_REFERENCES],
            "source=recorded: the dataset records no responses; use shape pairs, rankings, thumbs or demonstrations, or source=sampled",
        ),
        (
            ["algo=dpo", *DEMONSTRATIONS],
            "updates.policy.preference.objective: dpo needs pairs; no stage makes pairs: choose a dataset with preferences "
            "(dataset=preferences), or a reward and select=best_vs_worst",
        ),
        (["algo=ppo", "learners.critic.head=policy"], "credit: gae needs value; no critic in updates: add a learner with head=value, as algo=ppo does"),
        (
            ["algo=reward_model", "learners.reward.head=value"],
            "updates.reward.preference.objective: bradley_terry needs score_new; learner 'reward' has no score head: set learners.reward.head=score",
        ),
        (
            ["objective@updates.policy.surrogate.objective=gspo"],
            "updates.policy.surrogate.reduce: sequence_ratio_clip gives one value per row, not per token; "
            "type updates.policy.surrogate.reduce=null",
        ),
        (
            ["algo=dpo", *PAIRS, "objective@updates.policy.preference.objective=ppo_clip"],
            "updates.policy.preference.reduce: ppo_clip gives a value per token; choose a reduction (rlhf list reduce)",
        ),
        (["debug=tiny", "debug=shuffled_reward"], "debug is given twice; type debug=[tiny,shuffled_reward] for both"),
        (
            ["algo=dpo", "shaping=overlong"],
            "shaping.overlong changes the score after pairs are made, and nothing reads it then: choose a credit, or shaping=none",
        ),
        (
            ["rollout.temperature=0"],
            "rollout.temperature=0 draws 8 equal responses to every prompt; raise it, e.g. to 1",
        ),
        (["rollout.temperature=-1"], "rollout.temperature=-1.0: must be at least 0"),
        (["checkpoint.keep=0"], "checkpoint.keep=0: must be at least 1"),
        (["optim.warmup=-1"], "optim.warmup=-1: must be at least 0"),
        (["rollout.top_p=0"], "rollout.top_p=0.0: must be above 0 and at most 1"),
        (
            ["algo=rloo", "batch.epochs=2"],
            "2 updates per rollout with an objective that has no ratio to the sampling policy are biased; "
            "set batch.epochs=1 batch.minibatches=1, or choose an objective with one (ppo_clip)",
        ),
        (["reward=model"], "reward.model.path is empty; type reward.model.path=RUN"),
        (["reward=python"], "reward.python.path is empty; type reward.python.path=FILE:FUNCTION"),
        (["credit=none"], "updates.policy.surrogate.objective: ppo_clip needs advantage; no credit rule gives it: type credit=group_norm (rlhf list credit)"),
        (
            ["algo=sft", *PAIRS, "credit=group_norm"],
            "credit: group_norm needs score; recorded rows have no score: type source=sampled",
        ),
    ],
    ids=lambda x: " ".join(x)[:60] if isinstance(x, list) else "",
)  # fmt: skip
def test_each_mistake_is_one_line_before_anything_loads(overrides: list[str], message: str) -> None:
    assert refusal(*overrides) == message


def test_a_term_without_objective_and_with_an_unknown_key() -> None:
    cfg = config()
    cfg.updates.policy.surrogate = {"coeff": 1.0}
    with pytest.raises(ConfigError) as e:
        validate(cfg)
    assert (
        str(e.value)
        == "updates.policy.surrogate.coeff: unknown; a term has objective, reduce, coef; did you mean 'coef'?"
    )
    cfg.updates.policy.surrogate = {"coef": 1.0}
    with pytest.raises(
        ConfigError, match=r"updates.policy.surrogate: has no objective; choose one \(rlhf list objective\)"
    ):
        validate(cfg)


def test_a_learner_needs_its_section() -> None:
    cfg = config("algo=ppo")
    OmegaConf.set_struct(cfg, False)
    del cfg.learners["critic"]
    with pytest.raises(ConfigError) as e:
        learner_sections(cfg)
    assert str(e.value) == "updates.critic: learners.critic is missing; type learners.critic.head=value or =score"


def test_a_dropped_term_drops_what_only_it_needed() -> None:
    assert "reference" not in validate(config("updates.policy.kl=null")).models
    assert validate(config("updates.policy.kl=null", "shaping=kl", "credit=group_norm_to_go")).annotate == ("ref_logp",)


def test_what_is_not_used_is_said() -> None:
    notes = validate(config("algo=dpo", *PAIRS)).notes
    assert "reward=bleu is not used: the responses are recorded, not sampled" in notes
    on_policy = validate(config()).notes
    assert "old_logp is the update's own log-prob: one update per rollout is on-policy" in on_policy
    assert not any("old_logp" in n for n in validate(config("batch.epochs=2")).notes)


def test_the_reference_is_explained() -> None:
    def why(*overrides: str) -> str:
        return validate(config(*overrides)).models["reference"]

    assert why() == "gives ref_logp: a frozen copy of the initial policy"
    assert why("model.lora.r=8") == "gives ref_logp: the disabled adapter"
    assert why("model.reference=some/model") == "gives ref_logp: some/model"


# -- hardware ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_auto_hardware_without_a_gpu(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_cpu_has", lambda flag: False)
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(6)))
    found = resolve_hardware(config())
    assert found == {"device": "cpu", "processes": 1, "precision": "fp32", "threads": 6, "micro_batch_tokens": 1024}
    assert resolve_hardware(config("hardware.processes=4"))["threads"] == 1
    for words, tokens in (
        (["rollout.max_tokens=128"], 1536),
        (["rollout.max_tokens=512"], 2048),
        (["rollout.max_tokens=8"], 1024),
    ):
        found = resolve_hardware(config("batch.samples=8", "dataset.max_prompt_tokens=512", *words))
        assert found["micro_batch_tokens"] == tokens  # 512 + 8 x 128 is a whole group
    monkeypatch.setattr(hardware, "_cpu_has", lambda flag: flag == "amx_bf16")
    found = resolve_hardware(config())
    assert (found["precision"], found["micro_batch_tokens"]) == ("bf16", 1280)
    assert resolve_hardware(config("hardware=cpu"))["precision"] == "fp32"


def test_a_gpu_that_is_not_there_is_refused(no_gpu: None) -> None:
    with pytest.raises(ConfigError) as e:
        resolve_hardware(config("hardware=gpu"))
    assert str(e.value) == "hardware.device=cuda: no NVIDIA GPU is visible; type hardware=cpu"


def test_auto_hardware_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    found = resolve_hardware(config())
    assert (found["device"], found["processes"], found["precision"], found["micro_batch_tokens"]) == (
        "cuda",
        2,
        "bf16",
        16384,
    )
    with pytest.raises(ConfigError) as e:
        resolve_hardware(config("hardware.processes=3"))
    assert str(e.value) == "hardware.processes=3: 2 GPUs are visible"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert resolve_hardware(config())["device"] == "cpu"


# -- the printed plan --------------------------------------------------------------------------------------------------


def test_the_plan_in_words(no_gpu: None) -> None:
    text = describe(
        config(
            "algo=ppo",
            "steps=5",
            "batch.prompts=4",
            "batch.samples=3",
            "batch.epochs=2",
            "batch.minibatches=2",
            "hardware=cpu",
            "rollout.max_tokens=64",
        )
    )
    lines = text.splitlines()
    assert lines[0] == "algo=ppo reward=bleu dataset=quickstart model=tiny_random"
    assert "  4 prompts x 3 samples = 12 rows a step, over 1 process" in lines
    assert "  5 steps x 2 epochs x 2 minibatches = 20 optimizer steps" in lines
    assert f"  at most {12 * 64} new tokens a step (64 a response)" in lines
    models = lines[lines.index("Models") + 1 : lines.index("Memory per process (estimate)") - 1]
    assert [m.split()[0] for m in models] == ["policy", "critic", "reference"]
    assert "trained; answers the prompts" in models[0] and "gives ref_logp" in models[2]
    columns = {line.split()[0]: line for line in lines[lines.index("Columns") + 2 :] if line.startswith("  ")}
    assert "credit" in columns["advantage"] and "updates.policy.surrogate.objective" in columns["advantage"]
    assert "annotate" in columns["value"] and "critic forward" in columns["value_new"]


def test_a_recorded_plan_in_words(no_gpu: None) -> None:
    text = describe(config("algo=dpo", *PAIRS, "batch.prompts=4", "hardware=cpu"))
    assert "  4 records a step with all their responses, over 1 process" in text.splitlines()
    assert "read recorded responses of x.jsonl" in text and "Notes" in text


def test_the_memory_estimate_counts_bytes(no_gpu: None) -> None:
    """1.7e9 parameters in fp32: 6.8 GB of weights, 6.8 of gradients, 13.6 of AdamW moments; the reference another 6.8."""
    text = compose("train", ["model=smollm2_1_7b", "hardware=cpu"], None)
    lines = {line.split()[0]: line for line in describe(text).splitlines() if " GB " in line}
    assert "27.20 GB" in lines["policy"] and "weights 6.80 + gradients 6.80 + AdamW 13.60" in lines["policy"]
    assert "6.80 GB" in lines["reference"]
    sharded = describe(
        compose(
            "train", ["model=smollm2_1_7b", "hardware=zero3", "hardware.processes=4", "hardware.precision=fp32"], None
        )
    )
    assert "weights 1.70 + gradients 1.70 + AdamW 3.40" in sharded


def test_planning_loads_no_torch() -> None:
    code = (
        "import sys; from rlhf_cli.compose import compose; from rlhf_cli.report.planned import describe; "
        "describe(compose('train', ['model=tiny_random', 'algo=ppo', 'hardware=cpu'], None)); "
        "print([m for m in ('torch', 'transformers', 'datasets', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_reward_that_loads_a_model_is_named_whatever_its_key() -> None:
    plan = validate(compose("train", ["reward=model", "reward.model.path=runs/judge"], None))
    assert plan.models["reward.model"] == "scores responses (runs/judge)"
    assert "reward.bleu" not in validate(compose("train", [], None)).models


def test_rto_plans_with_any_reward_and_its_critic_then_starts_from_the_policy() -> None:
    cfg = config("experiment=rto", "reward=bleu", "frozen.dpo.path=x")
    assert validate(cfg).learners == {"policy": "policy", "critic": "value"} and cfg.learners.critic.path == ""
    assert config("experiment=rto", "reward.model.path=runs/rm").learners.critic.path == "runs/rm"


def test_the_batch_counts_what_is_drawn() -> None:
    from rlhf_cli.report.planned import describe

    # 8 prompts x (4 + 1 greedy) x 32 tokens; and 8 x 8 x 10 rollouts x 32
    remax = describe(config("algo=remax", "batch.prompts=8", "batch.samples=4", "rollout.max_tokens=32"))
    assert "8 prompts x 4 samples = 32 rows a step, over 1 process; a greedy response to each prompt besides" in remax
    assert "at most 1280 new tokens a step (32 a response)" in remax
    dapo = describe(config("algo=dapo", "rollout.max_tokens=32"))
    assert "at most 20480 new tokens a step in up to 10 rollouts (32 a response)" in dapo


def test_a_greedy_baseline_needs_sampled_rows() -> None:
    assert "baseline" in next(s for s in validate(config("algo=remax")).stages if s.name == "baseline").gives
    assert refusal("algo=remax", "source=recorded", *DEMONSTRATIONS).startswith("credit: greedy_baseline needs ")
