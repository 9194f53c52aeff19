"""Signs of hacking by hand: correlations, repetition, copying, what a group says twice, the frontier, and the limits."""

import math
import random

import pytest
import torch

from rlhf_cli.config import DetectorsSection
from rlhf_cli.detectors import (
    Detectors,
    Windows,
    alike,
    copied,
    format_share,
    frontier,
    ranks,
    repeated,
    scores,
    texts,
    within,
)
from rlhf_cli.errors import GateError
from rlhf_cli.rewards.report import spearman
from rlhf_cli.types import Experience


def experience(prompts, responses, score=None, group=None, **more):
    """Rows of token ids: prompt, response, padding."""
    t = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.zeros(len(prompts), t, dtype=torch.int64)
    attention, mask = torch.zeros(len(prompts), t, dtype=torch.bool), torch.zeros(len(prompts), t, dtype=torch.bool)
    for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        ids[i, : len(p) + len(r)] = torch.tensor([*p, *r])
        attention[i, : len(p) + len(r)] = True
        mask[i, len(p) : len(p) + len(r)] = True
    n = len(prompts)
    return Experience(
        ids=ids, attention=attention, mask=mask, group=torch.zeros(n, dtype=torch.int64) if group is None else torch.tensor(group),
        score=torch.arange(float(n)) if score is None else torch.tensor(score), **more,
    )  # fmt: skip


def test_a_reward_that_is_length_correlates_fully_inside_groups():
    # Two groups with lengths 1 2 3 and 4 5 6, scores their length and its negative: +1 and -1 inside, their mean 0.
    exp = experience([[1]] * 6, [[2] * n for n in range(1, 7)], [1.0, 2, 3, -4, -5, -6], [0, 0, 0, 1, 1, 1])
    assert within(ranks(exp.score, exp.group), ranks(exp.mask.sum(-1), exp.group), exp.group).tolist() == pytest.approx(
        [1, -1]
    )
    found = scores(exp)
    assert found["length_corr_within"] == pytest.approx(0) and found["zero_variance"] == 0
    # Ranks 4 5 6 3 2 1 against 1 to 6: 1 - 6 (9 + 9 + 9 + 1 + 9 + 25) / 210 = -0.7714.
    assert found["length_corr"] == pytest.approx(1 - 6 * 62 / 210)


def test_ranks_by_hand():
    # 3 and 1 are ranked among themselves; two equal values share ranks 1 and 2.
    assert ranks(torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([0, 0, 7, 7])).tolist() == [2, 1, 1.5, 1.5]


def test_correlations_equal_the_slow_ones():
    rng = random.Random(0)
    for _ in range(20):
        x, y = (torch.tensor([float(rng.randrange(5)) for _ in range(12)]) for _ in range(2))
        group = torch.tensor([rng.randrange(3) for _ in range(12)])
        got = within(ranks(x, group), ranks(y, group), group)
        for g, value in zip(group.unique().tolist(), got.tolist(), strict=True):
            slow = spearman(x[group == g], y[group == g])
            assert (math.isnan(value) and math.isnan(slow)) or value == pytest.approx(slow)


def test_repeated_ngrams_by_hand():
    # 5 5 5 5 5: three trigrams, one distinct. 1 2 3 1 2 3 1: five, three distinct. Two tokens: none.
    exp = experience([[9]] * 3, [[5] * 5, [1, 2, 3, 1, 2, 3, 1], [1, 2]])
    got = repeated(*Windows(exp.ids).of(3, exp.mask))
    assert got[:2].tolist() == pytest.approx([2 / 3, 2 / 5]) and got[2].isnan()
    assert texts(exp, 32)["repeated"] == pytest.approx((2 / 3 + 2 / 5) / 2)


def test_what_a_group_says_twice():
    # Twice the same four tokens: four trigrams, two distinct. The other group: nothing in common.
    exp = experience([[9]] * 4, [[1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7], [6, 7, 8]], group=[0, 0, 1, 1])
    assert alike(*Windows(exp.ids).of(3, exp.mask), exp.group).tolist() == pytest.approx([0.5, 0.0])


def test_copying_by_hand_and_against_the_slow_way():
    # 3 4 5 is copied of five tokens; all of it; nothing; a token of the padding is no copy.
    exp = experience([[1, 2, 3, 4, 5], [7, 8], [1, 2], [1, 2, 3]], [[9, 3, 4, 5, 9], [7, 8], [3, 4], [0, 0]])
    assert texts(exp, 32)["copied"] == pytest.approx((0.6 + 1 + 0 + 0) / 4)

    def slow(p, r):
        runs = [
            j - i
            for i in range(len(r))
            for j in range(i + 1, len(r) + 1)
            if any(p[k : k + j - i] == r[i:j] for k in range(len(p)))
        ]
        return max(runs, default=0) / len(r)

    rng = random.Random(1)
    prompts = [[rng.randrange(3) for _ in range(rng.randrange(1, 12))] for _ in range(30)]
    responses = [[rng.randrange(3) for _ in range(rng.randrange(1, 12))] for _ in range(30)]
    exp = experience(prompts, responses)
    prompt = exp.attention & ~exp.mask
    assert copied(Windows(exp.ids), prompt, exp.mask).tolist() == pytest.approx(
        [slow(p, r) for p, r in zip(prompts, responses, strict=True)]
    )


