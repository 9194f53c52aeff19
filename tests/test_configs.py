"""Every option that is shipped composes, is checked, builds, and fits into a plan."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from rlhf_cli import catalog
from rlhf_cli.compose import compose
from rlhf_cli.config import Root, build, check_node
from rlhf_cli.environments.section import OWN
from rlhf_cli.errors import ConfigError
from rlhf_cli.override import inherit, override
from rlhf_cli.plan import validate
from rlhf_cli.report.planned import describe
from rlhf_cli.rewards.nodes import RESERVED, RULE_RESERVED

OPTIONS = [(group, name) for group, found in catalog.groups().items() for name in found]
SHAPE_FITS = {"prompts": "grpo", "pairs": "dpo", "rankings": "dpo", "demonstrations": "sft"}
NEEDS_PATH = {
    "rlhf_cli.rewards.principles.Principles",
    "rlhf_cli.rewards.http.Http",
    "rlhf_cli.rewards.model.Model",
    "rlhf_cli.rewards.python.Python",
    "rlhf_cli.rewards.perplexity.Perplexity",
    "rlhf_cli.rewards.attributes.Attributes",
    "rlhf_cli.rewards.implicit.Implicit",
}
JUDGED = tuple(
    [
        "judge",
        "judge_anchor",
        "judge_listwise",
        "judge_pairwise",
        "judge_pivot",
        "mpo",
        "oni",
        "pair_verdict",
        "sql_judge",
    ]
)
REQUIRED = {
    **dict.fromkeys(JUDGED, "judge.backend=rule"),
    "co_reward": "dataset=rephrased",
    "model": "reward.model.path=RUN",
    "principles": "reward.principles.path=RUN",
    "http": "reward.http.url=http://127.0.0.1:8000/score",
    "ensemble": "reward.ensemble.path=[RUN,OTHER]",
    "attributes": "reward.attributes.path=FOLDER",
    "robust_heads": "reward.robust_heads.path=FOLDER",
    "implicit": "+debug.stand_ins=true",
    "python": "reward.python.path=mine.py:score",
    "regex": "reward.regex.pattern=x",
    "perplexity": "reward.perplexity.path=FOLDER",
    "zero3_offload_nvme": "hardware.nvme_path=nvme",
}


JUDGING = ("mpo", "pairwise_rl", "reasoning_sql", "rewardanything", "stable_reinforce", "writing_zero")
FITTING = {
    **{("experiment", name): ["judge.backend=rule"] for name in JUDGING},
    ("experiment", "p3o"): ["reward.model.path=RUN"],
    ("experiment", "salmon"): ["reward.principles.path=RUN"],
    ("experiment", "rto"): ["frozen.dpo.path=RUN", "reward.model.path=RUN"],
    ("experiment", "salsa"): ["model.soup.path=RUN"],
    ("shaping", "implicit_dpo"): ["algo=ppo", "frozen.dpo.path=RUN"],
    ("shaping", "lsc_canned"): ["prepass.canned=No."],
    ("rollout", "greedy"): ["algo=sft"],  # equal samples are refused in training; recorded rows need none
}


def nodes(section: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node with a target below `section`, and where it stands."""
    if isinstance(section, dict):
        if "_target_" in section:
            yield key, section
        for name, inner in section.items():
            yield from nodes(inner, f"{key}.{name}".lstrip("."))


GAME = ["reward=environment", "environment=guess_number"]
TALKS = {  # options that need the other party of a dialogue
    ("environment", "none"): ["environment=none", "reward=length"],
    ("environment", "calculator"): ["environment=calculator", "dataset=rephrased", "reward=environment"],
    ("environment", "guess_number"): GAME,
    **{
        ("environment", name): [f"environment={name}", "dataset=profiles", "reward=environment", "judge.backend=rule"]
        for name in ("scripted_user", "simulated_user", "simulated_user_dialogue")
    },
    **{("experiment", name): [f"experiment={name}", "judge.backend=rule"] for name in ("rlpa", "rlpa_dialogue", "oni")},
    ("reward", "environment"): GAME,
    ("reward", "by_category"): ["reward=by_category", "reward.by_category.path=RUN"],
    ("reward", "clause_distance"): ["reward=[clause_distance,bleu]"],
    ("credit", "difficulty_scaled"): [
        "credit=difficulty_scaled", "reward=[by_category,clause_distance]", "reward.by_category.path=RUN", "dataset=refusals",
    ],
    ("experiment", "dr_irl"): ["experiment=dr_irl", "reward.by_category.path=RUN"],
    ("shaping", "turns"): ["shaping=turns", "credit=group_norm_to_go", *GAME],
}  # fmt: skip


