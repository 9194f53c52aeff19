"""`rlhf eval`, `rlhf generate` and `rlhf score`: one process each."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from rlhf_cli import plan_reward, wiring
from rlhf_cli.config import check_node
from rlhf_cli.data.loading import load, load_whole
from rlhf_cli.data.record import Record, leading
from rlhf_cli.engine.comm import Comm, seed_all
from rlhf_cli.engine.memory import keep_freed_memory
from rlhf_cli.environments import section as dialogue
from rlhf_cli.errors import ConfigError
from rlhf_cli.models import loading
from rlhf_cli.report import evaluate as held_out
from rlhf_cli.report.evaluate import Row, bootstrap, by_prompt, paired, write_rows
from rlhf_cli.rewards.nodes import RESERVED, reward_nodes
from rlhf_cli.rewards.report import ScoreReport, render, report
from rlhf_cli.rollout.builtin import decoding_of
from rlhf_cli.rollout.sampler import Sampler
from rlhf_cli.sources.assemble import sample_of
from rlhf_cli.types import Sample, Scores


def _device(cfg: Any) -> torch.device:
    torch.set_num_threads(cfg.hardware.threads or 1)
    keep_freed_memory()
    seed_all(cfg.seed)
    return torch.device(cfg.hardware.device)


def _sampler(cfg: Any, model_cfg: Any, device: torch.device) -> Sampler:
    tokenizer = loading.load_tokenizer(model_cfg)
    model = loading.load_causal(model_cfg, dtype=wiring.dtype_of(cfg), seed=cfg.seed).to(device)
    sampler, _ = wiring.make_sampler(cfg, model, tokenizer, Comm(device), None, lambda numbers, stage: None)
    return sampler


# -- eval --------------------------------------------------------------------------------------------------------------


def evaluate(cfg: Any) -> int:
    """A model, or a run beside the model it started from, on held-out prompts: greedy, and sampled with eval.samples=K."""
    device = _device(cfg)
    records = load(cfg.dataset, "heldout")
    records = leading(records, cfg.eval.prompts)
    scorer = wiring.make_scorer(cfg)
    if scorer is None:
        raise ConfigError("eval: no reward; type reward=bleu (rlhf list reward)")
    wiring.require_references(scorer, records)
    environment = dialogue.make(cfg)
    columns: dict[str, list[Row]] = {}
    for name, model_cfg in _models(cfg).items():
        sampler = _sampler(cfg, model_cfg, device)
        player = wiring.make_player(cfg, environment, sampler)
        wiring.attended(scorer, sampler, cfg)
        encoded = wiring.encode(records, sampler.tokenizer, cfg, environment)
        for how, k, temperature in (("greedy", 1, 0.0), ("sampled", cfg.eval.samples, cfg.rollout.temperature)):
            if k:
                decoding = decoding_of(cfg, temperature=temperature)
                columns[f"{name}, {how}"] = held_out.generate_and_score(
                    sampler, scorer, records, encoded, Comm(device), decoding, k=k, seed=cfg.seed, player=player
                )
        getattr(sampler, "close", lambda: None)()  # an engine of its own makes room for the next model's
        del sampler
    _print_columns(columns, cfg)
    if cfg.output:
        write_rows(Path(cfg.output), [{"column": name, **r} for name, rows in columns.items() for r in rows])
        print(f"\nresponses and scores are in {cfg.output}")
    return 0


def _models(cfg: Any) -> dict[str, Any]:
    """The model asked for; for a run, also the model it started from."""
    found = {"model": cfg.model}
    run = Path(cfg.model.path) if cfg.model.path else None
    if run is not None and (run / "config.yaml").exists():
        from rlhf_cli.config import load_config

        found = {"base": load_config(run).model, "run": cfg.model}
    return found


def _print_columns(columns: dict[str, list[Row]], cfg: Any) -> None:
    print(
        f"\nheld-out {'+'.join(cfg.reward)} on {len({r['uid'] for r in next(iter(columns.values()))})} prompts, 95 % bootstrap intervals\n"
    )
    print(f"  {'':<18}{'mean':>8}  {'interval':<20}{'tokens':>7}{'truncated':>11}{'missing':>9}")
    for name, rows in columns.items():
        ci = bootstrap(by_prompt(rows), cfg.eval.bootstrap)
        s = held_out.summarise(rows, cfg.eval.bootstrap, cfg.eval.diversity)
        missing = sum(r["score"] is None for r in rows)
        print(
            f"  {name:<18}{ci.mean:>8.4f}  {f'[{ci.low:.4f}, {ci.high:.4f}]':<20}{s['tokens']:>7.1f}{s['truncated']:>11.1%}{missing:>9}"
        )
        for part, value in s.items():
            if part.startswith("reward/") and len(cfg.reward) > 1:
                print(f"    {part.removeprefix('reward/'):<16}{value:>8.4f}")
            if part.startswith("diversity/"):
                print(f"    {part.removeprefix('diversity/'):<16}{value:>8.4f}")
    for how in ("greedy", "sampled"):
        if f"base, {how}" in columns and f"run, {how}" in columns:
            gain = paired(columns[f"base, {how}"], columns[f"run, {how}"], cfg.eval.bootstrap)
            print(
                f"\n  run - base, {how}: {gain}  paired by prompt; the interval {'excludes' if gain.excludes_zero else 'includes'} 0"
            )


# -- generate ----------------------------------------------------------------------------------------------------------


def generate(cfg: Any) -> int:
    """Responses to prompts: from `input` (JSON lines by dataset.columns, or plain lines of text), or from the held-out records."""
    device = _device(cfg)
    records = _prompts(cfg)
    sampler = _sampler(cfg, cfg.model, device)
    environment = dialogue.make(cfg)
    encoded = wiring.encode(records, sampler.tokenizer, cfg, environment)
    player = wiring.make_player(cfg, environment, sampler)
    rows = held_out.generate_and_score(
        sampler,
        None,
        records,
        encoded,
        Comm(device),
        sampler.decoding,
        k=max(1, cfg.eval.samples),
        seed=cfg.seed,
        player=player,
    )
    if cfg.output:
        write_rows(Path(cfg.output), rows)
        print(f"{len(rows)} responses to {len(records)} prompts are in {cfg.output}")
        return 0
    for r in rows:
        print(
            json.dumps(r, ensure_ascii=False) if not sys.stdout.isatty() else f"> {r['prompt']}\n{r['response']}\n",
            flush=True,
        )
    return 0


def _prompts(cfg: Any) -> list[Record]:
    if not cfg.input:
        return load(cfg.dataset, "heldout")
    path = Path(cfg.input)
    if not path.is_file():
        raise ConfigError(
            f"input={cfg.input}: no such file; give JSON lines with a prompt column, or a .txt with one prompt a line"
        )
    if path.suffix == ".txt":
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise ConfigError(f"input={cfg.input}: the file has no prompt")
        return [
            Record(messages=({"role": "user", "content": t},), prompt=t, uid=f"line-{n}", where=f"{path.name}:{n}")
            for n, t in enumerate(lines, 1)
        ]
    return load_whole(_of_input(cfg, "prompts"))


def _of_input(cfg: Any, shape: str) -> Any:
    """The dataset section pointed at `input`, whole, without a held-out part."""
    section = cfg.dataset.copy()
    suffix = Path(cfg.input).suffix.lstrip(".")
    if suffix not in ("jsonl", "json", "parquet"):
        raise ConfigError(f"input={cfg.input}: unknown ending {suffix!r}; use .jsonl, .json or .parquet")
    section.update(
        {
            "format": suffix,
            "path": cfg.input,
            "heldout": "",
            "shape": shape if cfg.dataset.format == "packaged" else cfg.dataset.shape,
        }
    )
    return section


# -- score -------------------------------------------------------------------------------------------------------------


def score(cfg: Any) -> int:
    """Run the reward over recorded responses: values, latency, and what looks wrong, before anything is trained on it."""
    found, rows = score_report(cfg)
    print(render(found))
    if cfg.output:
        write_rows(Path(cfg.output), rows)
        print(f"\nscores are in {cfg.output}")
    return 0


def score_report(cfg: Any) -> tuple[ScoreReport, list[dict[str, Any]]]:
    """What `rlhf score` finds, and each response with its scores."""
    cfg = _at_input(cfg)
    for node in reward_nodes(cfg):
        plan_reward.fits(
            cfg, node.name, check_node(node.settings, node.key, allow=cfg.allow_targets, reserved=RESERVED)[0]
        )
    scorer = wiring.make_scorer(cfg)
    if scorer is None:
        raise ConfigError("score: no reward; type reward=bleu (rlhf list reward)")
    if any(getattr(part, "asks_policy", False) for _, part in scorer.scorers.values()):
        wiring.attended(scorer, _sampler(cfg, cfg.model, _device(cfg)), cfg)
    records = _responses(cfg)
    wiring.require_references(scorer, records)
    samples: list[Sample] = [sample_of(r, text) for r in records for text in r.responses]
    counts = torch.tensor([len(r.responses) for r in records])
    group = torch.arange(len(records)).repeat_interleave(counts)
    first = (counts.cumsum(0) - counts).tolist()
    edges = [(at + w, at + lo) for r, at in zip(records, first, strict=True) for w, lo in r.pairs]
    pairs = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2)
    unknown = float("nan")
    recorded = torch.tensor([x for r in records for x in (r.scores or [unknown] * len(r.responses))])
    scores = scorer(samples, group)
    found = report(samples, group, scorer, pairs, recorded, scores)
    return found, [_score_row(s, i, scores) for i, s in enumerate(samples)]


def _at_input(cfg: Any) -> Any:
    """The configuration whose dataset is `input`, where that is given: a path of the dataset's own may then be empty."""
    if not cfg.input:
        return cfg
    found = cfg.copy()
    found.dataset = _of_input(cfg, "demonstrations")
    return found


def _responses(cfg: Any) -> list[Record]:
    """All recorded responses of `input`, or those of the dataset's held-out part."""
    records = load_whole(cfg.dataset) if cfg.input else load(cfg.dataset, "heldout")
    if not any(r.responses for r in records):
        raise ConfigError(
            "score: there are no responses to score; type input=FILE with columns prompt, response and references, or pick a dataset of responses"
        )
    return records


def _score_row(sample: Sample, i: int, scores: Scores) -> dict[str, Any]:
    return {
        "uid": sample.uid,
        "prompt": sample.prompt,
        "response": sample.response,
        "score": None if scores.missing is not None and scores.missing[i] else float(scores.value[i]),
        "components": {k: float(v[i]) for k, v in scores.components.items() if not torch.isnan(v[i])},
    }
