"""The score of a step from raw values: slots, references, centring, token rewards, rules that learn, missing rows."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli import combine as c
from rlhf_cli import stages
from rlhf_cli.errors import GateError
from rlhf_cli.models.tiny import tiny_tokenizer
from rlhf_cli.prepass import References
from rlhf_cli.rewards.joining import NO_CANNED, NO_REFERENCE, Joining
from rlhf_cli.shaping import RunningNorm, Whiten, ceil, length_penalty, lsc, lsc_canned, par
from rlhf_cli.types import Experience, Sample, Scores

NAN = float("nan")
LSC = partial(lsc, level="mean", quantile=0.5)
PAR = partial(par, kind="sigmoid", k=1.0)
SUM = c.weighted_sum


def experience(*texts: str, group: tuple[int, ...] = (0, 0, 1, 1)) -> Experience:
    tok = tiny_tokenizer()
    ids = [[65, *tok(t, add_special_tokens=False)["input_ids"]] for t in texts]
    width = max(map(len, ids))
    attention = torch.arange(width) < torch.tensor([len(r) for r in ids])[:, None]
    return Experience(
        samples=tuple(Sample("p", t, uid=f"u{g}") for t, g in zip(texts, group, strict=True)),
        ids=torch.tensor([r + [0] * (width - len(r)) for r in ids]), attention=attention,
        mask=attention & (torch.arange(width) > 0), group=torch.tensor(group),
    )  # fmt: skip


EXP = experience("ab", "abcd", "a", "abc")


def scores(spans: Any = None, **parts: list[float]) -> Scores:
    columns = {k.replace("__", "/"): torch.tensor(v) for k, v in parts.items()}
    return Scores(next(iter(columns.values())), None, columns, spans)


def references(**sources: list[list[float]]) -> References:
    n = len(next(iter(sources.values())))
    lines = [
        {
            "uid": f"u{g}",
            "tokens": [2, 5],
            "scores": {k: [None if v != v else v for v in x[g]] for k, x in sources.items()},
        }
        for g in range(n)
    ]
    return References(lines, 2)


def join(weights: dict[str, float], rule: Any = SUM, refs: References | None = None, **more: Any) -> Joining:
    return Joining(weights, rule, references=None if refs is None else lambda: refs, **more)


def test_the_default_is_the_weighted_sum_and_parts_count_as_sources() -> None:
    exp, lost = join({"a": 2.0, "b/x": -1.0, "log": 0.0})(
        scores(a=[1.0, 2.0, 3.0, NAN], b__x=[1.0, 0.0, 1.0, 0.0], log=[NAN] * 4), EXP
    )
    assert exp.score[:3].tolist() == [1, 4, 5] and exp.score[3].isnan() and not lost


def test_each_source_has_its_own_shapers_and_references() -> None:
    refs = references(a=[[0.0, 2.0], [5.0, NAN]], b=[[1.0, 1.0], [0.0, 0.0]])
    exp, _ = join({"a": 1.0, "b": 1.0}, refs=refs, slots={"a": [LSC], "b": [LSC]})(
        scores(a=[1.0, 3.0, 5.0, 6.0], b=[1.0, 1.0, 0.0, 2.0]), EXP
    )
    u = [
        math.log(1 / (1 + math.exp(-x))) for x in (0, 0, 2, 0, 0, 0, 1, 2)
    ]  # a - mean(refs), b - mean(refs), row by row
    assert exp.score.tolist() == pytest.approx([u[0] + u[1], u[2] + u[3], u[4] + u[5], u[6] + u[7]])


def test_the_combined_score_of_references_goes_the_same_way() -> None:
    refs = references(a=[[0.0, 2.0], [1.0, 1.0]], b=[[1.0, -1.0], [0.0, 4.0]])
    exp, _ = join({"a": 1.0, "b": 2.0}, c.minimum, refs, keep_references=True, slots={"a": [partial(ceil, high=1.5)]})(
        scores(a=[9.0, 9.0, 0.0, 0.0], b=[9.0, 0.0, 9.0, 9.0]), EXP
    )
    # a is cut at 1.5, b counts twice: min(1.5, 18), ...; references min(0, 2), min(1.5, -2) and min(1, 0), min(1, 8)
    assert exp.score.tolist() == [1.5, 0, 0, 0]
    assert exp.ref_scores.tolist() == [[0, -2], [0, -2], [0, 1], [0, 1]]
    assert exp.ref_length.tolist() == [[2, 5]] * 4


def test_shapers_before_one_that_compares_also_shape_the_references() -> None:
    """PAR's rule: the length penalty is on the references too, each by its own length (2 and 5 tokens)."""
    refs = references(a=[[1.0, 2.0], [1.0, 2.0]])
    exp, _ = join({"a": 1.0}, refs=refs, keep_references=True)(scores(a=[3.0] * 4), EXP)
    shaped = stages.shaping([partial(length_penalty, rate=1.0, free=1, most=None), PAR])(exp)
    sig = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    # rows of 2, 4, 1, 3 tokens: 3 - (n - 1); references 1 - 1 = 0 and 2 - 4 = -2
    want = [(sig(r) + sig(r + 2)) / 2 for r in (2, 0, 3, 1)]
    assert shaped.score.tolist() == pytest.approx(want)


