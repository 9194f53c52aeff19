"""What gates, diagnostics and logging cost of a step: a whole run of the real worker with their functions timed. Argument: a job as JSON."""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from channel import Answers
from workloads import Job, overrides


class Clock:
    """Seconds spent in wrapped functions, by name; a wrapped function inside another counts once, for the outer."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._depth = 0
        self.on = False  # in the training loop only

    def wrap(self, name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            began = time.perf_counter()
            try:
                return fn(*args, **kwargs)
            finally:
                self._depth -= 1
                if self.on and not self._depth:
                    self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - began

        return timed


def instrument(clock: Clock) -> None:
    """Wrap what looks at a step without being part of it."""
    from rlhf_cli import diagnostics, gates, loop, worker
    from rlhf_cli.record.recorder import Recorder

    def patch(owner: Any, attribute: str, name: str) -> None:
        setattr(owner, attribute, clock.wrap(name, getattr(owner, attribute)))

    patch(gates.Gates, "__call__", "gates")
    patch(gates.Gates, "reward", "gates")
    patch(Recorder, "step", "record")
    patch(Recorder, "count", "record")
    patch(Recorder, "_enter", "record")
    for name, fn in diagnostics.DIAGNOSTICS.items():
        diagnostics.DIAGNOSTICS[name] = clock.wrap("diagnostics", fn)

    def train(run: Any) -> None:
        clock.on = True
        loop.train(run)
        clock.on = False

    worker.train = train


def main() -> None:
    job, answers = Job.loads(sys.argv[1]), Answers()
    from rlhf_cli.launch.local import calm, launch

    calm(job.threads, alone=True)
    from rlhf_cli.compose import compose

    clock = Clock()
    instrument(clock)
    with tempfile.TemporaryDirectory() as where:
        more = [
            f"run.dir={where}",
            "run.name=run",
            "tracker=offline",
            "checkpoint.every=0",
            "checkpoint.export=false",
            "eval.prompts=4",
        ]
        launch(compose("train", overrides(job, *more), None))
        rows = [json.loads(x) for x in (Path(where) / "run" / "metrics.jsonl").read_text().splitlines()]
    total = sum(r["time/step"] for r in rows)
    spent = {k: v / len(rows) for k, v in clock.spent.items()}
    answers.send(
        {
            "steps": len(rows),
            "step_seconds": total / len(rows),
            "seconds": spent,
            "share": sum(clock.spent.values()) / total,
        }
    )


if __name__ == "__main__":
    main()
