"""`make_run`: the one place that sees both the configuration and the objects made from it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_cli import frozen, gates, readers, stages
from rlhf_cli.data.loading import load
from rlhf_cli.data.record import Record, as_demonstrations, check_lengths, check_references, leading
from rlhf_cli.data.text import check_dialogue, render, response_ids
from rlhf_cli.engine.comm import Comm
from rlhf_cli.engine.deepspeed import DeepSpeedEngine, Frozen, Setup
from rlhf_cli.environments import section as dialogue
from rlhf_cli.hardest import Banded, banded
from rlhf_cli.models import fused, kernels, loading, packing
from rlhf_cli.models.heads import PolicyHead, ScalarHead, SharedHead, inner
from rlhf_cli.models.lora import add_lora
from rlhf_cli.pipeline import make_pipeline
from rlhf_cli.plan import HEADS, Plan, learner_sections, validate
from rlhf_cli.prepass import Prepass, make_prepass
from rlhf_cli.probe import probe_rows
from rlhf_cli.rewards.direction import written
from rlhf_cli.rewards.make import make_scorer
from rlhf_cli.rewards.self_judge import attended
from rlhf_cli.rewards.stage import held, make_scoring
from rlhf_cli.rollout.backends import backend
from rlhf_cli.rollout.sampler import Sampler
from rlhf_cli.sources.episodes import Episodes
from rlhf_cli.sources.play import Player
from rlhf_cli.sources.recorded import Recorded
from rlhf_cli.sources.resampled import Resampled
from rlhf_cli.sources.sampled import Sampled
from rlhf_cli.state import Builder
from rlhf_cli.types import Experience, Run, Scorer


@dataclass
class Parts:
    """What a run is made of, for the loop, for evaluation and for checkpoints."""

    plan: Plan
    tokenizer: Any
    engines: dict[str, DeepSpeedEngine]
    heads: list[Any]  # of the learners and the reference
    sampler: Sampler | None
    eval_scorer: Scorer | None  # the training reward on held-out prompts; None where the records do not allow it
    probe: Callable[[], Experience]  # a few rows for the gates at the start
    heldout: list[Record]
    encoded_heldout: list[list[int]]
    player: Player | None  # of dialogues, where there is an environment
    recorded_heldout: Recorded | None
    gates: gates.Gates
    state: dict[str, Any]  # name -> object with state_dict
    prepass: Prepass | Banded | None = None  # runs before the first step


def make_run(cfg: Any, comm: Comm, record: Any, folder: Path | None = None) -> tuple[Run, Parts]:
    """Build everything a training run needs; `folder` is its directory. Raises ConfigError for what only data and models can tell."""
    plan = validate(cfg)
    sampled = plan.source == "sampled"
    scorer = make_scorer(cfg) if sampled else None
    tokenizer = loading.load_tokenizer(cfg.model)
    train, heldout = load_records(cfg, plan)
    require_references(scorer, [*train, *heldout])
    if scorer is not None:
        scorer.start()
    environment = dialogue.make(cfg)
    encoded, encoded_heldout = (encode(records, tokenizer, cfg, environment) for records in (train, heldout))

    packing.register()
    sections = learner_sections(cfg)
    probe = partial(probe_rows, encoded=encoded[:2], records=train[:2])
    heads = make_heads(cfg, sections, comm, plan, probe, record.note)
    read_only = make_readers(cfg, heads, plan, comm, probe, record.note)
    scorable = "policy" in plan.learners and can_score(cfg, heldout)
    actor = make_actor(cfg, heads, plan, comm) if sampled or scorable else None
    engines = {name: DeepSpeedEngine(name, head, setup_of(cfg, sections[name]), comm) for name, head in heads.items()}
    followers = readers.followers(cfg, read_only, engines)
    sampler, publish = make_sampler(cfg, actor, tokenizer, comm, engines.get("policy"), record.count, read_only)
    rest = _nothing
    if sampled:
        assert sampler is not None
        rest = getattr(sampler, "rest", _nothing)  # an engine that gives its memory back while the learner trains
        draws: Any = partial(Episodes, make_player(cfg, environment, sampler)) if environment is not None else Sampled
        source: Any = draws(
            train, encoded, sampler, publish, comm, prompts=cfg.batch.prompts, samples=cfg.batch.samples, seed=cfg.seed,
            greedy=plan.greedy, begin=scorer.begin if scorer is not None else None, rest=rest,
        )  # fmt: skip
    else:
        answers = encode_answers(train, tokenizer, cfg)
        source = Recorded(train, encoded, answers, publish, prompts=cfg.batch.prompts, seed=cfg.seed)
    recorded_heldout = None if sampled else recorded_rows(heldout, encoded_heldout, tokenizer, cfg)

    checks = make_gates(cfg, sampler)
    build = Builder(cfg.allow_targets)
    ask = partial(make_prepass, cfg, train, encoded, sampler, scorer, comm, folder, rest)
    score, prepass = make_scoring(cfg, plan, scorer, comm, checks, record, tokenizer, build, ask)
    prepass = banded(cfg, prepass, source, scorer, folder)
    pipeline = make_pipeline(cfg, plan, build, record.count)
    stages_of = vars(pipeline) | {"score": score}
    if cfg.batch.resample > 1 and sampled:
        source = Resampled(
            source, score, pipeline.select, prompts=cfg.batch.prompts, rounds=cfg.batch.resample, count=record.count, phase=record.phase
        )  # fmt: skip
        stages_of |= {"score": stages.keep, "select": stages.keep}
    run = Run(
        source=source,
        annotate=held(stages.annotating(annotations(plan, engines, read_only)), build.state.get("detectors")),
        engines=engines,
        **stages_of,
        check=checks,
        after=lambda step: False,
        record=record,
        start=0,
        steps=cfg.steps,
        follow=partial(readers.follow, list(followers.values())),
    )
    for name, (_, part) in (scorer.scorers if scorer is not None else {}).items():
        build.keep(f"reward.{name}", part)
    state = {"source": source, "constant_reward": checks.constant, **build.state, **followers}
    eval_scorer = attended(scorer if sampled else make_scorer(cfg) if scorable else None, sampler, cfg)
    return run, Parts(
        plan=plan,
        tokenizer=tokenizer,
        engines=engines,
        heads=[*heads.values(), *(r.module for r in read_only.values())],
        sampler=sampler,
        eval_scorer=eval_scorer,
        probe=probe,
        heldout=heldout,
        encoded_heldout=encoded_heldout,
        player=make_player(cfg, environment, sampler),
        recorded_heldout=recorded_heldout,
        gates=checks,
        state=state,
        prepass=prepass,
    )


def recorded_rows(
    heldout: Sequence[Record], encoded: Sequence[Sequence[int]], tokenizer: Any, cfg: Any
) -> Recorded | None:
    """Held-out responses, which losses are evaluated on."""
    if not heldout:
        return None
    return Recorded(heldout, encoded, encode_answers(heldout, tokenizer, cfg), _nothing, prompts=len(heldout), seed=0)


def make_actor(cfg: Any, heads: Mapping[str, nn.Module], plan: Plan, comm: Comm) -> nn.Module:
    """The model that samples: the policy itself; a copy where ZeRO-3 shards the policy; else the initial one."""
    if "policy" not in heads:
        return loading.load_causal(cfg.model, dtype=dtype_of(cfg), seed=cfg.seed).to(comm.device).eval()
    model: Any = heads["policy"].model
    return copy.deepcopy(model) if cfg.hardware.zero == 3 and backend(cfg).SAMPLES_WITH_ACTOR else model


def make_sampler(
    cfg: Any,
    actor: nn.Module | None,
    tokenizer: Any,
    comm: Comm,
    learner: Any,
    count: Any,
    read_only: Mapping[str, Frozen] | None = None,
) -> tuple[Any, Callable[[], None]]:
    """The chosen sampler with the weights of the learner (of the actor, without one), and what brings it new ones."""
    if actor is None:
        return None, _nothing
    chosen = backend(cfg)
    sampler = chosen.make_sampler(cfg, actor, tokenizer, comm)
    publish = chosen.make_publish(cfg, sampler, actor, learner, comm, count)
    publish()
    if cfg.rollout.mask.model and read_only:
        readers.mask_sampler(cfg, sampler, read_only, tokenizer)
    return sampler, publish


def make_player(cfg: Any, environment: Any, sampler: Any) -> Player | None:
    """What plays dialogues with an environment; None without one."""
    if environment is None or sampler is None:
        return None
    s, rows = cfg.environment, cfg.environment["rows"]
    if rows == "episode":
        check_dialogue(sampler.tokenizer, cfg.dataset.chat)
    return Player(environment, sampler, cfg.dataset.chat, rows, s["turns"], cfg.dataset.max_prompt_tokens)


def make_gates(cfg: Any, sampler: Sampler | None) -> gates.Gates:
    """The gates that look at a finished step. A truncated distribution is another one than the learner's."""
    r = cfg.rollout
    return gates.Gates(
        cfg.gates,
        precision=cfg.hardware.precision,
        eos=sampler.eos if sampler is not None else [],
        stops=bool(r.stop),
        own_reference=cfg.model.reference == "auto" and not cfg.rollout.mask.model,
        exact_sampler=r.top_p == 1.0 and r.top_k == 0 and r.min_tokens == 0 and r.temperature > 0,
    )


