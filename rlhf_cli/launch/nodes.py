"""Several machines without a scheduler: the same command typed on each, or the others started over ssh from a file of hosts.

All machines see the run directory under the same path; machine 0 freezes the configuration there, and the others wait for it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ConfigError
from rlhf_cli.exits import DONE, STOPPED
from rlhf_cli.hardware import free_port
from rlhf_cli.record.rundir import RunDir

PASSED_ON = ("NCCL_", "GLOO_", "UCX_", "PYTHON", "RLHF_", "HF_", "OMP_", "GOMP_", "TOKENIZERS_", "DS_", "CUDA_VISIBLE")
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")  # never on a command line
OWN = (
    "hardware.node_rank",
    "hardware.master",
    "hardware.hostfile",
    "hardware.threads",
    "resume",
    "names",
)  # may differ by machine
WAIT = 600.0  # seconds for machine 0 to freeze the configuration
END = 60.0  # seconds for the other machines to end after this one


@dataclass(frozen=True)
class Place:
    """This machine among those of a run. `hosts`: machines 1, 2, ... that this one starts."""

    nodes: int
    node_rank: int
    master: str  # HOST:PORT of machine 0
    hosts: tuple[str, ...] = ()

    @property
    def suffix(self) -> str:
        """Of this machine's own log."""
        return f"-{self.node_rank}" if self.node_rank else ""


def place_of(cfg: Any) -> Place:
    """Where this machine stands. Raises ConfigError naming what is missing or too much."""
    hw = cfg.hardware
    if hw.nodes == 1:
        extra = [k for k in ("hostfile", "master", "node_rank") if hw[k] not in ("", None)]
        if extra:
            raise ConfigError(
                f"hardware.{extra[0]} is for several machines, and hardware.nodes=1; type hardware.nodes=2"
            )
        return Place(1, 0, f"127.0.0.1:{free_port()}")
    if hw.hostfile:
        if hw.node_rank is not None:
            raise ConfigError(
                "hardware.hostfile starts every machine from here, and hardware.node_rank says that you do; drop one"
            )
        hosts = read_hosts(Path(hw.hostfile), hw.nodes, hw.processes)
        return Place(hw.nodes, 0, _address(hw.master or f"{hosts[0]}:{free_port()}"), tuple(hosts[1:]))
    if hw.node_rank is None or not hw.master:
        raise ConfigError(
            f"hardware.nodes={hw.nodes}: type the same command on every machine with run.name=NAME hardware.master=HOST:PORT (of machine 0) "
            f"and hardware.node_rank=0 to {hw.nodes - 1}, or let hardware.hostfile=FILE start the others over ssh"
        )
    if not 0 <= hw.node_rank < hw.nodes:
        raise ConfigError(f"hardware.node_rank={hw.node_rank}: hardware.nodes={hw.nodes} has 0 to {hw.nodes - 1}")
    if not cfg.run.name:
        raise ConfigError("hardware.node_rank: every machine must name the same run; type run.name=NAME")
    return Place(hw.nodes, hw.node_rank, _address(hw.master))


def _address(master: str) -> str:
    host, _, port = master.partition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"hardware.master={master}: wanted HOST:PORT, e.g. hardware.master=node0:29500")
    return master


def read_hosts(path: Path, nodes: int, processes: int) -> list[str]:
    """The first `nodes` hosts of a file with lines `NAME` or `NAME slots=N`; machine 0, the first, is this one."""
    if not path.is_file():
        raise ConfigError(f"hardware.hostfile={path}: no such file; one machine a line: NAME slots=N")
    hosts: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        name, *rest = line.partition("#")[0].split() or [""]
        if not name:
            continue
        slots = rest[0].removeprefix("slots=") if rest else ""
        if name.startswith("-") or len(rest) > 1 or (rest and not (rest[0].startswith("slots=") and slots.isdigit())):
            raise ConfigError(f"{path}:{number}: wanted NAME or NAME slots=N, found {line.strip()!r}")
        if slots and int(slots) < processes and len(hosts) < nodes:
            raise ConfigError(f"{path}:{number}: {name} has {slots} slots, and hardware.processes={processes}")
        hosts.append(name)
    if len(hosts) < nodes:
        raise ConfigError(f"hardware.nodes={nodes}: {path} names {len(hosts)} machine(s)")
    return hosts[:nodes]


