"""What a configuration's rewards need, proved before anything loads: combination, shapers of one reward, the prepass. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rlhf_cli.config import check_node, nearest
from rlhf_cli.data.spec import gives
from rlhf_cli.errors import ConfigError
from rlhf_cli.flow import Plan, Stage
from rlhf_cli.judges.judge import check_section, describe
from rlhf_cli.rewards.nodes import PATHS, RESERVED, RULE_RESERVED, Node, reward_nodes, slot, sources
from rlhf_cli.signature import Signature

REFERENCE = ("ref_scores", "ref_length")
CANNED = "canned_score"
CARRIED = frozenset({"score", "mask", "group", "ids", "attention", *REFERENCE, CANNED})  # what a reference response has
CENTERS = ("none", "group", "reference")
SCALES = ("none", "batch", "reference")


class Wants(NamedTuple):
    """What the rewards of a run need besides themselves."""

    references: bool  # responses of the initial policy
    combined: bool  # their combined score too
    canned: bool = False  # the rewards of a canned answer

    @property
    def prepass(self) -> bool:
        """Whether anything is compared with."""
        return self.references or self.canned


def scorers(cfg: Any, plan: Plan, have: set[str]) -> None:
    """The stages from responses to scores."""
    if plan.source != "sampled" or not cfg.reward:
        if cfg.dataset.hardest:
            raise ConfigError(
                "dataset.hardest: it takes responses of the initial policy and a reward; type source=sampled reward=NAME, or dataset.hardest=0"
            )
        return
    check(cfg)
    if wants(cfg).prepass or cfg.dataset.hardest:
        _prepass(cfg, plan, have)
    for one in reward_nodes(cfg):
        name, key, node = one
        sig = check_node(node, key, allow=cfg.allow_targets, reserved=RESERVED)[0]
        fits(cfg, name, sig)
        check_filled(cfg, one, sig)
        brought = str(sig.flags.get("columns", "")).split()  # beside its value
        plan.stages.append(
            Stage(
                f"reward.{name}",
                f"{_short(sig)} x {float(node.get('weight', 1.0)):g}",
                frozenset(),
                ("score", *brought),
            )
        )
        have.update(("score", "components", *brought))
        plan.stages += [Stage(k, _short(s), frozenset(s.columns) - {"score"}) for k, s in shapers(cfg, one)]
        if sig.flags.get("asks_judge"):
            check_section(cfg.judge)
            plan.models["judge"] = describe(cfg.judge)
        if sig.flags.get("loads_model"):
            plan.models[f"reward.{name}"] = f"scores responses ({node['path']})"
    _combination(cfg, plan)


def check_filled(cfg: Any, one: Node, sig: Signature) -> None:
    """Refuse a reward whose model or file nobody named."""
    needed = (*PATHS, *str(sig.flags.get("required", "")).split())
    empty = next((n for n in needed if n in sig.params and not one.settings.get(n)), "")
    if empty:
        raise ConfigError(_named(cfg, one, empty, str(sig.flags.get("path_is", "FILE"))))


def fits(cfg: Any, name: str, sig: Signature) -> None:
    """Refuse a reward that the records, or the way a step is drawn, cannot serve."""
    if sig.flags.get("needs_references") and "references" not in gives(cfg.dataset):
        raise ConfigError(
            f"reward={name} compares with references, and this dataset maps none; type dataset.columns.references=COLUMN, or another reward"
        )
    if sig.flags.get("needs_links") and "link" not in gives(cfg.dataset):
        raise ConfigError(
            f"reward={name} compares the answers to linked prompts, and this dataset links none; type dataset.columns.link=COLUMN"
        )
    if sig.flags.get("counts_steps") and cfg.batch.resample > 1:
        raise ConfigError(
            f"reward={name} changes every so many scored rollouts, and batch.resample={cfg.batch.resample} scores several in one step; "
            "type batch.resample=1"
        )


def _named(cfg: Any, one: Node, setting: str, kind: str) -> str:
    """What to type where no model, or no file, is named."""
    several = sum(n.key == one.key for n in reward_nodes(cfg)) > 1
    value = f"'{one.key}.{setting}=[{kind},{kind}]'" if several else f"{one.key}.{setting}={kind}"
    return f"{one.key}.{setting} is empty; type {value}"


def _prepass(cfg: Any, plan: Plan, have: set[str]) -> None:
    """Responses of the initial policy: what they cost, or where they come from."""
    n, rows = drawn(cfg), cfg.batch.prompts * cfg.batch.samples
    if not n:
        does = "the rewards of a canned answer to each training prompt"
    elif cfg.prepass.path:
        does = (
            f"{n} responses of the initial policy to each training prompt, and their rewards, from {cfg.prepass.path}"
        )
    else:
        does = f"{n} responses of the initial policy to each training prompt, and their rewards"
        plan.notes.append(
            f"prepass: before the first step {n} responses are drawn and scored for each training prompt, "
            f"at most {n * cfg.rollout.max_tokens} tokens a prompt; {max(1, rows // n)} prompts cost as much sampling as a step. "
            "prepass.path=RUN uses those of another run"
        )
    found = wants(cfg)
    made = (*(REFERENCE if found.references else ()), *((CANNED,) if found.canned else ()))
    plan.stages.append(Stage("prepass", does, frozenset(), made))
    have.update(made)
    if cfg.dataset.hardest:
        plan.stages.append(
            Stage("choice", f"{cfg.dataset.hardest} training prompts by these scores: {cfg.dataset.band}")
        )


def _combination(cfg: Any, plan: Plan) -> None:
    """The rule, where there is more than one source to combine."""
    weights = sources(cfg)
    if weights and not any(weights.values()):
        plan.notes.append(
            f"every reward has weight 0 ({', '.join(weights)}): they are logged, and each response scores 0; "
            f"to train on one, type {reward_nodes(cfg)[0].key}.weight=1, or add another reward"
        )
    sig = rule(cfg)
    if sig is None or not weights:
        return
    if len(weights) > 1 or not sig.linear:
        plan.stages.append(
            Stage("combine", f"{_short(sig)} of {', '.join(n for n, w in weights.items() if w)}", frozenset({"score"}))
        )


def _short(sig: Signature) -> str:
    return sig.target.rpartition(".")[2]


def rule(cfg: Any) -> Signature | None:
    """The combination's rule."""
    if not cfg.combine:
        return None
    return check_node(cfg.combine, "combine", allow=cfg.allow_targets, reserved=RULE_RESERVED)[0]


