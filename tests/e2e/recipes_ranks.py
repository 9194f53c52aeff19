"""One rank of two that trains one frozen run after another, which saves importing torch for each: RANK and friends are in the environment."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from rlhf_cli.launch.stop import Stop
from rlhf_cli.record.rundir import RunDir
from rlhf_cli.worker import main


def train_all(folders: list[str]) -> None:
    """Every run to its end. One that fails is written down, and ends this process: its twin would wait for ever."""
    stop = Stop()
    for folder in folders:
        try:
            main(RunDir(folder), stop)
        except BaseException:
            (Path(folder) / "failed-of-two.txt").write_text(traceback.format_exc(), encoding="utf-8")
            raise
        (Path(folder) / f"done-of-two-{os.environ['RANK']}").touch()


if __name__ == "__main__":
    train_all(sys.argv[1:])
