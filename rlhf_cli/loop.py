"""The one training loop. It knows stages, not methods: everything it calls is a value of `Run`."""

from __future__ import annotations

from rlhf_cli.types import Run


def train(run: Run) -> None:
    """Source -> score -> select -> annotate -> shape -> credit -> update, until the steps are done or `after` asks to stop."""
    for step in range(run.start, run.steps):
        with run.record.phase("rollout"):
            exp = next(run.source)
        with run.record.phase("score"):
            exp = run.select(run.score(exp))
        with run.record.phase("annotate"):
            exp = run.credit(run.shape(run.annotate(exp)))
        stats: dict[str, list[dict[str, float]]] = {}
        with run.record.phase("update"):
            for index in run.minibatches(exp, step):
                batch = exp.rows(index)
                for name, update in run.updates.items():
                    if step >= update.starts_at:
                        stats.setdefault(name, []).append(run.engines[name].step(batch, update, lr=run.lr(name, step)))
        run.check(step, exp, stats)
        run.follow(step + 1)
        run.source.publish(step + 1)
        run.record.step(step, exp, stats)
        if run.after(step + 1):
            return
