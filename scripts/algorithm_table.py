"""The tables of algorithms and of their options in docs/algorithms.md, made from conf/.

python scripts/algorithm_table.py           # print it
python scripts/algorithm_table.py --write   # put it into the page
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli import catalog
from rlhf_cli.compose import compose
from rlhf_cli.config import check_node
from rlhf_cli.plan import learner_sections
from rlhf_cli.signature import Signature

PAGE = Path(__file__).parent.parent / "docs" / "algorithms.md"
BEGIN, END = "<!-- {} table: made by scripts/algorithm_table.py -->\n", "<!-- end of the {} table -->\n"
GROUPS = ("objective", "credit", "reduce", "combine", "shaping", "select")
COLUMNS = (
    "`algo=`", "trains", "objective", "ratio", "clip", "weights (`reduce`)", "advantage (`credit`)", "reward shaping", "KL to the reference",
    "`select`", "`source`", "prompts x samples, updates",
)  # fmt: skip
CLIPS = ("eps_low", "eps_high", "dual_clip", "delta", "cap", "floor", "clip")


@dataclass(frozen=True)
class Summand:
    """A term of an update."""

    name: str  # the option
    reduce: str
    coef: float
    sig: Signature
    node: Mapping[str, Any]

    @property
    def is_penalty(self) -> bool:
        """A distance to the reference, and nothing else."""
        return set(self.sig.columns) == {"logp", "ref_logp"}

    @property
    def ratio(self) -> str:
        """Between the policy and the one that sampled, per token or per row."""
        if "old_logp" not in self.sig.columns:
            return "" if "logp" not in self.sig.columns else "none"
        if self.sig.per_row:
            return f"row, `{self.node.get('level', 'row')}`"
        return "row, gradient per token" if "mask" in self.sig.columns else "token"

    @property
    def clip(self) -> str:
        """Its bounds."""
        return " ".join(f"{k}={self.node[k]:g}" for k in CLIPS if self.node.get(k) is not None)


def table() -> str:
    """The whole table, a line per recipe of conf/algo."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(row(name) for name in sorted(catalog.groups()["algo"]))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def row(algo: str) -> tuple[str, ...]:
    """What a recipe chooses."""
    cfg = compose("train", [f"algo={algo}"], None)
    names = dict(cfg.names)
    terms = list(summands(cfg, names))
    losses = [t for t in terms if not t.is_penalty]
    penalties = [f"loss: `{t.name}` x {t.coef:g}" for t in terms if t.is_penalty]
    heads = {name: section.head for name, section in learner_sections(cfg).items()}
    b = cfg.batch
    return (
        f"`{algo}`",
        ", ".join(name if head == name else f"{name} ({head})" for name, head in heads.items()),
        joined(f"`{t.name}`" for t in losses),
        joined(t.ratio for t in losses),
        joined(f"{t.name}: {t.clip}" if len(losses) > 1 else t.clip for t in losses if t.clip),
        joined(f"`{t.reduce}`" if t.reduce else "mean of rows or pairs" for t in losses),
        f"`{names['credit']}`",
        joined(f"`{x}`" for x in names["shaping"].split(",")),
        joined([*in_the_reward(cfg), *penalties, *(f"in `{t.name}`" for t in losses if "ref_logp" in t.sig.columns)]),
        f"`{names['select']}`" + (f", up to {b.resample} rollouts" if b.resample > 1 else ""),
        f"`{names['source']}`",
        f"{b.prompts} x {b.samples}, {b.epochs * b.minibatches}",
    )


def summands(cfg: Any, names: Mapping[str, str]) -> Iterator[Summand]:
    """Every term of every update."""
    for learner, terms in cfg.updates.items():
        for term, node in terms.items():
            if node is None:
                continue
            key = f"updates.{learner}.{term}"
            sig = check_node(node["objective"], key, allow=cfg.allow_targets)[0]
            place = {k.rpartition("@")[2]: v for k, v in names.items()}
            reduce = place.get(f"{key}.reduce", "") if node.get("reduce") else ""
            yield Summand(place[f"{key}.objective"], reduce, float(node.get("coef", 1.0)), sig, node["objective"])


def in_the_reward(cfg: Any) -> Iterator[str]:
    """Shapers that look at the reference."""
    for name, node in (cfg.shaping or {}).items():
        if node and "ref_logp" in check_node(node, name, allow=cfg.allow_targets)[0].columns:
            yield f"reward: `{name}` x {float(node.get('beta', 1)):g}"


def joined(parts: Iterable[str]) -> str:
    """Different ones, in order; `none` for nothing."""
    return ", ".join(dict.fromkeys(p for p in parts if p)) or "none"


def options() -> str:
    """The options of the groups that recipes choose from."""
    rows = [f"| `{g}` | {', '.join(f'`{o}`' for o in sorted(catalog.groups()[g]))} |\n" for g in GROUPS]
    return "| group | options |\n| --- | --- |\n" + "".join(rows)


def page(text: str) -> str:
    """The page with fresh tables."""
    for made in (table(), options()):
        name = made.partition("|")[2].partition("|")[0].strip().strip("`=")
        begin, end = BEGIN.format(name), END.format(name)
        head, _, rest = text.partition(begin)
        text = head + begin + "\n" + made + "\n" + end + rest.partition(end)[2]
    return text


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table(), end="")
