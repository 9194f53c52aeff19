"""vLLM as this process sees it: an engine in child processes, or a server on this machine. Both speak the same way.

Written against vLLM 0.32: `LLM`, its weight-transfer calls, and the server's routes of the same names.
"""

from __future__ import annotations

import atexit
import base64
import http.client
import importlib
import json
import logging
import pickle
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.hardware import free_port
from rlhf_cli.rollout.vllm_guard import Guard
from rlhf_cli.rollout.vllm_process import deaf, environment, outside, serve, watch

START_LIMIT = 1800.0  # seconds a server may take to load and compile
AT_ONCE = 256  # requests to a server in flight


class Answer(NamedTuple):
    """One response."""

    ids: list[int]
    logp: list[float]
    finished: bool  # a stop token or a stop text ended it, not the limit


class Engine(Protocol):
    """What the sampler and the weight sync ask of vLLM; the weight-transfer calls are those of vLLM's own client protocol."""

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]]) -> list[Answer]: ...
    def call(self, method: str, *args: Any) -> list[Any]: ...
    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...
    def start_weight_update(self) -> None: ...
    def update_weights(self, update_info: Any) -> None: ...
    def finish_weight_update(self, weight_version: str | None = None) -> None: ...
    def reset_prefix_cache(self) -> None: ...
    def sleep(self, level: int) -> None: ...
    def wake_up(self, tags: Sequence[str] | None = None) -> None: ...
    def close(self) -> None: ...


