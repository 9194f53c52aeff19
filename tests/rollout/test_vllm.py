"""The real vLLM on a CPU, against the built-in sampler and the learner's own log-probs. Needs `make vllm`."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_bed import PROMPTS, WARM, Bed, llama

from rlhf_cli.config import LoraSection
from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.launch.stop import SIGNALS
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.tiny import tiny_tokenizer
from rlhf_cli.rollout.sampler import Decoding
from rlhf_cli.rollout.vllm_guard import marked
from rlhf_cli.rollout.vllm_process import JOINED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="VLLM IS NOT INSTALLED, ITS ROLLOUTS ARE NOT TESTED: type make vllm"
    ),
]  # fmt: skip
BED = Path(__file__).with_name("vllm_bed.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    llama().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def started() -> Iterator[Bed]:
    bed = Bed()
    yield bed
    bed.sampler.close()


@pytest.fixture
def bed(started: Bed) -> Bed:
    """With the first weights again."""
    started.learn(llama())
    return started


def test_best_tokens_are_those_of_the_built_in_sampler(bed: Bed) -> None:
    drawn = bed.agree()
    assert not drawn.truncated.all() and all(ids[-1] in bed.sampler.eos for ids, t in zip(drawn.ids, drawn.truncated, strict=True) if not t)  # fmt: skip
    ours, theirs = bed.both(Decoding(max_tokens=24, temperature=0.0, min_tokens=20))
    assert theirs.ids == ours.ids and min(map(len, theirs.ids)) >= 20
    letter = chr(max(i for ids in theirs.ids for i in ids if 33 <= i < 127))
    ours, theirs = bed.both(Decoding(max_tokens=24, temperature=0.0, stop=(letter,), min_tokens=3))
    assert theirs.ids == ours.ids and torch.equal(theirs.truncated, ours.truncated)


def test_log_probs_are_the_learners_of_the_sampled_distribution(bed: Bed) -> None:
    drawn = bed.sampler.sample(PROMPTS, 4, range(12), WARM)
    assert len({tuple(ids) for ids in drawn.ids}) > 6
    for i, ids in enumerate(drawn.ids):
        prompt = PROMPTS[i // 4]
        with torch.no_grad():
            logits = bed.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        own = (logits / 0.7).log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        assert (own - drawn.logp[i, : len(ids)]).abs().max() < 1e-3


def test_a_seed_draws_the_same_row_whatever_its_batch(bed: Bed) -> None:
    drawn = bed.sampler.sample(PROMPTS, 2, range(6), WARM)
    turned = bed.sampler.sample(PROMPTS[::-1], 2, [4, 5, 2, 3, 0, 1], WARM)
    assert [turned.ids[i] for i in (4, 5, 2, 3, 0, 1)] == drawn.ids
    assert bed.sampler.sample(PROMPTS, 2, range(1, 7), WARM).ids != drawn.ids


def test_new_weights_arrive_everywhere(bed: Bed) -> None:
    before = bed.agree()
    for _ in range(2):
        bed.step()
        bed.publish()
        assert bed.counted["changed_tensors"] == bed.counted["synced_tensors"] >= 14
        assert bed.agree().ids != before.ids
    assert bed.learner.moved is False


def test_keys_and_values_of_old_weights_are_forgotten(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    bed.agree()
    monkeypatch.setattr(bed.sampler.engine, "reset_prefix_cache", lambda: None)
    bed.step()
    bed.publish()
    ours, theirs = bed.both()
    assert theirs.ids[0] != ours.ids[0] or not torch.allclose(theirs.logp[0], ours.logp[0], atol=1e-3)
    monkeypatch.undo()
    bed.learn(bed.learner.module.model)
    bed.agree()


def test_a_sync_that_did_not_happen_stops_the_run(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    bed.step()
    for call in ("update_weights", "start_weight_update", "finish_weight_update"):
        monkeypatch.setattr(bed.sampler.engine, call, lambda *a: None)
    with pytest.raises(
        GateError, match=r"rank 0: vLLM after the sync: its weights did not change \(\d+ of \d+ tensors"
    ):
        bed.publish()


def test_one_wrong_tensor_stops_the_run(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_cli.rollout import vllm_sync

    real = vllm_sync.chunks

    def damaged(weights: Any, most: int) -> Any:
        for chunk in real(weights, most):
            chunk["model.layers.1.self_attn.k_proj.weight"] = chunk["model.layers.1.self_attn.k_proj.weight"] * 1.001
            yield chunk

    bed.step()
    monkeypatch.setattr(vllm_sync, "chunks", damaged)
    with pytest.raises(
        GateError, match=r"it holds other weights than were sent \(1 of \d+ tensors, first .*layers\.1.*k_proj"
    ):
        bed.publish()


def test_an_update_that_changed_nothing_is_told(bed: Bed) -> None:
    bed.learner.moved = True
    with pytest.raises(GateError, match="did not change after an update"):
        bed.publish()


def test_adapters_reach_the_engine(bed: Bed) -> None:
    before = bed.agree()
    adapted = add_lora(llama(), LoraSection(r=4, alpha=16.0), 0)
    bed.learn(adapted)
    assert bed.agree().ids == before.ids  # an adapter adds 0 before training
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    bed.learner.moved = True
    bed.publish()
    assert bed.agree().ids != before.ids


def of_engine(bed: Bed) -> list[int]:
    """Its processes, as the guard finds them."""
    return marked(bed.sampler.engine._guard.mark)


def undisturbed_by_signals(bed: Bed) -> None:
    """What a cluster sends to every process of a job, or a terminal to its foreground, changes no draw."""
    draw = lambda: bed.sampler.sample(PROMPTS, 8, range(24), WARM)  # noqa: E731
    alone, pids, drawn = draw(), of_engine(bed), False
    assert len(pids) >= 2, "an engine and its worker"

    def disturb() -> int:
        rounds = 0
        while not drawn:
            for pid in (*pids, bed.sampler.engine._guard._process.pid):
                for number in SIGNALS:
                    os.kill(pid, number)
            rounds += 1
            time.sleep(0.005)
        return rounds

    with ThreadPoolExecutor(1) as beside:
        rounds = beside.submit(disturb)
        disturbed = draw()
        drawn = True
        assert rounds.result() > 1
    assert disturbed.ids == alone.ids and torch.equal(disturbed.truncated, alone.truncated)
    assert torch.allclose(disturbed.logp, alone.logp, atol=1e-5)
    bed.step()
    bed.publish()
    assert of_engine(bed) == pids and bed.sampler.engine._guard._process.poll() is None


def test_signals_that_ask_a_run_to_stop_do_not_reach_an_engine(bed: Bed) -> None:
    undisturbed_by_signals(bed)


def test_a_server_on_this_machine_does_the_same() -> None:
    bed = Bed("rollout.vllm.mode=server")
    try:
        before = bed.agree()
        bed.step()
        bed.publish()
        assert bed.counted["changed_tensors"] == bed.counted["synced_tensors"]
        assert bed.agree().ids != before.ids
        drawn = bed.sampler.sample(PROMPTS, 2, range(6), WARM)
        assert bed.sampler.sample(PROMPTS, 2, range(6), WARM).ids == drawn.ids
        undisturbed_by_signals(bed)
        core = next(p for p in of_engine(bed) if b"EngineCore" in Path(f"/proc/{p}/cmdline").read_bytes())
        os.kill(core, signal.SIGKILL)
        with pytest.raises(ConfigError, match=r"^the vLLM server died; out of memory\? see dmesg and .*\.log$"):
            bed.sampler.sample(PROMPTS, 2, range(6), WARM)
        mark = bed.sampler.engine._guard.mark
    finally:
        bed.sampler.close()
    assert marked(mark) == []


def test_two_ranks_share_a_server_and_draw_what_one_rank_draws(tmp_path: Path) -> None:
    """Rank 0 starts it and sends the weights; rank 1 only asks. Both read back the same sums, of the weights that were sent last."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(BED),
        str(tmp_path),
    ]
    env = {k: v for k, v in os.environ.items() if k not in JOINED} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert one["server"] == two["server"]
    assert one["asked"]["start_weight_update"] == one["asked"]["finish_weight_update"] == 2, (
        "the first weights and one update"
    )
    assert not {"start_weight_update", "update_weights", "finish_weight_update"} & set(two["asked"])
    assert one["held"] == two["held"] != one["before"] == two["before"]
    assert one["counted"]["changed_tensors"] == one["counted"]["synced_tensors"] >= 14 and two["counted"] == {}
    together = one["drawn"] | two["drawn"]
    assert len(one["drawn"]) == 4 and len(two["drawn"]) == 2
    assert [together[str(i)] for i in range(6)] == one["alone"] and len(set(map(tuple, one["alone"]))) > 4
    assert one["greedy"] == one["own greedy"], "the engine has the learner's new weights"


