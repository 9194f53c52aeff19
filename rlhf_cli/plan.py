"""What a run will do, proved before anything loads: stages, columns, models, batch identity, memory. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rlhf_cli import frozen, plan_reward, standins
from rlhf_cli.checks import check_numbers
from rlhf_cli.config import check_node, nearest
from rlhf_cli.environments import section as dialogue
from rlhf_cli.errors import ConfigError
from rlhf_cli.flow import Plan, Stage
from rlhf_cli.signature import Signature

BASE = ("ids", "attention", "mask", "group", "version")
SAMPLED = ("truncated", "behavior_logp")
HEADS = {
    "policy": ("logp", "entropy"),
    "policy_value": ("logp", "entropy", "value_new"),
    "value": ("value_new",),
    "score": ("score_new",),
}
"""Head -> what its forward returns."""
TERM_KEYS = ("objective", "reduce", "coef")


def validate(cfg: Any) -> Plan:
    """Walk the stages in order; every column a stage takes must have been made by an earlier one. Raises ConfigError in one sentence."""
    check_numbers(cfg)
    frozen.check(cfg)
    plan = Plan(source=source_kind(cfg))
    dialogue.check(cfg, plan.source)
    have = set(BASE)
    _source(cfg, plan, have)
    plan_reward.scorers(cfg, plan, have)
    plan.notes += standins.notes(cfg)
    _select(cfg, plan, have)
    terms = list(_terms(cfg))
    if not terms:
        raise ConfigError("updates is empty: no learner has a term; choose an algorithm (rlhf list algo)")
    shapers = [
        (f"shaping.{k}", _check(cfg, v, f"shaping.{k}"))
        for k, v in (cfg.shaping or {}).items()
        if v and plan.source == "sampled"
    ]
    credit = _check(cfg, cfg.credit, "credit") if cfg.credit else None
    correction = _correction(cfg, plan)
    _check_sampling(cfg, plan, [s for _, s in shapers], [s for *_, s in terms])
    takers = [s for _, s in shapers] + [s for s in (credit, correction) if s] + [s for *_, s in terms]
    _annotate(cfg, plan, have, frozenset().union(*(s.columns for s in takers)) if takers else frozenset())
    for name, sig in shapers:
        _stage(cfg, plan, have, name, sig, ())
    if "score" in have:
        plan.stages.append(
            Stage("reward", "the score lands on the last trained token", frozenset({"score", "mask"}), ("reward",))
        )
        have.add("reward")
    if credit is not None:
        _stage(cfg, plan, have, "credit", credit, credit.gives or ("advantage", "returns"))
    if correction is not None:
        _stage(cfg, plan, have, "correction", correction, ("advantage",))
    for learner, term, role, sig in terms:
        _stage(
            cfg,
            plan,
            have | set(HEADS[plan.learners[learner]]),
            f"updates.{learner}.{term}.{role}",
            sig,
            (),
            extra=learner,
        )
    _unused(plan, terms)
    if plan.source == "sampled":
        plan_reward.check_spans(cfg, read=any("reward" in s.needs for s in plan.stages))
    return plan


def source_kind(cfg: Any) -> str:
    """`sampled` or `recorded`: what conf/source says, or what the dataset holds."""
    kind = (cfg.source or {}).get("kind", "auto")
    if kind not in ("auto", "sampled", "recorded"):
        raise ConfigError(
            f"source.kind: {kind!r} is not allowed; choose one of auto, sampled, recorded{nearest(kind, ('sampled', 'recorded'))}"
        )
    if kind != "auto":
        return kind
    return "recorded" if "responses" in _dataset_gives(cfg) else "sampled"


def _dataset_gives(cfg: Any) -> frozenset[str]:
    from rlhf_cli.data.spec import gives

    return gives(cfg.dataset)


def _check(cfg: Any, node: Mapping[str, Any], key: str, reserved: Iterable[str] = ()) -> Signature:
    return check_node(node, key, allow=cfg.allow_targets, reserved=reserved)[0]


def _short(sig: Signature) -> str:
    return sig.target.rpartition(".")[2]


def _stage(
    cfg: Any, plan: Plan, have: set[str], name: str, sig: Signature, gives: tuple[str, ...], extra: str = ""
) -> None:
    """Append a stage after checking its columns."""
    absent = sorted(set(sig.columns) - have)
    if absent:
        raise ConfigError(f"{name}: {_short(sig)} needs {absent[0]}; {_why_absent(cfg, plan, absent[0], extra)}")
    if "group" in sig.columns and plan.source == "sampled" and cfg.batch.samples < 2:
        raise ConfigError(
            f"{name}: {_short(sig)} compares the responses to one prompt, and batch.samples={cfg.batch.samples}; type batch.samples=4 or more"
        )
    needs = frozenset(sig.columns) - {"components"}  # which come with the score
    plan.stages.append(Stage(name, _short(sig), needs, gives or sig.gives))
    have.update(gives or sig.gives)


SOURCE_ONLY = {
    **dict.fromkeys(("gap", "category"), "a reward brings it: type reward=[by_category,clause_distance]"),
    "hardness": "a reward brings it: type reward=[by_category,clause_distance]",
    "best": "a reward with levels brings it: type reward=levels, or reward=levels_knights",
    "turn_reward": "only the turns of a dialogue have one: type environment=NAME (rlhf list environment)",
    "baseline": "it is the score of a greedy response, and recorded rows have none: type source=sampled",
    "behavior_logp": "recorded rows were not drawn by this policy: type source=sampled",
}
"""Column that only some sources have -> why it is absent."""


def _why_absent(cfg: Any, plan: Plan, column: str, learner: str) -> str:
    if column == "pairs":
        return "no stage makes pairs: choose a dataset with preferences (dataset=preferences), or a reward and select=best_vs_worst"
    if column in ("score", "components", "reward", *plan_reward.REFERENCE):
        return (
            "no reward gives a score: type reward=bleu (rlhf list reward)"
            if plan.source == "sampled"
            else "recorded rows have no score: type source=sampled"
        )
    if column in ("value", "value_new"):
        return "no critic in updates: add a learner with head=value, as algo=ppo does"
    if column == "score_new":
        return f"learner {learner!r} has no score head: set learners.{learner}.head=score"
    if column in ("advantage", "returns"):
        return "no credit rule gives it: type credit=group_norm (rlhf list credit)"
    if column in SOURCE_ONLY:
        return SOURCE_ONLY[column]
    if column in ("label", "margin", "pair_weight"):
        return f"the dataset has no {column}: map it with dataset.columns"
    if column in ("logp", "entropy", "old_logp", "ref_logp", "full_logp"):
        return "it comes from a policy, and no policy is loaded"
    other = f"no stage makes it{nearest(column, (*BASE, *SAMPLED))}"
    return frozen.absent(column) if column.endswith(frozen.SUFFIX) else other


def _source(cfg: Any, plan: Plan, have: set[str]) -> None:
    gives = _dataset_gives(cfg)
    where = cfg.dataset.path or cfg.dataset.format
    if plan.source == "sampled":
        talks = dialogue.chosen(cfg)
        made = (*SAMPLED, *(("turn_reward",) if talks else ()))
        have.update(made)
        plan.models |= {"policy": "answers the prompts", **dialogue.models(cfg)}
        does = dialogue.does(cfg) if talks else f"sample {cfg.batch.samples} responses to each prompt of {where}"
        plan.stages.append(Stage("source", does, frozenset(), (*BASE, *made)))
        return
    if not gives & {"responses", "references"}:
        raise ConfigError(
            "source=recorded: the dataset records no responses; use shape pairs, rankings, thumbs or demonstrations, or source=sampled"
        )
    made = tuple(c for c in ("pairs", "margin", "label") if c in gives)
    have.update(made)
    plan.stages.append(Stage("source", f"read recorded responses of {where}", frozenset(), (*BASE, *made)))
    if cfg.reward:
        plan.notes.append(f"reward={','.join(cfg.reward)} is not used: the responses are recorded, not sampled")


def _select(cfg: Any, plan: Plan, have: set[str]) -> None:
    if not cfg.select:
        return
    if plan.source != "sampled":
        if cfg.select.get("_target_", "").rpartition(".")[2] not in ("keep_all", ""):
            plan.notes.append("select is not used: recorded rows carry their own pairs")
        return
    sig = _check(cfg, cfg.select, "select")
    plan_reward.check_metric(cfg)
    _stage(cfg, plan, have, "select", sig, sig.gives)


def _terms(cfg: Any) -> Iterable[tuple[str, str, str, Signature]]:
    """(learner, term, objective or reduce, signature) of every function in `updates`."""
    for learner, terms in cfg.updates.items():
        for term, node in (terms or {}).items():
            if node is None:
                continue
            key = f"updates.{learner}.{term}"
            for k in node:
                if k not in TERM_KEYS:
                    raise ConfigError(
                        f"{key}.{k}: unknown; a term has {', '.join(TERM_KEYS)}{nearest(str(k), TERM_KEYS)}"
                    )
            if not node.get("objective"):
                raise ConfigError(
                    f"{key}: has no objective; choose one (rlhf list objective), or delete the term with {key}=null"
                )
            sig = _check(cfg, node["objective"], f"{key}.objective")
            _check_reduce(key, sig, bool(node.get("reduce")))
            yield learner, term, "objective", sig
            if node.get("reduce"):
                yield learner, term, "reduce", _check(cfg, node["reduce"], f"{key}.reduce")


def _check_reduce(key: str, sig: Signature, reduces: bool) -> None:
    """A value per token needs a reduction; a value per row or per pair is averaged as it is."""
    whole = "row" if sig.per_row else "pair" if "pairs" in sig.columns else "row" if "score_new" in sig.columns else ""
    if whole and reduces:
        raise ConfigError(
            f"{key}.reduce: {_short(sig)} gives one value per {whole}, not per token; type {key}.reduce=null"
        )
    if not whole and not reduces:
        raise ConfigError(f"{key}.reduce: {_short(sig)} gives a value per token; choose a reduction (rlhf list reduce)")


def learner_sections(cfg: Any) -> dict[str, Any]:
    """Section of every learner in `updates`; the policy's is optional."""
    from rlhf_cli.config import LearnerSection

    idle = [name for name in cfg.learners if name not in cfg.updates]
    if idle:
        raise ConfigError(
            f"learners.{idle[0]}: nothing in updates trains it; updates has {', '.join(cfg.updates)}{nearest(idle[0], cfg.updates)}"
        )
    sections = {}
    for name in cfg.updates:
        if not any(v is not None for v in (cfg.updates[name] or {}).values()):
            continue
        found = cfg.learners.get(name)
        if found is None and name != "policy":
            raise ConfigError(f"updates.{name}: learners.{name} is missing; type learners.{name}.head=value or =score")
        sections[name] = found if found is not None else LearnerSection()
    return sections


