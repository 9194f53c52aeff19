"""Columns by parameter name."""

from functools import partial

import pytest
import torch
from torch import Tensor

from rlhf_cli.inject import call, is_rowwise, name_of, needs, rowwise
from rlhf_cli.types import Experience

EXP = Experience(ids=torch.zeros(2, 3), score=torch.tensor([1.0, 2.0]), old_logp=torch.ones(2, 3))


def scaled(score: Tensor, *, factor: float) -> Tensor:
    return score * factor


def ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    return logp - old_logp


class Stateful:
    def __call__(self, score: Tensor) -> Tensor:
        return score + 1


def test_positional_parameters_are_columns_and_keyword_only_ones_are_settings() -> None:
    assert (
        needs(scaled) == {"score"}
        and needs(partial(scaled, factor=2.0)) == {"score"}
        and needs(Stateful()) == {"score"}
    )
    assert needs(ratio) == {"logp", "old_logp"}


def test_call_takes_columns_from_the_experience_and_outputs_first() -> None:
    assert call(partial(scaled, factor=3.0), EXP).tolist() == [3.0, 6.0]
    assert call(Stateful(), EXP).tolist() == [2.0, 3.0]
    outs = {"logp": torch.full((2, 3), 5.0)}
    assert torch.equal(call(ratio, EXP, outs), torch.full((2, 3), 4.0))
    assert torch.equal(call(ratio, EXP, outs | {"old_logp": torch.zeros(2, 3)}), torch.full((2, 3), 5.0)), "outputs win"


def test_an_absent_column_is_named_with_what_there_is() -> None:
    with pytest.raises(ValueError) as e:
        call(ratio, EXP)
    assert str(e.value) == "ratio needs ['logp']; this run provides ['ids', 'old_logp', 'score']"


def test_the_rowwise_promise_survives_partial() -> None:
    @rowwise
    def marked(logp: Tensor, *, beta: float) -> Tensor:
        return logp * beta

    assert is_rowwise(marked) and is_rowwise(partial(marked, beta=1.0)) and not is_rowwise(ratio)


def test_names() -> None:
    assert [name_of(f) for f in (scaled, partial(scaled, factor=1.0), Stateful())] == ["scaled", "scaled", "Stateful"]
