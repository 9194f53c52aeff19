"""What the plan proves about rewards: names, ensembles, slots, combinations, the prepass, token rewards; each refusal by its text."""

from typing import Any

import pytest

from rlhf_cli import plan_reward
from rlhf_cli.compose import compose
from rlhf_cli.data.record import Record
from rlhf_cli.errors import ConfigError
from rlhf_cli.plan import validate
from rlhf_cli.rewards.direction import told, unit, written
from rlhf_cli.rewards.make import make_scorer
from rlhf_cli.rewards.nodes import reward_nodes, sources

TWO = "reward=[bleu,length]"
IMPLICIT = ["reward=implicit", "+debug.stand_ins=true", "reward.implicit.token_level=true"]


def config(*words: str) -> Any:
    return compose("train", ["model=tiny_random", *words], None)


def stages(*words: str) -> list[str]:
    return [s.name for s in validate(config(*words)).stages]


def test_the_same_reward_twice_and_a_list_of_models() -> None:
    cfg = config(
        "reward=none",
        "+reward@reward.words=length",
        "+reward@reward.letters=length",
        "reward.letters.length.unit=characters",
    )
    nodes = reward_nodes(cfg)
    assert [(n.name, n.key, n.settings["unit"]) for n in nodes] == [
        ("words", "reward.words.length", "words"),
        ("letters", "reward.letters.length", "characters"),
    ]
    made = make_scorer(cfg)
    assert made is not None and list(made.weights) == ["words", "letters"] and cfg.names.reward == "words+letters"
    several = config("reward=ensemble", "reward.ensemble.path=[A,B]")
    assert [(n.name, n.settings["path"]) for n in reward_nodes(several)] == [("ensemble_1", "A"), ("ensemble_2", "B")]
    assert "reward.ensemble_2" in validate(several).models


def test_stand_ins_fill_every_member_and_both_models_of_a_pair() -> None:
    cfg = config("reward=[ensemble,implicit]", "reward.ensemble.path=['',A,'']", "+debug.stand_ins=true")
    assert list(cfg.reward.ensemble.path) == ["tiny:1", "A", "tiny:2"]
    assert (cfg.reward.implicit.path, cfg.reward.implicit.reference) == ("tiny:3", "tiny:4")


def test_parts_are_sources_with_their_weights() -> None:
    cfg = config(
        "reward=[attributes,length]",
        "reward.attributes.path=tiny:1",
        "reward.attributes.weight=2",
        "reward.attributes.parts.safety=1",
    )
    assert sources(cfg) == {
        "attributes/politeness": 0.5, "attributes/meaningfulness": 0.5, "attributes/actionability": 0.5, "attributes/safety": 2.0, "length": 1.0,
    }  # fmt: skip
    more = config("reward=python", "reward.python.path=f.py:score", "reward.python.parts.style=0.5")
    assert sources(more) == {"python/style": 0.5}


def test_the_prepass_is_there_only_where_something_compares_and_says_its_cost() -> None:
    assert "prepass" not in stages(TWO, "shaping=ceil")
    for words in (
        ["shaping=par"],
        [TWO, "combine=min", "combine.center=reference"],
        ["+shaping@reward.bleu.shaping=lsc"],
    ):
        made = stages(*words)
        assert made.index("prepass") < min(i for i, n in enumerate(made) if n.startswith("reward."))
    plan = validate(
        config("shaping=par", "prepass.samples=4", "rollout.max_tokens=8", "batch.prompts=2", "batch.samples=6")
    )
    assert [n for n in plan.notes if n.startswith("prepass")] == [
        "prepass: before the first step 4 responses are drawn and scored for each training prompt, at most 32 tokens a prompt; 3 prompts cost "
        "as much sampling as a step. prepass.path=RUN uses those of another run"
    ]
    assert not [n for n in validate(config("shaping=par", "prepass.path=runs/a")).notes if n.startswith("prepass")]


