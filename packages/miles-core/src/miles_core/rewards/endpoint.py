"""Asking a service over HTTP for rewards: deadlines, repeated requests, a bound on how many at once. For ``http`` and ``judge``."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, ClassVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from ..errors import ConfigError, DataError, InfrastructureFailure
from ..plugin_finding import EXTRAS
from ..plugins import RewardConfig

if TYPE_CHECKING:
    import httpx

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""Before a request is repeated for the first time; it doubles each time, up to the longest."""
EXCERPT = 200
"""Characters of an answer in a message."""


def _url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0 or any(c.isspace() for c in url):
        raise ValueError(f"{url!r} is no URL of a service; write http://host:port/path or https://…")
    if parts.username or parts.password:
        raise ValueError("a URL in a recipe holds no password; put the key into an environment variable and name it in key_variable")
    if parts.query or parts.fragment:  # not shown: a query is where keys are put
        raise ValueError(
            "a URL in a recipe holds no '?' or '#', since messages show it; "
            "put a key into an environment variable and name it in key_variable"
        )
    return url


Url = Annotated[str, AfterValidator(_url)]
"""``http://`` or ``https://``, a host, no password, no query."""


class EndpointConfig(RewardConfig):
    """What rewards from a service have beside their own options."""

    point: ClassVar[str] = "reward"
    keeps_time: ClassVar[bool] = True

    timeout_s: float = Field(30.0, gt=0)
    """Deadline of one request, in seconds. All ``attempts`` and their pauses, three times (so often a group is sampled when a service
    fails), should stay below ``deadlines.group``: by default they are 3 · 165 s of 900."""
    key_variable: str | None = None
    """Environment variable with the service's API key, sent as ``Authorization: Bearer …``. None: no key."""
    attempts: int = Field(5, gt=0)
    """How often a request is sent in all when it gets no answer, or status 408, 429 or 5xx. Pauses of 1, 2, 4 … 30 s lie between, or what
    the service asks for in Retry-After, 30 s at most."""
    concurrency: int = Field(32, gt=0)
    """Most requests at once."""

    def missing(self) -> list[str]:
        """The library, the key."""
        found = [] if find_spec("httpx") else [f"httpx is not installed; pip install '{EXTRAS['httpx']}'"]
        key = None if self.key_variable is None else os.environ.get(self.key_variable, "")
        if key == "":
            found.append(f"the environment variable {self.key_variable}, which key_variable names, is not set; export it")
        elif key is not None and not (key.isascii() and key.isprintable() and key.strip() == key):
            found.append(f"the environment variable {self.key_variable} holds a line end, a space or another character that is in no key")
        return found


@dataclass
class _Session:
    """Connections that requests in flight share."""

    client: httpx.AsyncClient
    turns: asyncio.Semaphore
    users: int = 0


