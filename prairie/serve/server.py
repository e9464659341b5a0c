"""The process around the app: the port, the signals, the drain.

The port is taken before anything is imported or loaded, so that a taken one is said at once, and connections that come
while the server starts wait in the kernel instead of being refused. SIGTERM and SIGINT stop accepting and let running
requests end (up to `grace_s`), a second signal does not wait. Not here: the app (`app`), command line options (`cli`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from prairie.errors import BusyError, UsageError
from prairie.serve.memory import settle

if TYPE_CHECKING:
    from fastapi import FastAPI

BACKLOG = 1024
HEAD_S = 20.0
"""How long the head of a request may take; a client that drips it would hold its connection for ever (slow-loris)."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises BusyError; UsageError for a host that is not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise UsageError(f"the host {host!r} is not known", got=error, wanted="an address of this machine") from None
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        # Listening at once is what keeps a second server from binding the same port.
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise BusyError(
                f"port {port} on {host} is in use by another program", mend="choose another with --port"
            ) from None
        if error.errno == errno.EACCES:
            raise BusyError(f"port {port} is not for this user", wanted="1024 or more", mend="use --port") from None
        raise UsageError(
            f"{host}:{port} cannot be served", got=error.strerror, wanted="an address of this machine"
        ) from None
    return listening


def url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve_on(
    listening: socket.socket, app: FastAPI, *, grace_s: float = 30.0, on_ready: Callable[[], None] = lambda: None
) -> None:
    """Serves until a signal. `on_ready` is called (on the event loop) when all models are loaded.

    Raises what made the first load fail. In another thread than the main one signals are left alone: end it by
    `app.state.service.on_failure()`.
    """
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    service = app.state.service

    class Impatient(H11Protocol):
        """Closes a connection on which a head is begun and not ended within HEAD_S."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.last_cycle = self.cycle
            self.head_timer = self.loop.call_later(HEAD_S, self.look_at_head, False)

        def connection_lost(self, exc: Exception | None) -> None:
            self.head_timer.cancel()
            super().connection_lost(exc)

        def look_at_head(self, waited: bool) -> None:
            """`waited`: a head was begun at the last look too, and no request has come since."""
            answering = self.cycle is not None and not self.cycle.response_complete
            fresh = self.cycle is None
            begun = not answering and (fresh or bool(self.conn.trailing_data[0]))
            if begun and self.cycle is self.last_cycle and (fresh or waited):
                self.transport.close()
                return
            self.last_cycle = self.cycle
            self.head_timer = self.loop.call_later(HEAD_S, self.look_at_head, begun)

    class Server(uvicorn.Server):
        """Ends with exit code 0 after a drain, where uvicorn would end by the signal itself."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.force_exit = self.should_exit
            self.should_exit = True
            service.draining = True

    server = Server(
        uvicorn.Config(
            app,
            loop="asyncio",
            http=Impatient,
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=65,
            timeout_graceful_shutdown=max(1, round(grace_s)),
        )
    )

    def end() -> None:
        server.should_exit = True

    def ready() -> None:
        if threading.current_thread() is threading.main_thread():  # the process is ours alone
            settle()
        on_ready()

    service.on_ready, service.on_failure = ready, end
    try:
        server.run(sockets=[listening])
    except SystemExit:
        if service.failure is None:
            raise
    if service.failure is not None:
        raise service.failure
