"""The stages between source and update."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli import stages
from rlhf_cli.engine.comm import Comm
from rlhf_cli.errors import GateError
from rlhf_cli.shaping import scale, sequence_kl, token_kl
from rlhf_cli.types import Credit, Experience, Narrowed, Sample, Scores, Selection

IGNORE = lambda score: None  # noqa: E731
COMM = Comm(torch.device("cpu"))
N, T = 6, 4
GROUP = torch.tensor([0, 0, 1, 1, 4, 4])


def experience(**changes: Any) -> Experience:
    attention = torch.arange(T) < torch.tensor([4, 3, 4, 4, 2, 4])[:, None]
    columns: dict[str, Any] = {
        "samples": tuple(Sample(f"p{g}", f"response {i}") for i, g in enumerate(GROUP.tolist())),
        "ids": torch.arange(N * T).view(N, T), "attention": attention, "mask": attention & (torch.arange(T) > 0), "group": GROUP,
        "version": torch.zeros(N, dtype=torch.int64),
    }  # fmt: skip
    return Experience(**(columns | changes))


class Numbered:
    """Scores a row by the number in its text; `failed` rows are missing."""

    def __init__(self, failed: Sequence[int] = ()) -> None:
        self.failed, self.seen = failed, []

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        rows = [int(s.response.split()[1]) for s in samples]
        self.seen.append((rows, group.tolist()))
        value = torch.tensor(rows, dtype=torch.float64)
        return Scores(value, torch.tensor([r in self.failed for r in rows]), {"half": value / 2})


def test_scores_land_on_their_rows() -> None:
    scorer = Numbered()
    exp = stages.scoring(scorer, COMM, 0.0, IGNORE)(experience())
    assert exp.score.tolist() == [0, 1, 2, 3, 4, 5] and exp.score.dtype == torch.float32
    assert exp.components["half"].tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    assert scorer.seen == [([0, 1, 2, 3, 4, 5], GROUP.tolist())]


class Ranks:
    """Two ranks in one process: what rank 1 contributes is computed first."""

    def __init__(self, rank: int, others: dict[int, Any] | None = None) -> None:
        self.rank, self.world, self.others, self.sent = rank, 2, others or {}, None

    def gather(self, x: Any) -> list[Any]:
        self.sent = x
        return [x if r == self.rank else self.others.get(r, x) for r in range(2)]


def test_each_rank_scores_whole_groups_and_all_get_everything() -> None:
    second: Any = Ranks(1)
    theirs = Numbered()
    stages.score_sharded(theirs, experience(), second)
    first: Any = Ranks(0, {1: second.sent})
    mine = Numbered(failed=[5])
    scores = stages.score_sharded(mine, experience(), first)
    assert theirs.seen == [([2, 3], [1, 1])] and mine.seen == [([0, 1, 4, 5], [0, 0, 4, 4])]
    assert scores.value.tolist() == [0, 1, 2, 3, 4, 5] and scores.missing is not None
    assert scores.missing.tolist() == [False] * 5 + [True]
    assert scores.components["half"].tolist() == [0, 0.5, 1, 1.5, 2, 2.5]


def test_missing_scores_drop_their_rows_and_pairs_renumber() -> None:
    exp = experience(pairs=torch.tensor([[1, 0], [3, 2], [5, 4]]))
    left = stages.scoring(Numbered(failed=[0, 3]), COMM, 0.5, IGNORE)(exp)
    assert left.score.tolist() == [1, 2, 4, 5] and left.group.tolist() == [0, 1, 4, 4]
    assert left.pairs.tolist() == [[3, 2]], "only (5, 4) has both ends left"
    assert [s.response for s in left.samples] == ["response 1", "response 2", "response 4", "response 5"]


def test_too_many_missing_scores_stop_the_run() -> None:
    with pytest.raises(GateError) as e:
        stages.scoring(Numbered(failed=[1, 2]), COMM, 0.3, IGNORE)(experience())
    assert str(e.value).startswith("2 of 6 rewards failed") and "30%" in str(e.value)
    assert len(stages.scoring(Numbered(failed=[1, 2]), COMM, 0.34, IGNORE)(experience())) == 4


def test_missing_scores_are_counted_and_their_first_reason_is_told() -> None:
    class Failing(Numbered):
        def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
            found = super().__call__(samples, group)
            value = found.value.masked_fill(found.missing, float("nan"))
            reasons = {i: f"slow {samples[i].response}" for i in found.missing.nonzero().flatten().tolist()}
            return Scores(value, found.missing, {"x": value, "x/part": value}, reasons=reasons)

    counted: list[Mapping[str, float]] = []
    notes: list[str] = []
    stages.scoring(Failing([3, 4]), COMM, 0.5, IGNORE, counted.append, notes.append)(experience())
    stages.scoring(Failing(), COMM, 0.5, IGNORE, counted.append, notes.append)(experience())
    assert counted == [{"x/missing": 2.0}, {"x/missing": 0.0}]
    assert notes == ["2 of 6 responses lack a score; first: sample '': slow response 3"]
    with pytest.raises(GateError, match=r"^2 of 6 rewards failed.*\(first: sample '': slow response 3\)$"):
        stages.scoring(Failing([3, 4]), COMM, 0.3, IGNORE)(experience())
    second: Any = Ranks(1)
    stages.score_sharded(Failing([3]), experience(), second)  # its rows 0 and 1 are rows 2 and 3 of the step
    first: Any = Ranks(0, {1: second.sent})
    assert stages.score_sharded(Failing([4]), experience(), first).reasons == {
        3: "slow response 3",
        4: "slow response 4",
    }


def test_shuffled_deals_the_same_scores_to_other_rows() -> None:
    def at(version: int, seed: int = 0) -> list[float]:
        exp = experience(version=torch.full((N,), version))
        return stages.shuffled(stages.scoring(Numbered(), COMM, 0.0, IGNORE), seed)(exp).score.tolist()

    dealt = [at(v) for v in range(6)]
    assert all(sorted(d) == [0, 1, 2, 3, 4, 5] for d in dealt)
    assert sum(d == [0, 1, 2, 3, 4, 5] for d in dealt) == 0, "the identity would be no control"
    assert len({tuple(d) for d in dealt}) > 3 and at(3) == at(3) and at(3) != at(3, seed=1)


def test_selecting_keeps_rows_then_adds_pairs_over_them_and_counts() -> None:
    counted: list[Mapping[str, float]] = []

    def rule(score: Tensor) -> Selection:
        return Selection(torch.tensor([5, 2]), torch.tensor([[0, 1]]), {"dropped": 4.0})

    exp = stages.selecting(rule, counted.append)(experience(score=torch.arange(6.0)))
    assert exp.score.tolist() == [5, 2] and exp.pairs.tolist() == [[0, 1]]
    assert counted == [{"rows_before": 6.0, "dropped": 4.0}]
    same = stages.selecting(lambda: Selection(), counted.append)(experience(pairs=torch.tensor([[0, 1]])))
    assert len(same) == 6 and same.pairs.tolist() == [[0, 1]]


def test_annotating_asks_each_model_for_its_output() -> None:
    class Fake:
        def infer(self, exp: Experience, want: frozenset[str]) -> dict[str, Tensor]:
            return {name: torch.full((N, T), float(len(name))) for name in want}

    exp = stages.annotating({"ref_logp": (Fake(), "logp"), "value": (Fake(), "value_new")})(experience())
    assert exp.ref_logp[0, 0] == 4 and exp.value[0, 0] == 9 and exp.old_logp is None
    assert (
        len(stages.annotating({"ref_logp": (Fake(), "logp")})(experience().rows(torch.zeros(0, dtype=torch.int64))))
        == 0
    )


def test_the_score_lands_on_the_last_trained_token() -> None:
    exp = stages.shaping([])(experience(score=torch.arange(1.0, 7.0)))
    assert exp.reward.tolist() == [[0, 0, 0, 1], [0, 0, 2, 0], [0, 0, 0, 3], [0, 0, 0, 4], [0, 5, 0, 0], [0, 0, 0, 6]]


def test_a_row_shaper_replaces_the_score_and_a_token_shaper_adds_rewards() -> None:
    exp = experience(score=torch.ones(N), behavior_logp=torch.full((N, T), -1.0), ref_logp=torch.full((N, T), -3.0))
    dense = partial(token_kl, beta=0.1, kind="k1")  # -0.1 x (-1 + 3) = -0.2 on every trained token
    shaped = stages.shaping([partial(scale, factor=3.0), dense])(exp)
    assert shaped.score.tolist() == [3.0] * N
    assert shaped.reward[1].tolist() == pytest.approx([0.0, -0.2, 2.8, 0.0])
    # shapers see what earlier ones made: 1 -> 3 -> 3 - 0.1 x 2 x 2 tokens
    both = stages.shaping([partial(scale, factor=3.0), partial(sequence_kl, beta=0.1)])(exp)
    assert both.score[1].item() == pytest.approx(2.6) and both.reward[1].tolist() == pytest.approx([0, 0, 2.6, 0])


def test_shaping_leaves_rows_without_score_alone() -> None:
    assert stages.shaping([partial(scale, factor=3.0)])(experience()).reward is None


def test_crediting_refuses_advantages_out_of_scale() -> None:
    def rule(score: Tensor, mask: Tensor) -> Credit:
        return Credit(torch.where(mask, score[:, None], 0.0))

    score = torch.tensor([0.0, 1, 2, 3, 4, -5])
    credited = stages.crediting(rule, 5.0)(experience(score=score))
    assert credited.advantage[5].tolist() == [0, -5, -5, -5] and credited.returns is None
    for bad, text in ((-5.1, "5.1"), (float("nan"), "nan"), (float("-inf"), "inf")):
        broken = replace(experience(), score=torch.cat([score[:5], torch.tensor([bad])]))
        with pytest.raises(GateError) as e:
            stages.crediting(rule, 5.0)(broken)
        assert str(e.value) == (
            f"an advantage of {text} is beyond gates.advantage=5; the reward scale or the baseline is off. "
            "Clip the reward (shaping=clip), or raise gates.advantage if this is meant"
        )


# -- minibatches -------------------------------------------------------------------------------------------------------


def many(groups: int) -> Experience:
    group = (5 * torch.arange(groups) + 3).repeat_interleave(3)[
        torch.randperm(groups * 3, generator=torch.Generator().manual_seed(0))
    ]
    return Experience(ids=torch.zeros(groups * 3, 2, dtype=torch.int64), group=group)


def test_minibatches_hold_whole_groups_each_once_an_epoch() -> None:
    exp = many(8)
    found = [exp.group[i] for i in stages.minibatches(3, 4, seed=1)(exp, 5)]
    assert len(found) == 12
    for epoch in (found[:4], found[4:8], found[8:]):
        assert sorted(torch.cat(epoch).tolist()) == sorted(exp.group.tolist())
        for part in epoch:
            assert len(part) == 6 and all((part == g).sum() == 3 for g in part.unique())


def test_minibatches_depend_on_seed_step_and_epoch_alone() -> None:
    exp = many(8)

    def order(seed: int, step: int) -> list[list[int]]:
        return [i.tolist() for i in stages.minibatches(2, 4, seed)(exp, step)]

    assert order(1, 5) == order(1, 5)
    assert order(1, 5) != order(1, 6) and order(1, 5) != order(2, 5) and order(1, 5)[:4] != order(1, 5)[4:]


def test_one_minibatch_is_everything_in_order_and_few_groups_give_fewer() -> None:
    exp = many(2)
    assert [i.tolist() for i in stages.minibatches(1, 1, 0)(exp, 0)] == [list(range(6))]
    assert len(list(stages.minibatches(1, 4, 0)(exp, 0))) == 2
    assert list(stages.minibatches(2, 4, 0)(exp.rows(torch.zeros(0, dtype=torch.int64)), 0)) == []


def test_keep_does_nothing() -> None:
    exp = experience()
    assert stages.keep(exp) is exp


def test_the_greedy_row_s_score_is_its_group_s_baseline() -> None:
    counted: list[Mapping[str, float]] = []
    greedy = torch.tensor([False, True, True, False, True, False])
    score = stages.scoring(Numbered(failed=[2]), COMM, 0.5, IGNORE)
    exp = stages.baselined(score, counted.append)(experience(greedy=greedy))
    # rows 0, 3 and 5 are the others; the greedy row of group 1 has no score, so its row 3 leaves
    assert exp.score.tolist() == [0, 5] and exp.baseline.tolist() == [1, 4] and exp.group.tolist() == [0, 4]
    assert exp.greedy is None and counted == [{"without_baseline": 1.0}]


def test_selecting_narrows_the_mask_and_leaves_rows_in_their_groups() -> None:
    def rule(mask: Tensor, truncated: Tensor) -> Narrowed:
        return Narrowed(mask & ~truncated[:, None], torch.tensor([0, 1, 2]))

    truncated = torch.tensor([False, True] + [False] * 4)
    exp = stages.selecting(rule, IGNORE)(experience(truncated=truncated))
    assert len(exp) == 3 and exp.mask.any(-1).tolist() == [True, False, True]
