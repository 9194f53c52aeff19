"""The weighted sum: values, missing rows, parts, and the contract of a scorer."""

import pytest
import torch

from rlhf_cli.errors import GateError
from rlhf_cli.rewards.combine import Combined
from rlhf_cli.types import Sample, Scores

SAMPLES = [Sample("p", f"r{i}", uid=f"u{i}") for i in range(3)]
GROUP = torch.zeros(3, dtype=torch.int64)
NAN = float("nan")


def fixed(*values, missing=None, parts=None, spans=None):
    marks = None if missing is None else torch.tensor(missing)
    parts = {k: torch.tensor(v) for k, v in (parts or {}).items()}
    return lambda samples, group: Scores(torch.tensor(values), marks, parts, spans)


def test_weighted_sum_and_parts():
    combined = Combined(
        {"a": (1.0, fixed(1.0, 2.0, 3.0)), "b": (-0.5, fixed(4.0, 0.0, 2.0, parts={"found": [1.0, 0.0, 1.0]}))}
    )
    got = combined(SAMPLES, GROUP)
    assert got.value.tolist() == [-1, 2, 2]
    assert {k: v.tolist() for k, v in got.components.items()} == {"a": [1, 2, 3], "b": [4, 0, 2], "b/found": [1, 0, 1]}
    assert not got.missing.any() and got.spans is None
    assert set(combined.seconds) == {"a", "b"} and all(s >= 0 for s in combined.seconds.values())


def test_a_row_is_missing_where_any_weighted_scorer_is():
    a = fixed(1.0, 0.0, 3.0, missing=[False, True, False])
    logged = fixed(NAN, 1.0, 1.0, missing=[True, False, False])
    got = Combined({"a": (2.0, a), "b": (1.0, fixed(1.0, 1.0, 1.0)), "logged": (0.0, logged)})(SAMPLES, GROUP)
    assert got.missing.tolist() == [False, True, False]
    assert got.value[[0, 2]].tolist() == [3, 7] and got.value[1].isnan()
    assert got.components["a"].isnan().tolist() == [False, True, False]
    assert got.components["logged"].isnan().tolist() == [True, False, False]


def test_spans_are_weighted():
    got = Combined({"a": (2.0, fixed(0.0, 0.0, 0.0, spans=[(1, 0, 2, 0.5)]))})(SAMPLES, GROUP)
    assert got.spans == [(1, 0, 2, 1.0)]


@pytest.mark.parametrize(
    "scorer, message",
    [
        (fixed(1.0, 2.0), r"^reward 'x' returned 2 values for 3 samples$"),
        (
            lambda s, g: Scores(torch.tensor(1.0)),
            r"reward 'x' returned values of shape \[\] for 3 samples; it must be \[N\]",
        ),
        (fixed(1.0, NAN, 1.0), r"reward 'x' returned nan for sample 'u1' \(1 such rows of 3\); mark"),
        (fixed(1.0, 1.0, float("inf"), missing=[True, False, False]), r"reward 'x' returned inf for sample 'u2'"),
        (fixed(1.0, 1.0, 1.0, parts={"y": [1.0]}), r"reward 'x/y' returned 1 values for 3 samples"),
        (fixed(1.0, 1.0, 1.0, missing=[True]), r"reward 'x' returned 1 missing marks for 3 samples"),
    ],
)
def test_a_scorer_that_breaks_its_contract_is_named(scorer, message):
    with pytest.raises(GateError, match=message):
        Combined({"x": (1.0, scorer)})(SAMPLES, GROUP)