def can_score(cfg: Any, records: Sequence[Record]) -> bool:
    """Whether the chosen reward can be computed on these records."""
    scorer = make_scorer(cfg)
    if scorer is None or not records:
        return False
    wants = any(getattr(s, "needs_references", False) for _, s in scorer.scorers.values())
    return not wants or all(r.references for r in records)


def _nothing() -> None:
    pass


# -- data --------------------------------------------------------------------------------------------------------------


def load_records(cfg: Any, plan: Plan) -> tuple[list[Record], list[Record]]:
    """Train and held-out records; as demonstrations where no stage reads preferences, so that nothing imitates a rejected response."""
    train, heldout = (written(load(cfg.dataset, split), cfg) for split in ("train", "heldout"))
    heldout = leading(heldout, cfg.eval.prompts)
    judged = {"pairs", "margin", "pair_weight", "label", "score"}
    if plan.source == "recorded" and not any(judged & s.needs for s in plan.stages):
        return as_demonstrations(train), as_demonstrations(heldout)
    return train, heldout


def require_references(scorer: Any, records: Sequence[Record]) -> None:
    """Refuse records without reference before any scorer that compares with references runs."""
    for name, (_, part) in getattr(scorer, "scorers", {}).items():
        if getattr(part, "needs_references", False):
            check_references(records, f"reward={name}")


