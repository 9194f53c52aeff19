"""Character ranges on the policy's tokens: byte-level tokens, characters of several tokens, merges, stripped text, refusals."""

import pytest
import torch

from rlhf_cli.errors import GateError
from rlhf_cli.models.tiny import tiny_tokenizer
from rlhf_cli.rewards.spans import place, token_ends
from rlhf_cli.types import Experience, Sample

TOKENIZER = tiny_tokenizer()  # one token per byte
EOS = TOKENIZER.eos_token_id


def merged_tokenizer():
    """Byte-level BPE in which ` b` and the first two bytes of the euro sign are single tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from rlhf_cli.models.tiny import _byte_letters

    letters = _byte_letters()
    euro = [letters[b] for b in "€".encode()]
    pairs = [(letters[32], "b"), (euro[0], euro[1])]
    vocab = {c: i for i, c in enumerate([*letters, *("".join(p) for p in pairs)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<e>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>", clean_up_tokenization_spaces=False)


def experience(text: str, response: str, tokenizer=TOKENIZER, prompt: int = 2) -> Experience:
    ids = [*[0] * prompt, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    mask = torch.arange(len(ids)) >= prompt
    return Experience(samples=(Sample("p", response, uid="u"),), ids=torch.tensor([ids]), mask=mask[None])


def test_one_token_per_character() -> None:
    placed = place([(0, 0, 2, 0.5), (0, 2, 3, -1.0), (0, 0, 3, 0.25)], experience("abc", "abc"), TOKENIZER)
    # prompt 2 tokens; "ab" ends at b, "c" and "abc" at c; nothing on EOS
    assert placed.tolist() == [[0, 0, 0, 0.5, -0.75, 0]]


def test_a_character_of_several_tokens_is_complete_at_its_last() -> None:
    # a, then the three bytes of the euro sign, then b
    assert token_ends(list("a€b".encode()), "a€b", TOKENIZER) == [1, 1, 1, 2, 3]
    placed = place([(0, 1, 2, 1.0)], experience("a€b", "a€b", prompt=0), TOKENIZER)
    assert placed.tolist() == [[0, 0, 0, 1, 0, 0]]


def test_a_token_of_several_characters_and_one_that_ends_amid_one() -> None:
    tok = merged_tokenizer()
    ids = tok("a b€c", add_special_tokens=False)["input_ids"]
    assert len(ids) == 5  # a, " b", two bytes of the euro sign, its third, c
    assert token_ends(ids, "a b€c", tok) == [1, 3, 3, 4, 5]
    # " " alone ends within the token " b"; "b" too; the sum stays
    placed = place([(0, 1, 2, 2.0), (0, 2, 3, 3.0), (0, 3, 5, 4.0)], experience("a b€c", "a b€c", tok, 0), tok)
    assert placed.tolist() == [[0, 5, 0, 0, 4, 0]]


def test_emoji_and_combining_marks_keep_the_sum() -> None:
    text = "é👩‍🚀 né" * 3
    spans = [(0, i, i + 1, float(i + 1)) for i in range(len(text))]
    for tok in (TOKENIZER, merged_tokenizer()):
        exp = experience(text, text, tok)
        placed = place(spans, exp, tok)
        assert placed.sum() == sum(x for *_, x in spans)
        assert (placed[~exp.mask] == 0).all() and placed[0, -1] == 0, "neither the prompt nor EOS says a character"


def test_the_text_that_scorers_see_is_stripped_and_cut_at_a_stop() -> None:
    exp = experience("  ab END x", "ab", prompt=0)
    placed = place([(0, 0, 1, 1.0), (0, 1, 2, 2.0)], exp, TOKENIZER)
    assert placed[0].nonzero().flatten().tolist() == [2, 3] and placed[0, 3] == 2


@pytest.mark.parametrize(("first", "stop"), [(0, 0), (2, 1), (-1, 1), (0, 4)])
def test_a_range_that_the_response_lacks_is_refused(first: int, stop: int) -> None:
    with pytest.raises(GateError) as e:
        place([(0, first, stop, 1.0)], experience("abc", "abc"), TOKENIZER)
    assert str(e.value) == (
        f"a reward placed 1 on characters {first}:{stop} of a response of 3 characters (sample 'u'); "
        "a range is first:stop with 0 <= first < stop <= 3"
    )
