"""Answers that another server writes, with Prairie's records, votes and admission around them.

The other server's objects are passed on with our response ids in them, so that a vote finds its answer; who wrote it
stands in `prairie.remote` and in the record: address, model, fingerprint, and the identity that another Prairie gives.
Rows are committed when the first of an answer is there and before any of it is sent; whatever ends early is recorded as
aborted. The tokens are not known here, so such a record has a text and no token ids.
Not here: talking to the server (`prairie.engine.remote`).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prairie.data.records import Message
from prairie.engine.remote import Remote, RemoteError
from prairie.errors import PrairieError, RequestError
from prairie.serve.answers import DONE, event, to_json
from prairie.serve.choices import Caller, Desk
from prairie.serve.errors import body_of
from prairie.serve.schema import ChatRequest, CompletionRequest
from prairie.serve.stream import until_left
from prairie.serve.tracing import Told

if TYPE_CHECKING:
    from prairie.store.feedback import Response as Row

log = logging.getLogger("prairie.serve")
PATHS = {"chatcmpl": "/chat/completions", "cmpl": "/completions"}


class Remotes:
    """The models that other servers answer for."""

    def __init__(self, remotes: Sequence[Remote], desk: Desk) -> None:
        self.desk = desk
        self.of = {remote.name: remote for remote in remotes}
        self._clients: dict[str, httpx.AsyncClient] = {}

    def client(self, remote: Remote) -> httpx.AsyncClient:
        if remote.name not in self._clients:
            self._clients[remote.name] = remote.client()
        return self._clients[remote.name]

    async def close(self) -> None:
        for client in self._clients.values():
            await client.aclose()

    def listing(self) -> list[dict[str, Any]]:
        """OpenAI's model objects."""
        return [
            {"id": remote.name, "object": "model", "created": 0, "owned_by": "remote",
             "prairie": {"line": remote.name, "kind": "remote", "remote": {"url": remote.url, "model": remote.model}}}
            for remote in self.of.values()
        ]  # fmt: skip

    def chat(self, body: ChatRequest, caller: Caller) -> RemoteAnswering:
        """Raises PrairieError for what is refused here: a full queue, limits, messages that are none."""
        return RemoteAnswering(self, self.of[body.model], body, [body.to_messages()], caller, "chatcmpl")

    def complete(self, body: CompletionRequest, caller: Caller) -> RemoteAnswering:
        prompts = body.prompts()
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise RequestError("a remote model takes no token ids", wanted="text", param="prompt")
        return RemoteAnswering(self, self.of[body.model], body, [str(prompt) for prompt in prompts], caller, "cmpl")


@dataclass
class Said:
    """One choice as far as it has come."""

    id: str
    prompt: tuple[Message, ...] | str
    text: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    done: bool = False