# -- whole runs --------------------------------------------------------------------------------------------------------


def rlhf(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_cli.cli", *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in found]


def test_a_run_trains_with_lora_and_resumes_where_it_was(folder: Path, tmp_path: Path) -> None:
    reward = tmp_path / "varies.py"
    reward.write_text("def score(responses):\n    return [sum(map(ord, r)) % 7 / 7 for r in responses]\n")
    said = rlhf(
        "train", "debug=tiny", "rollout=vllm", "model=path", f"model.path={folder}", "model.lora.r=4", "reward=python", f"reward.python.path={reward}:score",
        "correction=truncated_token", "optim.lr=0.01", "steps=3", "hardware.device=cpu", "hardware.threads=1",
        "dataset.max_prompt_tokens=512", f"run.dir={tmp_path}", "run.name=one", "checkpoint.keep=3", "rollout.rows=16",
    )  # fmt: skip
    run = tmp_path / "one"
    made = rows(run)
    assert [r["step"] for r in made] == [1, 2, 3]
    for r in made:
        assert r["policy/sampler_gap"] < 1e-4 and r["policy/sampler_gap_max"] < 1e-3
        assert r["rollout/changed_tensors"] > 0 and r["correction/on"] == 0 and r["correction/weight"] == 1
    assert (run / "logs" / "vllm-rank-0.log").stat().st_size > 0 and "INFO" not in said
    again = tmp_path / "two"
    shutil.copytree(run, again)
    for late in (*(again / "checkpoints").glob("step-*3"), again / "export"):
        shutil.rmtree(late)
    (again / ".lock").unlink(missing_ok=True)
    status = json.loads((again / "status.json").read_text())
    (again / "status.json").write_text(json.dumps(status | {"status": "failed"}))
    assert "2 of 3 steps done" in rlhf("resume", str(again))
    assert rows(again) == made


def test_ranks_with_an_engine_each_and_a_server_draw_the_same(folder: Path, tmp_path: Path) -> None:
    words = [
        "train", "debug=tiny", "rollout=vllm", "model=path", f"model.path={folder}", "steps=2", "hardware.device=cpu", "hardware.threads=1",
        "dataset.max_prompt_tokens=512", "rollout.rows=8", f"run.dir={tmp_path}",
    ]  # fmt: skip
    rlhf(*words, "rollout.vllm.mode=server", "run.name=server")
    rlhf(*words, "hardware.processes=2", "run.name=ranks")
    server, ranks = tmp_path / "server", tmp_path / "ranks"
    for run in (server, ranks):
        made = rows(run)
        assert [r["step"] for r in made] == [1, 2] and all(r["policy/sampler_gap"] < 1e-4 for r in made)
        assert all(r["rollout/changed_tensors"] == r["rollout/synced_tensors"] > 0 for r in made)
        assert "finished" in (run / "status.json").read_text()
    assert (ranks / "logs" / "vllm-rank-1.log").stat().st_size > 0
    drawn = [[json.loads(x) for x in (run / "samples.jsonl").read_text().splitlines()] for run in (server, ranks)]
    first = [[r["response"] for r in one if r["step"] == 1] for one in drawn]
    assert first[0] == first[1] and len(first[0]) > 1


def children(pid: int) -> list[int]:
    return [int(p) for path in Path(f"/proc/{pid}/task").glob("*/children") for p in path.read_text().split()]


def test_a_killed_engine_ends_the_run_in_one_line(folder: Path, tmp_path: Path) -> None:
    words = [
        "train", "debug=tiny", "rollout=vllm", "model=path", f"model.path={folder}", "steps=10000", "hardware.device=cpu",
        "hardware.threads=1", "dataset.max_prompt_tokens=512", "rollout.rows=8", f"run.dir={tmp_path}", "run.name=one",
        "checkpoint.every=0",
    ]  # fmt: skip
    run = tmp_path / "one"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-m", "rlhf_cli.cli", *words], stdout=pipe, stderr=pipe, text=True
    ) as learner:
        end = time.monotonic() + 300
        while not (run / "metrics.jsonl").exists() and time.monotonic() < end and learner.poll() is None:
            time.sleep(0.05)
        core = next(p for p in children(learner.pid) if b"EngineCore" in Path(f"/proc/{p}/cmdline").read_bytes())
        (worker,) = children(core)
        os.kill(worker, signal.SIGSTOP)  # the learner surely waits for it
        time.sleep(1)
        os.kill(worker, signal.SIGKILL)
        said = learner.communicate(timeout=60)[1]
    log = run / "logs" / "vllm-rank-0.log"
    assert learner.returncode == 2
    assert said.endswith(f"rlhf: error: the vLLM engine died; out of memory? see dmesg and {log}\n"), said
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "failed" and "the vLLM engine died" in status["reason"]


ENGINE = """
import sys
from pathlib import Path
from rlhf_cli.rollout.vllm_engine import Local, Server
settings = {"model": sys.argv[2], "dtype": "float32", "max_model_len": 64, "enforce_eager": True}
room = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
log = Path(sys.argv[3])
engine = Local(settings, room, log) if sys.argv[1] == "inprocess" else Server("", settings, room, log)
print(engine._guard.mark, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("mode", ["inprocess", "server"])
def test_nothing_of_an_engine_outlives_a_killed_learner(mode: str, folder: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", ENGINE, mode, str(folder), str(tmp_path / "log")]
    learner = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert learner.stdout is not None
    mark = learner.stdout.readline().strip()
    assert mark, (tmp_path / "log").read_text()
    titles = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in marked(mark)]
    assert any(b"Engine" in t for t in titles), titles
    learner.kill()
    learner.wait()
    end = time.monotonic() + 60
    while marked(mark) and time.monotonic() < end:
        time.sleep(0.05)
    assert marked(mark) == []