def words_of(group: str, name: str) -> list[str]:
    """A command line around one option, with a recipe and records that fit it."""
    if group == "dataset":
        given = [] if "format: packaged" in catalog.groups()[group][name].path.read_text() else ["dataset.path=DATA"]
        raw = compose("train", [f"dataset={name}", *given], None)
        fit = SHAPE_FITS.get(raw.dataset.shape, "sft")
        return [
            f"dataset={name}",
            f"algo={fit}",
            *given,
            "reward=length",
        ]
    if group in ("objective", "reduce"):
        return term_words(group, name)
    if group == "algo" or (group, name) == ("reward", "none"):
        return [f"{group}={name}"] if group == "algo" else ["algo=dpo", *PAIRS, "reward=none"]
    if group == "credit":
        return [
            f"credit={name}",
            f"algo={'ppo' if name.startswith('gae') else 'sft' if name == 'none' else 'grpo'}",
            *reader(name),
        ]
    if group == "select":
        return [f"select={name}", f"algo={'dpo' if 'pairs' in name or 'worst' in name else 'grpo'}"]
    if group == "shaping" and name.partition("_")[0] in ("kl", "adaptive"):
        return [f"shaping={name}", "credit=group_norm_to_go"]
    if (group, name) in FITTING:
        return [f"{group}={name}", *FITTING[group, name]]
    if (group, name) == ("rollout", "vllm") and not importlib.util.find_spec("vllm"):
        pytest.skip("vLLM IS NOT INSTALLED: type make vllm")
    if group == "source":
        return [f"source={name}", f"algo={'sft' if name == 'recorded' else 'grpo'}"]
    return [
        f"{group}={name}",
        *WITH.get(group, []),
        *WITH.get(f"{group}={name}", []),
        *([REQUIRED[name]] if group in ("reward", "hardware") and name in REQUIRED else []),
    ]


WITH = {
    "combine": ["reward=[bleu,length]"],
    "combine=lagrangian": ["combine.thresholds.length=0.5"],
    "combine=maxmin_records": ["combine.by_meta=team", "dataset.columns.meta.team=team"],
    **{
        f"experiment={name}": ["debug.stand_ins=true"]
        for name in ("dpa", "infalign", "lsc", "mo_grpo", "par", "reward_robust", "rm_ensemble")
    },
    "rollout=greedy": ["algo=sft"],  # equal samples are refused in training; recorded rows need none
}
PAIRS = ["dataset=preferences", "dataset.path=DATA"]


def reader(credit: str) -> list[str]:
    return ["dataset=quickstart"] if credit != "none" else []


def term_words(group: str, name: str) -> list[str]:
    """The objective, or the weights, of one more term of a learner whose columns fit."""
    sig, _ = check_node(option_node(group, name), name)
    takes = set(sig.columns)
    if "score_new" in takes:
        base, learner = ["algo=reward_model", *(["dataset=scored"] if "label" in takes else PAIRS)], "reward"
    elif "score" in takes:
        base, learner = ["algo=dpo"] if "pairs" in takes else ["algo=ppo"], "policy"
        base += ["reward=levels"] if "best" in takes else []
    elif "label" in takes:
        base, learner = ["algo=sft", "dataset=rankings", "dataset.path=DATA"], "policy"
    elif "pairs" in takes:
        base, learner = ["algo=dpo", *PAIRS], "policy"
    else:
        base, learner = ["algo=ppo"], "critic" if "value_new" in takes else "policy"
    term = f"updates.{learner}.extra"
    if "margin" in takes:
        base = [*base, "dataset.columns.margin=margin"]
    other = "sequence_mean" if group == "objective" else "reinforce"
    both = {"objective": name, "reduce": other} if group == "objective" else {"objective": other, "reduce": name}
    if "pairs" in takes or "score_new" in takes or sig.per_row:
        both.pop("reduce")
    return [*base, *(f"+{g}@{term}.{g}={n}" for g, n in both.items()), f"{term}.coef=0.5"]


