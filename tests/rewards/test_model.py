"""The model reward on a tiny random Llama: where the score is read, padding, truncation, refusals."""

import json

import pytest
import torch

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.model import Model
from rlhf_cli.types import Sample

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}<eos>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GROUP = torch.zeros(5, dtype=torch.int64)
SAMPLES = [
    Sample("what is up", "a cat"),
    Sample("hi", "a much longer answer than the others have, with many words in it"),
    Sample("a long prompt " * 8, "yes"),
    Sample("hi", ""),
    Sample(
        "who",
        "hi there",
        meta={"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "who"}]},
    ),
]


def tokenizer(template=TEMPLATE):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")
    made.chat_template = template
    return made


def save(folder, labels=1, template=TEMPLATE, kind="sequence"):
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    tok = tokenizer(template)
    config = LlamaConfig(
        vocab_size=len(tok), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.5, num_labels=labels,
        pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    model = (LlamaForSequenceClassification if kind == "sequence" else LlamaForCausalLM)(config)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return model.eval(), tok


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rm")
    return folder, *save(folder)


def make(folder, **settings):
    chosen = {"render": "turn", "batch_size": 16, "max_tokens": 400, "device": "cpu", "dtype": "fp32"} | settings
    return Model(path=str(folder), **chosen)


def by_hand(model, tok, text):
    """One row, no padding: the head on the last position's hidden state."""
    ids = torch.tensor([tok(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        return model.score(model.model(ids).last_hidden_state[0, -1]).item()


def test_score_is_read_at_the_end_token_after_the_response(trained):
    folder, model, tok = trained
    got = make(folder)(SAMPLES, GROUP).value.tolist()
    assert tok.pad_token_id == tok.eos_token_id  # the library's own pooling is then one token early
    expected = [by_hand(model, tok, f"<user>{s.prompt}\n<assistant>{s.response}<eos>") for s in SAMPLES[:4]]
    expected.append(by_hand(model, tok, "<system>be kind\n<user>who\n<assistant>hi there<eos>"))
    assert got == pytest.approx(expected, abs=1e-5)
    early = by_hand(model, tok, "<user>what is up\n<assistant>a cat")
    assert abs(got[0] - early) > 1e-2
    assert len({round(x, 3) for x in got}) == 5


def test_template_rendering_takes_the_whole_conversation(trained):
    folder, model, tok = trained
    got = make(folder, render="template")(SAMPLES[:1], GROUP[:1]).value.item()
    assert got == pytest.approx(by_hand(model, tok, "<user>what is up\n<assistant>a cat<eos>\n"), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_scores_do_not_depend_on_batch_or_padding(trained, batch_size):
    folder = trained[0]
    whole = make(folder)(SAMPLES, GROUP).value
    assert torch.allclose(make(folder, batch_size=batch_size)(SAMPLES, GROUP).value, whole, atol=1e-5)
    assert torch.allclose(make(folder)(SAMPLES[::-1], GROUP).value.flip(0), whole, atol=1e-5)


def test_without_a_chat_template_prompt_and_response_follow_each_other(tmp_path):
    model, tok = save(tmp_path, template=None)
    got = make(tmp_path)([Sample("what? ", "a cat")], GROUP[:1]).value.item()
    assert got == pytest.approx(by_hand(model, tok, "what? a cat<eos>"), abs=1e-5)
    with pytest.raises(ConfigError, match=r"render=template: .* has no chat template; take render=turn"):
        make(tmp_path, render="template")(SAMPLES[:1], GROUP[:1])


def test_long_prompts_lose_their_beginning_and_long_responses_are_missing(trained):
    folder, model, tok = trained
    rows = [Sample("0123456789", "abc"), Sample("q", "far too long a response")]
    got = make(folder, max_tokens=16)(rows, GROUP[:2])
    # "abc" and <eos> take 4 of 16 tokens, so the last 12 characters of the prompt's turn stay: "\n<assistant>".
    assert got.value[0].item() == pytest.approx(by_hand(model, tok, "\n<assistant>abc<eos>"), abs=1e-5)
    assert got.missing.tolist() == [False, True] and got.value[1].isnan()


def test_a_run_stands_for_its_export(trained, tmp_path):
    (tmp_path / "export").symlink_to(trained[0])
    assert torch.equal(make(tmp_path)(SAMPLES, GROUP).value, make(trained[0])(SAMPLES, GROUP).value)


def test_bf16_stays_close(trained):
    a, b = (make(trained[0], dtype=d)(SAMPLES, GROUP).value for d in ("fp32", "bf16"))
    assert b.dtype == torch.float32 and not torch.equal(a, b) and torch.allclose(a, b, atol=0.3)


def test_paths_that_are_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match=r"^the path of a reward model is empty; give it a run of algo=reward_model"):
        make("")
    with pytest.raises(
        ConfigError, match=r"^path=.*absent: no such folder in .*; give a run, a Hugging Face folder or a Hub id"
    ):
        make(tmp_path / "absent")
    with pytest.raises(
        ConfigError, match=r"has neither config\.json nor export/; give a finished run of algo=reward_model"
    ):
        make(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ConfigError, match=r"is a LlamaForCausalLM, not a \.\.\.ForSequenceClassification; train one"):
        make(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds only a LoRA adapter; export it with model\.lora\.merge_export=true"):
        make(tmp_path)
    with pytest.raises(ConfigError, match=r"^batch_size=0, max_tokens=400 are not allowed"):
        make("org/name", batch_size=0)


def test_weights_that_are_refused_at_load(tmp_path):
    save(tmp_path / "two", labels=2)
    with pytest.raises(ConfigError, match=r"has 2 outputs; a reward model has one"):
        make(tmp_path / "two").load()
    save(tmp_path / "headless", kind="causal")
    config = json.loads((tmp_path / "headless/config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (tmp_path / "headless/config.json").write_text(json.dumps(config | {"id2label": {"0": "LABEL_0"}}))
    with pytest.raises(ConfigError, match=r"lacks the weights score\.weight; a random head would score at random"):
        make(tmp_path / "headless").load()
    save(tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled/pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pickled: it cannot be loaded: "):
        make(tmp_path / "pickled").load()


def test_the_bits_of_a_group_do_not_depend_on_the_groups_beside_it(trained):
    folder, *_ = trained
    group = torch.tensor([0, 0, 1, 1, 1])
    both = make(folder)(SAMPLES, group).value
    assert torch.equal(both[:2], make(folder)(SAMPLES[:2], group[:2]).value)
    assert torch.equal(both[2:], make(folder)(SAMPLES[2:], group[2:]).value)
