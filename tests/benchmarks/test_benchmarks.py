"""What the speed benchmark computes besides measuring: operation counts, records, statistics, tables."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> object:
    """Import a module of benchmarks/, which are scripts and no package."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def module(name: str) -> ModuleType:
        return importlib.import_module(name)

    return module


def decoder(flops: ModuleType, lora: int = 0) -> object:
    return flops.Decoder(hidden=4, layers=2, heads=2, key_heads=1, width=3, ffn=5, vocabulary=7, lora=lora)


# One decoder layer by hand: query 4x6, key and value 4x3, output 6x4, gate and up 4x5, down 5x4:
# 24 + 12 + 12 + 24 + 20 + 20 + 20 = 132 multiply-adds a token. A pair: 2 heads x 3 x 2 = 12. A position's logits: 4 x 7 = 28.


def test_forward_by_hand(load) -> None:
    flops = load("flops")
    work = flops.Work(tokens=10, pairs=30, logits=3)
    assert flops.forward(decoder(flops), work) == 2 * (10 * 2 * 132 + 30 * 2 * 12 + 3 * 28)


def test_backward_is_twice_the_forward_and_less_under_lora(load) -> None:
    flops = load("flops")
    work = flops.Work(tokens=10, pairs=30, logits=3)
    assert flops.backward(decoder(flops), work) == 2 * flops.forward(decoder(flops), work)
    # rank 1 adds inputs + outputs of each layer: 10 + 7 + 7 + 10 + 9 + 9 + 9 = 61 multiply-adds a token
    assert flops.forward(decoder(flops, 1), work) - flops.forward(decoder(flops), work) == 2 * 10 * 2 * 61
    frozen, adapters, attention = 10 * 2 * 132 + 3 * 28, 10 * 2 * 61, 30 * 2 * 12
    assert flops.backward(decoder(flops, 1), work) == 2 * (frozen + 2 * adapters + 2 * attention)


def test_counts_of_shared_prompts(load) -> None:
    flops = load("flops")
    groups = [(3, [2, 1])]
    # prompt: 1 + 2 + 3 pairs; first response sees 4 and 5 tokens, second 4
    assert flops.packed(groups) == flops.Work(tokens=6, pairs=6 + 9 + 4, logits=3)
    # the prompt's first two tokens once; then the rows feed its last token (3 keys) and their own first (4)
    assert flops.shared_rollout(groups) == flops.Work(tokens=5, pairs=3 + 3 + 4 + 3, logits=3)


def test_counts_of_padded_rows(load) -> None:
    flops = load("flops")
    groups = [(3, [2, 1]), (1, [2, 2])]
    assert flops.padded(groups) == flops.Work(tokens=20, pairs=4 * 15, logits=8)
    assert flops.padded_rollout(groups) == flops.Work(tokens=16, pairs=4 * 10, logits=8)


def test_linear_layers_are_those_of_a_real_model(load) -> None:
    from torch import nn

    from rlhf_cli.models.tiny import tiny_causal, tiny_config

    flops = load("flops")
    d = flops.decoder(tiny_config())
    import torch

    model = tiny_causal(0, torch.float32)
    linear = [m for name, m in model.model.named_modules() if isinstance(m, nn.Linear)]
    assert sum(m.weight.numel() for m in linear) == d.layers * sum(a * b for a, b in d.linear())
    assert d.vocabulary * d.hidden == model.get_output_embeddings().weight.numel()


def test_records_come_in_the_order_of_our_source(load, tmp_path: Path) -> None:
    from rlhf_cli.models.tiny import tiny_tokenizer

    workloads = load("workloads")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"q{i}", "answer": f"a{i}"}) + "\n" for i in range(20)))
    w = workloads.Workload("x", 2, 3, 4, min_prompt_tokens=9)
    workloads.write(tmp_path / "out", str(data), tiny_tokenizer(), w)
    train, order = (
        [json.loads(x) for x in (tmp_path / "out" / f"{n}.jsonl").read_text().splitlines()] for n in ("train", "order")
    )
    assert len(train) == 16 and len(order) == 2 * workloads.STEPS
    assert train[3] == {"prompt": "q3 q3 q3 q3", "references": "a3"}  # a byte is a token: 2, 5, 11
    assert sorted(r["prompt"] for r in order[:16]) == sorted(r["prompt"] for r in train)