def option_node(group: str, name: str) -> dict[str, Any]:
    text = (
        catalog.groups()[group][name]
        .path.read_text()
        .replace("${rollout.max_tokens}", "64")
        .replace("${reward.environment.weight}", "1.0")
    )
    return OmegaConf.to_container(OmegaConf.create(text))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("group", "name"),
    # with the other tests of an option in one process, which then composes it once
    [pytest.param(*o, marks=pytest.mark.xdist_group("-".join(o))) for o in OPTIONS],
)
def test_every_option_composes_builds_and_plans(group: str, name: str) -> None:
    if (group, name) == ("dataset", "thumbs"):
        pytest.skip("no shipped recipe takes thumbs up and down yet")
    cfg = compose("train", TALKS.get((group, name)) or words_of(group, name), None)
    if group not in ("algo", "debug", "objective", "reduce"):
        assert name in str(cfg.names[group])
    plain = OmegaConf.to_container(cfg, resolve=True)
    found = list(nodes(plain, ""))
    assert found
    for key, node in found:
        own = {"combine": RULE_RESERVED, "environment": OWN}
        kept = RESERVED if key.startswith("reward.") else own.get(key, ())
        node = node if isinstance(node.get("path", ""), str) else {**node, "path": node["path"][0]}
        check_node(node, key, reserved=kept)
        if node["_target_"] not in NEEDS_PATH and not key.startswith("tracker."):
            made: Any = build(node, key, reserved=kept)
            assert callable(made) or hasattr(made, "reset"), key
    plan = validate(cfg)
    assert plan.stages and plan.learners
    if group in ("credit", "combine", "reward", "shaping", "objective", "reduce") and name != "none":
        target = option_node(group, name)
        target = target if "_target_" in target else next(iter(target.values()))
        last = target["_target_"].rpartition(".")[2]
        assert any(last in s.does for s in plan.stages), f"{last} is not in the plan"


@pytest.mark.parametrize("name", list(catalog.groups()["algo"]))
def test_every_recipe_plans_in_words(name: str) -> None:
    text = describe(compose("train", [f"algo={name}", "model=tiny_random"], None))
    for head in ("Batch", "Hardware", "Models", "Memory per process (estimate)", "Flow", "Columns"):
        assert f"\n{head}\n" in text
    assert f"algo={name}" in text.splitlines()[0] and "GB" in text


# ---- open keys, without Hydra's marks ----


def train_cfg(*words: str) -> DictConfig:
    return compose("train", list(words), None)


def test_new_keys_of_open_sections_need_no_marks() -> None:
    cfg = train_cfg(
        "dataset.columns.meta.id=id",
        "dataset.columns.references=",
        "dataset.columns.prompt=question",
        "hardware.deepspeed.zero_optimization.reduce_bucket_size=1000",
        "debug.shuffled_reward=true",
        "learners.policy.lr=2e-5",
        "learners.policy.starts_at=3",
        "+objective@updates.policy.bonus.objective=entropy_bonus",
        "updates.policy.bonus.coef=0.1",
    )
    assert dict(cfg.dataset.columns) == {"prompt": "question", "references": "", "meta.id": "id"}
    assert cfg.hardware.deepspeed.zero_optimization.reduce_bucket_size == 1000
    assert cfg.debug.shuffled_reward is True
    assert (cfg.learners.policy.lr, cfg.learners.policy.starts_at, cfg.learners.policy.head) == (2e-5, 3, "policy")
    assert cfg.updates.policy.bonus.coef == 0.1
    assert train_cfg("algo=ppo", "learners.critic.lr=1").learners.critic.head == "value", (
        "a recipe's learner keeps the rest"
    )


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("learners.policy.lrr=1", "learners.policy.lrr: unknown key; did you mean 'lr'?"),
        ("learners.policy.lr=x", "learners.policy.lr=x: wanted float | None, e.g. learners.policy.lr=null"),
        ("learners.critc.lr=1", "learners.critc: nothing in updates trains it; updates has policy"),
        ("updates.policy.kll.coef=1", "updates.policy.kll.coef: unknown key; did you mean 'kl'?"),
        ("dataset.columns.promt=x", "dataset.columns.promt: unknown; it may be prompt"),
        ("dataset.columns.prompt=[a]", "dataset.columns.prompt=[a]: Cannot convert 'list' to string"),
        (
            "debug.shufled_reward=true",
            "debug: 'shufled_reward' is not allowed; choose one of shuffled_reward, stand_ins; did you mean",
        ),
        ("hardware.deepsped.x=1", "hardware.deepsped: unknown key; did you mean 'deepspeed'?"),
    ],
)
def test_open_sections_are_checked_all_the_same(word: str, text: str) -> None:
    with pytest.raises(ConfigError) as e:
        validate(train_cfg(word))
    message = str(e.value)
    assert message.startswith(text) or message.startswith(text.replace("hardware.deepsped:", "hardware.deepsped.x:"))


