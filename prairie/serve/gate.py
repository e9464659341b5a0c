"""The gate every HTTP request passes: request id, host, API key, body limit, figures. Default is deny.

Auth by a list of protected paths has failed again and again (a new route is open until somebody remembers), so the gate
stands before the router and knows one open path. Plain ASGI: it buffers nothing, so streams stay streams.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import logging
import time
import uuid
from collections.abc import Callable
from typing import Protocol

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prairie.errors import AuthError, PrairieError, RequestError
from prairie.serve.errors import error_response
from prairie.serve.metrics import Metrics
from prairie.serve.tracing import Tracing

OPEN_PATHS = frozenset({"/healthz"})
BODY_TIMEOUT_S = 60.0

log = logging.getLogger("prairie.serve")


class Keyring(Protocol):
    """The store's API keys as the gate sees them."""

    required: bool

    async def name_of(self, key: str) -> str | None:
        """Whose valid key it is; None for any other."""
        ...


class HostError(PrairieError):
    """A name was used for this server that does not belong to it."""

    http_status = 403
    code = "host_not_allowed"


class BodyTooLarge(RequestError):
    """The request body passes the limit."""

    http_status = 413
    code = "body_too_large"


class NotAdmin(PrairieError):
    """The key is good, and not for this."""

    http_status = 403
    code = "permission_denied"


def is_admin(name: str) -> bool:
    """Keys named `admin` or `admin-...` may change what is served."""
    return name == "admin" or name.startswith("admin-")


class Gate:
    """ASGI middleware; see the module's text."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keyring,
        metrics: Metrics,
        max_body_bytes: int,
        host_allowed: Callable[[str], bool] = lambda host: True,
        tracing: Tracing | None = None,
    ) -> None:
        self.app, self.keys, self.metrics, self.tracing = app, keys, metrics, tracing
        self.max_body_bytes, self.host_allowed = max_body_bytes, host_allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        request_id = _request_id(headers.get(b"x-request-id"))
        trace = None
        if self.tracing is not None:
            parent = headers.get(b"traceparent")
            trace = self.tracing.begin(_method(scope["method"]), scope["path"], parent, request_id)
        scope.setdefault("state", {}).update(request_id=request_id, trace=trace)
        started, status = time.perf_counter(), 0

        async def tagged_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode("latin-1"))]
            await send(message)

        try:
            # Each tenant's prompts are cached apart: one must not learn from timing what another asked.
            scope["state"]["tenant"] = await self._check(scope["path"], headers)
            await self.app(scope, self._limited(receive), tagged_send)
        except Exception as error:
            if not isinstance(error, PrairieError):
                log.error("%s %s (%s) failed", scope["method"], scope["path"], request_id, exc_info=error)
            if status:
                raise
            await error_response(error, _challenge(scope["path"], error))(scope, receive, tagged_send)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self.metrics.http.labels(_method(scope["method"]), route, str(status)).inc()
            self.metrics.http_seconds.labels(route).observe(time.perf_counter() - started)
            if trace is not None:
                trace.end(route, _method(scope["method"]), status)

    async def _check(self, path: str, headers: dict[bytes, str]) -> str:
        """Whose key came with the request, "" when none is needed. Raises HostError, AuthError or BodyTooLarge."""
        tenant = ""
        if not self.keys.required and not self.host_allowed(headers.get(b"host", "")):
            raise HostError(
                "this server does not answer to that name", got=headers.get(b"host"), wanted="an address or localhost",
                mend="start it with --host NAME, or create an API key with `prairie keys create NAME`",
            )  # fmt: skip
        if self.keys.required and path not in OPEN_PATHS:
            key = _key_of(headers.get(b"authorization", ""))
            name = await self.keys.name_of(key) if key else None
            if name is None:
                raise AuthError(
                    "no API key came with the request" if not key else "the API key is not known or was revoked",
                    wanted="the header `Authorization: Bearer KEY`", mend="create one with `prairie keys create NAME`",
                )  # fmt: skip
            tenant = name
        length = headers.get(b"content-length", "0")
        if length.isdecimal() and int(length) > self.max_body_bytes:
            raise self._too_large(int(length))
        return tenant

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that counts the body and does not wait for ever for its rest."""
        seen, whole = 0, False
        # For the whole body: one that drips a byte at a time would otherwise hold its place for ever.
        until = asyncio.get_running_loop().time() + BODY_TIMEOUT_S

        async def limited() -> Message:
            nonlocal seen, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the request body did not come within {BODY_TIMEOUT_S:.0f} s") from None
            whole = message["type"] != "http.request" or not message.get("more_body", False)
            seen += len(message.get("body", b""))
            if seen > self.max_body_bytes:
                raise HTTPException(413, str(self._too_large(seen)))
            return message

        return limited

    def _too_large(self, size: int) -> BodyTooLarge:
        return BodyTooLarge(
            "the request body is too large", got=f"{size} bytes", wanted=f"at most {self.max_body_bytes} bytes",
            mend="send less, or start the server with a larger --max-body-mb",
        )  # fmt: skip


def loopback_names(host: str) -> Callable[[str], bool]:
    """Which Host headers a server on a loopback address answers to: any IP address, localhost, and its own name.

    A page from elsewhere can make a browser talk to 127.0.0.1 under a name of its own (DNS rebinding), not under these.
    """

    def allowed(header: str) -> bool:
        name = header.rsplit(":", 1)[0] if not header.endswith("]") else header
        name = name.strip("[]").lower()
        if name in ("localhost", host.lower(), "") or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    return allowed


def _key_of(header: str) -> str:
    """The key in an Authorization header: Bearer, or the password of Basic (what a browser asks its user for)."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


def _challenge(path: str, refusal: Exception) -> dict[str, str]:
    if not isinstance(refusal, AuthError):
        return {}
    # A browser that opens the page shows its own password box for Basic; programs are told Bearer.
    return {
        "WWW-Authenticate": "Bearer" if path.startswith("/v1/") else 'Basic realm="prairie: the key is the password"'
    }


def _request_id(given: str | None) -> str:
    if given and len(given) <= 128 and given.isascii() and given.isprintable():
        return given
    return f"req-{uuid.uuid4().hex}"


def _method(method: str) -> str:
    return method if method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} else "other"