def await_config(rundir: RunDir, wanted: Any, differences: Any) -> None:
    """Wait until machine 0 has frozen the same configuration."""
    from omegaconf import OmegaConf

    path, end, said = rundir.path / "config.yaml", time.monotonic() + WAIT, False
    while True:
        there = OmegaConf.to_container(OmegaConf.load(path), resolve=True) if path.exists() else None
        found = {} if there is None else {k: v for k, v in differences(there, wanted).items() if not k.startswith(OWN)}
        if there is not None and not found:
            return
        why = (
            "is not there"
            if there is None
            else "says {0}={1[0]}, this command {1[1]}".format(*next(iter(found.items())))
        )
        if time.monotonic() > end:
            raise ConfigError(
                f"machine 0 did not start this run within {WAIT:.0f} s: {path} {why}; type the same command there"
            )
        if not said:
            print(f"rlhf: waiting for machine 0: {path} {why}", flush=True)
            said = True
        time.sleep(1.0)


class Others:
    """The machines that this one starts over ssh, for as long as its own ranks run. Their end of life is the end of our pipe."""

    def __init__(self, rundir: RunDir, place: Place) -> None:
        self.rundir, self.place, self.problem = rundir, place, ""
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Others:
        for n, host in enumerate(self.place.hosts, 1):
            with (self.rundir.logs / f"node-{n}.log").open("a", encoding="utf-8") as log:
                self._started[host] = subprocess.Popen(
                    ["ssh", "-o", "BatchMode=yes", host, remote_command(self.rundir.path, n, self.place, os.environ)],
                    stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
        return self

    def failed(self) -> bool:
        """Whether a machine could not be reached, or its ranks failed; `problem` says it."""
        for n, (host, ssh) in enumerate(self._started.items(), 1):
            if ssh.poll() not in (None, DONE, STOPPED) and not self.problem:
                self.problem = (
                    f"machine {n} ({host}) ended with status {ssh.returncode}; see {self.rundir.logs}/node-{n}.log"
                )
        return bool(self.problem)

    def __exit__(self, kind: Any, *rest: object) -> None:
        end = time.monotonic() + (END if kind is None and not self.problem else 0)
        for ssh in self._started.values():
            try:
                ssh.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                assert ssh.stdin is not None
                ssh.stdin.close()  # the other side ends when its input does
                try:
                    ssh.wait(5)
                except subprocess.TimeoutExpired:
                    ssh.kill()
        self.failed()


def remote_command(run: Path, node_rank: int, place: Place, environment: Mapping[str, str]) -> str:
    """The shell line that runs machine `node_rank`'s part of a frozen run, from this folder and with this environment."""
    kept = {k: v for k, v in environment.items() if k.startswith(PASSED_ON) and not any(s in k for s in SECRET)}
    settings = [f"{k}={v}" for k, v in sorted(kept.items())]
    words = ["env", *settings, sys.executable, "-m", "rlhf_cli.launch.nodes", str(run), str(node_rank), place.master]
    return f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}"


def main(run: Path, node_rank: int, master: str) -> int:
    """What ssh starts: this machine's ranks, until they end or the machine that started them is gone."""
    from rlhf_cli.cli import guard
    from rlhf_cli.config import load_config
    from rlhf_cli.launch.local import start

    cfg = load_config(run)
    threading.Thread(target=_end_with_input, daemon=True).start()
    return guard(lambda: start(RunDir(run), cfg.hardware, Place(cfg.hardware.nodes, node_rank, master)))


def _end_with_input() -> None:
    os.read(0, 1)  # returns when the pipe ends
    os._exit(1)  # the kernel ends the ranks with their parent


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
