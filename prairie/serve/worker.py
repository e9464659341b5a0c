"""The thread that computes: it steps every resident engine in turn and hands what they say to the event loop.

Engines are not thread-safe, so whatever touches one (a new request, a cancel, an adapter added or removed) is left here
as an errand and done between two steps. Outputs of one step cross to the event loop in one call.
Not here: which versions are resident (`models`), what an answer looks like (`answers`, `choices`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from prairie.errors import PrairieError

if TYPE_CHECKING:
    from prairie.engine.engine import Engine
    from prairie.engine.request import Completion, Output, Request

log = logging.getLogger("prairie.serve")
T = TypeVar("T")


class EngineFault(PrairieError):
    """The engine broke down in the middle of a step; its requests are lost, the server goes on."""

    http_status = 500
    code = "engine_error"


class Stopping(EngineFault):
    """The server ends; no fault of a model's."""

    def __init__(self) -> None:
        super().__init__("the server is stopping", mend="ask again in a moment")


class Sink(Protocol):
    """Who waits for the outputs of a request; called on the event loop."""

    def take(self, output: Output) -> None: ...
    def fail(self, request_id: str, error: Exception) -> None: ...


class Worker:
    """Owns the engines' thread. All methods may be called from any thread."""

    def __init__(self) -> None:
        self.on_fault: Callable[[Engine], None] = lambda engine: None
        """Hears of an engine that broke; called in the worker's thread."""
        self._to_loop: Callable[[Callable[[], None]], Any] = lambda call: call()
        self._errands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._sinks: dict[Engine, dict[str, Sink]] = {}
        """Engines that have work, each with who waits for which request."""
        self._working = False
        self._stopping = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="prairie-engine", daemon=True)
        self.beat = time.monotonic()
        """When the thread last came round its loop."""
        self.steps = 0

    def start(self, deliver: Callable[[Callable[[], None]], Any]) -> None:
        """`deliver` runs a call on the event loop from any thread: `loop.call_soon_threadsafe`."""
        self._to_loop = deliver
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the step it is in; what still ran is failed."""
        self._leave(self._stop)
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def busy(self) -> bool:
        return bool(self._working or self._errands or self._sinks)

    def stuck_s(self) -> float:
        """Seconds since the thread last came round although there is work; 0 when it is idle."""
        return time.monotonic() - self.beat if self.busy else 0.0

    def submit(self, engine: Engine, requests: Sequence[Request], sink: Sink) -> None:
        """Queues requests; a refusal by the engine reaches `sink.fail`."""
        self._leave(lambda: self._add(engine, requests, sink))

    def cancel(self, engine: Engine, request_ids: Sequence[str]) -> Future[dict[str, Completion]]:
        """Stops requests before the next step: what they hold is free, their sinks hear nothing more.

        Resolves to what each of them had said; one that was finished before is not in it.
        """
        return self.call(lambda: self._cancel(engine, request_ids))

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Runs `work` between two steps."""
        future: Future[T] = Future()

        def errand() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        self._leave(errand)
        return future

    def _leave(self, errand: Callable[[], None]) -> None:
        with self._wake:
            if not self._ended:
                self._errands.append(errand)
                self._wake.notify()
                return
        # Nobody steps any more, so the caller's own thread may touch the engines.
        errand()

    def _run(self) -> None:
        while self._wait():
            self._round()

    def _wait(self) -> bool:
        """Until there is work; False when all is done and the thread shall end."""
        with self._wake:
            while not (self._errands or self._sinks or self._stopping):
                self._working = False
                self._wake.wait()
                self.beat = time.monotonic()
            self._working = True
            self._ended = self._stopping and not self._errands
            return not self._ended

    def _round(self) -> None:
        """All errands, then a step of each engine. A function of its own: an engine that left memory in the meantime
        must not live on in a variable of a thread that waits."""
        with self._wake:
            errands = list(self._errands)
            self._errands.clear()
        for errand in errands:
            errand()
        for engine in list(self._sinks):
            self._step(engine)
        self.beat = time.monotonic()
        self.steps += 1

    def _stop(self) -> None:
        self._stopping = True
        for engine in list(self._sinks):
            self._fail_all(engine, Stopping())

    def _add(self, engine: Engine, requests: Sequence[Request], sink: Sink) -> None:
        for request in requests:
            try:
                if self._stopping:
                    raise Stopping()
                engine.add(request)
            except Exception as error:
                self._fail(sink, request.id, error)
            else:
                self._sinks.setdefault(engine, {})[request.id] = sink

    def _cancel(self, engine: Engine, request_ids: Sequence[str]) -> dict[str, Completion]:
        sinks = self._sinks.get(engine, {})
        said = {}
        for request_id in request_ids:
            sinks.pop(request_id, None)
            completion = engine.cancel(request_id)
            if completion is not None:
                said[request_id] = completion
        if not sinks:
            self._sinks.pop(engine, None)
        return said

    def _step(self, engine: Engine) -> None:
        sinks = self._sinks[engine]
        try:
            outputs = engine.step()
        except Exception as error:
            log.exception("a step failed; %d answers are lost", len(sinks))
            self._fail_all(engine, EngineFault(f"the engine failed in the middle of a step: {error}", mend="ask again"))
            self.on_fault(engine)
            return
        told: list[tuple[Sink, Output]] = []
        for output in outputs:
            sink = sinks.get(output.request_id)
            if sink is None:
                continue
            if output.finish_reason is not None:
                del sinks[output.request_id]
            told.append((sink, output))
        if not sinks:
            del self._sinks[engine]
        if told:
            self._deliver(lambda: _tell(told))

    def _fail_all(self, engine: Engine, error: Exception) -> None:
        for request_id, sink in self._sinks.pop(engine).items():
            try:
                engine.cancel(request_id)
            except Exception:
                log.debug("cancelling %s after a fault failed", request_id, exc_info=True)
            self._fail(sink, request_id, error)

    def _fail(self, sink: Sink, request_id: str, error: Exception) -> None:
        self._deliver(lambda: sink.fail(request_id, error))

    def _deliver(self, call: Callable[[], None]) -> None:
        try:
            self._to_loop(call)
        except RuntimeError:
            # The loop is closed: nobody is left to hear it.
            log.debug("an output came after the end of the event loop")


def _tell(outputs: Sequence[tuple[Sink, Output]]) -> None:
    for sink, output in outputs:
        sink.take(output)