def wants(cfg: Any) -> Wants:
    """Whether some stage compares with responses of the initial policy."""
    later = [sig for _, sig in _stages(cfg)]
    own = [sig for node in reward_nodes(cfg) for _, sig in shapers(cfg, node)]
    rule_ = cfg.combine or {}
    references = any("ref_scores" in sig.columns for sig in (*later, *own))
    return Wants(
        references or "reference" in (rule_.get("center"), rule_.get("scale")),
        any({"ref_scores", CANNED} & set(sig.columns) for sig in later),
        any(CANNED in sig.columns for sig in (*later, *own)),
    )


def compared(cfg: Any) -> list[Node]:
    """The rewards that count and whose values are compared with those of a prepass."""
    rule_, columns = cfg.combine or {}, {"ref_scores", CANNED}
    every = "reference" in (rule_.get("center"), rule_.get("scale")) or any(
        columns & set(sig.columns) for _, sig in _stages(cfg)
    )
    return [
        n
        for n in reward_nodes(cfg)
        if any(n.sources.values()) and (every or any(columns & set(sig.columns) for _, sig in shapers(cfg, n)))
    ]


def drawn(cfg: Any) -> int:
    """How many responses to a prompt the prepass draws: none where a canned answer is all that is compared with."""
    return int(cfg.prepass.samples) if wants(cfg).references or cfg.dataset.hardest else 0


def shapers(cfg: Any, node: Node) -> list[tuple[str, Signature]]:
    """(place, signature) of one reward's own shapers."""
    return [(key, check_node(v, key, allow=cfg.allow_targets)[0]) for key, v in slot(node).values()]


