"""Full steps in spite of dropped groups."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from rlhf_cli import stages
from rlhf_cli.errors import GateError
from rlhf_cli.select import all_pairs, drop_zero_variance
from rlhf_cli.sources.resampled import Resampled, first_groups, join, unparted
from rlhf_cli.types import Experience, Sample

VARIED = partial(drop_zero_variance, metric="")


def rollout(start: int, flat: tuple[int, ...], width: int) -> Experience:
    """Two groups of two rows; groups whose prompt number is in `flat` score alike."""
    prompts = [start, start, start + 1, start + 1]
    mask = torch.ones(4, width, dtype=torch.bool)
    return Experience(
        samples=tuple(Sample(f"p{p}", f"{p}-{i}", uid=str(p)) for i, p in enumerate(prompts)),
        ids=torch.full((4, width), start), attention=mask, mask=mask, group=torch.tensor([0, 0, 1, 1]),
        version=torch.zeros(4, dtype=torch.int64), truncated=torch.zeros(4, dtype=torch.bool),
        score=torch.tensor([1.0 if p in flat else float(i % 2) for i, p in enumerate(prompts)]), components={"r": torch.tensor(prompts).float()},
    )  # fmt: skip


class Counting:
    """Prompts 0, 1, then 2, 3 and so on; every rollout is one token wider."""

    def __init__(self, flat: tuple[int, ...]) -> None:
        self.flat, self.cursor = flat, 0

    def __next__(self) -> Experience:
        self.cursor += 2
        return rollout(self.cursor - 2, self.flat, 1 + self.cursor // 2)

    def publish(self, version: int) -> None:
        self.version = version

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self.cursor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.cursor = state["cursor"]


def resampled(flat: tuple[int, ...], counted: list[Any], rule: Any = VARIED, **changes: Any) -> Resampled:
    settings: dict[str, Any] = {"prompts": 2, "rounds": 3, "count": counted.append, "phase": contextlib.nullcontext}
    select = stages.selecting(rule, lambda _: None)
    return Resampled(Counting(flat), lambda exp: exp, select, **(settings | changes))


def test_it_draws_until_enough_groups_survive_and_cuts_the_surplus() -> None:
    counted: list[Any] = []
    exp = next(resampled((0, 2, 3), counted, rounds=3))
    # prompt 1 survives the first rollout, none the second, 4 and 5 the third: 5 is cut
    assert [s.uid for s in exp.samples] == ["1", "1", "4", "4"] and exp.ids.shape == (4, 4)
    assert exp.group.tolist() == [1, 1, 2, 2] and exp.mask.sum(-1).tolist() == [2, 2, 4, 4]
    assert exp.ids[:, 0].tolist() == [0, 0, 4, 4] and exp.ids[0].tolist() == [0, 0, 0, 0]
    assert exp.components["r"].tolist() == [1, 1, 4, 4]
    assert counted == [{"rollouts": 3, "groups_drawn": 6, "groups_survived": 3, "groups_cut": 1}]


def test_a_step_that_needs_one_rollout_is_that_rollout() -> None:
    exp = next(resampled((), []))
    plain = rollout(0, (), 2)
    assert torch.equal(exp.ids, plain.ids) and exp.samples == plain.samples and torch.equal(exp.group, plain.group)


def test_too_few_after_the_last_rollout_is_an_error() -> None:
    with pytest.raises(GateError) as e:
        next(resampled(tuple(range(20)), [], rounds=3))
    assert str(e.value) == (
        "after 3 rollouts 0 of 6 groups survived select, and a step needs 2; "
        "raise batch.resample, choose easier or harder prompts, or type batch.resample=1 for smaller steps"
    )


def test_the_raw_score_decides_not_the_shaped_one() -> None:
    # equal scores leave although a penalty on length would tell them apart later: nothing shapes before select
    source = resampled((0,), [], rounds=2)
    assert "0" not in [s.uid for s in next(source).samples]


def test_pairs_point_at_their_rows() -> None:
    exp = next(resampled((0,), [], rule=all_pairs))
    assert exp.pairs.tolist() == [[1, 0], [3, 2]]
    assert [exp.samples[w].response for w, _ in exp.pairs.tolist()] == ["1-3", "2-1"]


class Linked(Counting):
    """Two pairs of linked prompts a rollout: 0 with 1, 2 with 3 and so on."""

    def __next__(self) -> Experience:
        exp = join([super().__next__(), super().__next__()])
        return replace(exp, samples=tuple(replace(s, link=f"pair {int(s.uid) // 2}") for s in exp.samples))


def test_linked_groups_survive_together_and_no_cut_parts_them() -> None:
    # 1 is flat, so 0 leaves with it: 2 and 3 are left of the first rollout; of the second, 4 to 7 survive and 6 and 7 are cut
    counted: list[Any] = []
    source = resampled((1,), counted, prompts=4)
    source.source = Linked((1,))
    exp = next(source)
    assert [s.uid for s in exp.samples[::2]] == ["2", "3", "4", "5"]
    assert counted == [{"rollouts": 2, "groups_drawn": 8, "groups_survived": 6, "groups_cut": 2}]


def test_a_linked_group_whose_rows_are_all_missing_takes_its_partner_along() -> None:
    drawn = next(Linked(()))
    kept = drawn.rows((drawn.group != 0).nonzero().flatten())
    assert unparted(drawn, kept).group.tolist() == [2, 2, 3, 3]
    assert unparted(drawn, drawn) is drawn


def test_it_goes_on_from_the_source_s_position() -> None:
    first = resampled((0, 4, 7), [])
    next(first)
    other = resampled((0, 4, 7), [])
    other.load_state_dict(first.state_dict())
    a, b = next(first), next(other)
    assert a.samples == b.samples and torch.equal(a.ids, b.ids)


def test_joining_and_cutting_keep_every_column() -> None:
    one, two = rollout(0, (), 2), rollout(2, (), 3)
    both = join([one, replace(one.rows(torch.tensor([], dtype=torch.int64))), two])
    assert len(both) == 8 and both.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert torch.equal(both.score, torch.cat([one.score, two.score])) and both.truncated.dtype == torch.bool
    assert first_groups(both, 3).group.tolist() == [0, 0, 1, 1, 2, 2]
    assert partial(join, [one])() is one
