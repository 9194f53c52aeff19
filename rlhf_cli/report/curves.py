"""Learning curves of configurations: mean over seeds with the range of the seeds, training beside held-out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ConfigError
from rlhf_cli.report.configurations import Configuration

# Of M. Okabe and K. Ito, Color Universal Design: told apart with any colour vision, and in grey by their lightness.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
DASHES = ("-", "--", ":", "-.")


def draw(configurations: Sequence[Configuration], metric: str, path: Path) -> None:
    """Write a picture: one row of panels per reward; left the metric, right the reward of training, by step."""
    figures = figure_class("plot", path)
    shown = [c for c in configurations if c.runs]
    metrics = list(dict.fromkeys((metric, "score/mean")))
    metrics = [m for m in metrics if any(r.series(m) for c in shown for r in c.runs)]
    figure, panels, lines = drawn(figures, shown, metrics, _curve)
    for panel in panels[-1]:
        panel.set_xlabel("step")
    several = max(len(c.runs) for c in shown) > 1 if shown else False
    note = "line: mean over seeds; band: their range" if several else "one seed each"
    legend(figure, lines, note)
    save(figure, "plot", path)


def drawn(
    figures: Any, shown: Sequence[Configuration], metrics: Sequence[str], line: Callable[..., Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """A figure, its panels [rewards, metrics], and a line for each name: `line(panel, configuration, metric, style)` draws one."""
    rewards = list(dict.fromkeys(reward_of(c) for c in shown))
    size = (5.2 * len(metrics), 3.2 * len(rewards) + 0.15 * len(shown) + 0.4)
    figure = figures(figsize=size, layout="constrained")
    panels = figure.subplots(len(rewards), len(metrics), squeeze=False, sharex=True)
    names = {id(c): name_of(c, several_rewards=len(rewards) > 1) for c in shown}
    order = list(dict.fromkeys(names.values()))
    lines = {}
    for row, reward in zip(panels, rewards, strict=True):
        for panel, name in zip(row, metrics, strict=True):
            prepared(panel, name, f"reward={reward}" if len(rewards) > 1 else "")
            for c in (x for x in shown if reward_of(x) == reward):
                lines[names[id(c)]] = line(panel, c, name, style_of(order.index(names[id(c)])))
    return figure, panels, lines


def legend(figure: Any, lines: Mapping[str, Any], note: str) -> None:
    """Name the lines below the panels."""
    figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=min(2, len(lines)), frameon=False, title=note
    )


def figure_class(word: str, path: Path) -> Any:
    """matplotlib's Figure; `word` is the setting that wants it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(f"{word}={path}: needs matplotlib; type: pip install 'rlhf-cli[plot]'") from None
    return Figure


def save(figure: Any, word: str, path: Path) -> None:
    """Write the picture, in the format of its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as e:
        raise ConfigError(f"{word}={path}: {str(e).splitlines()[0]}; e.g. {word}={word}.png") from None


def reward_of(c: Configuration) -> str:
    """The name of its reward."""
    return str(c.any.config.get("names", {}).get("reward", ""))


def name_of(c: Configuration, *, several_rewards: bool) -> str:
    """Its label; where each reward has its panels, without the reward, so that a method keeps its color."""
    kept = {k: v for k, v in c.settings.items() if k != "reward" or not several_rewards}
    return ", ".join(f"{k}={v}" for k, v in kept.items()) or c.label


def style_of(i: int) -> dict[str, Any]:
    """Color and dashes of the i-th line."""
    return {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}


def prepared(panel: Any, metric: str, title: str) -> None:
    """Label a panel."""
    panel.set_ylabel({"score/mean": "score/mean, training"}.get(metric, metric))
    panel.set_title(title, fontsize="medium", loc="left")
    panel.grid(color="0.9", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _curve(panel: Any, c: Configuration, metric: str, style: Mapping[str, Any]) -> Any:
    """The mean over the seeds that reached a step, smoothed where rows are many."""
    seeds = [dict(smooth(r.series(metric))) for r in c.runs]
    steps = sorted(set.intersection(*(set(s) for s in seeds))) if seeds else []
    values = [[s[step] for s in seeds] for step in steps]
    mean = [math.fsum(v) / len(v) for v in values]
    (line,) = panel.plot(steps, mean, linewidth=1.8, marker="o" if len(steps) <= 12 else None, markersize=4, **style)
    if len(seeds) > 1:
        panel.fill_between(
            steps, [min(v) for v in values], [max(v) for v in values], color=style["color"], alpha=0.16, linewidth=0
        )
    return line


def smooth(series: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """A centred moving mean over a tenth of long series, so that curves can be told apart."""
    half = len(series) // 20 if len(series) > 30 else 0
    found = []
    for i, (step, _) in enumerate(series):
        near = [v for _, v in series[max(0, i - half) : i + half + 1]]
        found.append((step, math.fsum(near) / len(near)))
    return found
