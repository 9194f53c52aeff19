"""BLEU, BLEUBERI's BLEU, chrF and ROUGE against numbers worked out by hand and against the libraries."""

import math
import random
from pathlib import Path

import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer

from rlhf_cli.config import build
from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.bleuberi import inside_answer
from rlhf_cli.rewards.rouge import common_subsequence
from rlhf_cli.types import Sample

CONF = Path(__file__).parents[2] / "conf" / "reward"


def make(name, **settings):
    """The scorer of conf/reward/NAME.yaml, with some settings changed."""
    from omegaconf import OmegaConf

    node = dict(OmegaConf.load(CONF / f"{name}.yaml")[name]) | settings
    return build(node, f"reward.{name}", reserved=("weight",))


def score(scorer, response, *references):
    scores = scorer([Sample("p", response, references)], torch.zeros(1, dtype=torch.int64))
    assert scores.value.dtype == torch.float32
    return scores.value[0].item()


CAT, IS = "the cat sat on the mat", "the cat is on the mat"


def words(n, seed):
    rng = random.Random(seed)
    return " ".join(rng.choice("the a cat dog sat, ran. on 3.5 mat-5 it's Big big \n").strip() or "x" for _ in range(n))


# p = 5/6, 3/5, 1/4, then exp smoothing 1/(2*3): (5/6 * 3/5 * 1/4 * 1/6) ** 1/4 = (1/48) ** 1/4; floor: 0.1/3; add-k: 1
# added above and below from bigrams on: 5/6, 4/6, 2/5, 1/4.
@pytest.mark.parametrize(
    "smooth, expected",
    [
        ("exp", (1 / 48) ** 0.25),
        ("floor", (5 / 6 * 3 / 5 / 4 * 0.1 / 3) ** 0.25),
        ("add-k", (5 / 6 * 4 / 6 * 2 / 5 / 4) ** 0.25),
        ("none", 0.0),
    ],
)
def test_bleu_smoothing_by_hand(smooth, expected):
    assert score(make("bleu", smooth=smooth), CAT, IS) == pytest.approx(expected, abs=1e-6)


def test_bleu_short_texts_and_effective_order():
    bleu = make("bleu")
    assert score(bleu, "the cat sat", "the cat sat") == pytest.approx(1.0)
    assert score(make("bleu", effective_order=False), "the cat sat", "the cat sat") == 0
    # p = 1, 1 over the two orders that exist; BP = exp(1 - 6/2).
    assert score(bleu, "the cat", IS) == pytest.approx(math.exp(-2), abs=1e-6)
    assert score(bleu, "", IS) == 0
    assert score(bleu, "dog", "yes") == 0


def test_bleu_many_references_clip_against_all_and_take_the_closest_length():
    # Against both references every n-gram of the response occurs; the closest length is 6, so BP = 1.
    both = score(make("bleu", max_order=2), CAT, IS, "a cat sat on it")
    # unigrams: the cat sat on the mat, all 6; bigrams: the-cat cat-sat sat-on on-the the-mat, all 5.
    assert both == pytest.approx(1.0)
    # Lengths 5 and 9 against 6: the closest is 5, so no penalty; 9 alone costs exp(1 - 9/6).
    short, long = "a dog ran off today", "the cat sat on the mat and slept well"
    assert score(make("bleu"), CAT, long, short) == pytest.approx(1.0)
    assert score(make("bleu"), CAT, long) == pytest.approx(math.exp(1 - 9 / 6))
    # Lengths 3 and 8: the closest is 8 although a shorter one exists, exp(1 - 8/6).
    assert score(make("bleu"), CAT, "x y z", CAT + " today now") == pytest.approx(math.exp(1 - 8 / 6))


def test_bleu_equals_the_library_sentence_score():
    for seed in range(40):
        response, references = words(seed, seed), [words(12 + seed % 7, 100 + seed), words(9, 200 + seed)]
        expected = sacrebleu.sentence_bleu(response, references).score / 100
        assert score(make("bleu"), response, *references) == pytest.approx(expected, abs=1e-6)


def test_bleu_settings_reach_the_library():
    assert score(make("bleu"), "The Cat", "the cat") == 0
    assert score(make("bleu", lowercase=True), "The Cat", "the cat") == pytest.approx(1.0)
    assert score(make("bleu"), "今天天气", "今天天氣") == 0
    assert score(make("bleu", tokenize="char"), "今天天气", "今天天气") == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"reward\.bleu\.max_order: 0 is not allowed; type a number from 1, usually 4"):
        make("bleu", max_order=0)


