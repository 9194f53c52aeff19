"""docs/what-each-method-optimises.md: every recipe trained to its end on policies that are tables, beside what theory predicts.

python scripts/method_optima.py           # print the tables
python scripts/method_optima.py --write   # put them into the page; about two minutes on one core
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "beds"))

from optimality_bed import Row, land, rows  # noqa: E402
from optimality_envs import Env, Law, distance  # noqa: E402
from reductions import REDUCTIONS, Reduction  # noqa: E402

PAGE = ROOT / "docs" / "what-each-method-optimises.md"
BEGIN, END = "<!-- made by scripts/method_optima.py -->\n", "<!-- end of what it made -->\n"


def tables(measure: Callable[[Row, Env], Law]) -> str:
    """A table per problem, a line per recipe; then the recipes whose rule another one has."""
    envs = list({env.name: env for row in rows() for env in row.envs}.values())
    return "\n".join([*(table(env, measure) for env in envs), reduced()])


def reduced() -> str:
    """The recipes whose rule is another recipe's."""
    lines = ["### The rule of another recipe\n\n", "| method | its rule | what it brings |\n", "|---|---|---|\n"]
    return "".join([*lines, *(f"{reduction(r)}\n" for r in REDUCTIONS)])


def reduction(r: Reduction) -> str:
    """A line of that table."""
    return f"| {r.name} | `{' '.join(r.words)}` | {r.says} |"


def table(env: Env, measure: Callable[[Row, Env], Law]) -> str:
    """The recipes that were tried on one problem."""
    lines = [
        f"### {env.name.capitalize()}\n\n",
        "| method | ends at | predicted | measured | distance, allowed |\n",
        "|---|---|---|---|---|\n",
    ]
    for row in rows():
        if env in row.envs:
            found, law = measure(row, env), row.predicted(env)
            lines.append(f"{start(row, law)} {shown(found)} | {distance(found, law):.4f} of {row.tolerance:g} |\n")
    return "".join(lines)


def start(row: Row, law: Law) -> str:
    """The cells of a line that theory fills."""
    return f"| {row.name} | {row.says} | {shown(law)} |"


def shown(law: Law) -> str:
    """Probabilities of the responses."""
    return ", ".join(f"{y}: {p:.3f}" for y, p in law.items())


def page(text: str, made: str) -> str:
    """The page with fresh tables."""
    head, _, rest = text.partition(BEGIN)
    return head + BEGIN + "\n" + made + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    made = tables(land)
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
    else:
        print(made)
