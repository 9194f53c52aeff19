"""`python child.py SIGNAL PARENT CORES COMMAND...`: become COMMAND, which the kernel sends SIGNAL when PARENT dies.

Asked of the kernel by the new process itself: a function between fork and exec (`preexec_fn`) runs in a copy of a process with threads,
where it may wait for ever for a lock that no thread holds any more, and takes the slow fork of a large process. Imports the standard
library only, so that it costs a hundredth of a second.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def bound(command: Sequence[str], number: int, cores: Sequence[int] = ()) -> list[str]:
    """What starts `command` so that it gets signal `number` when this process dies; `cores`: all that it may use, empty: any."""
    if sys.platform != "linux":
        return list(command)
    return [
        sys.executable, "-I", "-S", __file__, str(int(number)), str(os.getpid()), ",".join(map(str, cores)), *command,
    ]  # fmt: skip


def die_with(parent: int, number: int) -> None:
    """Have the kernel send this process a signal when its parent dies, however that happens (Linux only)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:  # it died in between
        os._exit(1)


if __name__ == "__main__":
    signal_number, parent_pid, cores_allowed, *words = sys.argv[1:]
    die_with(int(parent_pid), int(signal_number))
    if cores_allowed:
        os.sched_setaffinity(0, map(int, cores_allowed.split(",")))
    os.execvp(words[0], words)