class RemoteAnswering(Response):
    """The response of one request, whole or as a stream."""

    def __init__(
        self,
        remotes: Remotes,
        remote: Remote,
        body: ChatRequest | CompletionRequest,
        prompts: Sequence[tuple[Message, ...] | str],
        caller: Caller,
        prefix: str,
    ) -> None:
        self.remotes, self.remote, self.asked, self.caller = remotes, remote, body, caller
        self.desk, self.path = remotes.desk, PATHS[prefix]
        self.id = f"{prefix}-{secrets.token_hex(12)}"
        self.arrived = time.perf_counter()
        n, count = body.n or 1, (body.n or 1) * len(prompts)
        ids = [self.id if index == 0 else f"{self.id}:{index}" for index in range(count)]
        self.choices = [Said(id, prompts[index // n]) for index, id in enumerate(ids)]
        self.identity: dict[str, Any] = {}
        self.started = False
        self._recording: asyncio.Task[None] | None = None
        self.began: float | None = None
        """When the other server began to answer."""
        self.background = None
        self.status_code = 200
        self.init_headers({"Cache-Control": "no-store"})
        self.desk.admit(count, caller.tenant)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._stream(send) if self.asked.stream else self._whole(send)
        try:
            await until_left(work, receive)
        finally:
            await asyncio.shield(self.desk.keep(self._close()))

    async def _whole(self, send: Send) -> None:
        client = self.remotes.client(self.remote)
        said = await self.remote.answer(client, self.path, self._outgoing())
        await self._start(said)
        for choice in said.get("choices") or ():
            self._take(choice, choice.get("message") or {})
        await self._finish()
        self._charge(said)
        data = to_json(self._ours(said))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": [*self.raw_headers, *headers]})
        await send({"type": "http.response.body", "body": data, "more_body": False})

    async def _stream(self, send: Send) -> None:
        client = self.remotes.client(self.remote)

        async def put(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            async for chunk in self.remote.events(client, self.path, self._outgoing()):
                if not self.started:
                    await self._start(chunk)
                    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
                    await send({"type": "http.response.start", "status": 200, "headers": [*self.raw_headers, *headers]})
                for choice in chunk.get("choices") or ():
                    self._take(choice, choice.get("delta") or {})
                # A choice's whole text is on disk before its last chunk is passed on.
                await self._finish()
                self._charge(chunk)
                await put(event(self._ours(chunk)))
        except PrairieError as error:
            if not self.started:
                raise
            log.warning("%s ended early: %s", self.id, error)
            await put(event(body_of(error)[1]), more=False)
            return
        await put(DONE, more=False)

    def _outgoing(self) -> dict[str, Any]:
        """The body as it came."""
        return self.asked.model_dump(exclude_unset=True, by_alias=True)

    def _take(self, choice: Mapping[str, Any], message: Mapping[str, Any]) -> None:
        index = choice.get("index", 0)
        if not isinstance(index, int) or not 0 <= index < len(self.choices):
            raise RemoteError(f"the server of {self.remote.name} made a choice that nobody asked for", got=index)
        said = self.choices[index]
        said.text.append(message.get("content") or choice.get("text") or "")
        said.finish_reason = choice.get("finish_reason") or said.finish_reason

    def _ours(self, said: dict[str, Any]) -> dict[str, Any]:
        """The other server's object under our ids and name."""
        choices = [
            {**choice, "response_id": self.choices[choice.get("index", 0)].id} for choice in said.get("choices") or ()
        ]
        return {**said, "id": self.id, "model": self.asked.model, "choices": choices, "prairie": self.identity}

    async def _start(self, said: Mapping[str, Any]) -> None:
        """With the first that the other server says: who it is, and the rows."""
        self.began = time.perf_counter()
        told = {"url": self.remote.url, "model": self.remote.model, "fingerprint": said.get("system_fingerprint"),
                "prairie": said.get("prairie")}  # fmt: skip
        remote = {key: value for key, value in told.items() if value is not None}
        self.identity = {"line": self.remote.name, "version": None, "artifact_id": None, "remote": remote}
        await self._record(self._write_rows([self._row(choice, remote) for choice in self.choices]))

    async def _write_rows(self, rows: Sequence[Row]) -> None:
        await self.desk.do(self.desk.feedback.start_responses, rows)
        self.started = True

    async def _record(self, writing: Coroutine[Any, Any, None]) -> None:
        """What is being written is written to its end, whoever leaves meanwhile; `_close` waits for it."""
        self._recording = self.desk.keep(writing)
        await asyncio.shield(self._recording)

    def _row(self, choice: Said, remote: Mapping[str, Any]) -> Row:
        from prairie.store.feedback import Response as Row

        sampling = {key: value for key, value in self._outgoing().items() if key not in ("messages", "prompt", "user")}
        theirs = remote.get("prairie") or {}
        return Row(
            id=choice.id, model=self.asked.model, prompt=choice.prompt, line=self.remote.name,
            weights_hash=theirs.get("weights_hash"), adapter_hash=theirs.get("adapter_hash"),
            sampling={**sampling, "remote": dict(remote)}, user=self.caller.user, surface=self.caller.surface,
            purpose=self.caller.purpose,
        )  # fmt: skip

    async def _finish(self) -> None:
        """Closes the rows of the choices that have ended."""
        for choice in self.choices:
            if choice.finish_reason is not None and not choice.done:
                choice.done = True
                await self._record(self.desk.do(
                    self.desk.feedback.finish_response, choice.id, (), None, "".join(choice.text),
                    choice.finish_reason, self._latency_ms(),
                ))  # fmt: skip
                self.desk.metrics.choices.labels(self.remote.name, choice.finish_reason).inc()
                self._trace(choice, choice.finish_reason)

    def _charge(self, said: Mapping[str, Any]) -> None:
        usage = said.get("usage")
        if isinstance(usage, dict):
            self.desk.limits.charge(self.caller.tenant, int(usage.get("total_tokens") or 0))

    async def _close(self) -> None:
        """Gives back the places; what had not ended is recorded as aborted."""
        try:
            if self._recording is not None:
                await asyncio.gather(self._recording, return_exceptions=True)
            for choice in self.choices if self.started else ():
                if not choice.done:
                    choice.done = True
                    self._trace(choice, "cancelled")
                    await self.desk.do(
                        self.desk.feedback.abort_response, choice.id, (), None, "".join(choice.text), "cancelled",
                        self._latency_ms(),
                    )  # fmt: skip
        except PrairieError as error:
            log.warning("the end of %s was not recorded: %s", self.id, error)
        finally:
            self.desk.pending -= len(self.choices)

    def _trace(self, choice: Said, end: str) -> None:
        if self.caller.trace is not None:
            kind = "chat" if isinstance(choice.prompt, tuple) else "text_completion"
            self.caller.trace.answered(Told(
                kind, self.asked.model, self.remote.model, choice.id, None, None, None, end, self.arrived,
                first_token=self.began,
            ))  # fmt: skip

    def _latency_ms(self) -> float:
        return round((time.perf_counter() - self.arrived) * 1000, 3)
