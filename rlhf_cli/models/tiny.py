"""A random two-layer Llama and a byte-level tokenizer, made in memory in milliseconds: for tests and debugging."""

from __future__ import annotations

from typing import Any

import torch

NAME = "tiny_random"
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def tiny_tokenizer() -> Any:
    """One token per byte (ids 0 to 255 are the byte values), then BOS, EOS and PAD. Any text survives a round trip."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(_byte_letters())}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (BOS, EOS, PAD)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_config() -> Any:
    """Two layers of width 64, four query heads on two key heads, a context of 2048."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        tie_word_embeddings=False,
    )


def tiny_causal(seed: int, dtype: torch.dtype) -> Any:
    """The language model; equal seeds give equal weights, and the global random state stays as it was."""
    from transformers import LlamaForCausalLM

    return _randomised(LlamaForCausalLM, tiny_config(), seed).to(dtype)


def tiny_scalar(seed: int, dtype: torch.dtype, outputs: int = 1) -> Any:
    """The same backbone, with `outputs` numbers per token; its head is drawn by the caller."""
    from transformers import LlamaForSequenceClassification

    config = tiny_config()
    config.num_labels = outputs
    return _randomised(LlamaForSequenceClassification, config, seed).to(dtype)


def _randomised(kind: Any, config: Any, seed: int) -> Any:
    """Matrices ~ N(0, 1 / columns), by name order so that both heads share a backbone."""
    with torch.random.fork_rng(devices=[]):
        model = kind(config)
    generator = torch.Generator().manual_seed(seed)
    for _, p in sorted(model.base_model.named_parameters()):
        if p.ndim == 2:
            torch.nn.init.normal_(p.data, std=p.shape[1] ** -0.5, generator=generator)
    head = model.get_output_embeddings()
    if head is not None:
        torch.nn.init.normal_(head.weight.data, std=head.weight.shape[1] ** -0.5, generator=generator)
    return model.eval()


def _byte_letters() -> list[str]:
    """The printable letter that byte-level tokenizers write for each byte 0 to 255 (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]
