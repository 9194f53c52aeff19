"""vLLM as this process sees it: an engine in child processes, or a server on this machine. Both speak the same way.

Written against vLLM 0.32: `LLM`, its weight-transfer calls, and the server's routes of the same names.
"""

from __future__ import annotations

import atexit
import base64
import importlib
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rlhf_cli.errors import ConfigError
from rlhf_cli.hardware import free_port
from rlhf_cli.rollout.vllm_guard import Guard

# Variables of the learner's own process group; an engine that read them would join it.
JOINED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
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
    """vLLM's `LLM` in child processes of this rank, so that its threads, signals and process groups are its own.

    Args:
        settings: arguments of `vllm.LLM`.
        environment: variables that its processes get.
        log: file that takes what they print.
    """

    def __init__(self, settings: Mapping[str, Any], environment: Mapping[str, str], log: Path) -> None:
        self._guard = Guard()
        own = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", **environment, **self._guard.environment}
        with _outside(log), _environment(own):
            vllm: Any = importlib.import_module("vllm")
            try:
                self.llm = vllm.LLM(**settings)
            except (RuntimeError, ValueError, TypeError) as e:
                raise ConfigError(f"vLLM did not start: {_last_line(e)}; its output is in {log}") from e
        logging.getLogger("vllm").setLevel(logging.ERROR)
        self._params = vllm.SamplingParams
        atexit.register(self.close)

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """One answer to each prompt (token ids) under its own sampling parameters."""
        asked = [{"prompt_token_ids": list(p)} for p in prompts]
        outputs = self.llm.generate(asked, [self._params(**p) for p in params], use_tqdm=False)
        made = []
        for one in (o.outputs[0] for o in outputs):
            ids = list(one.token_ids)
            logp = [float(at[i].logprob) for i, at in zip(ids, one.logprobs, strict=True)]
            made.append(Answer(ids, logp, one.finish_reason == "stop"))
        return made

    def call(self, method: str, *args: Any) -> list[Any]:
        """A method of every worker."""
        return self.llm.collective_rpc(method, args=args)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        self.llm.update_weights({"update_info": portable(update_info)})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.llm.finish_weight_update(weight_version)

    def reset_prefix_cache(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not forget the keys and values of the old weights")

    def sleep(self, level: int) -> None:
        self.llm.sleep(level=level)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        self.llm.wake_up(tags=list(tags) if tags else None)

    def close(self) -> None:
        """End its processes."""
        atexit.unregister(self.close)
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            self._guard.close(
                kill=False
            )  # multiprocessing's helper, which bears the mark too, goes on serving this process


class Server:
    """A vLLM server on this machine, over HTTP. With `url` empty it is started here and ended with this object.

    Args:
        url: http://127.0.0.1:PORT of a running server.
        settings: as of `vllm.LLM`.
        environment: variables that a started server gets.
        log: file that takes what a started server prints.
    """

    def __init__(self, url: str, settings: Mapping[str, Any], environment: Mapping[str, str], log: Path) -> None:
        self._guard = None if url else Guard()
        marked = {**environment, **(self._guard.environment if self._guard else {})}
        self._process = None if url else serve(port := free_port(), settings, marked, log)
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
        except urllib.error.HTTPError as e:
            missing = "; start it as docs/rollouts.md says" if e.code == 404 else ""
            raise RuntimeError(f"vLLM at {self.url} refused /{path}: {e.code} {e.read()[:500]!r}{missing}") from e
        return json.loads(text) if text else None

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """One answer to each prompt (token ids) under its own sampling parameters."""
        with ThreadPoolExecutor(min(AT_ONCE, len(prompts)) or 1) as pool:
            return list(pool.map(self._complete, prompts, params))

    def _complete(self, prompt: Sequence[int], params: Mapping[str, Any]) -> Answer:
        settings = {k: v for k, v in params.items() if k != "detokenize"}
        body = {"model": self.model, "prompt": list(prompt), "return_token_ids": True, **settings}
        one = self._post("v1/completions", body)["choices"][0]
        logp = [float(x) for x in one["logprobs"]["token_logprobs"]]
        return Answer(list(one["token_ids"]), logp, one["finish_reason"] == "stop")

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
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._process = None
        if self._guard is not None:
            self._guard.close(kill=True)
            self._guard = None


def serve(port: int, settings: Mapping[str, Any], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a server on 127.0.0.1, in a session of its own. Its development routes carry the weights."""
    # Not `vllm serve`: that command looks for a distribution named vllm, and the one for CPUs has another name.
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(settings["model"])]
    words += ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    for key, value in settings.items():
        if key != "model":
            words += flag(key, value)
    own = {k: v for k, v in os.environ.items() if k not in JOINED}
    with log.open("ab") as out:
        return subprocess.Popen(
            words,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=own | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn", **environment},
            start_new_session=True,
        )


def flag(key: str, value: Any) -> list[str]:
    """An argument of `LLM` as the command line of `vllm serve` writes it."""
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict | list) else str(value)]


def portable(update_info: Any) -> Any:
    """CUDA IPC handles are no JSON and no msgpack: they travel pickled, as vLLM's workers accept them."""
    if isinstance(update_info, list):
        return [portable(x) for x in update_info]
    if update_info.get("ipc_handles") is None:
        return {k: v for k, v in update_info.items() if v is not None}
    kept = {k: v for k, v in update_info.items() if k != "ipc_handles" and v is not None}
    return kept | {"ipc_handles_pickled": base64.b64encode(pickle.dumps(update_info["ipc_handles"])).decode()}


@contextmanager
def _outside(log: Path) -> Iterator[None]:
    """Children started meanwhile print to `log` and are in a process group that Ctrl-C in the terminal does not reach."""
    group = os.getpgid(0)
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    moved = group != os.getpid() and os.getsid(0) != os.getpid()
    os.dup2(file, 1)
    os.dup2(file, 2)
    if moved:
        os.setpgid(0, 0)
    try:
        yield
    finally:
        if moved:
            os.setpgid(0, group)
        sys.stdout.flush()
        sys.stderr.flush()
        for number, own in enumerate(kept, 1):
            os.dup2(own, number)
            os.close(own)
        os.close(file)


@contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    """The variables `more`, and none of the learner's process group, meanwhile."""
    kept = dict(os.environ)
    for name in JOINED:
        os.environ.pop(name, None)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _last_line(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return lines[-1] if lines else type(e).__name__