# ---- overrides of a frozen configuration ----


def test_override_changes_settings_of_a_copy() -> None:
    cfg = train_cfg("algo=ppo")
    made = override(
        cfg, ["steps=9", "updates.policy.surrogate.coef=2", "learners.critic.lr=0.1", "debug.shuffled_reward=true"]
    )
    assert (made.steps, made.updates.policy.surrogate.coef, made.learners.critic.lr) == (9, 2, 0.1)
    assert (made.learners.critic.head, made.debug.shuffled_reward, dict(made.names)) == ("value", True, dict(cfg.names))
    assert cfg.steps != 9 and not cfg.debug


RUNS = "a run keeps its"
REFUSED = {
    "algo=ppo": f"algo=ppo: {RUNS} algo (grpo); for another, start a new run: rlhf train algo=ppo",
    "reward=[bleu,length]": f"reward=[bleu,length]: {RUNS} reward (bleu); for another, start a new run: "
    "rlhf train reward=[bleu,length]",
    "run.name=x": f"run.name=x: {RUNS} name and place; move its folder instead",
    "stepz=1": "stepz: unknown key or group; did you mean 'steps'?",
    "optim.lrr=1": "optim.lrr: unknown key; did you mean 'lr'?",
    "steps=x": f"steps=x: wanted int, e.g. steps={Root().steps}; it is: optimisation steps",
    "steps=1,2": "steps=1,2: several values; type one, or steps=[a,b] for a list",
    "~seed": "~seed: nothing can be deleted from a run; give it another value",
    "+foo=1": "foo: unknown key; keys cannot be added to the root",
    "grpo": "grpo: not a setting; type key=value, e.g. algo=grpo",
    "reward.length.weight=1": "reward.length.weight: length is not chosen; type reward=[bleu,length] to add it",
}


@pytest.mark.parametrize("word", list(REFUSED))
def test_override_refuses(word: str) -> None:
    with pytest.raises(ConfigError) as e:
        override(train_cfg(), [word])
    assert str(e.value) == REFUSED[word]


def test_a_saved_configuration_can_be_overridden(tmp_path: Path) -> None:
    from rlhf_cli.config import load_config

    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(train_cfg("algo=dpo"), resolve=True))
    made = override(load_config(tmp_path), ["hardware.processes=2", "updates.policy.preference.objective.beta=0.2"])
    assert (made.hardware.processes, made.updates.policy.preference.objective.beta) == (2, 0.2)


def test_a_run_is_measured_on_what_it_was_trained_on() -> None:
    run = compose("train", ["dataset=jsonl", "dataset.path=mine.jsonl", "reward=length", "rollout.max_tokens=7"], None)
    words = ["reward=chrf", "dataset.limit=3"]
    made = inherit(compose("eval", words, None), run, words, ("dataset", "reward", "rollout"))
    assert (made.dataset.path, made.dataset.limit, made.rollout.max_tokens) == ("mine.jsonl", 3, 7)
    assert list(made.reward) == ["chrf"]


def test_one_group_is_chosen_at_several_places() -> None:
    places = [f"reduce@updates.policy.{term}.reduce" for term in ("surrogate", "kl")]
    cfg = train_cfg("algo=grpo", *(f"{place}=sequence_sum" for place in places))
    assert [cfg.names[place] for place in places] == ["sequence_sum"] * 2
    with pytest.raises(ConfigError, match="reduce is given twice"):
        train_cfg("algo=grpo", f"{places[0]}=sequence_sum", f"{places[0]}=token_mean")
