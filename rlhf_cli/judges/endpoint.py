"""Judges behind any endpoint that speaks the OpenAI chat protocol, through the official client."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any
from urllib.parse import quote, urlsplit

from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.ask import Ask, Reply, Sampling
from rlhf_cli.judges.network import Again, Limits, Network, Refused, retry_after
from rlhf_cli.record.redact import keep_secret

NO_KEY = "none"  # sent where no key is set: local servers want something
HIDDEN = "<redacted>"
PASSING = (408, 409, 425, 429)  # statuses that may pass, besides 5xx


class Endpoint:
    """Asks over HTTP. The key is read from the environment at the first question and leaves through the Authorization header only.

    Args:
        url: base URL, such as http://127.0.0.1:8000/v1.
        models: the judge's name at the endpoint, and that of the judge of the judge.
        key_env: the environment variable that holds the key.
        sampling: how it draws.
        limits: of the requests.
    """

    early = True  # worth asking before the answer is needed

    def __init__(
        self,
        url: str,
        models: tuple[str, str],
        key_env: str,
        sampling: Sampling,
        limits: Limits,
        network: Network | None = None,
    ) -> None:
        self.url, self.models, self.key_env, self.sampling, self.limits = url, models, key_env, sampling, limits
        keep_secret(key_env)
        self.network = network or Network(limits)
        self._client: Any = None

    def name(self, ask: Ask) -> str:
        """The model that a question goes to."""
        return self.models[1] if ask.meta else self.models[0]

    def start(self, asks: Sequence[Ask]) -> list[Future[Reply]]:
        """Send the questions; a failure is a reply with an error."""
        self._openai()  # its import takes a second, which belongs to no request
        return [self.network.submit(self._reply(ask)) for ask in asks]

    def check(self, asks: Sequence[Ask]) -> None:
        """Ask what a reward will ask, once, so that a wrong URL, name or key is told before training."""
        for ask, wait in zip(asks, self.start(asks), strict=True):
            found = wait.result()
            if found.error:
                raise ConfigError(f"judge.url={self.url}, judge.model={self.name(ask)}: {found.error}{self._hint(ask)}")

    def _hint(self, ask: Ask) -> str:
        missing = "" if os.environ.get(self.key_env) else f"; the environment variable {self.key_env} is not set"
        structured = "; without structured output: judge.structured=false" if ask.schema else ""
        return f" (is it running? the key is read from {self.key_env}{missing}{structured})"

    async def _reply(self, ask: Ask) -> Reply:
        try:
            reply, retries, seconds = await self.network.attempt(lambda: self._once(ask))
        except (Again, Refused) as e:
            tried = self.limits.retries if isinstance(e, Again) else 0  # Again is raised after the last attempt only
            return Reply(error=f"the judge failed: {' '.join(self._hide(str(e)).split())[:300]}", retries=tried)
        return Reply(
            self._hide(reply.text),
            tuple((self._hide(t), p) for t, p in reply.top),
            self._hide(reply.finish),
            seconds=seconds,
            retries=retries,
        )

    async def _once(self, ask: Ask) -> Reply:
        import openai

        parameters = self.sampling.of(ask)
        extra = dict(self.sampling.extra)
        try:
            answer = await self._openai().chat.completions.create(
                model=self.name(ask), messages=ask.messages, extra_body=extra or None, **parameters
            )
            return reply_of(answer)
        except openai.APIStatusError as e:
            why = f"status {e.status_code}: {self._hide(_message(e))[:200]}"
            if e.status_code in PASSING or e.status_code >= 500:
                raise Again(why, retry_after(e.response.headers.get("retry-after"))) from None
            raise Refused(why) from None
        except openai.APITimeoutError:
            raise Again(f"no answer within {self.limits.timeout:g} s (judge.timeout)") from None
        except openai.APIConnectionError as e:
            raise Again(f"no connection: {type(e.__cause__ or e).__name__}: {e.__cause__ or e}") from None
        except (openai.OpenAIError, AttributeError, KeyError, IndexError, TypeError, ValueError) as e:
            raise Again(f"its answer is no chat completion ({type(e).__name__})") from None

    def _openai(self) -> Any:
        if self._client is None:
            from openai import AsyncOpenAI

            key = secret_of(self.key_env) or NO_KEY
            self._client = AsyncOpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=self.limits.timeout)
        return self._client

    def _hide(self, text: str) -> str:
        return hide(text, secret_of(self.key_env))


def secret_of(variable: str) -> str:
    """The key in an environment variable, without the blanks and the newline that a file leaves around it."""
    return os.environ.get(variable, "").strip() if variable else ""


def check_key(variable: str) -> None:
    """Refuse a key that no header can carry; it would be quoted in an error otherwise."""
    if not re.fullmatch(r"[!-~]*", secret_of(variable)):
        raise ConfigError(
            f"the environment variable {variable} holds blanks or characters beyond ASCII, which no key has; export it again"
        )


def hide(text: str, key: str) -> str:
    """The text without the key, which whoever got it may quote, as it is or as JSON or an address would write it.

    Before anything is cut off: the first half of a key is a secret too.
    """
    if len(key) < 4:
        return text
    for form in {key, json.dumps(key)[1:-1], repr(key)[1:-1], quote(key, safe="")}:
        text = text.replace(form, HIDDEN)
    return text


def reply_of(answer: Any) -> Reply:
    """The first choice of a chat completion. Raises a common exception where it is none."""
    choice = answer.choices[0]
    text = choice.message.content
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise TypeError("content is no text")
    first = choice.logprobs.content[0] if choice.logprobs and choice.logprobs.content else None
    top = tuple((str(t.token), float(t.logprob)) for t in first.top_logprobs) if first else ()
    refusal = getattr(choice.message, "refusal", None)
    return Reply(text, top, "refusal" if refusal else str(choice.finish_reason or "stop"))


def _message(e: Any) -> str:
    body = e.body if isinstance(e.body, Mapping) else {}
    inner = body.get("error", body)
    text = inner.get("message") if isinstance(inner, Mapping) else inner
    return str(text or e.response.text or e.message)


def check_url(url: str, key: str = "judge.url") -> None:
    """Refuse what is no base URL, and one that carries a password."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{key}={url}: wanted an address such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query:
        where = f"{parts.scheme}://{parts.hostname}"
        raise ConfigError(
            f"{key}={where}...: an address must hold no user, password or query; put the secret into an environment variable "
            f"and name it with {key.rpartition('.')[0]}.key_env=NAME"
        )