def encode(records: Sequence[Record], tokenizer: Any, cfg: Any, environment: Any = None) -> list[list[int]]:
    """Prompt ids of every record, as its environment opens it; too long ones are refused by file and line."""
    opened = [r.messages if environment is None else environment.reset(r, 0).messages for r in records]
    ids = [render(messages, tokenizer, cfg.dataset.chat) for messages in opened]
    check_lengths(records, [len(x) for x in ids], cfg.dataset.max_prompt_tokens)
    return ids


def encode_answers(records: Sequence[Record], tokenizer: Any, cfg: Any) -> list[list[list[int]]]:
    """Ids of every recorded response, end of turn included; too long ones are refused by file and line."""
    ids = [[response_ids(text, tokenizer, cfg.dataset.chat) for text in r.responses] for r in records]
    longest = [max((len(x) for x in several), default=0) for several in ids]
    check_lengths(records, longest, cfg.dataset.max_response_tokens, key="dataset.max_response_tokens")
    return ids


# -- models ------------------------------------------------------------------------------------------------------------


def dtype_of(cfg: Any) -> torch.dtype:
    """Of the weights that compute."""
    return torch.bfloat16 if cfg.hardware.precision == "bf16" else torch.float32


def make_heads(
    cfg: Any,
    sections: Mapping[str, Any],
    comm: Comm,
    plan: Plan,
    probe: Callable[[], Experience],
    note: Callable[[str], None],
) -> dict[str, nn.Module]:
    """The trained models by name, with the chosen kernels where these agree with the plain path on the rows of `probe`."""
    heads = {name: make_head(cfg, section, comm, plan) for name, section in sections.items()}
    for name, head in heads.items():
        want = frozenset(HEADS[sections[name].head]) - {"entropy"}
        kernels.use(head, cfg.model.kernels, probe, want, note, comm.any)
    return heads


