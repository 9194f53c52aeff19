"""Nothing of vLLM outlives the process that started it: `python vllm_guard.py MARK` waits for its input to end and kills what bears MARK.

vLLM's own processes look after each other only as long as they are ended in order; after a SIGKILL of the learner they would keep a GPU's
memory. Every process of an engine, also one that a child of a child starts, inherits a variable of its environment, by which it is found
(/proc, Linux only). Imports the standard library only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

NAME = "RLHF_ENGINE"
TRACKER = b"multiprocessing.resource_tracker"
TRIES, PAUSE = 50, 0.1  # looks for processes that were just being started, and seconds between them


class Guard:
    """A process that ends an engine when this one is gone or closes it. `environment` marks the engine's processes."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.environment = {
            NAME: self.mark,
            "SPT_NOENV": "1",
        }  # vLLM's names for its processes stay off their environment
        command = [sys.executable, "-I", "-S", __file__, self.mark]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def close(self) -> None:
        """End what is left of the engine."""
        self._process.communicate()


def marked(mark: str) -> list[int]:
    """The living processes that were started with this mark.

    Without multiprocessing's helper: it removes their shared memory after them, and then ends by itself.
    """
    wanted = f"{NAME}={mark}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone by now, or another user's
            bears = wanted in (path / "environ").read_bytes().split(b"\0")
            if bears and TRACKER not in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


def kill(mark: str) -> None:
    """SIGKILL everything that bears the mark, until nothing does."""
    for _ in range(TRIES):
        left = marked(mark)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not left:
            return
        time.sleep(PAUSE)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    kill(sys.argv[1])