# p = (5+1)/(6+1), (3+1)/(5+1), (2+1)/(4+1), (1+1)/(3+1); unsmoothed (5/6 * 3/5 * 2/4 * 1/3) ** 1/4.
def test_bleuberi_by_hand():
    b = make("bleuberi")
    on_a = "the cat sat on a mat"
    assert score(b, CAT, on_a) == pytest.approx((6 / 7 * 4 / 6 * 3 / 5 * 2 / 4) ** 0.25, abs=1e-6)
    assert score(b, CAT, on_a) == pytest.approx(0.643459, abs=1e-6)
    # With "the cat lay on the mat" all 6 unigrams, 5 bigrams match; trigrams add on-the-mat (3 of 4), 4-grams stay 1.
    assert score(b, CAT, on_a, "the cat lay on the mat") == pytest.approx(0.795271, abs=1e-6)
    # Without smoothing (5/6 * 3/5 * 2/4 * 1/3) ** 1/4: the same counts in sacrebleu's formula.
    assert score(make("bleu", smooth="none"), CAT, on_a) == pytest.approx(0.537285, abs=1e-6)
    # All of 3, 2, 1, 0 n-grams match: every p is 1, BP = exp(1 - 6/3) = 0.367879.
    assert score(b, "the cat sat", on_a) == pytest.approx(math.exp(-1), abs=1e-6)
    assert score(b, "the cat sat", on_a) == pytest.approx(0.367879, abs=1e-6)
    assert score(b, CAT, IS) == pytest.approx((6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25, abs=1e-6)
    assert score(b, CAT, IS) == pytest.approx(0.488923, abs=1e-6)


def test_bleuberi_smooths_unigrams_too():
    b = make("bleuberi")
    assert score(b, "yes", "yes") == pytest.approx(1.0)
    # p = 1/2, 1, 1, 1; against six words the brevity penalty is exp(1 - 6).
    assert score(b, "no", "yes") == pytest.approx(0.5**0.25, abs=1e-6) == pytest.approx(0.840896, abs=1e-6)
    assert score(b, "no", CAT) == pytest.approx(0.5**0.25 * math.exp(-5), abs=1e-6) == pytest.approx(0.005666, abs=1e-6)


def test_bleuberi_counts_never_fall_with_another_reference():
    # The shortest reference stays first and as short as the response, so the brevity penalty is 1 and the value is the matches' alone.
    b, rng, words = make("bleuberi"), random.Random(0), ["the", "cat", "sat", "on", "a", "mat"]
    for _ in range(100):
        response, first, *more = (" ".join(rng.choices(words, k=k)) for k in (6, 6, 7, 9, 6))
        values = [score(b, response, first, *more[:i]) for i in range(4)]
        assert values == sorted(values) and values[0] > 0


def test_without_smoothing_it_is_bleu():
    assert score(make("bleu", smooth="none"), CAT, "the cat sat on a mat") == pytest.approx(0.537285, abs=1e-6)


def test_another_reference_never_lowers_bleuberi():
    b = make("bleuberi")
    for seed in range(40):
        response, one, two = (words(4 + (7 * seed + i) % 9, 3 * seed + i) for i in range(3))
        assert score(b, response, one, two) >= score(b, response, one) - 1e-7


def test_bleuberi_takes_the_shortest_reference():
    # sacrebleu's closest length would be 8, with BP = exp(1 - 8/6); the shortest is 3, so there is no penalty.
    assert score(make("bleuberi"), CAT, "a b c", CAT + " today now") == pytest.approx(1.0)


def test_bleuberi_clips_at_the_largest_count_in_one_reference():
    # "a" occurs once in each reference, so 1 of 4 unigrams counts: p = 2/5, then 1/4, 1/3, 1/2.
    assert score(make("bleuberi"), "a a a a", "a b c d", "a e f g") == pytest.approx((1 / 60) ** 0.25, abs=1e-6)


def test_bleuberi_blank_and_answer_tag():
    b = make("bleuberi")
    assert score(b, " \n", CAT) == 0
    assert score(b, "<think>zzz</think><answer> the cat sat on the mat </answer>", CAT) == pytest.approx(1.0)
    assert score(b, "<answer>the cat sat on the mat", CAT) == pytest.approx(1.0)
    assert score(b, "<answer></answer> " + CAT, CAT) == 0
    assert score(make("bleuberi", answer_tag=False), "<answer>" + CAT + "</answer>", CAT) < 0.9
    assert inside_answer("a <answer>b<answer>c</answer>") == "b"
    assert inside_answer("no tag </answer>") == "no tag </answer>"


def test_bleuberi_tokens_are_13a():
    # "3.5," -> "3.5" ","; "mat." -> "mat" "."; "&amp;" -> "&"; a hyphen at a line's end joins.
    assert score(make("bleuberi"), "3.5, mat. a &amp; long-\ner", "3.5 , mat . a & longer") == pytest.approx(1.0)


def test_chrf_by_hand_and_by_the_library():
    # Characters without spaces: "abc" against "abd", orders 1..3 (no longer ones): P = R = (2/3 + 1/2 + 0) / 3.
    assert score(make("chrf"), "abc", "abd") == pytest.approx((2 / 3 + 1 / 2) / 3, abs=1e-6)
    assert score(make("chrf"), CAT, IS) == pytest.approx(0.645779, abs=1e-6)
    assert score(make("chrf", word_order=2), CAT, IS) == pytest.approx(0.663607, abs=1e-6)
    assert score(make("chrf"), "abc", "xyz", "abc") == pytest.approx(1.0)
    assert score(make("chrf"), "", "abc") == 0
    for seed in range(10):
        response, reference = words(20, seed), words(25, 50 + seed)
        expected = sacrebleu.sentence_chrf(response, [reference]).score / 100
        assert score(make("chrf"), response, reference) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match=r"reward\.chrf: char_order=0, word_order=0, beta=2 are not allowed"):
        make("chrf", char_order=0)