def _annotate(cfg: Any, plan: Plan, have: set[str], wanted: frozenset[str]) -> None:
    for name, section in learner_sections(cfg).items():
        if section.head not in HEADS:
            raise ConfigError(
                f"learners.{name}.head: {section.head!r} is not allowed; choose one of {', '.join(HEADS)}{nearest(section.head, HEADS)}"
            )
        plan.learners[name] = section.head
        plan.models[name] = "trained" + (f"; {plan.models[name]}" if name in plan.models else "")
    policy = "logp" in HEADS.get(plan.learners.get("policy", ""), ()) or plan.source == "sampled"
    filled = []
    if "old_logp" in wanted and "policy" in plan.learners:
        have.add("old_logp")
        if cfg.batch.epochs * cfg.batch.minibatches > 1 or (cfg.correction and plan.source == "sampled"):
            filled.append("old_logp")
        else:
            plan.notes.append("old_logp is the update's own log-prob: one update per rollout is on-policy")
    if "baseline" in wanted and plan.source == "sampled":
        have.add("baseline")
        plan.greedy = True
        does = "the score of a greedy response to every prompt, which is not trained"
        plan.stages.append(Stage("baseline", does, frozenset({"score"}), ("baseline",)))
    if "ref_logp" in wanted and policy:
        have.add("ref_logp")
        filled.append("ref_logp")
        plan.models["reference"] = frozen.reference(cfg)
    own = ["full_logp"] if "full_logp" in wanted and "policy" in plan.learners else []
    have.update(own)
    filled += own
    frozen.refuse_idle(cfg, wanted, trained="logp" in HEADS.get(plan.learners.get("policy", ""), ()))
    plan.models |= {name: frozen.described(cfg, name) for name in cfg.frozen}
    named = [column for column in frozen.columns(cfg) if column in wanted]
    have.update(named)
    filled += named
    critics = [n for n, head in plan.learners.items() if "value_new" in HEADS[head]]
    if "value" in wanted and critics:
        have.add("value")
        filled.append("value")
    plan.annotate = tuple(filled)
    if filled:
        plan.stages.append(Stage("annotate", "forward passes without gradient", frozenset({"ids"}), plan.annotate))


