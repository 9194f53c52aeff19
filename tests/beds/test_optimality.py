"""Every method lands where theory says, through its own recipe's stages; and the page that says so is current."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
from optimality_bed import Row, land, rows
from optimality_envs import MEMORYLESS, TWO_TOKENS, Env, distance, optimum
from reductions import REDUCTIONS, Reduction, rule

from rlhf_cli import catalog
from rlhf_cli.compose import compose

ROOT = Path(__file__).parents[2]
CASES = [(row, env) for row in rows() for env in row.envs]
LONG = ("trpa", "copg", "dpo")  # they compare all pairs of responses: half a minute each
slow = pytest.mark.slow
each_case = pytest.mark.parametrize(
    ("row", "env"),
    [
        # the last problem of a row, where lengths or contexts differ, stands for its others in a quick run
        pytest.param(
            r,
            e,
            id=f"{r.name}-{e.name}".replace(" ", "-"),
            marks=[slow] if e is not r.envs[-1] or r.name.startswith(LONG) else [],
        )
        for r, e in CASES
    ],
)


@each_case
def test_it_lands_where_theory_says(row: Row, env: Env) -> None:
    found, predicted = land(row, env), row.predicted(env)
    away = distance(found, predicted)
    assert away <= row.tolerance, f"{away:.4f} from the predicted law: {found} instead of {predicted}"


def test_the_closed_forms_by_hand() -> None:
    # p(1) = 0.3 e^1.5 / (0.7 + 0.3 e^1.5) = 0.657619 at beta = 1 / 1.5
    law = optimum(1 / 1.5)(MEMORYLESS)
    assert law["11"] == pytest.approx(0.657619**2, abs=1e-6) and law["01"] == pytest.approx(
        0.657619 * 0.342381, abs=1e-6
    )
    # p e^r = 0.28, 0.42 e^2, 0.27 e^3, 0.03 / e; log Z = 2.176742
    law = optimum(1.0)(TWO_TOKENS)
    assert law == pytest.approx({"00": 0.031755, "01": 0.351958, "10": 0.615035, "11": 0.001252}, abs=1e-6)
    kl = sum(p * math.log(p / q) for p, q in zip(law.values(), TWO_TOKENS.law(TWO_TOKENS.start).values(), strict=True))
    mean = sum(p * TWO_TOKENS.reward[y] for y, p in law.items())
    assert (mean, kl) == pytest.approx((2.547771, 0.371028), abs=1e-6)


def script() -> Any:
    spec = importlib.util.spec_from_file_location("method_optima", ROOT / "scripts" / "method_optima.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_holds_every_row_and_its_prediction() -> None:
    made = script()
    text = made.PAGE.read_text(encoding="utf-8")
    parts = {part.partition("\n")[0]: part for part in text.split("\n### ")[1:]}
    for row, env in CASES:
        line = made.start(row, row.predicted(env))
        assert line in parts.get(env.name.capitalize(), ""), f"type: python scripts/method_optima.py --write   ({line})"
    for r in REDUCTIONS:
        assert made.reduction(r) in text, f"type: python scripts/method_optima.py --write   ({r.name})"
    found = text.count("\n| ")
    assert found == len(CASES) + len(REDUCTIONS) + len(parts), "a row is gone: python scripts/method_optima.py --write"


@pytest.mark.parametrize("r", REDUCTIONS, ids=lambda r: r.name)
def test_its_rule_is_that_of_the_other_recipe(r: Reduction) -> None:
    mine, other = rule((f"experiment={r.name}",)), rule(r.words)
    for part, value in mine.items():
        assert value == other[part], f"{part} of experiment={r.name} is not that of {' '.join(r.words)}"


def test_lsc_shapes_each_reward_as_its_row_shapes_one() -> None:
    words = ["experiment=lsc", "reward.helpful.model.path=x", "reward.harmless.model.path=y"]
    nodes = compose("train", words, None).reward
    wanted = compose("train", ["algo=ppo", "shaping=[lsc,kl]"], None).shaping.lsc
    assert [nodes[name].model.shaping.lsc for name in ("helpful", "harmless")] == [wanted, wanted]


def test_every_recipe_stands_on_the_page() -> None:
    said = {word for row in rows() for word in row.words} | {f"experiment={r.name}" for r in REDUCTIONS}
    names = [f"{group}={name}" for group in ("algo", "experiment") for name in catalog.groups()[group]]
    absent = [name for name in names if name not in said]
    assert not absent, f"{absent}: add a Row to tests/beds/rows_*.py, or a Reduction to tests/beds/reductions.py"
