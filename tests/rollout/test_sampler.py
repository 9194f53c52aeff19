"""The sampler against one that runs the whole sequence for every token."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_cli.config import LoraSection
from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.tiny import tiny_causal, tiny_config, tiny_tokenizer
from rlhf_cli.rollout import sampler as sampling
from rlhf_cli.rollout.cache import span
from rlhf_cli.rollout.limits import rows_at_a_time
from rlhf_cli.rollout.sampler import Decoding, Rollout, Sampler, eos_ids

PROMPTS = [
    [256, *b"What is it?"],
    [256],
    [256, *b"A much longer prompt than the others, so that lengths differ."],
    [256, *b"hm"],
]
ENDS = [257, *range(60, 90)]  # one token in eight ends a response, so that slots are handed on


def llama(**changes: Any) -> Any:
    model = tiny_causal(0, torch.float32)
    model.generation_config.eos_token_id = ENDS
    model.config._attn_implementation = changes.get("attention", "sdpa")
    return model


def family(name: str) -> Any:
    """Tiny random models of other architectures."""
    import transformers

    kind = getattr(transformers, f"{name}ForCausalLM")
    config = getattr(transformers, f"{name}Config")(**{
        "vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.2, "pad_token_id": None, "bos_token_id": 256,
    })  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).eval()
    model.generation_config.eos_token_id = ENDS
    return model


def sampler(model: Any, **settings: Any) -> Sampler:
    return Sampler(model, tiny_tokenizer(), Decoding(**({"max_tokens": 24, "rows": 4} | settings)), device="cpu")


def seeds(n: int, start: int = 0) -> list[int]:
    return list(range(start, start + n))


def allowed(p: np.ndarray, d: Decoding) -> np.ndarray:
    """Top-k, then the nucleus, by their definitions over sorted tokens."""
    order = np.argsort(-p, kind="stable")
    kept = p.copy()
    if d.top_k:
        kept[order[d.top_k :]] = 0
    if d.top_p < 1:
        mass = np.cumsum(kept[order]) / kept.sum()
        kept[order[int(np.argmax(mass >= d.top_p)) + 1 :]] = 0
    return kept / kept.sum()


@torch.no_grad()
def slow(
    model: Any, prompt: Sequence[int], seed: int, d: Decoding, eos: Sequence[int]
) -> tuple[list[int], list[float]]:
    """One row: a forward of everything for every token, float64 probabilities, numpy's own search."""
    u = np.random.Generator(np.random.Philox(key=seed)).random(d.max_tokens)
    ids: list[int] = []
    logps: list[float] = []
    for t in range(d.max_tokens):
        logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, -1].double()
        if t < d.min_tokens:
            logits[list(eos)] = -torch.inf
        p = torch.softmax(logits / (d.temperature or 1), -1).numpy()
        p = p if d.temperature == 0 else allowed(p, d)
        token = int(p.argmax()) if d.temperature == 0 else int(np.searchsorted(np.cumsum(p), u[t], side="right"))
        ids.append(token)
        logps.append(float(np.log(p[token])))
        if token in eos:
            break
    return ids, logps


def check_against_slow(s: Sampler, model: Any, k: int = 3, atol: float = 1e-5) -> Rollout:
    numbers = seeds(len(PROMPTS) * k)
    out = s.sample(PROMPTS, k, numbers)
    for i, seed in enumerate(numbers):
        ids, logps = slow(model, PROMPTS[i // k], seed, s.decoding, s.eos)
        assert out.ids[i] == ids, f"row {i}"
        torch.testing.assert_close(out.logp[i, : len(ids)], torch.tensor(logps), atol=atol, rtol=0)
        assert (out.logp[i, len(ids) :] == 0).all()
    return out


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 0},
        {"top_k": 7},
        {"top_p": 0.8},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.9},
        {"min_tokens": 9},
        {"temperature": 0, "min_tokens": 9},
        {"rows": 64},
        {"rows": 1},
    ],
    ids=str,
)
def test_equals_a_forward_of_everything_per_token(settings: dict[str, Any]) -> None:
    model = llama()
    out = check_against_slow(sampler(model, **settings), model)
    lengths = [len(ids) for ids in out.ids]
    assert len(set(lengths)) > 2, "rows must end at different steps for slots to be handed on"


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3", "Mistral"])
def test_other_architectures(name: str) -> None:
    model = family(name)
    check_against_slow(sampler(model), model, k=2)


