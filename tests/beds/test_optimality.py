"""Every method lands where theory says, through its own recipe's stages."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from optimality_bed import Row, land
from optimality_envs import Env, distance

ROWS: list[Row] = [
    row for path in sorted(Path(__file__).parent.glob("rows_*.py")) for row in importlib.import_module(path.stem).ROWS
]
CASES = [(row, env) for row in ROWS for env in row.envs]


@pytest.mark.parametrize(("row", "env"), CASES, ids=[f"{r.name}-{e.name}".replace(" ", "-") for r, e in CASES])
def test_it_lands_where_theory_says(row: Row, env: Env) -> None:
    found, predicted = land(row, env), row.predicted(env)
    away = distance(found, predicted)
    assert away <= row.tolerance, f"{away:.4f} from the predicted law: {found} instead of {predicted}"
