"""The judge that rewards talk to: a backend behind a cache, and the checks of the `judge` section."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

from rlhf_cli.config import nearest
from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.ask import Ask, Reply, Sampling, key_of
from rlhf_cli.judges.cache import Cache
from rlhf_cli.judges.endpoint import Endpoint, check_key, check_url
from rlhf_cli.judges.network import Limits
from rlhf_cli.judges.rule import RULES, Rule
from rlhf_cli.judges.strict import repeated

BACKENDS = ("openai", "transformers", "rule")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("fp32", "bf16")
CACHE_WORDS = ("run", "none")
ECHO = Reply(error="the judge's reply only repeats what stands in the texts that it was shown")
INSTALL = "pip install 'rlhf-cli[judge]'"


class Backend(Protocol):
    """What answers."""

    early: bool

    def name(self, ask: Ask) -> str: ...
    def start(self, asks: Sequence[Ask]) -> list[Future[Reply]]: ...
    def check(self, asks: Sequence[Ask]) -> None: ...


@dataclass
class _Waiting:
    future: Future[Reply]
    stored: bool  # it is in the cache already


class Judge:
    """Answers questions, each once: from the cache, from a question under way, or from the backend.

    Args:
        backend: what answers.
        sampling: how it draws; part of a reply's place in the cache.
        cache: replies on the disk.
        folder: of the run, for what a judge's reward wants to keep; None outside of a run.
    """

    def __init__(self, backend: Backend, sampling: Sampling, cache: Cache, folder: Path | None = None) -> None:
        self.backend, self.sampling, self.cache, self.folder = backend, sampling, cache, folder
        self._early: dict[str, _Waiting] = {}
        self._checked: set[tuple[bool, bool]] = set()

    def begin(self, asks: Sequence[Ask]) -> None:
        """Ask now what will be needed later, where the backend works beside this process."""
        if self.backend.early:
            for ask in asks:
                key = self._key(ask)
                if key not in self._early:
                    self._early[key] = self._start(key, ask)

    def forget(self, asks: Sequence[Ask]) -> None:
        """These are needed no more, though they may have been begun: another rank scores the group, or the step was given up."""
        for ask in asks:
            self._early.pop(self._key(ask), None)

    def ask(self, asks: Sequence[Ask]) -> list[Reply]:
        """A reply to every question, in order. A question that failed has a reply with an error."""
        keys = [self._key(a) for a in asks]
        waits: dict[str, _Waiting] = {}
        new: dict[str, Ask] = {}
        for key, ask in zip(keys, asks, strict=True):
            if key in waits or key in new:
                continue
            known = self._early.pop(key, None)
            if known is None and (found := self.cache.get(key)) is not None:
                known = _stored(found)
            if known is None:
                new[key] = ask
            else:
                waits[key] = known
        for key, future in zip(new, self.backend.start(list(new.values())), strict=True):
            waits[key] = _Waiting(future, False)
        replies = {}
        for key, wait in waits.items():
            replies[key] = wait.future.result()
            if not wait.stored:
                self.cache.put(key, replies[key])
        return [ECHO if repeated(replies[key], ask) else replies[key] for key, ask in zip(keys, asks, strict=True)]

    def check(self, asks: Sequence[Ask]) -> None:
        """Refuse a judge that cannot answer questions of these kinds, before training; each kind is tried once."""
        kinds = {(a.meta, bool(a.top)): a for a in asks}
        self.backend.check([a for kind, a in kinds.items() if kind not in self._checked])
        self._checked |= kinds.keys()

    def _key(self, ask: Ask) -> str:
        return key_of(self.backend.name(ask), ask, self.sampling.of(ask) | {"extra": dict(self.sampling.extra)})

    def _start(self, key: str, ask: Ask) -> _Waiting:
        found = self.cache.get(key)
        return _stored(found) if found is not None else _Waiting(self.backend.start([ask])[0], False)


def _stored(reply: Reply) -> _Waiting:
    future: Future[Reply] = Future()
    future.set_result(replace(reply, cached=True))
    return _Waiting(future, True)


# -- from the configuration --------------------------------------------------------------------------------------------

_made: dict[str, Judge] = {}


def judge_of(cfg: Any) -> Judge:
    """The judge of a configuration; one per process, whoever asks for it."""
    check_section(cfg.judge)
    folder = Path(cfg.run.dir) / cfg.run.name if cfg.run.name else None
    section: Any = OmegaConf.to_container(cfg.judge, resolve=True)
    key = json.dumps([section, str(folder), cfg.hardware.device], sort_keys=True, default=str)
    if key not in _made:
        _made[key] = _make(cfg, folder)
    return _made[key]


def _make(cfg: Any, folder: Path | None) -> Judge:
    j = cfg.judge
    extra: Any = OmegaConf.to_container(j.extra, resolve=True)
    sampling = Sampling(j.temperature, j.max_tokens, j.structured, extra)
    where = (
        None if j.cache == "none" else Path(j.cache).expanduser() if j.cache != "run" else folder and folder / "judge"
    )
    backend: Backend
    if j.backend == "openai":
        limits = Limits(j.concurrency, j.timeout, j.retries)
        backend = Endpoint(j.url.rstrip("/"), (j.model, j.meta_model or j.model), j.key_env, sampling, limits)
    elif j.backend == "rule":
        backend, where = Rule(j.model or "hash"), None
    else:
        import torch

        from rlhf_cli.judges.local import Local, device_of

        dtype = torch.bfloat16 if j.dtype == "bf16" else torch.float32
        backend = Local(j.model, sampling, device_of(j.device, cfg.hardware.device), dtype)
    return Judge(backend, sampling, Cache(where), folder)


def configured(section: Any) -> bool:
    """Whether somebody said who judges."""
    return bool(section.url) if section.backend == "openai" else section.backend == "rule" or bool(section.model)


def check_section(j: Any) -> None:
    """Refuse a section with which nothing can be asked. Opens no connection."""
    for key, value, allowed in (
        ("backend", j.backend, BACKENDS),
        ("device", j.device, DEVICES),
        ("dtype", j.dtype, DTYPES),
        *((("model", j.model or "hash", tuple(RULES)),) if j.backend == "rule" else ()),
    ):
        if value not in allowed:
            raise ConfigError(
                f"judge.{key}={value}: unknown; choose one of {', '.join(allowed)}{nearest(str(value), allowed)}"
            )
    for key, least in (("concurrency", 1), ("timeout", 0.01), ("retries", 0), ("temperature", 0), ("max_tokens", 0)):
        if j[key] < least:
            raise ConfigError(f"judge.{key}={j[key]}: must be at least {least}")
    if not configured(j):
        raise ConfigError(
            f"judge.{'url' if j.backend == 'openai' else 'model'} is empty: who judges? type judge.url=http://HOST:PORT/v1 "
            "judge.model=NAME for an endpoint, or judge.backend=transformers judge.model=smollm2 (or a folder, run or Hub id)"
        )
    if j.backend == "openai":
        _check_endpoint(j)


def _check_endpoint(j: Any) -> None:
    check_url(j.url)
    if not j.model:
        raise ConfigError(f"judge.model is empty: which model of {j.url}? type judge.model=NAME")
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*", j.key_env):
        raise ConfigError(
            "judge.key_env: wanted the name of an environment variable, such as OPENAI_API_KEY, never a key"
        )
    check_key(j.key_env)
    if importlib.util.find_spec("openai") is None:
        raise ConfigError(f"judge.backend=openai: openai is not installed; type {INSTALL}")


def describe(j: Any) -> str:
    """Who judges, for the plan."""
    if j.backend == "rule":
        return f"judges by the rule {j.model or 'hash'}, without reading"
    where = f" at {j.url}" if j.backend == "openai" else " in this process"
    return f"judges responses: {j.model}{where}"
