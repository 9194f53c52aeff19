"""`python -m rlhf_cli.launch.rank RUN`: what DeepSpeed's launcher starts once per rank, a keeper and the process that trains.

The keeper sees how its rank ends. A rank that a signal kills cannot write down why, so its keeper does; and a rank that has to end because
another one failed may wait in a collective for ever, so its keeper kills it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_cli.exits import DONE, STOPPED
from rlhf_cli.launch.stop import SIGNALS, Stop, die_with_parent
from rlhf_cli.record.heartbeat import DUMP_TIME, STACKS
from rlhf_cli.record.rundir import RunDir


def main(path: Path) -> int:
    """Keep one rank; returns its exit status, or 128 + the signal that killed it."""
    die_with_parent()
    stop = Stop()  # before the fork, so that no signal finds the rank without a handler
    sys.stdout.flush()
    worker = os.fork()
    if worker == 0:
        die_with_parent()
        from rlhf_cli.worker import entry

        code = entry(RunDir(path), stop)
        return DONE if code == STOPPED else code  # DeepSpeed's launcher would end ranks that still close their files
    return keep(worker, RunDir(path), int(os.environ["RANK"]))


def keep(worker: int, rundir: RunDir, rank: int) -> int:
    """Wait for the process of a rank. SIGTERM ends it at once where a rank failed, and else asks it to stop."""
    ended = False

    def end(number: int, frame: Any) -> None:
        nonlocal ended
        with suppress(ProcessLookupError):
            if not rundir.silent.exists() and not any(rundir.errors()):
                os.kill(worker, signal.SIGTERM)
                return
            ended = True
            if rundir.silent.exists():
                os.kill(worker, STACKS)  # its stacks, even if it holds the interpreter's lock
                time.sleep(DUMP_TIME)
            os.kill(worker, signal.SIGKILL)

    for ignored in SIGNALS:  # they reach the rank itself
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    if code >= 0:
        return code
    if not ended:
        rundir.error(rank).write_text(f"Killed: {obituary(-code)}\n", encoding="utf-8")
    return 128 - code


def obituary(number: int) -> str:
    """What to say of a rank that a signal killed."""
    name = signal.Signals(number).name
    return f"was killed ({name}); " + ("out of memory? see dmesg" if name == "SIGKILL" else "see the end of its log")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