class Endpoint:
    """One URL of a service. Connections are kept while requests are in flight, and closed with the last: nothing is left to be closed."""

    def __init__(self, config: EndpointConfig, url: str):
        """Nothing is sent yet.

        Raises:
            ConfigError: httpx is not installed, or the key's variable is not set.
        """
        if lacking := config.missing():
            raise ConfigError(f"reward {config.use}: {lacking[0]}")
        self.config, self.url = config, url
        self._key = os.environ[config.key_variable] if config.key_variable else ""
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        self._session: _Session | None = None
        self._answers = self._hangs = 0

    async def ask(self, body: dict[str, Any], subject: str) -> Any:
        """POST a JSON object and return the JSON that comes back with a status 2xx.

        Args:
            body: Of the request.
            subject: ``reward … of sample …``, for messages.

        Raises:
            InfrastructureFailure: No answer after all attempts.
            ConfigError: The service does not take the key, or there is none at this URL.
            DataError: The body is no JSON, the service refuses it, or what it answers is no JSON.
        """
        try:
            content = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise DataError(f"{subject}: what is sent to {self.url} must be JSON: {error}; look at its metadata and label") from None
        hangs = self._hangs
        async with self._connected() as client:
            if self._hangs > hangs:  # turn after turn, many would wait for longer than a group may take
                raise InfrastructureFailure(
                    f"{subject}: {self.url} hangs: nobody got an answer in {self.config.attempts} attempts of {self.config.timeout_s:g} s "
                    "while this request waited for its turn. Look at the service; raise timeout_s if it is slow"
                )
            response = await self._answered(client, content, subject)
        self._check_status(response, subject)
        try:
            return response.json()
        except ValueError as error:
            raise DataError(
                f"{subject}: {self.url} answered {len(response.content)} bytes that are no JSON ({error}): {self._excerpt(response)}"
            ) from None

    @asynccontextmanager
    async def _connected(self) -> AsyncGenerator[httpx.AsyncClient]:
        """The client, when it is this request's turn."""
        import httpx

        if self._session is None:
            client = httpx.AsyncClient(headers=self._headers, timeout=None, verify=_tls(), limits=httpx.Limits(max_connections=None))
            self._session = _Session(client, asyncio.Semaphore(self.config.concurrency))
        session = self._session
        session.users += 1
        try:
            async with session.turns:
                yield session.client
        finally:
            session.users -= 1
            if not session.users:
                self._session = None
                await session.client.aclose()

    async def _answered(self, client: httpx.AsyncClient, content: bytes, subject: str) -> httpx.Response:
        """The first answer that does not say: later."""
        import httpx

        answers = self._answers
        for attempt in range(1, self.config.attempts + 1):
            pause = min(FIRST_PAUSE_S * 2 ** (attempt - 1), LONGEST_PAUSE_S)
            hung = False
            try:
                async with asyncio.timeout(self.config.timeout_s):
                    response = await client.post(self.url, content=content)
            except TimeoutError:
                hung = True
                last = f"no answer within {self.config.timeout_s:g} s"
            except httpx.RequestError as error:
                last = self.without_key(f"{type(error).__name__}: {error}")
            else:
                if response.status_code not in (408, 429) and response.status_code < 500:
                    self._answers += 1
                    return response
                last = f"HTTP {response.status_code}: {self._excerpt(response)}"
                pause = min(_asked_for(response) or pause, LONGEST_PAUSE_S)
            if attempt < self.config.attempts:
                await asyncio.sleep(pause)
        self._hangs += hung and self._answers == answers
        raise InfrastructureFailure(
            f"{subject}: {self.url} failed {self.config.attempts} times, last: {last}. Look at the service; "
            "raise timeout_s if it is slow, attempts if it comes and goes, lower concurrency if it has too much to do"
        )

    def without_key(self, text: str) -> str:
        """What may be shown of an answer: some services say the key that they were sent."""
        return text.replace(self._key, f"<{self.config.key_variable}>") if self._key else text

    def _excerpt(self, response: httpx.Response) -> str:
        text = self.without_key(response.text)
        return repr(text[:EXCERPT]) + (" …" if len(text) > EXCERPT else "")

    def _check_status(self, response: httpx.Response, subject: str) -> None:
        status = response.status_code
        if status < 300:
            return
        if status in (401, 403):
            which = self.config.key_variable
            told = f"the key in the environment variable {which}" if which else "a request without a key; name its variable in key_variable"
            raise ConfigError(f"{subject}: {self.url} does not take {told} (HTTP {status}): {self._excerpt(response)}")
        if status == 404 or status < 400:
            raise ConfigError(f"{subject}: there is no service at {self.url} (HTTP {status}): {self._excerpt(response)}; correct the URL")
        raise DataError(f"{subject}: {self.url} refuses what is sent (HTTP {status}): {self._excerpt(response)}")


@functools.cache
def _tls() -> ssl.SSLContext:
    """Made once: it reads all certificates."""
    import httpx

    return httpx.create_ssl_context()


def _asked_for(response: httpx.Response) -> float | None:
    """Seconds in Retry-After; None where there are none."""
    said = response.headers.get("retry-after", "")
    return float(said) if said.isdecimal() else None