def test_rouge_by_hand():
    # 5 of 6 unigrams, 3 of 5 bigrams, common subsequence "the cat on the mat" of 5.
    assert score(make("rouge", variant="rouge1"), CAT, IS) == pytest.approx(5 / 6)
    assert score(make("rouge", variant="rouge2"), CAT, IS) == pytest.approx(3 / 5)
    assert score(make("rouge"), CAT, IS) == pytest.approx(5 / 6)
    # The best reference counts: "the cat" covers 2 of 2 and of 6, F = 2 * 2 / 8.
    assert score(make("rouge"), "the cat", "dogs", CAT) == pytest.approx(0.5)
    assert score(make("rouge"), "", CAT) == 0
    assert score(make("rouge"), "running cats", "run cat") == 0
    assert score(make("rouge", stemmer=True), "running", "runs") == pytest.approx(1.0)


@pytest.mark.parametrize("variant", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
@pytest.mark.parametrize("stemmer", [False, True])
def test_rouge_equals_the_library(variant, stemmer):
    library = RougeScorer([variant], use_stemmer=stemmer)
    for seed in range(15):
        response, references = words(seed, seed), [words(11, 100 + seed), words(17, 200 + seed)]
        expected = library.score_multi(references, response)[variant].fmeasure
        assert score(make("rouge", variant=variant, stemmer=stemmer), response, *references) == pytest.approx(expected)


def test_common_subsequence_equals_the_table():
    def table(a, b):
        rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                rows[i + 1][j + 1] = rows[i][j] + 1 if x == y else max(rows[i][j + 1], rows[i + 1][j])
        return rows[-1][-1]

    rng = random.Random(0)
    for _ in range(200):
        a, b = ([rng.choice("abcd") for _ in range(rng.randrange(90))] for _ in range(2))
        assert common_subsequence(a, b) == table(a, b)


def test_meteor_by_hand():
    # 5 of 6 words match in 2 chunks ("the cat", "on the mat"): F = 5/6, penalty 0.5 (2/5)^3 = 0.032, 5/6 * 0.968.
    meteor = make("meteor")
    assert score(meteor, CAT, IS) == pytest.approx(0.806667, abs=1e-6)
    # Six words with themselves: one chunk of 6, 1 - 0.5 (1/6)^3.
    assert score(meteor, CAT, CAT) == pytest.approx(0.997685, abs=1e-6)
    # Stems match: "running" and "runs"; one word, one chunk: 1 - 0.5. The best reference counts.
    assert score(meteor, "running", "dogs", "runs") == pytest.approx(0.5)
    assert score(meteor, "", CAT) == 0 and score(meteor, "dog", CAT) == 0
    # alpha = 0 is recall-free: F = P R / R = P = 1 of "the cat" against six words.
    assert score(make("meteor", alpha=0.0, gamma=0.0), "the cat", CAT) == pytest.approx(1.0)


def test_meteor_says_which_variant_it_is_and_refuses_settings():
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:
        with pytest.raises(
            ConfigError, match=r"^reward\.meteor\.synonyms=true: the WordNet corpus is not on this machine; type"
        ):
            make("meteor", synonyms=True)
    with pytest.raises(
        ConfigError, match=r"^reward\.meteor: alpha=2\.0, beta=3\.0, gamma=0\.5 are not allowed; alpha and"
    ):
        make("meteor", alpha=2.0)


def test_meteor_matches_synonyms_of_a_corpus_that_is_there():
    from types import SimpleNamespace as Thing

    meteor = make("meteor")
    car = Thing(lemmas=lambda: [Thing(name=lambda: "auto")])
    meteor.wordnet = Thing(synsets=lambda word: [car] if word == "car" else [])
    assert score(meteor, "car", "auto") == pytest.approx(0.5) and score(make("meteor"), "car", "auto") == 0


@pytest.mark.parametrize("name", ["bleu", "bleuberi", "chrf", "rouge", "meteor", "exact_match", "math_answer"])
def test_no_reference_is_missing_not_zero(name):
    samples = [Sample("p", "7", ("7",)), Sample("p", "7"), Sample("p", "7", (" ",))]
    scores = make(name)(samples, torch.zeros(3, dtype=torch.int64))
    assert scores.missing.tolist() == [False, True, True]
    # METEOR of n words with themselves is 1 - 0.5 / n^3.
    assert scores.value[0] == (0.5 if name == "meteor" else 1) and scores.value[1:].isnan().all()


@pytest.mark.parametrize("name", ["bleu", "bleuberi", "chrf", "rouge", "meteor"])
def test_rows_are_scored_alike_in_any_order_and_company(name):
    samples = [Sample("p", words(n, n), (words(9, n % 3), words(7, 5))) for n in range(3, 12)]
    group = torch.arange(9) % 3
    together = make(name)(samples, group).value
    alone = torch.cat([make(name)([s], group[:1]).value for s in reversed(samples)]).flip(0)
    assert torch.equal(together, alone) and together.unique().numel() > 3
    assert ((together >= 0) & (together <= 1)).all()


def test_grue_has_the_settings_of_its_metrics_and_trains_on_none():
    from omegaconf import OmegaConf

    for name, node in OmegaConf.load(CONF / "grue.yaml").items():
        option = "rouge" if name.startswith("rouge") else name
        alone = dict(OmegaConf.load(CONF / f"{option}.yaml")[option]) | {"weight": 0.0}
        assert dict(node) == alone | ({"variant": name, "stemmer": True} if option == "rouge" else {})


@pytest.mark.parametrize("name", sorted(p.stem for p in CONF.glob("*.yaml") if p.stem not in ("none", "grue")))
def test_every_option_is_keyed_by_its_name_and_checks(name):
    from omegaconf import OmegaConf

    from rlhf_cli.config import check_node
    from rlhf_cli.rewards.nodes import RESERVED, reward_nodes

    chosen = OmegaConf.load(CONF / f"{name}.yaml")
    weights = {"hidden_answer": 0.0, "clause_distance": 0.0, "oni": 0.4, "extrinsic_bleu": 0.1}  # 0: logged only
    assert list(chosen) == [name] and chosen[name].weight == weights.get(name, 1.0)
    node = reward_nodes(OmegaConf.create({"reward": chosen}))[0]
    sig, _ = check_node(node.settings, node.key, reserved=RESERVED)
    assert all(p.doc for p in sig.params.values()), {k: p.doc for k, p in sig.params.items()}
    needing = {
        "bleu",
        "bleuberi",
        "chrf",
        "rouge",
        "meteor",
        "bertscore",
        "exact_match",
        "math_answer",
        "cosine_length",
        "sql_execution",
        "sql_partial",
        "hidden_answer",
        "judge_anchor",
        "levels",
        "levels_knights",
        "ter",
        "extrinsic_bleu",
        "by_category",
        "clause_distance",
        "sql_judge",
    }
    assert bool(sig.flags.get("needs_references")) == (name in needing)
    text = (CONF / f"{name}.yaml").read_text()
    assert text.startswith("# ") and len(text.splitlines()) <= 12
