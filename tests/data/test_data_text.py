"""Prompts and responses as ids, on tokenizers built here."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_cli.data.text import check_bos, end_id, render, response_ids
from rlhf_cli.errors import ConfigError, GateError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER = ({"role": "user", "content": "Hi"},)


def tokenizer(template: str | None, *, adds_bos: bool, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """Byte level without merges: one token per character here."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"])
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[(t, inner.token_to_id(t)) for t in ("<s>", "</s>")]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=eos)
    made.chat_template = template
    return made


def ids(tok, text: str) -> list[int]:
    return tok(text, add_special_tokens=False)["input_ids"]


def test_chat_prompt_and_response_make_the_conversation():
    tok = tokenizer(CHATML, adds_bos=False)
    prompt = render(USER, tok, True)
    assert tok.decode(prompt) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    whole = tok.apply_chat_template([*USER, {"role": "assistant", "content": "Yo"}], tokenize=False)
    assert prompt + response_ids("Yo", tok) == ids(tok, whole)[:-1]  # the template adds a newline after the turn
    assert response_ids("Yo", tok)[-1] == end_id(tok) == tok.convert_tokens_to_ids("<|im_end|>")


def test_template_that_writes_bos_gives_one():
    tok = tokenizer(LLAMA, adds_bos=True)
    prompt = render(USER, tok, True)
    assert tok.decode(prompt) == "<s>[user]Hi<|eot_id|>[assistant]"
    assert prompt.count(tok.bos_token_id) == 1
    assert end_id(tok) == tok.convert_tokens_to_ids("<|eot_id|>") != tok.eos_token_id


@pytest.mark.parametrize("adds_bos", [True, False])
def test_plain_text(adds_bos):
    for tok, chat in ((tokenizer(None, adds_bos=adds_bos), True), (tokenizer(CHATML, adds_bos=adds_bos), False)):
        turns = ({"role": "system", "content": "S"}, *USER)
        assert tok.decode(render(turns, tok, chat)) == "<s>" * adds_bos + "S\n\nHi"
        assert response_ids("Yo", tok, chat) == [*ids(tok, "Yo"), tok.eos_token_id]


def test_template_without_end_of_turn_falls_back_to_eos():
    tok = tokenizer("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", adds_bos=False)
    assert end_id(tok) == tok.eos_token_id
    tok.chat_template = CHATML  # a replaced template counts at once
    assert end_id(tok) == tok.convert_tokens_to_ids("<|im_end|>")
    with pytest.raises(
        ConfigError, match=r"^the tokenizer has no EOS token and its chat template ends no turn with one"
    ):
        end_id(tokenizer(None, adds_bos=False, eos=None))


def test_first_special_token_after_the_answer_ends_the_turn():
    tok = tokenizer("{% for m in messages %}{{ m['content'] }} <|eot_id|><|im_end|>{% endfor %}</s>", adds_bos=False)
    assert end_id(tok) == tok.convert_tokens_to_ids("<|eot_id|>")


def test_two_bos_are_refused():
    tok = tokenizer("{{ bos_token }}" + LLAMA, adds_bos=True)
    with pytest.raises(
        GateError, match=r"^a prompt starts with 2 BOS tokens \('<s>', id \d+\), wanted at most one; take it"
    ):
        render(USER, tok, True)
    bos = tok.bos_token_id
    check_bos([bos, 1, bos, bos], tok)
    check_bos([1, 2], tok)
    check_bos([], tok)
    with pytest.raises(GateError, match="starts with 3 BOS"):
        check_bos([bos] * 3, tok)


def test_refusing_template():
    tok = tokenizer("{{ raise_exception('System role not supported') }}", adds_bos=False)
    with pytest.raises(ConfigError) as e:
        render(USER, tok, True)
    assert str(e.value) == (
        "the chat template refuses turns of user: System role not supported; "
        "change dataset.system, or type dataset.chat=false"
    )
