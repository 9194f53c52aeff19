"""Whole training steps of the engine: against plain torch, over micro-batches, processes and ZeRO stages, and from checkpoints."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_bed import COUPLED, FUSED, LR, SCHEDULE, SETUP, engine, experience, followed, head, steps, weights
from torch import Tensor

from rlhf_cli.engine.comm import Comm, start
from rlhf_cli.engine.deepspeed import Frozen, _merge
from rlhf_cli.engine.masters import MasterEngine
from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.inject import call, rowwise
from rlhf_cli.models.heads import stage_inputs
from rlhf_cli.types import Experience, Term, Update

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
BED = Path(__file__).with_name("engine_bed.py")


@pytest.fixture(scope="module")
def comm() -> Iterator[Comm]:
    before = {k: os.environ.get(k) for k in LAUNCHER}
    yield start(torch.device("cpu"))
    for (
        k,
        v,
    ) in before.items():  # what this module's lone process made is nothing for the programs that later tests start
        if v is None:
            os.environ.pop(k, None)
        else:
            os.environ[k] = v


def close(a: dict[str, Tensor], b: dict[str, Tensor], atol: float) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def plain_torch(clip: float) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """The same steps by autograd on everything at once: weights, gradient norms before clipping, losses."""
    module, exp = head(), experience()
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=LR, betas=SETUP.betas, eps=SETUP.eps, weight_decay=SETUP.weight_decay
    )
    norms, losses = [], []
    for update in SCHEDULE:
        outs = module(**stage_inputs(exp, torch.arange(len(exp))), want=frozenset({"logp"}))
        width = exp.ids.shape[1]
        outs = {"logp": torch.nn.functional.pad(outs["logp"], (0, width - outs["logp"].shape[1]))}
        loss = torch.zeros(())
        for term in update.terms:
            x = call(term.objective, exp, outs)
            loss = loss + (x.mean() if term.reduce is None else (call(term.reduce, exp) * x).sum())
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), clip or float("inf"))))
        losses.append(loss.item())
        optimizer.step()
    return {n: p.detach().clone() for n, p in module.named_parameters()}, norms, losses


@pytest.mark.parametrize(("zero", "clip"), [(0, 0.0), (0, 0.05), (1, 0.05), (2, 0.05), (3, 0.0), (3, 0.05)])
def test_steps_equal_plain_torch_with_and_without_clipping(comm: Comm, zero: int, clip: float) -> None:
    e = engine(comm, zero=zero, clip=clip)
    start_at = weights(e)
    stats = steps(e)
    wanted, norms, losses = plain_torch(clip)
    assert min(norms) > 2 * 0.05, "the clip must bite for this to mean anything"
    close(weights(e), wanted, 1e-6)
    assert max((wanted[k] - start_at[k]).abs().max().item() for k in wanted) > 1e-4, "the steps must move the weights"
    assert [s["grad_norm"] for s in stats] == pytest.approx(norms, rel=1e-4)
    assert [s["loss"] for s in stats] == pytest.approx(losses, abs=1e-5)
    assert [s["lr"] for s in stats] == [LR] * 3 and e.updates == 3 and e.moved


def test_clipping_changes_the_result() -> None:
    free, tight = plain_torch(0.0)[0], plain_torch(0.05)[0]
    assert max((free[k] - tight[k]).abs().max().item() for k in free) > 1e-5


@pytest.mark.parametrize("zero", [0, 2])
def test_micro_batches_do_not_change_a_training_step(comm: Comm, zero: int) -> None:
    small, large = engine(comm, zero=zero, budget=12), engine(comm, zero=zero, budget=10_000)
    assert len(small.batches(experience())) > 4 and len(large.batches(experience())) == 1
    a, b = steps(small), steps(large)
    close(weights(small), weights(large), 1e-6)
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, abs=1e-4)


def test_term_values_add_up_and_the_first_ratio_is_measured(comm: Comm) -> None:
    e = engine(comm)
    stats = e.step(replace(experience(), old_logp=None), COUPLED, lr=LR)
    assert stats["loss"] == pytest.approx(stats["loss/preference"] + stats["loss/surrogate"], abs=1e-6)
    assert stats["ratio_max"] == 1.0 and stats["kl_old"] == 0.0 and stats["kl"] > 0 and 0 <= stats["accuracy"] <= 1


def test_evaluate_reports_and_changes_nothing(comm: Comm) -> None:
    e = engine(comm)
    before = weights(e)
    first = e.evaluate(experience(), COUPLED)
    assert equal(before, weights(e)) and e.updates == 0
    assert e.step(experience(), COUPLED, lr=LR)["loss"] == pytest.approx(first["loss"], abs=1e-6)


def test_a_frozen_model_infers_what_its_learner_does(comm: Comm) -> None:
    frozen = Frozen(head(), SETUP, comm)
    got = frozen.infer(experience(), frozenset({"logp"}))["logp"]
    assert torch.equal(got, engine(comm).infer(experience(), frozenset({"logp"}))["logp"]) and not got.requires_grad
    assert not got[~experience().mask].any() and (got[experience().mask] < 0).all()


# -- refusals ----------------------------------------------------------------------------------------------------------


@rowwise
def sharp(logp: Tensor) -> Tensor:
    """Value 0, gradient inf * 0."""
    return (logp * 0).abs().sqrt()


def poisoned() -> Experience:
    exp = experience()
    bad = exp.advantage.clone()
    bad[2, 5] = float("inf")
    return replace(exp, advantage=bad)


@pytest.mark.parametrize(
    ("zero", "kind"), [(0, "loss"), (3, "loss"), (0, "gradient"), (1, "gradient"), (2, "gradient"), (3, "gradient")]
)
def test_non_finite_numbers_stop_the_run_and_change_no_weight(comm: Comm, zero: int, kind: str) -> None:
    e = engine(comm, zero=zero)
    e.step(experience(), FUSED, lr=LR)
    before = weights(e)
    bad = Update((Term("sharp", sharp, lambda mask: mask / mask.sum()),))
    exp, update = (poisoned(), FUSED) if kind == "loss" else (experience(), bad)
    with pytest.raises(GateError) as error:
        e.step(exp, update, lr=LR)
    what = "loss is not finite" if kind == "loss" else "a gradient is not finite"
    assert str(error.value) == (
        f"rank 0: policy: {what} at optimizer step 1; no weight was changed. Lower optim.lr, or set hardware.precision=fp32"
    )
    assert equal(before, weights(e)) and e.updates == 1


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"zero": 0}, {"zero": 1}, {"zero": 2}, {"zero": 3}, {"bf16": True}], ids=str)
def test_going_on_from_a_checkpoint_is_bit_identical(comm: Comm, tmp_path: Path, settings: dict[str, Any]) -> None:
    e = engine(comm, **settings)
    steps(e)
    state = json.loads(json.dumps(e.save(tmp_path)))
    more, wanted = steps(e), weights(e)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"policy.{x}.safetensors" for x in ("exp_avg", "exp_avg_sq", "weights")
    ]
    for target in (e, engine(comm, **settings)):  # the same engine, and a fresh process's
        target.load(tmp_path, state)
        assert target.updates == 3
        assert steps(target) == more and equal(weights(target), wanted)


def test_a_checkpoint_of_an_untouched_engine_holds_weights_only(comm: Comm, tmp_path: Path) -> None:
    e = engine(comm)
    state = e.save(tmp_path)
    assert state == {"updates": 0} and [p.name for p in tmp_path.iterdir()] == ["policy.weights.safetensors"]
    wanted = steps(e)
    other = engine(comm)
    other.load(tmp_path, state)
    assert steps(other) == wanted


def test_bf16_keeps_fp32_masters(comm: Comm, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    e = engine(comm, bf16=True, eps=1e-8, weight_decay=0.0)
    start_at = {k: v.float() for k, v in weights(e).items()}
    assert {p.dtype for p in e.trained.values()} == {torch.bfloat16}
    for _ in range(3):
        e.step(experience(), FUSED, lr=1e-6)
    e.save(tmp_path)
    masters = load_file(tmp_path / "policy.weights.safetensors")
    assert {v.dtype for v in masters.values()} == {torch.float32}
    name = next(k for k in masters if "q_proj" in k)
    moved = (masters[name] - start_at[name]).abs()
    # three AdamW steps of 1e-6 move at most 3e-6; near 1/32 two bf16 numbers lie 1e-4 apart, so bf16 weights alone would stand still
    assert 5e-7 < moved.max() <= 3.1e-6
    assert torch.equal(masters[name].bfloat16(), weights(e)[name])


@pytest.mark.parametrize("budget", [24, 10_000])
def test_bf16_without_zero_takes_the_steps_of_stage_1(comm: Comm, tmp_path: Path, budget: int) -> None:
    from safetensors.torch import load_file

    masters, stats = [], []
    for zero in (0, 1):
        e = engine(comm, bf16=True, zero=zero, budget=budget, clip=0.05)
        assert isinstance(e.engine, MasterEngine) == (zero == 0)
        stats.append(steps(e))
        assert all(p.grad is None for p in e.trained.values()) or zero
        e.save(tmp_path)
        masters.append(load_file(tmp_path / "policy.weights.safetensors"))
    close(masters[0], masters[1], 1e-5)  # where a bf16 weight rounds the other way, later gradients differ
    for x, y in zip(*stats, strict=True):
        assert x == pytest.approx(y, rel=1e-3, abs=1e-5)


def test_a_weight_without_gradient_keeps_none_of_the_last_step() -> None:
    m = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 1, bias=False), "b": torch.nn.Linear(2, 1, bias=False)}).bfloat16()
    e = MasterEngine(m, lambda p: torch.optim.SGD(p, lr=1.0), 0.0, 1)
    start_at, x = e.flat.detach().clone(), torch.ones(1, 2, dtype=torch.bfloat16)
    for _ in range(2):
        e.backward((m["a"](x) + m["b"](x)).sum())
    e.step()
    assert torch.equal(e.flat, start_at - 2) and e.get_global_grad_norm() == 4.0
    e.backward(m["b"](x).sum())
    e.step()
    assert torch.equal(e.flat, start_at - torch.tensor([2.0, 2.0, 3.0, 3.0]))
    assert torch.equal(m["b"].weight, (start_at[2:] - 3).bfloat16()[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_full_precision_lie_in_the_flat_tensor(dtype: torch.dtype) -> None:
    m = torch.nn.Linear(2, 1, bias=False).to(dtype)
    before = m.weight.detach().clone()
    e = MasterEngine(m, lambda p: torch.optim.SGD(p, lr=1.0), 0.0, 1)
    assert e.flat.dtype == dtype and m.weight.data_ptr() == e.flat.data_ptr() and torch.equal(m.weight, before)
    e.backward(m(torch.tensor([[1.0, 1e-9]], dtype=dtype)).sum())
    e.step()
    assert torch.equal(m.weight, before - torch.tensor([[1.0, 1e-9]], dtype=dtype))


def test_extra_keys_are_merged_deep() -> None:
    assert _merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 5}, "e": 6}) == {"a": {"b": 5, "c": 2}, "d": 3, "e": 6}


# -- two processes -----------------------------------------------------------------------------------------------------


ONE_WORKER = pytest.mark.xdist_group("two-ranks")  # another would make all of it again


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    out = tmp_path_factory.mktemp("two_ranks")
    if AsyncIOBuilder().is_compatible(verbose=False):
        AsyncIOBuilder().load(verbose=False)  # compiled once on a machine, which takes minutes that no rank should wait
    root = BED.parents[2]
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), env.get("PYTHONPATH", "")])}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(BED),
        str(out),
    ]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def kept(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / name).exists():
        assert name == "zero3-nvme"
        pytest.skip(
            "OFFLOADING TO A DISK IS NOT TESTED: DeepSpeed's async_io needs libaio; type apt-get install libaio-dev"
        )
    return torch.load(folder / name / "kept.pt", weights_only=True)


WAYS = ("zero0", "zero1", "zero2", "zero3", "zero2-cpu", "zero3-cpu", "zero3-nvme")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@ONE_WORKER
def test_two_processes_take_the_steps_of_one(comm: Comm, two_ranks: Path, way: str) -> None:
    two, one = kept(two_ranks, way), engine(comm, zero=0)
    stats = steps(one)
    assert two["world"] == 2
    close(two["before"], weights(one), 1e-5)
    for x, y in zip(two["stats"], stats, strict=True):
        assert x == pytest.approx(y, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "where"), [("zero3", []), ("zero2-cpu", ["cpu"]), ("zero3-cpu", ["cpu"] * 2), ("zero3-nvme", ["nvme"] * 2)]
)
@ONE_WORKER
def test_state_and_parameters_are_where_they_were_asked_to_be(two_ranks: Path, way: str, where: list[str]) -> None:
    assert [x.rpartition(".")[2] for x in kept(two_ranks, way)["offload"]] == where


def test_a_disk_without_libaio_is_refused_in_one_line(
    comm: Comm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    said = r"hardware.offload=nvme: DeepSpeed's async_io needs libaio, which is not here; install libaio .* or type hardware.offload=cpu"
    with pytest.raises(ConfigError, match=said):
        engine(comm, zero=3, offload="nvme", nvme_path=str(tmp_path))


@pytest.mark.slow
@ONE_WORKER
def test_two_processes_take_the_steps_of_one_in_bf16(comm: Comm, two_ranks: Path) -> None:
    two, one = kept(two_ranks, "bf16"), engine(comm, bf16=True)
    stats = steps(one)
    close(two["before"], weights(one), 2e-3)  # half a unit of the last place of a weight
    for x, y in zip(two["stats"], stats, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-2)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@ONE_WORKER
def test_models_that_follow_are_those_of_one_process(comm: Comm, two_ranks: Path, zero: int) -> None:
    two, one = kept(two_ranks, f"zero{zero}")["beside"], followed(engine(comm, zero=0))[1]
    assert len(two) == len(one) > 0
    close(two, one, 1e-5)
    moved = {k: float((x - one[k.replace("copy/", "average/")]).abs().max()) for k, x in two.items() if "copy/" in k}
    assert max(moved.values()) > 3e-5, "a copy and an average are two things"


@pytest.mark.slow
@pytest.mark.parametrize("way", [*WAYS, "bf16"])
@ONE_WORKER
def test_two_processes_go_on_bit_identically(two_ranks: Path, way: str) -> None:
    two = kept(two_ranks, way)
    assert equal(two["before"], two["loaded"]) and not equal(two["before"], two["after"])
    assert two["more"] == two["again"] and equal(two["after"], two["final"])


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "loaded"), [("zero2", 0), ("zero3", 1), ("zero0", 3), ("zero3-cpu", 0)])
@ONE_WORKER
def test_a_checkpoint_of_two_ranks_goes_on_in_one(comm: Comm, two_ranks: Path, saved: str, loaded: int) -> None:
    two, e = kept(two_ranks, saved), engine(comm, zero=loaded)
    e.load(two_ranks / saved, two["state"])
    assert equal(weights(e), two["before"])
    steps(e, (COUPLED, FUSED))
    close(weights(e), two["after"], 1e-5)
