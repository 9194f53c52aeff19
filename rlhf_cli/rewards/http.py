"""A reward behind a URL of yours: samples out as JSON, numbers back."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from torch import Tensor

from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.endpoint import PASSING, check_key, check_url, hide, secret_of
from rlhf_cli.judges.network import Again, Limits, Network, Refused, retry_after
from rlhf_cli.record.redact import keep_secret
from rlhf_cli.rewards.per_sample import Row, groups_of, scored
from rlhf_cli.types import Sample, Scores

INSTALL = "pip install 'rlhf-cli[judge]'"


class Found(NamedTuple):
    """What came of one request."""

    rows: list[Row]
    retries: int
    seconds: float
    failed: bool = False


class Http:
    """Whatever a server of yours answers to a POST of samples.

    Sent: {"samples": [{"uid", "prompt", "response", "references", "meta"}]}, the responses to one prompt, or one response.
    Wanted: {"values": [a number or null per sample]}, and optionally "components": {name: [numbers or null]} and
    "reasons": [a text or null per sample]. null is missing. An answer of another form makes all its samples missing.
    Requests start as soon as a group is drawn. The same one may come twice, after a lost answer or a resume.
    """

    required = "url"
    path_is = "http://HOST:PORT/PATH"

    def __init__(
        self,
        *,
        url: str,
        sees: Literal["group", "sample"],
        key_env: str,
        concurrency: int,
        timeout: float,
        retries: int,
    ) -> None:
        """Args:
        url: where to POST
        sees: group (a request holds the responses to one prompt) or sample (one response)
        key_env: environment variable whose value is sent as a bearer token; empty: none
        concurrency: requests at a time, per rank
        timeout: seconds per request
        retries: further attempts after a time-out, a lost connection, status 429 or 5xx
        """
        if not url:
            raise ConfigError(f"reward.http.url is empty; type reward.http.url={self.path_is}")
        check_url(url, "reward.http.url")
        _check_key(key_env)
        if concurrency < 1 or timeout <= 0 or retries < 0:
            raise ConfigError(
                f"reward.http: concurrency={concurrency}, timeout={timeout:g}, retries={retries} are not allowed; type larger numbers"
            )
        if importlib.util.find_spec("httpx") is None:
            raise ConfigError(f"reward=http: httpx is not installed; type {INSTALL}")
        self.url, self.sees, self.key_env = url, sees, key_env
        self.network = Network(Limits(concurrency, timeout, retries, "reward.http.timeout"))
        self._client: Any = None
        self._early: dict[Any, list[Future[Found]]] = {}

    def begin(self, samples: Sequence[Sample]) -> None:
        """A group is drawn: send it now."""
        for part in self._parts(list(range(len(samples)))):
            chosen = [samples[i] for i in part]
            self._early.setdefault(_known(chosen), []).append(self._send(chosen))

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        parts = [p for members in groups_of(group.tolist()) for p in self._parts(members)]
        waits = [self._wait([samples[i] for i in part]) for part in parts]
        self._early = {}
        answers = [w.result() for w in waits]
        rows = {i: row for part, a in zip(parts, answers, strict=True) for i, row in zip(part, a.rows, strict=True)}
        timing = {
            "calls": float(len(answers)),
            "seconds": sum(a.seconds for a in answers),
            "retries": float(sum(a.retries for a in answers)),
            "failed": float(sum(a.failed for a in answers)),
        }
        return replace(scored(rows[i] for i in range(len(samples))), timing=timing)

    def _parts(self, members: list[int]) -> list[list[int]]:
        return [members] if self.sees == "group" else [[i] for i in members]

    def _wait(self, samples: Sequence[Sample]) -> Future[Found]:
        begun = self._early.get(_known(samples))
        return begun.pop() if begun else self._send(samples)

    def _send(self, samples: Sequence[Sample]) -> Future[Found]:
        if self._client is None:
            import httpx

            limits = httpx.Limits(max_connections=self.network.limits.concurrency)
            self._client = httpx.AsyncClient(timeout=None, limits=limits)  # `attempt` has the time limit
        return self.network.submit(self._found(samples))

    async def _found(self, samples: Sequence[Sample]) -> Found:
        body = json.dumps({"samples": [_plain(s) for s in samples]}, default=str).encode()
        try:
            answer, retries, seconds = await self.network.attempt(lambda: self._once(body))
        except (Again, Refused) as e:
            why = f"the server failed: {' '.join(self._hide(str(e)).split())[:300]}"
            again = self.network.limits.retries if isinstance(e, Again) else 0
            return Found([Row(None, reason=why)] * len(samples), again, 0.0, True)
        return Found(read_answer(answer, len(samples)), retries, seconds)

    async def _once(self, body: bytes) -> Any:
        import httpx

        key = self._key()
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        try:
            answer = await self._client.post(self.url, content=body, headers=headers)
        except httpx.HTTPError as e:
            raise Again(f"no answer ({type(e).__name__})") from None
        if answer.status_code in PASSING or answer.status_code >= 500:
            raise Again(f"status {answer.status_code}", retry_after(answer.headers.get("retry-after")))
        if answer.status_code != 200:
            raise Refused(f"status {answer.status_code}: {self._hide(answer.text)[:100]}")
        try:
            return json.loads(self._hide(answer.text))
        except ValueError:
            raise Again("its answer is no JSON") from None

    def _key(self) -> str:
        return secret_of(self.key_env)

    def _hide(self, text: str) -> str:
        return hide(text, self._key())


def _check_key(name: str) -> None:
    if not name:
        return
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
        raise ConfigError("reward.http.key_env: wanted the name of an environment variable, never a key")
    check_key(name)
    keep_secret(name)
    if not secret_of(name):
        raise ConfigError(
            f"reward.http.key_env={name}: the environment variable is not set; export it, or name another"
        )


def _plain(s: Sample) -> dict[str, Any]:
    """A sample as it is sent; where its record stands on this machine stays here."""
    return {
        "uid": s.uid,
        "prompt": s.prompt,
        "response": s.response.encode("utf-8", "replace").decode(),
        "references": list(s.references),
        "meta": {k: v for k, v in s.meta.items() if k != "where"},
    }


def _known(samples: Sequence[Sample]) -> Any:
    return tuple((s.uid, s.prompt, s.response) for s in samples)


def read_answer(body: Any, n: int) -> list[Row]:
    """A row per sample of an answer; all are missing where it has another form."""
    values = body.get("values") if isinstance(body, Mapping) else None
    if not isinstance(values, list) or len(values) != n:
        had = f"{len(values)} values" if isinstance(values, list) else "no list `values`"
        return [Row(None, reason=f"the server's answer holds {had} for {n} samples")] * n
    parts, why = body.get("components") or {}, body.get("reasons") or [None] * n
    lists = [*parts.values(), why] if isinstance(parts, Mapping) else [None]
    if any(not isinstance(x, list) or len(x) != n for x in lists):
        return [Row(None, reason=f"the components or reasons of the server's answer are no lists of {n}")] * n
    return [_row(values[i], {str(k): x[i] for k, x in parts.items()}, why[i]) for i in range(n)]


def _row(value: Any, parts: Mapping[str, Any], why: Any) -> Row:
    good = {k: float(x) if _finite(x) else None for k, x in parts.items()}
    if _finite(value):
        return Row(float(value), good)
    said = str(why)[:200] if why else "the server says null" if value is None else f"its value is {str(value)[:40]!r}"
    return Row(None, good, said)


def _finite(x: Any) -> bool:
    """Whether x is a number that a float32 column can hold."""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 3.4e38