def test_a_job_survives_its_journey(load) -> None:
    workloads = load("workloads")
    job = workloads.Job(workloads.WORKLOADS["W3"], "bf16", "cpu", 2, "m", "r", rows=8, extra=("a=1",))
    assert workloads.Job.loads(job.dumps()) == job


def test_later_settings_win_and_compose(load) -> None:
    from rlhf_cli.compose import compose

    workloads = load("workloads")
    job = workloads.Job(workloads.WORKLOADS["W1"], "fp32", "cpu", 1, "m", "r", extra=("steps=7",))
    cfg = compose("train", workloads.overrides(job, "steps=9"), None)
    assert (cfg.steps, cfg.batch.prompts, cfg.rollout.max_tokens, cfg.rollout.min_tokens) == (9, 8, 64, 64)
    assert cfg.updates.policy.kl.coef == workloads.BETA


def test_a_line_is_found_again(load) -> None:
    found = load("summary").fit([1.0, 2.0, 4.0], [3.0, 6.0, 12.0])
    assert found == pytest.approx({"intercept": 0.0, "slope": 3.0, "r2": 1.0, "exponent": 1.0})


def sides(seconds: float, first: float) -> dict[str, object]:
    spent = {"rollout": seconds / 2, "annotate": seconds / 4, "update": seconds / 4}
    step = {"seconds": spent, "peak_gb": {"update": 2.0}, "step_peak_gb": 2.0, "step_seconds": seconds, "tokens": 100}
    rest = {"groups": [[3, [2, 2]]], "digest": "d"}
    return {
        "load_peak_gb": 1.0,
        "steps": [{**step, **rest, "step": 0, "step_seconds": first}, {**step, **rest, "step": 1}],
    }


def test_the_best_micro_batch_counts_and_the_first_step_does_not(load) -> None:
    flops, summary, table = load("flops"), load("summary"), load("table")
    entry = {
        "workload": {"name": "W1"}, "precision": "fp32", "ours": sides(1.0, 50.0),
        "trl": {"4": sides(3.0, 1.0), "8": sides(2.0, 90.0), "32": {"failed": "memory"}},
        "peak_gflops": {"square": 1e-3, "update_layers": 2e-3, "rollout_layers": 1e-3},
        "equality": {"float64": {"loss": 1e-9, "gradient": 1e-12}},
    }  # fmt: skip
    found = summary.summarise(entry, decoder(flops))
    assert (found["trl_rows"], found["throughput_ratio"], found["memory_ratio"]) == (8, 2.0, 1.0)
    update = 3 * flops.forward(decoder(flops), flops.packed([(3, [2, 2])]))
    assert found["ours"]["share_of_peak"]["update"] == pytest.approx(update / 0.25 / 1e9 / 1e-3)
    assert not found["targets"]["throughput against TRL"]["met"]  # 2.0 of 2.8
    assert not found["targets"]["loss, float64"]["met"] and found["targets"]["gradient, float64"]["met"]
    row = table.step({**entry, "summary": found})
    assert row.startswith("| W1 | fp32 | 1.00 (0.50, 0.25, 0.25) | 100 | 2.00 (8) | 2.00 | 2.0 / 2.0 |")


def test_memory_peaks_belong_to_their_phase(load) -> None:
    import numpy as np

    meter_module = load("meter")
    if not meter_module.CLEAR.exists():
        pytest.skip("peaks per phase need /proc")
    meter = meter_module.Meter("cpu")
    with meter.phase("large"):
        np.ones(40_000_000).sum()  # 0.32 GB
    with meter.phase("small"):
        pass
    found = meter.end()
    assert found["peak_gb"]["large"] > found["peak_gb"]["small"] + 0.25
    assert found["step_peak_gb"] == found["peak_gb"]["large"]
    assert set(found["seconds"]) == {"other", "large", "small"}


