"""Traces of requests for OpenTelemetry: `prairie serve --otel URL` (extra `otel`).

A span for each HTTP request, continued from the caller's `traceparent`, and below it one for each answer: who wrote it,
how many tokens, how long it waited, when its first token came. The names are OpenTelemetry's for generative models, and
vLLM's for latencies. No text of anybody is in them. Spans leave in batches from a thread of their own; a receiver that
is down costs spans, never answers.
Not here: when an answer begins and ends (`choices`, `remote`), the figures of /metrics (`metrics`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from prairie import __version__
from prairie.errors import UsageError

if TYPE_CHECKING:
    from opentelemetry.trace import Span

UNTRACED = frozenset({"/healthz", "/readyz", "/metrics"})
"""Asked for every few seconds by machines."""
EXPORT_S = 5.0


@dataclass(frozen=True)
class Told:
    """What is known of an answer at its end. Times are those of `time.perf_counter`."""

    kind: str
    """chat or text_completion."""
    asked: str
    """The model's name in the request."""
    version: str
    id: str
    prompt_tokens: int | None
    cached_tokens: int | None
    answer_tokens: int | None
    finish_reason: str
    arrived: float
    seated: float | None = None
    """When it first had a place in a batch."""
    first_token: float | None = None


class Tracing:
    """Where spans go. Methods may be called from any thread."""

    def __init__(self, url: str) -> None:
        """`url`: of an OTLP receiver over HTTP, such as http://127.0.0.1:4318. Raises UsageError."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UsageError("that is no address of an OTLP receiver", got=repr(url), wanted="http://HOST:4318")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise UsageError(
                "traces need the extra `otel`, which is not installed", mend="pip install 'prairie[otel]'"
            ) from None
        endpoint = url if parts.path.strip("/") else f"{url.rstrip('/')}/v1/traces"
        # Not the process's global provider: a program around this one may have its own.
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "prairie", "service.version": __version__}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=EXPORT_S)))
        self._tracer = self._provider.get_tracer("prairie.serve", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, method: str, path: str, traceparent: str | None, request_id: str) -> RequestTrace | None:
        """The span of an HTTP request; None for what is not traced."""
        if path in UNTRACED:
            return None
        from opentelemetry.trace import SpanKind

        carrier = {"traceparent": traceparent} if traceparent else {}
        span = self._tracer.start_span(
            method, self._propagator.extract(carrier), SpanKind.SERVER,
            {"http.request.method": method, "url.path": path, "gen_ai.request.id": request_id},
        )  # fmt: skip
        return RequestTrace(self._tracer, span, request_id)

    def close(self) -> None:
        """Sends what is left; blocks for as long as one export may take."""
        self._provider.shutdown()


class RequestTrace:
    """One HTTP request and the answers that it asked for."""

    def __init__(self, tracer: Any, span: Span, request_id: str) -> None:
        self._tracer, self._span, self._request_id = tracer, span, request_id

    def answered(self, told: Told) -> None:
        """The span of one answer, from the request's arrival until now."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        now, clock = time.time_ns(), time.perf_counter()

        def at(moment: float) -> int:
            return now - round((clock - moment) * 1e9)

        facts = {
            "gen_ai.request.id": self._request_id,
            "gen_ai.operation.name": told.kind,
            "gen_ai.request.model": told.asked,
            "gen_ai.response.model": told.version,
            "gen_ai.response.id": told.id,
            "gen_ai.response.finish_reasons": [told.finish_reason],
            "gen_ai.usage.input_tokens": told.prompt_tokens,
            "gen_ai.usage.cached_tokens": told.cached_tokens,
            "gen_ai.usage.output_tokens": told.answer_tokens,
            "gen_ai.latency.time_in_queue": None if told.seated is None else told.seated - told.arrived,
            "gen_ai.latency.time_to_first_token": None if told.first_token is None else told.first_token - told.arrived,
            "gen_ai.latency.e2e": clock - told.arrived,
        }
        span = self._tracer.start_span(
            f"{told.kind} {told.asked}", set_span_in_context(self._span), SpanKind.INTERNAL,
            {name: value for name, value in facts.items() if value is not None}, start_time=at(told.arrived),
        )  # fmt: skip
        for name, moment in (("in a batch", told.seated), ("first token", told.first_token)):
            if moment is not None:
                span.add_event(name, timestamp=at(moment))
        if told.finish_reason in ("cancelled", "error", "fault"):
            span.set_status(Status(StatusCode.ERROR, told.finish_reason))
        span.end(now)

    def end(self, route: str, method: str, status: int) -> None:
        """The last byte is sent, or (`status` 0) the client left before the first."""
        from opentelemetry.trace import Status, StatusCode

        self._span.update_name(f"{method} {route}")
        self._span.set_attributes({"http.route": route, "http.response.status_code": status})
        if status == 0 or status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()
