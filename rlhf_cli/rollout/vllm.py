"""The vLLM backend: an engine beside the learner draws, token ids in, token ids and log-probabilities out.

It behaves as the built-in sampler does: the same ends of a response, a seed per row, log-probabilities of the distribution that
was sampled. Weights come from the learner, the first ones too, so engine and learner cannot start apart.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from rlhf_cli.data.text import end_id
from rlhf_cli.engine.comm import Comm
from rlhf_cli.engine.deepspeed import DeepSpeedEngine
from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.rollout.backends import require
from rlhf_cli.rollout.builtin import decoding_of
from rlhf_cli.rollout.sampler import Decoding, Rollout, eos_ids
from rlhf_cli.rollout.vllm_engine import Answer, Engine, Local, Server
from rlhf_cli.rollout.vllm_sync import Sync, plain_weights

SAMPLES_WITH_ACTOR = False
OWN = (
    "model", "tokenizer", "dtype", "load_format", "max_model_len", "max_num_seqs", "tensor_parallel_size", "seed", "logprobs_mode",
    "worker_extension_cls", "weight_transfer_config", "generation_config", "quantization", "enable_sleep_mode", "enforce_eager",
    "gpu_memory_utilization", "kv_cache_memory_bytes",
)  # fmt: skip
"""Arguments of vLLM that follow from other settings, or would make its weights others than the learner's."""


