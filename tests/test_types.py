"""The container of columns: shapes are checked by letter, and rows take their edges along."""

import pytest
import torch

from rlhf_cli.types import COLUMNS, OUTPUTS, Experience, Sample


def experience() -> Experience:
    return Experience(
        samples=tuple(Sample(f"p{i}", f"r{i}") for i in range(5)),
        components={"bleu": torch.arange(5.0)},
        ids=torch.arange(15).view(5, 3),
        score=torch.arange(5.0),
        pairs=torch.tensor([[0, 1], [4, 2], [1, 3]]),
        margin=torch.tensor([0.1, 0.2, 0.3]),
        pair_weight=torch.tensor([1.0, 2.0, 3.0]),
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"score": torch.zeros(2, 3)}, "score must be [N], got [2, 3]"),
        ({"ids": torch.zeros(2)}, "ids must be [N, T], got [2]"),
        ({"ids": torch.zeros(2, 3), "mask": torch.zeros(2, 4)}, "mask: T is 4, other columns have 3"),
        ({"ids": torch.zeros(2, 3), "score": torch.zeros(4)}, "score: N is 4, other columns have 2"),
        ({"pairs": torch.zeros(3, 3)}, "pairs: 2 is 3, other columns have 2"),
        ({"pairs": torch.zeros(3, 2), "margin": torch.zeros(2)}, "margin: M is 2, other columns have 3"),
    ],
)
def test_a_wrong_shape_names_the_column_and_both_sizes(columns: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError) as e:
        Experience(**columns)
    assert str(e.value) == message


def test_rows_reorder_every_column_and_renumber_pairs() -> None:
    cut = experience().rows(torch.tensor([4, 2, 1]))
    assert len(cut) == 3
    assert cut.ids.tolist() == [[12, 13, 14], [6, 7, 8], [3, 4, 5]]
    assert cut.score.tolist() == [4, 2, 1] and cut.components["bleu"].tolist() == [4, 2, 1]
    assert [s.prompt for s in cut.samples] == ["p4", "p2", "p1"]
    # of (0,1), (4,2), (1,3) only (4,2) has both ends inside: it becomes (0,1)
    assert cut.pairs.tolist() == [[0, 1]]
    assert cut.margin.tolist() == pytest.approx([0.2]) and cut.pair_weight.tolist() == [2.0]


def test_rows_keep_every_edge_between_kept_rows() -> None:
    assert experience().rows(torch.tensor([3, 1, 0])).pairs.tolist() == [[2, 1], [1, 0]]


def test_no_rows_is_a_valid_experience() -> None:
    cut = experience().rows(torch.zeros(0, dtype=torch.int64))
    assert len(cut) == 0 and cut.ids.shape == (0, 3) and cut.pairs.shape == (0, 2) and cut.samples == ()
    assert len(Experience()) == 0


def test_the_original_is_untouched() -> None:
    exp = experience()
    exp.rows(torch.tensor([1]))
    assert exp.pairs.tolist() == [[0, 1], [4, 2], [1, 3]] and len(exp) == 5


def test_columns_and_outputs_are_disjoint() -> None:
    assert not COLUMNS.keys() & OUTPUTS.keys()
    assert COLUMNS["ids"] == "N T" and COLUMNS["pairs"] == "M 2" and "samples" not in COLUMNS
