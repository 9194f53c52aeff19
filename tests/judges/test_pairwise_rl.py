"""Pairwise-RL (arXiv:2504.04950): the comparator is trained on both orders, and the anchored reward teaches nothing between equals."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import torch
from test_rewards import ANCHOR, Fake, by, group, run, shown

from rlhf_cli.credit import gae
from rlhf_cli.judges.ask import Ask, Reply
from rlhf_cli.judges.questions import Compare
from rlhf_cli.objectives import nll
from rlhf_cli.reduce import token_mean
from rlhf_cli.rewards.judge_pairs import JudgeAnchor, ask_pair, read_pair
from rlhf_cli.shaping import centered, par

F = torch.float64
TEXTS = ("a", "b", "c")
STRENGTH = torch.tensor([0.0, 1.0, 2.0], dtype=F)


def said(logits: torch.Tensor, ask: Ask) -> Reply:
    """What a judge says that prefers A with log-odds logits[first, second]."""
    x = float(logits[tuple(TEXTS.index(t) for t in shown(ask))])
    return Reply("A", (("A", -math.log1p(math.exp(-x))), ("B", -math.log1p(math.exp(x)))))


def comparator(logits: torch.Tensor) -> Any:
    """That judge."""
    return by(Fake(partial(said, logits)))


def anchored(logits: torch.Tensor, response: str, anchor: str, **more: Any) -> float:
    return float(run(JudgeAnchor(**ANCHOR | more), comparator(logits), group([response], references=(anchor,))).value)


def test_a_table_trained_on_bradley_terry_data_gives_its_probabilities() -> None:
    """A verdict token per ordered pair, trained by algo=sft's objective and reduction on draws from r = (0, 1, 2), both orders as rows."""
    g, per = torch.Generator().manual_seed(0), 4000
    rows = []
    for i, j in itertools.combinations(range(3), 2):
        first = torch.rand(per, generator=g, dtype=F) < torch.sigmoid(STRENGTH[i] - STRENGTH[j])
        rows += [(i, j, bool(x)) for x in first] + [(j, i, not x) for x in first]
    at = torch.tensor([(i, j) for i, j, _ in rows]).T
    verdict = torch.tensor([int(not x) for *_, x in rows])[:, None]
    table = torch.zeros(3, 3, 2, dtype=F, requires_grad=True)  # logits of A and B
    weights = token_mean(torch.ones(len(rows), 1, dtype=torch.bool))
    for _ in range(60):
        logp = table.log_softmax(-1)[at[0], at[1]].gather(-1, verdict)
        (grad,) = torch.autograd.grad((nll(logp) * weights).sum(), table)
        with torch.no_grad():
            table -= 20 * grad
    odds = (table[..., 0] - table[..., 1]).detach()
    for i, j in itertools.permutations(range(3), 2):
        p = float(torch.sigmoid(STRENGTH[i] - STRENGTH[j]))
        found = anchored(odds, TEXTS[i], TEXTS[j])
        assert abs(found - p) < 4 * math.sqrt(p * (1 - p) / per), (i, j)
        assert abs(found + anchored(odds, TEXTS[j], TEXTS[i]) - 1) < 1e-6


def test_with_a_bradley_terry_comparator_it_is_par_of_one_reference_and_the_centred_reward() -> None:
    odds = STRENGTH[:, None] - STRENGTH
    for i, j in itertools.product(range(3), repeat=2):
        score, reference = STRENGTH[i : i + 1], STRENGTH[j : j + 1, None]
        assert math.isclose(
            anchored(odds, TEXTS[i], TEXTS[j]), float(par(score, reference, kind="sigmoid", k=1.0)), abs_tol=1e-6
        )
        logit = anchored(odds, TEXTS[i], TEXTS[j], scale="logit")
        assert math.isclose(logit, float(centered(score, reference)), abs_tol=1e-6)


def test_the_order_of_the_two_answers_does_not_matter() -> None:
    """The other order of every pair asks the same questions and gives the same probability, of a judge that has an opinion of places."""
    odds = torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=F) + 0.7
    question, prompt = Compare("the better one", "logits"), group(["a"])[0]
    for i, j in itertools.permutations(TEXTS, 2):
        asked, other = ask_pair(question, prompt, i, j, 2), ask_pair(question, prompt, j, i, 2)
        assert sorted(map(shown, asked)) == sorted(map(shown, other)) and shown(asked[0]) != shown(other[0])
        one, two = (read_pair(question, [said(odds, a) for a in asks])[0] for asks in (asked, other))
        assert one is not None and two is not None
        assert math.isclose(one.probability(), 1 - two.probability(), abs_tol=1e-12)
        assert abs(one.probability() - 1 / (1 + math.exp(-one.ahead[0]))) > 1e-3, "one order alone says something else"


def test_between_equals_the_expected_advantage_is_zero() -> None:
    """A policy that answers as its anchors do, judged by any comparator, biased by place as it may be: the mean reward is 1/2."""
    odds = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=F) + 0.7
    assert all(anchored(odds, t, t) == 0.5 for t in TEXTS), "an answer against itself"
    policy = torch.tensor([0.2, 0.5, 0.3], dtype=F)
    pairs = list(itertools.product(range(3), repeat=2))
    reward = torch.tensor([[anchored(odds, TEXTS[i], TEXTS[j])] for i, j in pairs], dtype=F)
    chance = torch.tensor([policy[i] * policy[j] for i, j in pairs], dtype=F)
    assert abs(float(chance @ reward[:, 0]) - 0.5) < 1e-6
    value, mask = torch.full_like(reward, 0.5), torch.ones(len(pairs), 1, dtype=torch.bool)
    advantage = gae(reward, value, mask, gamma=1.0, lam=0.95, whiten=False).advantage[:, 0]
    assert abs(float(chance @ advantage)) < 1e-6 and advantage.abs().max() > 0.05