def _correction(cfg: Any, plan: Plan) -> Signature | None:
    """The rule that weighs advantages, where there are any and the rows are sampled."""
    if not cfg.correction:
        return None
    if plan.source != "sampled":
        plan.notes.append("correction is not used: the responses are recorded, not sampled")
        return None
    if not cfg.credit:
        raise ConfigError(
            "correction: it weighs advantages, and no credit rule gives any; type credit=group_norm, or correction=none"
        )
    if cfg.rollout.top_p < 1 or cfg.rollout.top_k > 0:
        raise ConfigError(
            "correction: the learner's log-probs are of the whole distribution and the sampler's of a part of it; "
            "set rollout.top_p=1 rollout.top_k=0, or correction=none"
        )
    return _check(cfg, cfg.correction, "correction")


def _unused(plan: Plan, terms: list[tuple[str, str, str, Signature]]) -> None:
    """Token rewards that nobody reads would be dropped silently; refuse them."""
    used = {c for s in plan.stages for c in s.needs}
    dense = [s.name for s in plan.stages if s.name.startswith("shaping.") and "score" not in s.needs]
    if dense and "reward" not in used:
        raise ConfigError(
            f"{dense[0]} gives token rewards, and no stage reads them: choose a credit that takes `reward` (credit=group_norm_to_go, credit=gae)"
        )
    shapers = [s.name for s in plan.stages if s.name.startswith("shaping.")]
    readers = [s for s in plan.stages if s.name == "credit" or s.name.startswith("updates.")]
    if shapers and not any({"score", "reward"} & s.needs for s in readers):
        raise ConfigError(
            f"{shapers[0]} changes the score after pairs are made, and nothing reads it then: choose a credit, or shaping=none"
        )
    if any("advantage" in s.gives for s in plan.stages) and "advantage" not in used:
        plan.notes.append("advantage is computed and not used")


def _check_sampling(cfg: Any, plan: Plan, shapers: list[Signature], terms: list[Signature]) -> None:
    """What would be a bias nobody sees: equal samples, stale advantages, log-probs of a truncated distribution."""
    if plan.source != "sampled":
        return
    r, b = cfg.rollout, cfg.batch
    if r.temperature == 0 and b.samples > 1:
        raise ConfigError(
            f"rollout.temperature=0 draws {b.samples} equal responses to every prompt; raise it, e.g. to 1"
        )
    stale = any("advantage" in s.columns for s in terms) and not any("old_logp" in s.columns for s in terms)
    if b.epochs * b.minibatches > 1 and stale:
        raise ConfigError(
            f"{b.epochs * b.minibatches} updates per rollout with an objective that has no ratio to the sampling policy are biased; "
            "set batch.epochs=1 batch.minibatches=1, or choose an objective with one (ppo_clip)"
        )
    if (r.top_p < 1 or r.top_k > 0) and any("behavior_logp" in s.columns for s in shapers):
        plan.notes.append(
            "the KL in the reward is biased: samples come from a truncated distribution (rollout.top_p, top_k)"
        )
