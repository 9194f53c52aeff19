"""What a plan is made of."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    """One stage of the flow: what it takes and what it makes."""

    name: str
    does: str
    needs: frozenset[str] = frozenset()
    gives: tuple[str, ...] = ()


@dataclass
class Plan:
    """Everything that follows from a configuration without loading a weight."""

    source: str  # sampled | recorded
    stages: list[Stage] = field(default_factory=list)
    learners: dict[str, str] = field(default_factory=dict)  # trained model -> head
    models: dict[str, str] = field(default_factory=dict)  # loaded model -> why
    annotate: tuple[str, ...] = ()  # columns filled from models
    greedy: bool = False  # a greedy response to every prompt is scored as its baseline
    notes: list[str] = field(default_factory=list)
