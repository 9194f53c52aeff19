"""How processes of vLLM start: with variables and a log of their own, and deaf to the signals that ask a run to stop.

A preemption, a time limit or Ctrl-C may signal every process of a job. The learner then finishes its step, for which it needs
the engine, and ends it afterwards.

As a program, `python -m rlhf_cli.rollout.vllm_process ARGUMENTS`: vLLM's server, whose own children are deaf too.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import InvalidStateError
from contextlib import contextmanager, suppress
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any

from rlhf_cli.launch.stop import SIGNALS

# Variables of the learner's own process group; an engine that read them would join it.
JOINED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def deaf() -> Iterator[None]:
    """Processes started meanwhile never hear `SIGNALS`: they inherit the mask, and vLLM, which installs handlers, does not lift it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()  # multiprocessing would start it later, and lift the mask for two signals
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def outside(log: Path) -> Iterator[None]:
    """Children started meanwhile print to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, own in enumerate(kept, 1):
            os.dup2(own, number)
            os.close(own)
        os.close(file)


@contextmanager
def environment(more: Mapping[str, str]) -> Iterator[None]:
    """The variables `more`, and none of the learner's process group, meanwhile."""
    kept = dict(os.environ)
    for name in JOINED:
        os.environ.pop(name, None)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def watch(core: Any, error: Callable[[], Exception]) -> None:
    """Raise `error` for whoever waits for the client `core` of an engine when the engine's processes are gone.

    vLLM's own watch only marks the client as dead, which those who wait already do not see.
    """
    sentinels = core.resources.engine_manager.sentinels()

    def wait() -> None:
        connection.wait(sentinels)
        core.resources.engine_dead = True  # for whoever asks from now on
        core.outputs_queue.put(error())
        for future in list(core.utility_results.values()):
            with suppress(InvalidStateError):  # answered at the last moment
                future.set_exception(error())

    threading.Thread(target=wait, name="vllm-watch", daemon=True).start()


def serve(port: int, settings: Mapping[str, Any], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a server on 127.0.0.1, in a session of its own. Its development routes carry the weights."""
    words = [sys.executable, "-m", "rlhf_cli.rollout.vllm_process", "--model", str(settings["model"])]
    words += ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    for key, value in settings.items():
        if key != "model":
            words += flag(key, value)
    own = {k: v for k, v in os.environ.items() if k not in JOINED}
    with log.open("ab") as out:
        return subprocess.Popen(
            words,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=own | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn", **environment},
            start_new_session=True,
        )


def flag(key: str, value: Any) -> list[str]:
    """An argument of `LLM` as the command line of `vllm serve` writes it."""
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict | list) else str(value)]


if __name__ == "__main__":
    # Not `vllm serve`: that command looks for a distribution named vllm, and the one for CPUs has another name.
    with deaf():
        runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