class Local:
    """vLLM's `LLM` in child processes of this rank, so that its threads and signals are its own.

    Args:
        settings: arguments of `vllm.LLM`.
        more: variables that its processes get.
        log: file that takes what they print.
    """

    def __init__(self, settings: Mapping[str, Any], more: Mapping[str, str], log: Path) -> None:
        self._log = log
        with outside(log), deaf():
            self._guard = Guard()
            own = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
            with environment({**own, **more, **self._guard.environment}):
                vllm: Any = importlib.import_module("vllm")
                try:
                    self.llm = vllm.LLM(**settings)
                except (RuntimeError, ValueError, TypeError) as e:
                    raise ConfigError(f"vLLM did not start: {_last_line(e)}; its output is in {log}") from e
        logging.getLogger("vllm").setLevel(logging.ERROR)
        self._params = vllm.SamplingParams
        self._dead = importlib.import_module("vllm.v1.engine.exceptions").EngineDeadError
        self._core = self.llm.llm_engine.engine_core
        watch(self._core, self._dead)
        atexit.register(self.close)

    def _ask(self, method: str, *args: Any, **more: Any) -> Any:
        """A method of vLLM's `LLM`; a dead engine is one line."""
        try:
            return getattr(self.llm, method)(*args, **more)
        except self._dead as e:
            raise ConfigError(f"the vLLM engine died; out of memory? see dmesg and {self._log}") from e

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """One answer to each prompt (token ids) under its own sampling parameters."""
        asked = [{"prompt_token_ids": list(p)} for p in prompts]
        outputs = self._ask("generate", asked, [self._params(**p) for p in params], use_tqdm=False)
        made = []
        for one in (o.outputs[0] for o in outputs):
            ids = list(one.token_ids)
            logp = [float(at[i].logprob) for i, at in zip(ids, one.logprobs, strict=True)]
            made.append(Answer(ids, logp, stopped(one.finish_reason)))
        return made

    def call(self, method: str, *args: Any) -> list[Any]:
        """A method of every worker."""
        return self._ask("collective_rpc", method, args=args)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._ask("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._ask("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._ask("update_weights", {"update_info": portable(update_info)})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._ask("finish_weight_update", weight_version)

    def reset_prefix_cache(self) -> None:
        if not self._ask("reset_prefix_cache"):
            raise RuntimeError("vLLM did not forget the keys and values of the old weights")

    def sleep(self, level: int) -> None:
        self._ask("sleep", level=level)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        self._ask("wake_up", tags=list(tags) if tags else None)

    def close(self) -> None:
        """End its processes."""
        atexit.unregister(self.close)
        if self.llm is not None:
            self._core.shutdown(timeout=0)  # they do not hear the SIGTERM that it would wait for
            self.llm = self._core = None
            self._guard.close()


class Server:
    """A vLLM server on this machine, over HTTP. With `url` empty it is started here and ended with this object.

    Args:
        url: http://127.0.0.1:PORT of a running server.
        settings: as of `vllm.LLM`.
        more: variables that a started server gets.
        log: file that takes what a started server prints.
    """

    def __init__(self, url: str, settings: Mapping[str, Any], more: Mapping[str, str], log: Path) -> None:
        self._log = "its log" if url else log
        self._guard = self._process = None
        if not url:
            with deaf():
                self._guard = Guard()
                self._process = serve(port := free_port(), settings, {**more, **self._guard.environment}, log)
        self.url = url.rstrip("/") or f"http://127.0.0.1:{port}"
        self.model = str(settings["model"]) if self._process else ""
        atexit.register(self.close)
        self._wait(log)

    def _wait(self, log: Path) -> None:
        """Until the server answers."""
        end = time.monotonic() + (START_LIMIT if self._process else 10)
        while True:
            try:
                self.model = self.model or self._get("v1/models")["data"][0]["id"]
                self._get("health")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError) as e:
                if self._process is not None and self._process.poll() is not None:
                    raise ConfigError(
                        f"the vLLM server ended with {self._process.returncode}; its output is in {log}"
                    ) from e
                if time.monotonic() > end:
                    raise ConfigError(f"rollout.vllm.url: nothing answers at {self.url} ({e})") from e
            time.sleep(0.5)

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=10) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def _post(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}/{path}", data=data or b"", headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=START_LIMIT) as answer:
                text = answer.read()
        except (OSError, http.client.HTTPException) as e:
            if getattr(e, "code", 500) >= 500 and not self._lives():
                raise ConfigError(f"the vLLM server died; out of memory? see dmesg and {self._log}") from e
            if not isinstance(e, urllib.error.HTTPError):
                raise
            missing = "; start it as docs/rollouts.md says" if e.code == 404 else ""
            raise RuntimeError(f"vLLM at {self.url} refused /{path}: {e.code} {e.read()[:500]!r}{missing}") from e
        return json.loads(text) if text else None

    def _lives(self) -> bool:
        """The server answers, and its engine is there."""
        try:
            self._get("health")
        except (OSError, http.client.HTTPException):
            return False
        return True

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """One answer to each prompt (token ids) under its own sampling parameters."""
        with ThreadPoolExecutor(min(AT_ONCE, len(prompts)) or 1) as pool:
            return list(pool.map(self._complete, prompts, params))

    def _complete(self, prompt: Sequence[int], params: Mapping[str, Any]) -> Answer:
        settings = {k: v for k, v in params.items() if k != "detokenize"}
        body = {"model": self.model, "prompt": list(prompt), "return_token_ids": True, **settings}
        one = self._post("v1/completions", body)["choices"][0]
        logp = [float(x) for x in one["logprobs"]["token_logprobs"]]
        return Answer(list(one["token_ids"]), logp, stopped(one["finish_reason"]))

    def call(self, method: str, *args: Any) -> list[Any]:
        """A method of every worker."""
        return self._post("collective_rpc", {"method": method, "args": list(args)})["results"]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._post("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._post("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._post("update_weights", {"update_info": portable(update_info)})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("finish_weight_update", {"weight_version": weight_version} if weight_version else None)

    def reset_prefix_cache(self) -> None:
        self._post("reset_prefix_cache")

    def sleep(self, level: int) -> None:
        self._post(f"sleep?level={level}")

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        self._post("wake_up" + "".join(f"{'&' if i else '?'}tags={t}" for i, t in enumerate(tags or ())))

    def close(self) -> None:
        """End a server that was started here."""
        atexit.unregister(self.close)
        if self._process is not None:
            self._process.kill()  # it does not hear SIGTERM; the guard ends its children
            self._process.wait()
            self._process = None
        if self._guard is not None:
            self._guard.close()
            self._guard = None


def portable(update_info: Any) -> Any:
    """CUDA IPC handles are no JSON and no msgpack: they travel pickled, as vLLM's workers accept them."""
    if isinstance(update_info, list):
        return [portable(x) for x in update_info]
    if update_info.get("ipc_handles") is None:
        return {k: v for k, v in update_info.items() if v is not None}
    kept = {k: v for k, v in update_info.items() if k != "ipc_handles" and v is not None}
    return kept | {"ipc_handles_pickled": base64.b64encode(pickle.dumps(update_info["ipc_handles"])).decode()}


def stopped(reason: str | None) -> bool:
    """A stop token or a stop text ended the response; False where the limit did. Whatever else ends one is no response."""
    if reason not in ("stop", "length"):
        raise GateError(f"vLLM ended a response with {reason!r}, neither at a stop nor at rollout.max_tokens")
    return reason == "stop"


def _last_line(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return lines[-1] if lines else type(e).__name__