def check(cfg: Any) -> None:
    """Refuse, in one sentence, what the rewards and their combination cannot do."""
    nodes = reward_nodes(cfg)
    twice = next((n.name for i, n in enumerate(nodes) if n.name in {m.name for m in nodes[:i]}), None)
    if twice:
        raise ConfigError(
            f"reward: two rewards are called {twice}; give one another name with +reward@reward.NAME=OPTION"
        )
    for node in nodes:
        for key, sig in shapers(cfg, node):
            _check_shaper(key, sig)
    _check_detectors(cfg.detectors, [n.name for n in nodes])
    _check_compared(cfg)
    if wants(cfg).canned and not cfg.prepass.canned.strip():
        raise ConfigError(
            "prepass.canned is empty, and shaping=lsc_canned compares with its rewards; type prepass.canned='I cannot help with that.'"
        )
    if cfg.prepass.canned and not wants(cfg).canned:
        raise ConfigError(
            "prepass.canned: nothing compares with its rewards; type shaping=lsc_canned, or prepass.canned="
        )
    found = rule(cfg)
    if found is not None and nodes:
        _check_rule(cfg, found)
    _check_chain([(k, s) for k, s in _stages(cfg) if k.startswith("shaping.")])
    for node in nodes:
        _check_chain(shapers(cfg, node))


def check_metric(cfg: Any) -> None:
    """A selection that judges one reward needs that reward."""
    metric, names = cfg.select.get("metric", ""), [node.name for node in reward_nodes(cfg)]
    if metric and metric.partition("/")[0] not in names:
        raise ConfigError(
            f"select.metric={metric}: no such reward; there are {', '.join(names)}{nearest(metric, names)}; one that is only judged: "
            "reward=[a,b] reward.b.weight=0 select.metric=b"
        )


STALE = (
    "{key} changes while the policy trains, and the responses of the initial policy that it is compared with were scored before the first "
    "step; choose shaping and combine options that compare with none, or another reward"
)


def _check_compared(cfg: Any) -> None:
    """What is compared with references must be what they were scored by, and in their units."""
    for node in compared(cfg):
        if check_node(node.settings, node.key, allow=cfg.allow_targets, reserved=RESERVED)[0].flags.get("moves"):
            raise ConfigError(STALE.format(key=node.key))
        if slot(node) and (cfg.combine or {}).get("scale") == "reference":
            raise ConfigError(
                f"combine.scale=reference divides by the spread of raw rewards, and {node.key} has shapers of its own; type combine.scale=batch"
            )


def _check_detectors(d: Any, names: list[str]) -> None:
    """The reward that the trained one is compared with must be there; limits on both need it."""
    try:
        re.compile(d.answer)
    except re.error as e:
        raise ConfigError(f"detectors.answer: {d.answer!r} is no regular expression: {e}") from None
    if d.pairs < 0:
        raise ConfigError(f"detectors.pairs={d.pairs}: must be at least 0")
    if d.gold and d.gold.partition("/")[0] not in names:
        raise ConfigError(
            f"detectors.gold={d.gold}: no such reward; there are {', '.join(names)}; one that is only logged: "
            "reward=[a,b] reward.b.weight=0 detectors.gold=b"
        )
    limit = next((k for k in ("gold_gap", "gold_falls") if getattr(d, k) is not None), "")
    if limit and not d.gold:
        raise ConfigError(f"detectors.{limit} compares with detectors.gold, which is empty; type detectors.gold=REWARD")
    if d.gold and (d.window < 2 or d.window % 2):
        raise ConfigError(f"detectors.window={d.window}: its halves are compared; type an even number of steps")


def _check_shaper(key: str, sig: Signature) -> None:
    absent = sorted(set(sig.columns) - CARRIED)
    name = _short(sig)
    if "score" not in sig.columns:
        raise ConfigError(f"{key}: {name} gives token rewards, which are shaped together; put it into shaping")
    if absent:
        raise ConfigError(
            f"{key}: {name} needs {absent[0]}, which is not known when a reward is scored; put it into shaping"
        )