def test_slots_and_combinations_are_stages() -> None:
    made = validate(config(TWO, "+shaping@reward.bleu.shaping=lsc", "combine=uwo")).stages
    does = {s.name: s.does for s in made}
    assert does["reward.bleu.shaping.lsc"] == "lsc" and does["combine"] == "uwo of bleu, length"
    assert "combine" not in stages("reward=bleu")


REFUSED = {
    ("shaping=par", "reward=none"): "shaping.par: par needs ref_scores; no reward gives a score: type reward=bleu (rlhf list reward)",
    (TWO, "+shaping@reward.bleu.shaping=kl"): "reward.bleu.shaping.kl: token_kl gives token rewards, which are shaped together; "
    "put it into shaping",
    (TWO, "+shaping@reward.bleu.shaping=sequence_kl"): "reward.bleu.shaping.sequence_kl: sequence_kl needs behavior_logp, "
    "which is not known when a reward is scored; put it into shaping",
    ("shaping=[sequence_kl,par]",): "shaping.sequence_kl: the responses of the initial policy have no behavior_logp, "
    "so it cannot stand before shaping.par; put it behind",
    (TWO, "combine=min", "combine.center=grup"): "combine.center: 'grup' is not allowed; choose one of none, group, reference; did you mean 'group'?",
    (TWO, "combine=maxmin", "shaping=par"): "combine=maxmin compares the rows of a step, so responses of the initial policy have no score under it; "
    "shape each reward by itself (+shaping@reward.NAME.shaping=par), or choose another combination",
    ("combine=direction",): "combine=direction weighs two rewards, and this run has 1; type reward=[a,b]",
    (TWO, "combine=maxmin_records"): "combine.by_meta is empty; type combine.by_meta=KEY and dataset.columns.meta.KEY=COLUMN",
    (TWO, "combine=lagrangian"): "combine.thresholds is empty; type combine.thresholds.NAME=VALUE for each reward that must reach one",
    (TWO, "combine=lagrangian", "combine.thresholds.lenght=1"): "combine.thresholds.lenght: no such reward; there are bleu, length; did you mean 'length'?",
    ("combine=lagrangian", "combine.thresholds.bleu=1"): "combine.thresholds bounds every reward, and none is left to maximise; "
    "type reward=[a,b] with one more",
    ("reward=mpo", "judge.backend=rule", "shaping=par"): "reward.mpo changes while the policy trains, and the responses of the initial policy "
    "that it is compared with were scored before the first step; choose shaping and combine options that compare with none, or another reward",
    ("reward=[bleu,oni]", "judge.backend=rule", "combine=min", "combine.center=reference"): plan_reward.STALE.format(key="reward.oni"),
    ("reward=[bleu,self]", "+shaping@reward.self.shaping=lsc"): plan_reward.STALE.format(key="reward.self"),
    (TWO, "+shaping@reward.bleu.shaping=tanh", "combine=min", "combine.scale=reference"): "combine.scale=reference divides by the spread of raw rewards, and "
    "reward.bleu has shapers of its own; type combine.scale=batch",
    ("reward=ensemble",): "reward.ensemble.path is empty; type 'reward.ensemble.path=[RUN,RUN]'",
    ("reward=ensemble", "reward.ensemble.path=[]"): "reward.ensemble.path is empty; type 'reward.ensemble.path=[RUN,RUN]' with as many as there are members",
    ("reward=implicit", "reward.implicit.path=A"): "reward.implicit.reference is empty; type reward.implicit.reference=RUN",
    tuple(IMPLICIT): "reward.implicit gives token rewards, and no stage reads them: choose a credit that takes `reward` "
    "(credit=group_norm_to_go, credit=gae)",
    (*IMPLICIT, "algo=ppo", "combine=mean"): "reward.implicit gives token rewards, and only combine=weighted_sum knows where they fall; "
    "type combine=weighted_sum",
}  # fmt: skip


