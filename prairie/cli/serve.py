"""`prairie serve`: models over OpenAI's HTTP API, with a chat page and votes."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import socket
import sys
from dataclasses import replace
from typing import Annotated

import typer

from prairie.cli.options import HomeOption, JsonOption, ThreadsOption, emit, open_home, say
from prairie.serve.options import Dtype, Quantize, Speculate

COMPILE_AFTER_S = 5.0
"""After the start, the compiled form of the models is made ready: the first questions have the cores to themselves."""


def serve(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME_OR_DIR]...", help="Lines, versions or model folders; none: every line."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    threads: ThreadsOption = None,
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="Keep the weights in float32, or rounded to bfloat16; auto: in bfloat16 where nothing is lost by it "
            "and a probe finds it faster."
        ),
    ] = Dtype.auto,
    quantize: Annotated[
        Quantize | None,
        typer.Option("--quantize", help="Keep the weights in bf16, int8, int4 or nf4; the log says what that changes."),
    ] = None,
    speculate: Annotated[
        Speculate | None,
        typer.Option(help="Draft what stood in prompt and answer before, where that is faster; answers stay the same."),
    ] = None,
    max_pending: Annotated[
        int, typer.Option(min=1, help="Answers under way or queued; more are told to come back (429).")
    ] = 512,
    max_pending_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that prompts and answers under way or queued may come to.")
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Of each API key; more are told to come back (429).")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Of each API key, prompts and answers together.")
    ] = None,
    max_adapters: Annotated[
        int, typer.Option(min=0, help="Adapters loaded by name that stay in memory although nobody uses them.")
    ] = 16,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Largest request body.")] = 8,
    remote: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=URL[#MODEL]", help="A model of another OpenAI-compatible server; may be repeated."),
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Server processes behind the port, on one home.")] = 1,
    otel: Annotated[
        str | None, typer.Option(metavar="URL", help="An OTLP receiver over HTTP that gets traces of the requests.")
    ] = None,
    grace_s: Annotated[float, typer.Option(min=0, help="How long a stop waits for running answers.")] = 30.0,
    no_guard: Annotated[
        bool, typer.Option("--no-guard", help="Do not take back a trial or a promotion that goes badly.")
    ] = False,
    compile_first: Annotated[
        bool,
        typer.Option(
            "--compile", help="Ready only when the models are compiled: seeded answers then repeat bit by bit."
        ),
    ] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve models over OpenAI's HTTP API, with a chat page at / and votes that the next version learns from."""
    from prairie.engine.remote import Remote
    from prairie.errors import UsageError
    from prairie.serve.replicas import inherited_socket
    from prairie.serve.server import bind, serve_on, url_of

    if dtype is not Dtype.auto and quantize is not None:
        raise UsageError(
            "--dtype and --quantize both say how weights are kept", got=f"{dtype.value} and {quantize.value}",
            mend="leave out one of them",
        )  # fmt: skip
    remotes = [Remote.parse(text, os.environ.get("PRAIRIE_REMOTE_KEY")) for text in remote or ()]
    # Before anything is loaded: a taken port is said at once.
    listening = inherited_socket() or bind(host, port)
    if replicas > 1:
        _serve_replicas(listening, replicas, grace_s, as_json)
        return
    with listening, open_home(home, make=bool(names or remotes)) as store:
        import logging

        from prairie.runtime import Runtime
        from prairie.serve.app import Settings, create_app
        from prairie.serve.gate import loopback_names

        logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
        logging.getLogger("prairie").setLevel(logging.INFO)
        settings = Settings(
            max_pending=max_pending, max_pending_tokens=max_pending_tokens, requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute, remotes=remotes, max_adapters=max_adapters,
            admin_without_key=_is_loopback(host), max_body_bytes=max_body_mb * 2**20, otel=otel, guard=not no_guard,
            compile_first=compile_first,
        )  # fmt: skip
        if _is_loopback(host):
            settings = replace(settings, host_allowed=loopback_names(host))
        count = threads or int(os.environ.get("OMP_NUM_THREADS") or 0) or None
        asked = {
            "dtype": dtype.value, "quantize": quantize and quantize.value, "speculate": speculate and speculate.value,
            "threads": threads,
        }  # fmt: skip
        given = {name: value for name, value in asked.items() if value is not None}
        app = create_app(store, names or (), settings, lambda: Runtime.detect(threads=count), **given)

        def ready() -> None:
            served = [model["id"] for model in app.state.service.models.listing()]
            served += [each.name for each in remotes]
            url = url_of(listening)
            say(f"{', '.join(served)} on {url}   chat page: {url}/   Ctrl-C ends.")
            emit({"url": url, "pid": os.getpid(), "models": served}, as_json)
            asyncio.get_running_loop().call_later(COMPILE_AFTER_S, app.state.service.models.start_compiling)

        serve_on(listening, app, grace_s=grace_s, on_ready=ready)
        if not app.state.service.models.ready:
            # Stopped while it was loading: that thread cannot be interrupted, and nothing depends on it.
            store.close()
            os._exit(0)


def _serve_replicas(listening: socket.socket, count: int, grace_s: float, as_json: bool) -> None:
    """The same command line again for each child, as one server with --json."""
    from prairie.serve.replicas import Replicas

    command = [argument for argument in sys.argv[1:] if argument != "--json"]
    # Of an option that comes twice the last counts.
    command += ["--replicas", "1", "--json"]

    def ready(line: str) -> None:
        told = json.loads(line)
        say(f"{', '.join(told['models'])} on {told['url']}   {count} processes   Ctrl-C ends.")
        emit({"url": told["url"], "pid": os.getpid(), "models": told["models"], "replicas": count}, as_json)

    Replicas(listening, command, count).run(ready, grace_s)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