def test_eager_attention_is_kept() -> None:
    model = llama(attention="eager")
    used = set()
    model.register_forward_pre_hook(lambda module, args: used.add(module.config._attn_implementation))
    check_against_slow(sampler(model), model, k=2)
    assert used == {"eager"}


def test_leaves_the_model_as_it_was() -> None:
    model = llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sampler(model).sample(PROMPTS, 1, seeds(4))
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad and not p.is_inference() for p in model.parameters())


def test_longer_than_one_read_size() -> None:
    # 262 prompt tokens and 24 new ones cross 256, where the number of places read changes its multiple from 32 to 512.
    model = llama()
    prompt = [256, *(b"All work and no play makes Jack a dull boy. " * 6)[:243]]
    s = sampler(model, min_tokens=24)
    ids, logps = slow(model, prompt, 5, s.decoding, s.eos)
    out = s.sample([prompt], 1, [5])
    assert out.ids == [ids]
    torch.testing.assert_close(out.logp[0], torch.tensor(logps), atol=1e-5, rtol=0)
    assert [span(n) for n in (1, 32, 33, 256, 257, 512, 513)] == [32, 32, 64, 256, 512, 512, 1024]


def test_batch_split_and_order_change_nothing() -> None:
    """Bit for bit: alone, in another order, in another place of the queue."""
    model = llama()
    s = sampler(model, rows=16)
    k, numbers = 6, seeds(24)
    together = s.sample(PROMPTS, k, numbers)
    for i, seed in enumerate(numbers):
        alone = s.sample([PROMPTS[i // k]], 1, [seed])
        assert alone.ids[0] == together.ids[i]
        assert torch.equal(alone.logp[0], together.logp[i, : len(alone.ids[0])])
    backwards = s.sample([PROMPTS[i // k] for i in reversed(range(24))], 1, numbers[::-1])
    assert backwards.ids == together.ids[::-1]
    assert torch.equal(backwards.logp, together.logp.flip(0))
    assert torch.equal(backwards.truncated, together.truncated.flip(0))


def test_rows_at_a_time_change_no_token() -> None:
    model = llama()
    drawn = [sampler(model, rows=rows).sample(PROMPTS, 5, seeds(20)) for rows in (3, 16, 64)]
    assert drawn[0].ids == drawn[1].ids == drawn[2].ids
    torch.testing.assert_close(drawn[0].logp, drawn[2].logp, atol=1e-5, rtol=0)


def test_shared_prefill_reads_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accelerator's way to read prompts: several per forward, padded to a multiple."""
    model = llama()
    usual = sampler(model).sample(PROMPTS * 3, 2, seeds(24))
    monkeypatch.setitem(sampling.PREFILL, "cpu", (3, 8))
    shared = sampler(model).sample(PROMPTS * 3, 2, seeds(24))
    assert shared.ids == usual.ids
    torch.testing.assert_close(shared.logp, usual.logp, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_behaviour_logp_is_the_models(temperature: float) -> None:
    model = llama()
    out = sampler(model, temperature=temperature).sample(PROMPTS, 4, seeds(16))
    for i, ids in enumerate(out.ids):
        prompt = PROMPTS[i // 4]
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        wanted = torch.log_softmax(logits / temperature, -1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(out.logp[i, : len(ids)], wanted.detach(), atol=1e-5, rtol=0)


def test_bf16() -> None:
    model = llama().to(torch.bfloat16)
    out = sampler(model, rows=16).sample(PROMPTS, 4, seeds(16))
    exact = llama().to(torch.bfloat16).float()  # the same rounded weights, computed in float32
    for i, ids in enumerate(out.ids):
        prompt = PROMPTS[i // 4]
        logits = exact(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        wanted = torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(out.logp[i, : len(ids)], wanted.detach(), atol=0.1, rtol=0)
    again = sampler(model, rows=16).sample(
        PROMPTS[::-1], 4, seeds(16)[12:] + seeds(16)[8:12] + seeds(16)[4:8] + seeds(16)[:4]
    )
    assert again.ids == [out.ids[i] for i in (12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3)]


def test_adapters_are_used() -> None:
    model = add_lora(llama(), LoraSection(r=4), seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.3, generator=generator)
    out = check_against_slow(
        sampler(model), model, k=2, atol=1e-4
    )  # a row amplifies: the model itself is 3e-5 from its float64
    with model.disable_adapter():
        base = sampler(model).sample(PROMPTS, 2, seeds(8))
    assert base.ids != out.ids


def test_rows_of_a_group_differ_and_equal_seeds_agree() -> None:
    s = sampler(llama())
    out = s.sample([PROMPTS[0]] * 2, 4, [1, 2, 3, 4, 1, 2, 3, 4])
    assert len({tuple(ids) for ids in out.ids[:4]}) == 4
    assert out.ids[:4] == out.ids[4:]


def test_global_random_state_is_untouched() -> None:
    s = sampler(llama())
    torch.manual_seed(0)
    first = s.sample(PROMPTS, 1, seeds(4)).ids
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert s.sample(PROMPTS, 1, seeds(4)).ids == first
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_eos_ids_come_from_the_tokenizer_and_the_model() -> None:
    model = llama()
    assert eos_ids(model, tiny_tokenizer()) == sorted(ENDS)
    model.generation_config.eos_token_id = 65
    assert eos_ids(model, tiny_tokenizer()) == [65, 257]
    model.generation_config.eos_token_id = None
    assert eos_ids(model, tiny_tokenizer()) == [257]


class Scripted:
    """A model that writes one text, whatever the prompt's length: after position p comes script[p + 1]."""

    def __init__(self, script: Sequence[int]) -> None:
        self.script = [*script, *([ord(".")] * 100)]
        self.config = tiny_config()
        self.generation_config = SimpleNamespace(eos_token_id=257)
        self.dtype, self.training = torch.float32, False
        self.calls = 0
        self.read: list[tuple[int, ...]] = []

    def __call__(self, *, input_ids: Tensor, position_ids: Tensor | None = None, **_: Any) -> Any:
        if position_ids is None:
            self.read.append(tuple(input_ids.shape))
            return None
        self.calls += 1
        logits = torch.full((len(input_ids), 1, 259), -1e4)
        logits[torch.arange(len(input_ids)), 0, torch.tensor([self.script[p + 1] for p in position_ids[:, 0]])] = 0
        return SimpleNamespace(logits=logits)


def write(text: str, **settings: Any) -> tuple[str, bool]:
    """What the sampler keeps of `text`, and whether it is called truncated."""
    script = [256, *b"ST", *tiny_tokenizer()(text).input_ids]
    out = sampler(Scripted(script), **settings).sample([script[:3]], 1, [0])
    return tiny_tokenizer().decode(out.ids[0]), bool(out.truncated[0])


@pytest.mark.parametrize(
    ("text", "settings", "kept"),
    [
        ("one two three", {"stop": ("two",)}, "one two"),
        ("STSTOP and on", {"stop": ("STOP",)}, "STSTOP"),
        ("OP is no stop, the prompt's ST does not count", {"stop": ("STOP",), "max_tokens": 45}, None),
        ("a café au lait", {"stop": ("é",)}, "a café"),
        ("日本語。次", {"stop": ("。", "x")}, "日本語。"),
        ("aXbXc", {"stop": ("X",), "min_tokens": 2}, "aX"),
        ("aXbXc", {"stop": ("X",), "min_tokens": 3}, "aXbX"),
        ("ab\n\ncd", {"stop": ("\n\n",)}, "ab\n\n"),
        ("first of two: yx", {"stop": ("x", "y")}, "first of two: y"),
        ("the end<|eos|>and more", {"stop": ("<|eos",)}, "the end<|eos|>"),
    ],
)
def test_stop_texts(text: str, settings: dict[str, Any], kept: str | None) -> None:
    assert write(text, **settings) == (text if kept is None else kept, kept is None)


def test_eos_ends_a_row_and_is_kept() -> None:
    assert write("done<|eos|>never") == ("done<|eos|>", False)


@pytest.mark.parametrize(("limit", "truncated"), [(4, True), (5, False), (6, False)])
def test_truncated_means_the_limit_came_first(limit: int, truncated: bool) -> None:
    text, cut = write("done<|eos|>", max_tokens=limit)
    assert (text, cut) == ("done" if truncated else "done<|eos|>", truncated)


def test_finished_rows_make_room() -> None:
    """Eight rows of five tokens in slots of two: twenty forwards, not more."""
    script = [256, *b"ST", *b"done", 257]
    model = Scripted(script)
    out = sampler(model, rows=2, max_tokens=50).sample([script[:3]] * 4, 2, seeds(8))
    assert out.ids == [[*b"done", 257]] * 8
    assert model.calls == 20


def test_prompts_are_read_once_in_their_own_shape() -> None:
    """Three rows of each prompt in slots of two, so that groups straddle; the last token belongs to the first step."""
    script = [256, *b"STS", *b"done", 257]
    model = Scripted(script)
    sampler(model, rows=2, max_tokens=50).sample([script[:3], script[:4], script[:3], [256]], 3, seeds(12))
    assert model.read == [(1, 2), (1, 3), (1, 2)]


def test_errors_name_the_setting() -> None:
    model = llama()
    with pytest.raises(
        ConfigError, match=r"a prompt of 12 tokens with rollout.max_tokens=2040 exceeds the model's 2048"
    ):
        sampler(model, max_tokens=2040).sample([PROMPTS[0]], 1, [0])
    with pytest.raises(ConfigError, match="a prompt has no tokens"):
        sampler(model).sample([[]], 1, [0])
    with pytest.raises(AssertionError, match="3 seeds for 1 prompts x 2"):
        sampler(model).sample([[256]], 2, [0, 1, 2])
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ConfigError, match=r"rollout.backend=builtin cannot decode llama \(linear_attention layers\)"):
        sampler(model).sample([[256]], 1, [0])


def test_a_diverged_model_is_refused() -> None:
    model = llama()
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(GateError, match="prompt 0: the model's logits are not finite"):
        sampler(model).sample([[256]], 1, [0])


def test_sliding_windows_are_full_attention_below_their_size() -> None:
    model = family("Mistral")
    model.config.sliding_window = 20
    with pytest.raises(ConfigError, match="exceeds the model's 20"):
        sampler(model).sample([[256]], 1, [0])
    assert len(sampler(model, max_tokens=19).sample([[256]], 1, [0]).ids) == 1


def test_nothing_to_do() -> None:
    out = sampler(llama()).sample([], 4, [])
    assert (out.ids, out.logp.shape, out.truncated.shape) == ([], (0, 0), (0,))


def test_rows_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_cli.rollout import limits

    model, cpu = llama(), torch.device("cpu")
    assert rows_at_a_time(model, cpu, 7, 100) == 7
    assert rows_at_a_time(model, cpu, 0, 100) == 64
    # 100 tokens: 2 (keys, values) x 2 layers x 2 heads x 16 x 4 bytes x 100 = 51200, logits 16 x 259, together 55344.
    monkeypatch.setattr(limits, "_memory", lambda device: 5 * 55344 * 9)
    assert rows_at_a_time(model, cpu, 0, 100) == 8


def test_groups_are_told_when_their_last_row_ends() -> None:
    """With the rows that the call returns at its end."""
    s = sampler(llama(), max_tokens=8, rows=3)
    told: list[tuple[int, list[list[int]]]] = []
    steps: list[int] = []  # decoding steps made when a group was told
    count = 0
    forward = s._forward

    def counted(batch: Any) -> Tensor:
        nonlocal count
        count += 1
        return forward(batch)

    def done(p: int, ids: list[list[int]]) -> None:
        told.append((p, [list(x) for x in ids]))
        steps.append(count)

    s._forward = counted  # type: ignore[method-assign]
    out = s.sample(PROMPTS, 3, seeds(len(PROMPTS) * 3), done=done)
    assert sorted(p for p, _ in told) == list(range(len(PROMPTS))), "each group once"
    assert steps[0] < steps[-1] == count, "the first while others are drawn"
    for p, ids in told:
        assert ids == out.ids[3 * p : 3 * p + 3]
