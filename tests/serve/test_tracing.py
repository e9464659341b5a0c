"""Traces: real protobuf over HTTP to a receiver of the test's own."""

import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from tiny_server import Settings, ask, running

from prairie.errors import UsageError
from prairie.serve.tracing import Tracing

service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="the extra `otel`")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `otel` is not installed")


@pytest.fixture
def collector():
    """(address, spans so far), as an OpenTelemetry collector would take them."""
    spans = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            data = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf"
            for group in service.ExportTraceServiceRequest.FromString(data).resource_spans:
                about = {a.key: a.value.string_value for a in group.resource.attributes}
                assert about["service.name"] == "prairie"
                spans.extend(span for scope in group.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(service.ExportTraceServiceResponse().SerializeToString())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", spans
    server.shutdown()
    server.server_close()
    thread.join()


def attributes(span):
    def plain(value):
        kind = value.WhichOneof("value")
        return [plain(v) for v in value.array_value.values] if kind == "array_value" else getattr(value, kind)

    return {a.key: plain(a.value) for a in span.attributes}


def test_each_request_and_each_answer_is_a_span(home, collector):
    url, spans = collector
    parent = {"traceparent": f"00-{'a1' * 16}-{'b2' * 8}-01", "X-Request-Id": "mine-7"}
    with running(home, ["spark"], Settings(otel=url)) as server:
        base = server.url
        whole = httpx.post(f"{base}/v1/chat/completions", json=ask("spark", n=2), headers=parent, timeout=30).json()
        httpx.post(f"{base}/v1/completions", json={"model": "spark", "prompt": "fox", "stream": True}, timeout=30)
        httpx.post(f"{base}/v1/chat/completions", json=ask("spark", n=0), timeout=30)
        httpx.get(f"{base}/healthz")
        server.slowed()
        left = ask("spark", stream=True, max_tokens=120, ignore_eos=True)
        with httpx.stream("POST", f"{base}/v1/chat/completions", json=left, timeout=30) as answer:
            next(answer.iter_lines())
        server.idle()
    requests = {s.span_id: s for s in spans if s.kind == s.SPAN_KIND_SERVER}
    answers = [s for s in spans if s.kind == s.SPAN_KIND_INTERNAL]
    assert len(requests) == 4 and len(answers) == 4 and len(spans) == 8, "health is not traced"
    assert {s.name for s in requests.values()} == {"POST /v1/chat/completions", "POST /v1/completions"}

    mine = [s for s in answers if attributes(s)["gen_ai.request.id"] == "mine-7"]
    assert {attributes(s)["gen_ai.response.id"] for s in mine} == {c["response_id"] for c in whole["choices"]}
    (above,) = {s.parent_span_id for s in mine}
    assert requests[above].trace_id == mine[0].trace_id == bytes.fromhex("a1" * 16)
    assert requests[above].parent_span_id == bytes.fromhex("b2" * 8)
    said = attributes(mine[0])
    assert said["gen_ai.operation.name"] == "chat" and said["gen_ai.request.model"] == "spark"
    assert said["gen_ai.response.model"] == "spark@1" and said["gen_ai.response.finish_reasons"] == ["length"]
    assert said["gen_ai.usage.input_tokens"] == whole["usage"]["prompt_tokens"]
    assert sum(attributes(s)["gen_ai.usage.output_tokens"] for s in mine) == whole["usage"]["completion_tokens"]
    queue, whole_s = (said[f"gen_ai.latency.{name}"] for name in ("time_in_queue", "e2e"))
    lasted = (mine[0].end_time_unix_nano - mine[0].start_time_unix_nano) / 1e9
    assert 0 < queue <= whole_s < 30 and abs(lasted - whole_s) < 0.01
    assert attributes(requests[above])["http.response.status_code"] == 200

    (text,) = [attributes(s) for s in answers if s.name == "text_completion spark"]
    waited, first, whole_s = (
        text[f"gen_ai.latency.{name}"] for name in ("time_in_queue", "time_to_first_token", "e2e")
    )
    assert 0 < waited <= first <= whole_s
    (gone,) = [s for s in answers if attributes(s)["gen_ai.response.finish_reasons"] == ["cancelled"]]
    assert gone.status.code == gone.status.STATUS_CODE_ERROR and attributes(gone)["gen_ai.usage.output_tokens"] < 120
    assert [e.name for e in gone.events] == ["in a batch", "first token"]
    (refused,) = [s for s in requests.values() if attributes(s)["http.response.status_code"] == 400]
    assert refused.status.code == refused.status.STATUS_CODE_UNSET, "a wrong request is no fault of ours"
    assert not any("fox" in str(span) for span in spans), "no text of anybody"


def test_a_collector_that_is_down_costs_no_answer(home):
    with running(home, ["spark"], Settings(otel="http://127.0.0.1:9")) as server:
        began = time.monotonic()
        for _ in range(3):
            assert httpx.post(f"{server.url}/v1/chat/completions", json=ask("spark"), timeout=30).status_code == 200
    assert time.monotonic() - began < 55, "its exporter tries for a minute"


def test_what_cannot_be_is_one_sentence(monkeypatch):
    with pytest.raises(UsageError, match="no address of an OTLP receiver"):
        Tracing("localhost:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(UsageError, match=r"the extra `otel`, which is not installed; pip install 'prairie\[otel\]'"):
        Tracing("http://127.0.0.1:4318")
