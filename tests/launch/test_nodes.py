"""Where a machine stands among several, what is refused, and what is sent over ssh."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rlhf_cli.config import schema
from rlhf_cli.errors import ConfigError
from rlhf_cli.launch import nodes
from rlhf_cli.launch.nodes import Place, place_of, read_hosts, remote_command


def config(**hardware: object):
    return OmegaConf.merge(schema(), {"run": {"name": "r"}, "hardware": {"processes": 2, **hardware}})


def refusal(**hardware: object) -> str:
    with pytest.raises(ConfigError) as e:
        place_of(config(**hardware))
    return str(e.value)


def test_one_machine_talks_to_itself() -> None:
    place = place_of(config())
    assert (place.nodes, place.node_rank, place.hosts, place.suffix) == (1, 0, (), "")
    assert place.master.startswith("127.0.0.1:")


def test_the_same_command_on_every_machine() -> None:
    place = place_of(config(nodes=3, node_rank=2, master="a:29500"))
    assert place == Place(3, 2, "a:29500") and place.suffix == "-2"


def test_a_hostfile_names_the_others(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# cluster\na slots=2\n\nb slots=8 # big\nc\nd slots=1\n")
    place = place_of(config(nodes=3, hostfile=str(file)))
    assert place.hosts == ("b", "c") and place.master.startswith("a:") and place.node_rank == 0
    assert read_hosts(file, 1, 2) == ["a"], "what is not used is not judged"


@pytest.mark.parametrize(
    ("hardware", "said"),
    [
        ({"nodes": 2}, "type the same command on every machine with run.name=NAME hardware.master=HOST:PORT"),
        ({"nodes": 2, "node_rank": 0}, "type the same command on every machine"),
        ({"nodes": 2, "node_rank": 2, "master": "a:1"}, "hardware.node_rank=2: hardware.nodes=2 has 0 to 1"),
        ({"nodes": 2, "node_rank": 0, "master": "a"}, "hardware.master=a: wanted HOST:PORT"),
        ({"node_rank": 0}, "hardware.node_rank is for several machines, and hardware.nodes=1"),
        ({"hostfile": "x"}, "hardware.hostfile is for several machines"),
        ({"nodes": 2, "hostfile": "nowhere"}, "hardware.hostfile=nowhere: no such file"),
        ({"nodes": 2, "hostfile": "x", "node_rank": 1}, "drop one"),
    ],
)
def test_what_is_refused(hardware: dict[str, object], said: str) -> None:
    assert said in refusal(**hardware)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\n", "names 1 machine(s)"),
        ("a slots=1\nb slots=4\n", ":1: a has 1 slots, and hardware.processes=2"),
        ("a\nb slot=4\n", ":2: wanted NAME or NAME slots=N"),
        ("a\n-oProxyCommand=x\n", ":2: wanted NAME"),
    ],
)
def test_hostfiles_that_are_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text(text)
    assert said in refusal(nodes=2, hostfile=str(file))


def test_an_unnamed_run_cannot_be_joined() -> None:
    cfg = config(nodes=2, node_rank=1, master="a:1")
    cfg.run.name = ""
    with pytest.raises(ConfigError, match=r"type run\.name=NAME"):
        place_of(cfg)


def test_the_line_for_ssh_keeps_the_environment_and_no_secret() -> None:
    environment = {"NCCL_DEBUG": "INFO now", "HF_TOKEN": "hf_x", "HOME": "/h", "RLHF_API_KEY": "k", "PYTHONPATH": "/p"}
    words = shlex.split(remote_command(Path("runs/a b"), 1, Place(2, 0, "a:1", ("b",)), environment))
    assert words[:1] == ["cd"] and "runs/a b" in words and words[-2:] == ["1", "a:1"]
    assert {"NCCL_DEBUG=INFO now", "PYTHONPATH=/p"} < set(words)
    assert not [w for w in words if "hf_x" in w or "KEY" in w or w.startswith("HOME")]


def test_waiting_for_machine_0_ends_and_says_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_cli.launch.local import differences
    from rlhf_cli.record.rundir import RunDir

    monkeypatch.setattr(nodes, "WAIT", 0.0)
    run = RunDir(tmp_path).create()
    with pytest.raises(ConfigError, match=r"config\.yaml is not there"):
        nodes.await_config(run, {"steps": 2}, differences)
    run.save_config({"steps": 3, "hardware": {"node_rank": 0}})
    with pytest.raises(ConfigError, match="says steps=3, this command 2"):
        nodes.await_config(run, {"steps": 2}, differences)
    nodes.await_config(run, {"steps": 3, "hardware": {"node_rank": 1}}, differences)