def test_windows_are_the_same_wherever_they_stand():
    ids = torch.tensor([[4, 7, 1, 9, 4, 7, 1], [2, 2, 4, 7, 1, 3, 3]])
    hashes, valid = Windows(ids).of(3, torch.ones_like(ids, dtype=torch.bool))
    assert valid.all() and hashes[0, 0] == hashes[0, 4] == hashes[1, 2] and hashes.unique().numel() == 10 - 2


def test_format_share_by_hand():
    # 0.5 * mean(1, 1) of 0.5 + 2 * mean(0, 0.5): 0.5 of 1. A missing value is left out.
    parts = {
        "format": torch.tensor([1.0, 1.0]),
        "bleu": torch.tensor([0.0, 0.5]),
        "seen": torch.tensor([math.nan, 9.0]),
    }
    weights = {"format": 0.5, "bleu": 2.0, "seen": 0.0}
    assert format_share(parts, weights, {"format": 0.5}) == pytest.approx(0.5)
    assert math.isnan(format_share({"format": torch.zeros(2)}, {"format": 1.0}, {"format": 1.0}))


def test_the_frontier_of_a_known_gap():
    # log pi - log ref = 0.5 on each of two tokens, padding aside: k1 = 1; k3 = 2 (e^-0.5 - 1 + 0.5).
    exp = experience([[1]], [[2, 3]])
    logp = torch.tensor([[9.0, -1.0, -1.0]])
    exp = Experience(
        **{k: getattr(exp, k) for k in ("ids", "attention", "mask", "group", "score")},
        behavior_logp=logp,
        ref_logp=logp - 0.5,
    )
    got = frontier(exp)
    assert got["kl"] == pytest.approx([1.0]) and got["kl_k3"] == pytest.approx([2 * (math.exp(-0.5) - 0.5)])
    assert frontier(experience([[1]], [[2]])) == {}
    # a mask made the sampled log-probs larger; the policy itself is its reference
    same = frontier(exp.filled({"full_logp": exp.ref_logp}))
    assert same == {"kl": [0.0], "kl_k3": [0.0]}


def test_the_frontier_s_estimates_are_of_the_kl() -> None:
    # m coins of q = 0.514629 against p = 0.3: KL = m (q ln(q/p) + (1-q) ln((1-q)/(1-p))) = 0.1 m
    q, p, m, n = 0.514629, 0.3, 5, 4000
    heads = torch.rand(n, m, generator=torch.Generator().manual_seed(0)) < q
    logp, ref = (torch.where(heads, math.log(x), math.log(1 - x)) for x in (q, p))
    every = torch.ones(n, m, dtype=torch.bool)
    exp = Experience(
        ids=heads.long(), attention=every, mask=every, group=torch.arange(n), score=torch.zeros(n), behavior_logp=logp, ref_logp=ref,
    )  # fmt: skip
    exact = m * (q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)))
    assert exact == pytest.approx(0.1 * m, abs=1e-6)
    for values in frontier(exp).values():
        x = torch.tensor(values)
        assert abs(float(x.mean()) - exact) < 3 * float(x.std()) / math.sqrt(n)


def test_texts_are_looked_at_in_whole_groups():
    # Eight groups of two: the second response of every group repeats the first, so a half of them would show nothing.
    exp = experience(
        [[9]] * 16,
        [[g, g + 50, g + 100] for g in range(8) for _ in range(2)],
        group=[g for g in range(8) for _ in range(2)],
    )
    assert texts(exp, 4)["alike"] == texts(exp, 100)["alike"] == 0.5 == texts(exp, 1)["alike"]


LOOPING = experience([[9]] * 4, [[5] * 8] * 4, [1.0, 2, 3, 4])


def test_a_limit_stops_the_run_after_some_steps_in_a_row():
    detect = Detectors(DetectorsSection(steps=2, repeated=0.5), {"x": 1.0}, {})
    assert detect(LOOPING)["repeated"] == pytest.approx(5 / 6)
    fine = experience([[9]] * 2, [[1, 2, 3], [4, 5, 6]])
    detect(fine)
    detect(LOOPING)
    kept = Detectors(DetectorsSection(steps=2, repeated=0.5), {"x": 1.0}, {})
    kept.load_state_dict(detect.state_dict())
    message = r"^hack/repeated is 0\.833, beyond detectors\.repeated=0\.5 for 2 steps \(detectors\.steps=2\); responses repeat themselves"
    with pytest.raises(GateError, match=message):
        kept(LOOPING)


def test_without_limits_nothing_stops_and_switched_off_nothing_is_looked_at():
    detect = Detectors(DetectorsSection(), {"x": 1.0}, {})
    for _ in range(20):
        assert detect(LOOPING)["alike"] > 0.9
    assert Detectors(DetectorsSection(enabled=False, repeated=0.1), {}, {})(LOOPING) == {}
    assert detect(LOOPING.rows(torch.zeros(0, dtype=torch.int64))) == {}


def test_only_finite_numbers_are_logged():
    found = Detectors(DetectorsSection(), {"x": 1.0}, {})(experience([[9]], [[1]]))
    assert all(math.isfinite(v) for v in found.values()) and "length_corr" not in found