def _check_chain(chain: list[tuple[str, Signature]]) -> None:
    """A shaper before one that compares with references must fit references too."""
    last = max((i for i, (_, sig) in enumerate(chain) if "ref_scores" in sig.columns), default=0)
    for key, sig in chain[:last]:
        if "score" in sig.columns and not set(sig.columns) <= CARRIED:
            raise ConfigError(
                f"{key}: the responses of the initial policy have no {min(set(sig.columns) - CARRIED)}, "
                f"so it cannot stand before {chain[last][0]}; put it behind"
            )
    end = max((i for i, (_, sig) in enumerate(chain) if CANNED in sig.columns), default=0)
    for key, sig in chain[:end]:
        if "score" in sig.columns and set(sig.columns) - {"score"}:
            raise ConfigError(
                f"{key}: the canned answer has no {min(set(sig.columns) - {'score'})}, so it cannot stand before {chain[end][0]}; put it behind"
            )


def _check_rule(cfg: Any, sig: Signature) -> None:
    node, names = cfg.combine, [n for n, w in sources(cfg).items() if w]
    name = cfg.names.get("combine", _short(sig))
    for key, allowed in (("center", CENTERS), ("scale", SCALES)):
        if node.get(key, "none") not in allowed:
            raise ConfigError(
                f"combine.{key}: {node[key]!r} is not allowed; choose one of {', '.join(allowed)}{nearest(str(node[key]), allowed)}"
            )
    if wants(cfg).combined and not sig.rowwise:
        raise ConfigError(
            f"combine={name} compares the rows of a step, so responses of the initial policy have no score under it; "
            "shape each reward by itself (+shaping@reward.NAME.shaping=par), or choose another combination"
        )
    if "directions" in sig.columns and len(names) != 2:
        raise ConfigError(f"combine={name} weighs two rewards, and this run has {len(names)}; type reward=[a,b]")
    if "by_meta" in sig.params and not node.get("by_meta"):
        raise ConfigError("combine.by_meta is empty; type combine.by_meta=KEY and dataset.columns.meta.KEY=COLUMN")
    if "thresholds" in sig.params:
        _check_thresholds(node.get("thresholds") or {}, names)


def _check_thresholds(thresholds: Mapping[str, Any], names: list[str]) -> None:
    if not thresholds:
        raise ConfigError(
            "combine.thresholds is empty; type combine.thresholds.NAME=VALUE for each reward that must reach one"
        )
    for key in thresholds:
        if key not in names:
            raise ConfigError(
                f"combine.thresholds.{key}: no such reward; there are {', '.join(names)}{nearest(str(key), names)}"
            )
    if len(thresholds) == len(names):
        raise ConfigError(
            "combine.thresholds bounds every reward, and none is left to maximise; type reward=[a,b] with one more"
        )


def spans(cfg: Any) -> list[str]:
    """The rewards that place their value on tokens themselves."""
    return [n.key for n in reward_nodes(cfg) if n.settings.get("weight", 1.0) and _gives_spans(cfg, n)]


def check_spans(cfg: Any, *, read: bool) -> None:
    """Refuse token rewards that nobody reads, and combinations that do not know where they fall."""
    placed = spans(cfg)
    if not placed:
        return
    if not read:
        raise ConfigError(
            f"{placed[0]} gives token rewards, and no stage reads them: choose a credit that takes `reward` (credit=group_norm_to_go, credit=gae)"
        )
    found = rule(cfg)
    if found is not None and not found.linear:
        raise ConfigError(
            f"{placed[0]} gives token rewards, and only combine=weighted_sum knows where they fall; type combine=weighted_sum"
        )


def _gives_spans(cfg: Any, node: Node) -> bool:
    """`gives_spans` of a scorer's class: True, or the name of the setting that turns them on."""
    flag = check_node(node.settings, node.key, allow=cfg.allow_targets, reserved=RESERVED)[0].flags.get("gives_spans")
    return bool(node.settings.get(flag) if isinstance(flag, str) else flag)


def _stages(cfg: Any) -> Iterator[tuple[str, Signature]]:
    """Every function behind the combination."""
    for key in ("shaping", "select", "credit", "updates"):
        yield from _targets(cfg, cfg.get(key), key)


def _targets(cfg: Any, section: Any, key: str) -> Iterator[tuple[str, Signature]]:
    if not isinstance(section, Mapping):
        return
    if "_target_" in section:
        yield key, check_node(section, key, allow=cfg.allow_targets)[0]
        return
    for name, inner in section.items():
        yield from _targets(cfg, inner, f"{key}.{name}")
