"""Fixtures of the end-to-end tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e_support import JOINED, TINY, Done

from rlhf_cli import cli

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture(scope="session", autouse=True)
def deepspeed_is_there() -> None:
    """Its first import in a process runs a linker probe that writes to the terminal; let that happen before anything is captured."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run in this process takes over signals and the environment; give them back."""
    kept, handlers = dict(os.environ), [signal.getsignal(s) for s in SIGNALS]
    for name in JOINED:
        os.environ.pop(name, None)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "GOMP_SPINCOUNT": "0"}
    yield
    os.environ.clear()
    os.environ.update(kept)
    for number, handler in zip(SIGNALS, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def rlhf(capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run the command in this process, which is seconds cheaper than a new one."""

    def run(*argv: str) -> Done:
        capfd.readouterr()
        code = cli.main(list(argv))
        return Done(code, *capfd.readouterr())

    return run


@pytest.fixture
def train(rlhf: Callable[..., Done], tmp_path: Path) -> Callable[..., Path]:
    """Train a tiny model to the end in this process; returns the run."""

    def run(name: str, *words: str) -> Path:
        done = rlhf("train", *TINY, f"run.dir={tmp_path}", f"run.name={name}", *words)
        assert done.code == 0, done.err
        return tmp_path / name

    return run