def canned(samples: int = 2, **sources: list[float]) -> References:
    """A canned answer worth so much to each of the two prompts, and no or two responses beside it."""
    lines = [
        {"uid": f"u{g}", "tokens": [2, 5][:samples], "scores": {k: [0.0, 2.0][:samples] for k in sources},
         "canned": {k: None if x[g] != x[g] else x[g] for k, x in sources.items()}}
        for g in range(2)
    ]  # fmt: skip
    return References(lines, samples)


def u(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_one_source_compares_with_responses_and_another_with_a_canned_answer() -> None:
    refs = canned(a=[7.0, 7.0], b=[1.0, -1.0])
    exp, _ = join({"a": 1.0, "b": 1.0}, refs=refs, slots={"a": [LSC], "b": [lsc_canned]})(
        scores(a=[1.0, 3.0, 1.0, 0.0], b=[1.0, 2.0, 0.0, 2.0]), EXP
    )
    # a against the mean 1 of its responses, b against 1, 1, -1, -1
    wanted = [u(0) + u(0), u(2) + u(1), u(0) + u(1), u(-1) + u(3)]
    assert exp.score.tolist() == pytest.approx(wanted)


def test_a_canned_answer_alone_draws_nothing_and_takes_the_steps_before_it() -> None:
    refs = canned(0, a=[1.0, 5.0])
    slots = {"a": [partial(ceil, high=2.0), lsc_canned]}
    exp, lost = join({"a": 1.0}, refs=refs, slots=slots)(scores(a=[9.0, 1.0, 9.0, 1.0]), EXP)
    assert exp.score.tolist() == pytest.approx([u(1), u(0), u(0), u(-1)]) and not lost and exp.ref_scores is None


def test_a_canned_answer_of_the_combined_score() -> None:
    refs = canned(0, a=[1.0, 2.0], b=[0.5, 0.0])
    exp, _ = join({"a": 1.0, "b": 2.0}, refs=refs, keep_references=True)(scores(a=[1.0] * 4, b=[0.0] * 4), EXP)
    assert exp.canned_score is not None and exp.canned_score.tolist() == [2, 2, 2, 2]
    shaped = stages.shaping([partial(ceil, high=1.5), lsc_canned])(exp)
    assert shaped.score.tolist() == pytest.approx([u(1 - 1.5)] * 4)


def test_a_prompt_whose_canned_answer_has_no_score_is_missing() -> None:
    exp, lost = join({"a": 1.0}, refs=canned(0, a=[NAN, 1.0]), slots={"a": [lsc_canned]})(scores(a=[1.0] * 4), EXP)
    assert exp.score.isnan().tolist() == [True, True, False, False] and lost == {0: NO_CANNED, 1: NO_CANNED}


def test_running_statistics_are_read_and_not_moved_by_references() -> None:
    refs = references(a=[[1.0, 100.0], [1.0, 2.0]])
    norm = RunningNorm(center=True, eps=0.0)
    exp, _ = join({"a": 1.0}, refs=refs, keep_references=True)(scores(a=[0.0, 2.0, 0.0, 2.0]), EXP)
    stages.shaping([norm, PAR])(exp)
    assert norm.stats == {"running_mean": 1, "running_std": 1}, "of the four rows alone"


def test_a_steps_mean_and_spread_are_those_of_its_references_too() -> None:
    """Scores 0, 2, 0, 2 have mean 1 and sample std sqrt(4 / 3); references 4 and 1 (3 and 0 above the mean) take these, not their own."""
    refs = references(a=[[4.0, 4.0], [1.0, 1.0]])
    exp, _ = join({"a": 1.0}, refs=refs, keep_references=True)(scores(a=[0.0, 2.0, 0.0, 2.0]), EXP)
    for center, level in ((True, 0.0), (False, 1.0)):
        shaped = stages.shaping([Whiten(center=center, eps=0.0), lambda score, ref_scores: ref_scores[:, 0]])(exp)
        assert shaped.score.tolist() == pytest.approx([level + 3 / (4 / 3) ** 0.5] * 2 + [level] * 2)


def test_rows_without_any_reference_are_missing_and_say_why() -> None:
    refs = references(a=[[NAN, NAN], [1.0, 2.0]])
    exp, lost = join({"a": 1.0}, refs=refs, keep_references=True)(scores(a=[1.0] * 4), EXP)
    assert exp.score.isnan().tolist() == [True, True, False, False] and lost == {0: NO_REFERENCE, 1: NO_REFERENCE}


def test_centring_by_group_or_references_forgives_offsets_of_a_member() -> None:
    a, b = [1.0, 2.0, 4.0, 0.0], [0.0, 5.0, 1.0, 1.0]
    moved = [x + s for x, s in zip(b, (9, 9, -7, -7), strict=True)]
    refs, far = (
        references(a=[[0.0, 1.0]] * 2, b=[[2.0, 0.0]] * 2),
        references(a=[[0.0, 1.0]] * 2, b=[[11.0, 9.0], [-5.0, -7.0]]),
    )
    for how in ("group", "reference"):
        for scale in ("none", "reference"):
            one, _ = join({"a": 1.0, "b": 1.0}, c.minimum, refs, center=how, scale=scale)(scores(a=a, b=b), EXP)
            two, _ = join({"a": 1.0, "b": 1.0}, c.minimum, far, center=how, scale=scale)(scores(a=a, b=moved), EXP)
            assert torch.allclose(one.score, two.score), (how, scale)
    raw, _ = join({"a": 1.0, "b": 1.0}, c.minimum)(scores(a=a, b=b), EXP)
    off, _ = join({"a": 1.0, "b": 1.0}, c.minimum)(scores(a=a, b=moved), EXP)
    assert raw.score.argsort().tolist() != off.score.argsort().tolist()


def test_ensemble_std_is_told() -> None:
    told: dict[str, float] = {}
    join({"a": 1.0, "b": 1.0}, c.minimum, count=lambda numbers, stage: told.update(numbers))(
        scores(a=[1.0, 1.0, 1.0, NAN], b=[1.0, 3.0, 5.0, 0.0]), EXP
    )
    assert told["ensemble_std"] == pytest.approx((0 + 2 + 4) / math.sqrt(2) / 3)


def test_sigmas_come_from_components() -> None:
    rule = partial(c.nominal_robust, lam=1.0)
    exp, _ = join({"a": 1.0, "b": 1.0}, rule)(
        scores(a=[1.0] * 4, b=[2.0] * 4, a__sigma=[0.1, 0.9, 0.1, 0.9], b__sigma=[0.5] * 4), EXP
    )
    assert exp.score.tolist() == [1, 2, 1, 2]


def test_a_rule_that_learns_learns_after_the_step_from_raw_values() -> None:
    rule = c.Lagrangian(thresholds={"b": 1.0}, initial=1.0, lr=0.5, largest=9.0, normalise=False)
    made = join({"a": 1.0, "b": 1.0}, rule)
    exp, _ = made(scores(a=[0.0] * 4, b=[0.0] * 4), EXP)
    assert exp.score.tolist() == [-1] * 4 and rule.multipliers == {"b": 1.5}


# -- token rewards -----------------------------------------------------------------------------------------------------


def placed(rule: Any = SUM, reads: bool = True, **parts: list[float]) -> Experience:
    made = join({k: 1.0 for k in parts}, rule, tokenizer=tiny_tokenizer(), reads_tokens=reads)
    return made(scores(spans=[(1, 0, 2, 0.5), (1, 3, 4, 0.25)], **parts), EXP)[0]


def test_spans_place_the_value_and_the_rest_lands_at_the_end() -> None:
    exp = stages.shaping([])(placed(a=[1.0, 2.0, 3.0, 4.0]))
    # row 1 is "abcd" behind one prompt token: 0.5 on b, 0.25 on d, and 2 - 0.75 on d, its last
    assert exp.reward.tolist() == [[0, 0, 1, 0, 0], [0, 0, 0.5, 0, 1.5], [0, 3, 0, 0, 0], [0, 0, 0, 4, 0]]
    assert torch.equal(exp.reward.sum(-1), exp.score)
    shaped = stages.shaping([partial(ceil, high=1.0)])(placed(a=[1.0, 2.0, 3.0, 4.0]))
    assert torch.equal(shaped.reward.sum(-1), shaped.score), "whatever the score becomes"


def test_token_rewards_need_a_reader_and_a_sum() -> None:
    with pytest.raises(
        GateError, match=r"^a reward gives token rewards, and no stage reads them: choose a credit that takes `reward`"
    ):
        placed(reads=False, a=[1.0] * 4)
    with pytest.raises(GateError, match="only combine=weighted_sum knows where they fall"):
        placed(c.minimum, a=[1.0] * 4)


def test_shuffled_scores_leave_no_token_rewards_behind() -> None:
    made = placed(a=[1.0, 2.0, 3.0, 4.0])
    exp = stages.shuffled(lambda e: Experience(**{**vars(made), "version": torch.zeros(4, dtype=torch.int64)}), 0)(made)
    assert made.span_reward is not None and exp.span_reward is None


class Ranks:
    def __init__(self, others: list[Any]) -> None:
        self.rank, self.world, self.others = 0, 2, others

    def gather(self, x: Any) -> list[Any]:
        return [x, *self.others]


def test_spans_of_other_ranks_land_on_their_rows() -> None:
    theirs = Scores(torch.ones(2), None, {"a": torch.ones(2)}, [(0, 0, 1, 0.5)])
    comm: Any = Ranks([(torch.tensor([2, 3]), theirs)])
    mine = Scores(torch.zeros(2), None, {"a": torch.zeros(2)}, [(1, 0, 1, 2.0)])
    found = stages.score_sharded(lambda samples, group: mine, EXP, comm)
    assert found.spans == [(1, 0, 1, 2.0), (2, 0, 1, 0.5)]


def test_a_whole_stage_drops_what_is_missing_and_watches_the_rest() -> None:
    seen: list[Tensor] = []

    def scorer(samples: Any, group: Tensor) -> Scores:
        return Scores(torch.zeros(4), None, {"a": torch.tensor([1.0, NAN, 3.0, 4.0])})

    from rlhf_cli.engine.comm import Comm

    stage = stages.scoring(scorer, Comm(torch.device("cpu")), 0.5, seen.append, join=join({"a": 2.0}))
    exp = stage(EXP)
    assert exp.score.tolist() == [2, 6, 8] and seen[0].tolist() == [2, 6, 8] and len(exp) == 3