def test_a_table_goes_between_the_markers(load, tmp_path: Path) -> None:
    table = load("table")
    page, result = tmp_path / "page.md", tmp_path / "r.json"
    page.write_text(f"above\n{table.BEGIN}\nold\n{table.END}\nbelow\n")
    about = {"date": "d", "hardware": {"cpu": "c", "cores": 2, "threads": 2, "memory_gib": 8, "accelerator": None}}
    result.write_text(json.dumps({**about, "versions": {"torch": "2"}, "command": "x", "gates": {"share": 0.0012}}))
    table.main([str(result), "--into", str(page)])
    assert "| gates, diagnostics and logging | 0.12% of a step |" in page.read_text()
    assert (
        page.read_text().startswith("above\n")
        and page.read_text().endswith("below\n")
        and "old" not in page.read_text()
    )


def stored_check(score: float, torch_version: str) -> dict[str, object]:
    return {"tokens_per_fixed_work": score, "date": "2026-01-01", "versions": {"torch": torch_version}}


@pytest.mark.parametrize(
    ("score", "status", "text"),
    [(85.0, 0, "85%"), (84.9, 1, "85%"), (130.0, 0, "130%"), (10.0, 1, "10%"), (float("nan"), 1, "nan%")],
)
def test_a_check_fails_below_the_stored_share(load, score: float, status: int, text: str) -> None:
    import torch

    found = load("check").verdict(
        "m", {"tokens_per_fixed_work": score}, {"m": stored_check(100.0, torch.__version__)}, "f"
    )
    assert found == (status, f"{text} of the stored speed of 2026-01-01 (at least 85% wanted)")


def test_a_check_names_what_changed_since(load) -> None:
    import torch

    _, text = load("check").verdict("m", {"tokens_per_fixed_work": 1.0}, {"m": stored_check(1.0, "0.1")}, "f")
    assert text.endswith(f"wanted); since then: torch 0.1 -> {torch.__version__}")


def test_a_check_without_a_stored_result_does_not_pass_and_does_not_measure(
    load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = load("check")
    monkeypatch.setattr(check, "measure", lambda *_: pytest.fail("measured"))
    file = tmp_path / "check.json"
    file.write_text(json.dumps({"another machine": stored_check(1.0, "2")}))
    assert check.main(["--stored", str(file), "--threads", "1"]) == 2
    assert (
        "check.json has no result of this kind of machine and job, it has: another machine; make one: "
        in capsys.readouterr().out
    )


def test_a_check_is_stored_under_its_machine_and_found_again(
    load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = load("check")
    score = [100.0, 86.0, 84.0]
    monkeypatch.setattr(check, "measure", lambda *_: {"tokens_per_fixed_work": score.pop(0)})
    words = ["--stored", str(tmp_path / "check.json"), "--threads", "1"]
    assert [check.main([*words, "--store"]), check.main(words), check.main(words)] == [0, 0, 1]
    assert check.main([*words, "--precision", "fp32"]) == 2, "another job has no result"
    (key,) = json.loads((tmp_path / "check.json").read_text())
    assert key.endswith(", 1 threads, smollm2, W1, bf16")


def test_series_share_the_point_they_have_in_common(load, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = load("costs")
    asked = []

    def point(bench: object, w) -> dict[str, object]:
        asked.append(w)
        work = float(w.samples * w.new_tokens * w.min_prompt_tokens)
        return {"workload": vars(w), "gflop": {"total": work}, "seconds": {"total": 3 * work}}

    monkeypatch.setattr(costs, "point", point)
    found = costs.scaling(None)
    assert len(asked) == len(set(asked)) == 7
    assert [len(x["points"]) for x in found.values()] == [3, 3, 3]
    assert all(x["fits"]["total"]["exponent"] == pytest.approx(1.0) for x in found.values())
