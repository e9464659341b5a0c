"""A model that another server answers for: any OpenAI-compatible URL (vLLM, llama.cpp, another Prairie).

Requests go out as they came in, with the model's name over there; what comes back is passed on as it is. Nothing is
retried: the client knows better. Not here: records, votes, admission (`prairie.serve.remote`).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from prairie.errors import PrairieError, UsageError

CONNECT_S = 10.0
SILENCE_S = 300.0
"""How long the other server may say nothing."""


class RemoteError(PrairieError):
    """The other server refused, failed or cannot be reached."""

    http_status = 502
    code = "remote_error"

    def __init__(self, what: str, status: int = 502, body: Mapping[str, Any] | None = None, **facts: Any) -> None:
        """`body`: the other server's own error object, which says more than we could."""
        self.http_status = status
        self.body = body
        super().__init__(what, **facts)


@dataclass(frozen=True)
class Remote:
    """One model of one server."""

    name: str
    """What it is called here."""
    url: str
    """Up to and with `/v1`."""
    model: str
    """What it is called there."""
    key: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, text: str, key: str | None = None) -> Remote:
        """`NAME=URL` or `NAME=URL#MODEL`. Raises UsageError."""
        name, _, address = text.partition("=")
        url, _, model = address.partition("#")
        parts = urlsplit(url)
        if not name or parts.scheme not in ("http", "https") or not parts.netloc:
            raise UsageError("a remote model is not told well", got=repr(text), wanted="NAME=URL or NAME=URL#MODEL")
        url = url.rstrip("/")
        return cls(name, url if url.endswith("/v1") else url + "/v1", model or name, key)

    def client(self) -> httpx.AsyncClient:
        """Connections to it; the caller closes them."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        timeout = httpx.Timeout(SILENCE_S, connect=CONNECT_S)
        return httpx.AsyncClient(headers=headers, timeout=timeout, limits=httpx.Limits(max_connections=None))

    async def answer(self, client: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The whole JSON object. Raises RemoteError."""
        async with self._asked(client, path, body) as response:
            await response.aread()
            return _object(response.text, self)

    async def events(
        self, client: httpx.AsyncClient, path: str, body: Mapping[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a stream up to [DONE]. Raises RemoteError, also for a stream that ends before that."""
        async with self._asked(client, path, body) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                chunk = _object(data, self)
                if "error" in chunk:
                    raise RemoteError(f"{self.name} failed in the middle of an answer", body=chunk)
                yield chunk
        raise RemoteError(f"the server of {self.name} ended in the middle of an answer", mend="ask again")

    @asynccontextmanager
    async def _asked(
        self, client: httpx.AsyncClient, path: str, body: Mapping[str, Any]
    ) -> AsyncIterator[httpx.Response]:
        try:
            async with client.stream("POST", self.url + path, json={**body, "model": self.model}) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise _refusal(response, self)
                yield response
        except httpx.HTTPError as error:
            raise RemoteError(
                f"the server of {self.name} cannot be reached", got=f"{type(error).__name__} {error}".strip(),
                wanted=f"an answer of {self.url}", mend="try again in a moment", status=503,
            ) from None  # fmt: skip


def _object(text: str, remote: Remote) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RemoteError(f"the server of {remote.name} answered no JSON object", got=repr(text[:80]))
    return value


def _refusal(response: httpx.Response, remote: Remote) -> RemoteError:
    """Its own words, with its status; a key of ours that it does not take is not the client's fault."""
    status = 502 if response.status_code in (401, 403) or response.status_code >= 500 else response.status_code
    try:
        body = response.json()
    except ValueError:
        body = None
    fitting = isinstance(body, dict) and isinstance(body.get("error"), dict) and status == response.status_code
    return RemoteError(
        f"the server of {remote.name} refused", status, body if fitting else None,
        got=f"{response.status_code} {response.text[:200]}",
    )  # fmt: skip