@pytest.mark.parametrize("words", list(REFUSED), ids=lambda w: " ".join(w))
def test_refusals(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as e:
        validate(config(*words))
    assert str(e.value) == REFUSED[words]


def test_a_reward_that_changes_is_fine_where_nothing_compares_with_it() -> None:
    for words in (
        ["+shaping@reward.bleu.shaping=par"],
        ["shaping=par", "reward.oni.weight=0"],
        ["combine=min", "combine.scale=batch"],
    ):
        assert validate(config("reward=[bleu,oni]", "judge.backend=rule", *words))


def test_token_rewards_that_are_read_are_fine() -> None:
    assert validate(config(*IMPLICIT, "algo=ppo")) and validate(config(*IMPLICIT, "credit=group_norm_to_go"))
    assert plan_reward.spans(config(*IMPLICIT[:2])) == [], "only where the setting turns them on"


def test_rewards_that_are_all_logged_only_are_told() -> None:
    told_ = validate(config("reward=hidden_answer")).notes
    assert [n for n in told_ if "weight 0" in n] == [
        "every reward has weight 0 (hidden_answer): they are logged, and each response scores 0; "
        "to train on one, type reward.hidden_answer.weight=1, or add another reward"
    ]
    for words in (["reward=[bleu,hidden_answer]"], ["reward=hidden_answer", "reward.hidden_answer.weight=1"]):
        assert not any("weight 0" in n for n in validate(config(*words)).notes)


# -- directions --------------------------------------------------------------------------------------------------------


def test_a_direction_in_words() -> None:
    # cos 15 = 0.9659, sin -15 = -0.2588
    text = told(unit(-15), ["help", "long"], "maximize weighted rating = {weights}")
    assert text == "maximize weighted rating = help*97 + long*-26"


def test_directions_are_written_into_prompts_by_hash() -> None:
    records = [Record(({"role": "user", "content": f"q{i}"},), f"q{i}", uid=f"u{i}") for i in range(200)]
    cfg = config(TWO, "combine=direction")
    made = written(records, cfg)
    vs = [r.meta["direction"] for r in made]
    assert all(abs(x * x + y * y - 1) < 1e-12 and x >= 0.7071 for x, y in vs) and len({v[0] for v in vs}) == 200
    assert min(y for _, y in vs) < -0.6 and max(y for _, y in vs) > 0.6
    assert made[0].messages[0]["role"] == "system" and made[0].messages[1:] == records[0].messages
    assert [r.meta for r in written(records[::-1], cfg)][::-1] == [r.meta for r in made], "whatever the order"
    led = Record(({"role": "system", "content": "be kind"}, {"role": "user", "content": "q"}), "q", uid="u")
    assert written([led], cfg)[0].messages[0]["content"].startswith("be kind\n\nmaximize weighted rating = bleu*")
    assert written(records, config(TWO)) == records


def test_a_canned_answer_is_named_and_compared_with() -> None:
    plan = validate(compose("train", ["algo=ppo", "shaping=[lsc_canned,kl]", "prepass.canned=No."], None))
    stage = next(s for s in plan.stages if s.name == "prepass")
    assert stage.gives == ("canned_score",) and stage.does == "the rewards of a canned answer to each training prompt"
    for words, said in (
        (
            ["shaping=lsc_canned"],
            r"^prepass\.canned is empty, and shaping=lsc_canned compares with its rewards; type prepass\.canned='I cannot",
        ),
        (
            ["prepass.canned=No."],
            r"^prepass\.canned: nothing compares with its rewards; type shaping=lsc_canned, or prepass\.canned=$",
        ),
        (
            ["shaping=[length_penalty,lsc_canned]", "prepass.canned=No."],
            r"^shaping\.length_penalty: the canned answer has no mask, so it cannot stand",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            validate(compose("train", words, None))
