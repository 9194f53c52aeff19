"""Recorded responses as rows with edges."""

from typing import Any

import torch

from rlhf_cli.data.record import Record
from rlhf_cli.sources.recorded import Recorded


def record(n: int, responses: int, **more: Any) -> Record:
    texts = tuple(f"{n}-{j}" for j in range(responses))
    return Record(({"role": "user", "content": str(n)},), str(n), responses=texts, uid=str(n), **more)


def recorded(records: list[Record], prompts: int = 2) -> Recorded:
    encoded = [[100 + i] for i in range(len(records))]
    answers = [[[10 * i + j, 9] for j in range(len(r.responses))] for i, r in enumerate(records)]
    return Recorded(records, encoded, answers, lambda: None, prompts=prompts, seed=0)


PAIR = record(0, 2, pairs=((0, 1),), margins=(0.5,))
RANKING = record(1, 3, scores=(0.1, 0.9, 0.4), pairs=((1, 0), (1, 2), (2, 0)), margins=(0.8, 0.5, 0.3))
TIED = record(2, 2, scores=(0.5, 0.5))


def test_pairs_become_edges_over_rows() -> None:
    exp = recorded([PAIR, RANKING]).experience([1, 0])
    assert exp.group.tolist() == [0, 0, 0, 1, 1]
    assert [s.response for s in exp.samples] == ["1-0", "1-1", "1-2", "0-0", "0-1"]
    assert exp.pairs.tolist() == [[1, 0], [1, 2], [2, 0], [3, 4]]
    assert torch.allclose(exp.margin, torch.tensor([0.8, 0.5, 0.3, 0.5]))
    assert exp.ids.tolist() == [[101, 10, 9], [101, 11, 9], [101, 12, 9], [100, 0, 9], [100, 1, 9]]
    assert exp.label is None and exp.version.tolist() == [0] * 5


def test_labels_are_scores_or_the_thumb() -> None:
    assert recorded([RANKING]).experience([0]).label.tolist() == torch.tensor([0.1, 0.9, 0.4]).tolist()
    thumbs = recorded([record(0, 1, label=1.0), record(1, 1, label=0.0)])
    assert thumbs.experience([1, 0]).label.tolist() == [0.0, 1.0]
    assert thumbs.experience([0]).pairs is None


def test_a_step_of_ties_has_an_empty_set_of_pairs_not_none() -> None:
    """An objective on pairs then has a loss of 0 for the step, where a missing column would end the run."""
    exp = recorded([TIED, RANKING]).experience([0])
    assert exp.pairs is not None and exp.pairs.shape == (0, 2) and exp.pairs.dtype == torch.int64
    assert exp.margin is not None and exp.margin.shape == (0,)


def test_margins_are_given_for_all_pairs_or_for_none() -> None:
    bare = record(3, 2, pairs=((0, 1),))
    assert recorded([PAIR, bare]).experience([0, 1]).margin is None


def test_it_goes_on_from_its_state() -> None:
    source = recorded([PAIR, RANKING, TIED])
    next(source)
    state = source.state_dict()
    wanted = [next(source).ids.tolist() for _ in range(4)]
    other = recorded([PAIR, RANKING, TIED])
    other.load_state_dict(state)
    other.publish(7)
    assert [next(other).ids.tolist() for _ in range(4)] == wanted
