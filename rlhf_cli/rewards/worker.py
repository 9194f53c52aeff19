"""A worker process of `pool`: builds the scorers that it is told and scores what it is sent. Imports no torch."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.launch.child import die_with
from rlhf_cli.launch.stop import SIGNALS
from rlhf_cli.rewards.per_sample import Row

if TYPE_CHECKING:
    from rlhf_cli.sample import Sample

NICE = 10  # behind the threads that decode
END = "end"  # of a job: a row too many would otherwise be taken for the next job's first


def attempt(scorer: Any, samples: Sequence[Sample]) -> Iterator[Row]:
    """The scorer's rows. Where it raises, that row is missing and it goes on with the next; what the user can fix is raised."""
    done = 0
    while done < len(samples):
        try:
            for row in scorer.rows(samples[done:]):
                if done == len(samples):
                    raise GateError(f"a reward returned more values than the {done} samples that it got")
                done += 1
                yield row
            if done != len(samples):
                raise GateError(f"a reward returned {done} values for {len(samples)} samples")
        except (ConfigError, GateError):
            raise
        except Exception as e:  # a metric may raise anything
            done += 1
            yield Row(None, reason=f"{type(e).__name__}: {' '.join(str(e).split())[:200]}")


def serve(conn: Connection) -> None:
    """Answer until the other end closes: (seconds, row) for each sample and END, or the error that ends the job.

    The first message is (sys.path, {name: (target, settings)}); each job is (name, samples).
    """
    path, made = conn.recv()
    sys.path[:] = path
    try:
        scorers = {name: _build(target, settings) for name, (target, settings) in made.items()}
    except Exception as e:  # it was built once before, in the process that asks
        conn.send(GateError(f"a reward worker could not start: {type(e).__name__}: {' '.join(str(e).split())[:300]}"))
        return
    conn.send("ready")
    while True:
        name, samples = conn.recv()
        start = time.perf_counter()
        try:
            for row in attempt(scorers[name], samples):
                conn.send((time.perf_counter() - start, row))
                start = time.perf_counter()
            conn.send(END)
        except (ConfigError, GateError) as e:
            conn.send(e)


def _build(target: str, settings: dict[str, Any]) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)(**settings)


def main() -> None:
    """Run with the number of an inherited socket and the parent's process id."""
    end, parent = map(int, sys.argv[1:])
    os.set_inheritable(end, False)
    # A run that is asked to stop finishes its step first, and needs the scores for that; what a worker starts ignores them too.
    for s in SIGNALS:
        signal.signal(s, signal.SIG_IGN)
    die_with(
        parent, signal.SIGKILL
    )  # even amid a sample that hangs; elsewhere the closed socket ends it after the sample
    os.nice(NICE)
    try:
        serve(Connection(end))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


if __name__ == "__main__":
    main()
