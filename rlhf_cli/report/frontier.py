"""The frontier of configurations: reward against the KL from the reference, so that runs compare at equal KL and not at equal step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ConfigError
from rlhf_cli.report.configurations import Configuration
from rlhf_cli.report.curves import drawn, figure_class, legend, save, smooth
from rlhf_cli.report.numbers import RunFiles

KL = "hack/kl"
TRAINING = "score/mean"
Point = tuple[int, float, float]  # step, KL, value


def points(run: RunFiles, metric: str) -> list[Point]:
    """The run's frontier by step: KL in nats a response, never below 0, and the metric of the same policy.

    The row of step n tells of the policy that sampled it; an evaluation after n steps is of the policy that samples row n + 1. Both
    are smoothed where rows are many.
    """
    kl = dict(smooth(run.series(KL)))
    evaluated = any(metric in row for row in run.evaluations)
    found = []
    for step, value in smooth(run.series(metric)):
        at = step + 1 if evaluated and step + 1 in kl else step
        if at in kl:
            found.append((step, max(0.0, kl[at]), value))
    return found


def curve(runs: Sequence[RunFiles], metric: str) -> list[Point]:
    """Means over the seeds, at the steps that all of them reached."""
    seeds = [{step: (kl, value) for step, kl, value in points(r, metric)} for r in runs]
    steps = sorted(set.intersection(*(set(s) for s in seeds))) if seeds else []
    return [(n, *(math.fsum(s[n][i] for s in seeds) / len(seeds) for i in (0, 1))) for n in steps]


def draw(configurations: Sequence[Configuration], metric: str, path: Path) -> list[Configuration]:
    """Write a picture: one row of panels per reward, a line per configuration; returns those that logged no KL."""
    figures = figure_class("frontier", path)
    done = [c for c in configurations if c.runs]
    shown = [c for c in done if all(r.series(KL) for r in c.runs)]
    if not shown:
        raise ConfigError(
            f"frontier={path}: no finished run logged {KL}, the KL from the reference; it is there where a KL term or shaping=kl reads one"
        )
    metrics = [m for m in dict.fromkeys((metric, TRAINING)) if any(curve(c.runs, m) for c in shown)]
    figure, panels, lines = drawn(figures, shown, metrics, _line)
    _axis(panels)
    several = max(len(c.runs) for c in shown) > 1
    note = "line: mean over seeds, dot: last step; thin: each seed" if several else "one seed each; dot: last step"
    legend(figure, lines, note)
    save(figure, "frontier", path)
    return [c for c in done if c not in shown]


def _axis(panels: Any) -> None:
    """In units of sqrt(KL), in which overoptimisation is a parabola: Gao et al., arXiv:2210.10760."""
    import numpy as np

    largest = max(
        (float(line.get_xdata().max()) for p in panels.flat for line in p.lines if len(line.get_xdata())), default=0.0
    )
    for panel in panels.flat:
        panel.set_xscale("function", functions=(lambda x: np.sqrt(np.clip(x, 0, None)), np.square))
        panel.set_xlim(0, 1.05 * largest or 1.0)
        panel.set_xticks(_ticks(largest or 1.0))
    for panel in panels[-1]:
        panel.set_xlabel("KL from the reference, nats per response (square-root axis)")


def _ticks(largest: float) -> list[float]:
    """0 and the squares of round distances, evenly spread under the root."""
    unit = math.sqrt(largest) / 5
    power = 10 ** math.floor(math.log10(unit))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= unit * 0.999)
    return [round((i * step) ** 2, 10) for i in range(7) if (i * step) ** 2 <= 1.1 * largest]


def _line(panel: Any, c: Configuration, metric: str, style: dict[str, Any]) -> Any:
    found = curve(c.runs, metric)
    for run in c.runs if len(c.runs) > 1 else ():
        own = points(run, metric)
        panel.plot([x for _, x, _ in own], [y for _, _, y in own], linewidth=0.7, alpha=0.35, color=style["color"])
    xs, ys = [x for _, x, _ in found], [y for _, _, y in found]
    (line,) = panel.plot(xs, ys, linewidth=1.8, **style)
    panel.plot(xs[-1:], ys[-1:], marker="o", markersize=5, linestyle="none", color=style["color"])
    return line