def make_head(cfg: Any, section: Any, comm: Comm, plan: Plan) -> nn.Module:
    """A trained model with its head, on this rank's device, dropout off."""
    model_cfg = copy.deepcopy(cfg.model)
    if section.path:
        model_cfg.path, model_cfg.source, model_cfg.revision = section.path, "auto", ""
    causal = "logp" in HEADS[section.head]
    load_model = loading.load_causal if causal else loading.load_scalar
    model = load_model(model_cfg, dtype=dtype_of(cfg), seed=cfg.seed)
    if cfg.model.lora.r:
        model = add_lora(model, cfg.model.lora, cfg.seed)
    prepare(model, checkpointing=cfg.model.checkpointing)
    model.to(comm.device)
    if causal:
        settings: Any = {"temperature": temperature_of(cfg, plan), "packing": cfg.model.packing}
        shared = "value_new" in HEADS[section.head]
        head = SharedHead(model, **settings, seed=cfg.seed) if shared else PolicyHead(model, **settings)
        return head.to(comm.device)
    return ScalarHead(model, packing=cfg.model.packing)


def prepare(model: nn.Module, *, checkpointing: bool) -> None:
    """Packed attention, dropout off; activation checkpointing on request."""
    hf: Any = inner(model)
    if hf.config._attn_implementation != "eager":
        hf.set_attn_implementation(packing.ATTENTION)
    fused.install(hf)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        if hasattr(m, "attention_dropout"):
            m.attention_dropout = 0.0  # type: ignore[assignment]
    if checkpointing:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        hf.enable_input_require_grads()
    model.train(checkpointing)


def temperature_of(cfg: Any, plan: Plan) -> float:
    """Log-probs are those of the distribution that sampled; recorded rows are scored at 1."""
    return cfg.rollout.temperature if plan.source == "sampled" and cfg.rollout.temperature > 0 else 1.0


def make_readers(
    cfg: Any,
    heads: Mapping[str, nn.Module],
    plan: Plan,
    comm: Comm,
    probe: Callable[[], Experience],
    note: Callable[[str], None],
) -> dict[str, Frozen]:
    """Models that are only read, by name."""

    def head_of(model: Any) -> nn.Module:
        model.to(comm.device)
        prepare(model, checkpointing=False)
        head = PolicyHead(model, temperature=temperature_of(cfg, plan), packing=cfg.model.packing)
        head.eval().requires_grad_(False)
        kernels.use(head, cfg.model.kernels, probe, frozenset({"logp"}), note, comm.any)
        return head

    wants_reference = "ref_logp" in plan.annotate
    return readers.make(cfg, heads, wants_reference, head_of, dtype_of(cfg), setup_of(cfg, None), comm)


def setup_of(cfg: Any, section: Any) -> Setup:
    """Engine settings of one learner."""
    lr = cfg.optim.lr if section is None or section.lr is None else section.lr
    hw = cfg.hardware
    return Setup(
        zero=hw.zero, bf16=hw.precision == "bf16", offload=hw.offload, nvme_path=hw.nvme_path, budget=hw.micro_batch_tokens, lr=lr,
        betas=tuple(cfg.optim.betas), eps=cfg.optim.eps, weight_decay=cfg.optim.weight_decay, clip=cfg.optim.clip, extra=dict(hw.deepspeed),
    )  # fmt: skip


def annotations(
    plan: Plan, engines: Mapping[str, DeepSpeedEngine], read_only: Mapping[str, Frozen]
) -> dict[str, tuple[Any, str]]:
    """Columns filled from models: name -> (model, its output)."""
    critic = next((engines[n] for n, head in plan.learners.items() if "value_new" in HEADS[head]), None)
    makers = {
        "old_logp": (engines.get("policy"), "logp"),
        "ref_logp": (read_only.get("reference"), "logp"),
        "full_logp": (engines.get("policy"), "full_logp"),
        "value": (critic, "value_new"),
        **{frozen.column(name): (reader, "logp") for name, reader in read_only.items()},
    }
    return {c: makers[c] for c in plan.annotate}