class VllmSampler:
    """Draws responses from a vLLM engine; the interface of `sampler.Sampler`."""

    def __init__(
        self, engine: Engine, tokenizer: Any, decoding: Decoding, eos: Sequence[int], max_model_len: int, *, lead: bool
    ) -> None:
        self.engine, self.tokenizer, self.decoding = engine, tokenizer, decoding
        self.eos = list(eos)
        self.max_model_len = max_model_len
        self.lead = lead  # this rank drives the engine: its weights and its sleep

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        k: int,
        seeds: Sequence[int],
        decoding: Decoding | None = None,
        done: Callable[[int, list[list[int]]], None] | None = None,
    ) -> Rollout:
        """Draw k responses to each prompt (token ids, not empty).

        `seeds`: one number in [0, 2^63) per response, prompt by prompt; equal seeds draw equal tokens. `done` gets each
        prompt's index and its k responses, all of them at the end.
        """
        decoding = decoding or self.decoding
        assert len(seeds) == len(prompts) * k, f"{len(seeds)} seeds for {len(prompts)} prompts x {k}"
        self._check(prompts, decoding)
        params = [parameters(decoding, seed, self.eos) for seed in seeds]
        answers = self.engine.generate([p for p in prompts for _ in range(k)], params) if seeds else []
        rows = [self._row(i // k, answer, decoding) for i, answer in enumerate(answers)]
        for i in range(len(prompts) if done is not None else 0):
            done(i, [r.ids for r in rows[i * k : i * k + k]])  # type: ignore[misc]
        logp = torch.zeros(len(rows), max((len(r.ids) for r in rows), default=0))
        for i, r in enumerate(rows):
            logp[i, : len(r.ids)] = torch.tensor(r.logp)
        return Rollout([r.ids for r in rows], logp, torch.tensor([not r.finished for r in rows], dtype=torch.bool))

    def _check(self, prompts: Sequence[Sequence[int]], decoding: Decoding) -> None:
        """Refuse what vLLM would cut without a word."""
        if any(len(p) == 0 for p in prompts):
            raise ConfigError("a prompt has no tokens; give it text, or dataset.chat=true")
        longest = max(map(len, prompts), default=0)
        if longest + decoding.max_tokens > self.max_model_len:
            raise ConfigError(
                f"a prompt of {longest} tokens with rollout.max_tokens={decoding.max_tokens} exceeds the engine's {self.max_model_len}; "
                "raise rollout.vllm.max_model_len, or lower rollout.max_tokens or dataset.max_prompt_tokens"
            )

    def _row(self, prompt: int, answer: Answer, decoding: Decoding) -> Answer:
        """The answer, cut behind the first token that completes a stop text (vLLM looks for texts one token later)."""
        if not all(map(math.isfinite, answer.logp)):
            raise GateError(f"vLLM: prompt {prompt}: a log-prob is not finite; lower optim.lr")
        end = stop_at(self.tokenizer, answer.ids, decoding)
        return answer if end is None else Answer(answer.ids[:end], answer.logp[:end], True)

    def rest(self) -> None:
        """Training begins and nothing is sampled until the next weights."""

    def close(self) -> None:
        """End the engine."""
        self.engine.close()


def parameters(decoding: Decoding, seed: int, eos: Sequence[int]) -> dict[str, Any]:
    """vLLM's sampling parameters of one row. Only our own tokens end it, and they are part of the answer."""
    return {
        "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k, "seed": seed,
        "max_tokens": decoding.max_tokens, "min_tokens": decoding.min_tokens, "stop": list(decoding.stop),
        "stop_token_ids": list(eos), "ignore_eos": True, "logprobs": 0, "detokenize": bool(decoding.stop), "skip_special_tokens": False,
    }  # fmt: skip


def stop_at(tokenizer: Any, ids: Sequence[int], decoding: Decoding) -> int | None:
    """How many tokens it takes until a stop text is complete, counted from `min_tokens` on; None without one."""
    if not decoding.stop:
        return None
    for n in range(max(1, decoding.min_tokens), len(ids) + 1):
        # Every token holds a byte at least; some more let the tail begin amid a character.
        tail = ids[max(0, n - max(len(s.encode()) for s in decoding.stop) - 4) : n]
        before = tokenizer.decode(tail[:-1], skip_special_tokens=False).rstrip("\ufffd")
        text = tokenizer.decode(tail, skip_special_tokens=False)
        if any(s in text[max(0, len(before) - len(s) + 1) :] for s in decoding.stop):
            return n
    return None


class SleepingSampler(VllmSampler):
    """Gives its device's memory to the learner between a rollout and the next weights."""

    def __init__(self, *args: Any, level: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.level = level
        self.asleep = False

    def rest(self) -> None:
        """Level 1 keeps the weights in the machine's memory; level 2 drops them, as new ones come anyway."""
        if self.lead and not self.asleep:
            self.engine.sleep(self.level)
            self.asleep = True

    def wake(self, tag: str) -> None:
        """Take memory back: `weights` before they are loaded, `kv_cache` after."""
        if self.asleep:
            self.engine.wake_up([tag])
            self.asleep = tag != "kv_cache"


# -- from the configuration --------------------------------------------------------------------------------------------


def make_sampler(cfg: Any, actor: nn.Module, tokenizer: Any, comm: Comm) -> VllmSampler:
    """Start an engine for this rank, or one server for all, with random weights of the actor's architecture."""
    require("vllm")
    v, model = cfg.rollout.vllm, getattr(actor, "get_base_model", lambda: actor)()
    served = v.mode == "server"
    longest = v.max_model_len or cfg.dataset.max_prompt_tokens + cfg.rollout.max_tokens
    longest = min(longest, getattr(model.config.get_text_config(), "max_position_embeddings", None) or longest)
    settings = engine_settings(cfg, model, longest, comm.device)
    made: Engine
    if served:
        made = _server(v, settings, model, tokenizer, cfg, comm)
    else:
        with tempfile.TemporaryDirectory(prefix="rlhf-vllm-") as folder:
            _write(model, tokenizer, Path(folder))
            own = {**settings, "model": folder, "tokenizer": folder}
            made = Local(own, environment(cfg, comm), log_file(cfg, comm.rank))
    eos = sorted({*eos_ids(model, tokenizer), end_id(tokenizer, cfg.dataset.chat)})
    common = (made, tokenizer, decoding_of(cfg), eos, longest)
    lead = not served or comm.rank == 0
    return SleepingSampler(*common, lead=lead, level=v.sleep) if v.sleep else VllmSampler(*common, lead=lead)


def make_publish(
    cfg: Any,
    sampler: VllmSampler,
    actor: nn.Module,
    learner: DeepSpeedEngine | None,
    comm: Comm,
    count: Callable[[Mapping[str, float], str], None],
) -> Callable[[], None]:
    """Send the learner's weights (or the actor's, which never change) to the engine, prove it, and count what was checked."""
    dtype = torch.bfloat16 if cfg.hardware.precision == "bf16" else torch.float32

    def weights() -> Any:
        if learner is None:
            return plain_weights(actor, [*actor.named_parameters(), *actor.named_buffers()], dtype)
        model: Any = learner.module.model
        named = learner.full_state()  # a value head, whose name has no such prefix, does not sample
        state = ((name.removeprefix("model."), value) for name, value in named if name.startswith("model."))
        return plain_weights(model, state, dtype)

    model: Any = getattr(actor, "get_base_model", lambda: actor)()
    tied = getattr(model, "all_tied_weights_keys", {}) if model.config.tie_word_embeddings else {}
    sync = Sync(sampler.engine if sampler.lead else None, weights, transfer_of(cfg), comm, tied)

    def publish() -> None:
        wake = getattr(sampler, "wake", None)
        if wake is not None:
            wake("weights")
        count(sync(learner is not None and learner.moved), "rollout")
        if wake is not None:
            wake("kv_cache")
        if learner is not None:
            learner.moved = False

    return publish


def transfer_of(cfg: Any) -> str:
    """How weights travel, where it is not said: files on a CPU, CUDA IPC on a shared device, NCCL to a server's device."""
    v = cfg.rollout.vllm
    if v.transfer != "auto":
        return str(v.transfer)
    return "files" if cfg.hardware.device != "cuda" else "nccl" if v.mode == "server" else "ipc"


def engine_settings(cfg: Any, model: Any, max_model_len: int, device: torch.device) -> dict[str, Any]:
    """Arguments of `vllm.LLM`. Its own defaults that would change what is sampled are set, whatever a model's folder says."""
    v = cfg.rollout.vllm
    taken = [k for k in v.engine if k in OWN]
    if taken:
        raise ConfigError(
            f"rollout.vllm.engine.{taken[0]}: follows from other settings (rlhf show rollout=vllm); leave it out"
        )
    rows = cfg.rollout.rows or (256 if device.type == "cuda" else 64)
    transfer = transfer_of(cfg)
    settings = {
        "dtype": "bfloat16" if cfg.hardware.precision == "bf16" else "float32",
        "load_format": "dummy",  # the learner sends the weights
        "max_model_len": max_model_len,
        "max_num_seqs": rows,
        "tensor_parallel_size": v.tensor_parallel,
        "seed": cfg.seed,
        "enforce_eager": device.type != "cuda" if v.enforce_eager is None else v.enforce_eager,
        "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled, temperature included
        "generation_config": "vllm",  # not the model's own penalties and cuts, which nobody asked for
        "worker_extension_cls": "rlhf_cli.rollout.vllm_worker.Extension",
        "weight_transfer_config": {"backend": "rlhf_files" if transfer == "files" else transfer},
        "trust_remote_code": cfg.model.trust_remote_code,
        "enable_sleep_mode": v.sleep > 0,
    }
    if v.kv_cache_gb or device.type != "cuda":
        settings["kv_cache_memory_bytes"] = int(v.kv_cache_gb * 2**30) or cache_bytes(model, rows, max_model_len)
    else:
        settings["gpu_memory_utilization"] = v.gpu_memory_utilization
    return {**settings, **{str(k): x for k, x in v.engine.items()}}


def cache_bytes(model: Any, rows: int, tokens: int) -> int:
    """Keys and values of `rows` rows of `tokens` tokens, in whole blocks with some to spare."""
    c = model.config.get_text_config()
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    per_token = 2 * c.num_hidden_layers * heads * width * model.dtype.itemsize
    return per_token * (rows + 1) * (math.ceil(tokens / 128) + 1) * 128


def environment(cfg: Any, comm: Comm) -> dict[str, str]:
    """Variables of the engine's processes."""
    threads = {"OMP_NUM_THREADS": str(cfg.hardware.threads or 1), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    # Its own lines belong into the log of the rank, as warnings do, not between the lines of the progress display.
    made = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        **(threads if comm.device.type == "cpu" else {}),
    }
    if comm.device.type == "cuda" and comm.world > 1 and cfg.rollout.vllm.mode == "inprocess":
        made["CUDA_VISIBLE_DEVICES"] = str(comm.device.index)
    if transfer_of(cfg) == "ipc":
        made["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # the handles come pickled, from this very process
    return made


def log_file(cfg: Any, rank: int) -> Path:
    """Where the engine prints: the run's logs, or a temporary file for a command without a run."""
    run = Path(cfg.run.dir) / cfg.run.name
    folder = run / "logs" if cfg.run.name and run.is_dir() else Path(tempfile.gettempdir())
    return folder / f"vllm-rank-{rank}.log"


def _server(v: Any, settings: dict[str, Any], model: Any, tokenizer: Any, cfg: Any, comm: Comm) -> Server:
    """Rank 0 starts a server, or finds the one that `url` names; the others join it."""
    if v.url and urlparse(v.url).hostname not in ("127.0.0.1", "localhost", "::1"):
        raise ConfigError(
            f"rollout.vllm.url={v.url}: the server must be on this machine; its weights can be replaced by whoever reaches it"
        )
    made = None
    if comm.rank == 0:
        with tempfile.TemporaryDirectory(prefix="rlhf-vllm-") as folder:
            _write(model, tokenizer, Path(folder))
            own = {**settings, "model": folder, "tokenizer": folder}
            made = Server(v.url, own, environment(cfg, comm), log_file(cfg, 0))
    url = comm.broadcast(made.url if made is not None else "")
    return made or Server(url, {}, {}, log_file(cfg, comm.rank))


def _write(model: Any, tokenizer: Any, folder: Path) -> None:
    """What vLLM reads of a model besides its weights."""
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
