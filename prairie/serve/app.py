"""The HTTP face: routes, and the parts behind them put together. `create_app` loads nothing; the lifespan does.

    app = create_app(Home(), ["spark"])       # raises in one sentence if there is nothing to serve
    uvicorn.run(app)                          # or prairie.serve.server.run, which also owns port and signals

torch is imported by the first load, in the loader's thread: votes are taken as soon as the port is open.
Not here: what an answer is made of (`choices`, `stream`), which version answers (`models`), keys and limits (`gate`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Header, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from prairie import __version__
from prairie.errors import BusyError, RequestError
from prairie.serve import board, errors, studio
from prairie.serve.adapters import Adapters
from prairie.serve.choices import Caller, Desk
from prairie.serve.gate import Gate, NotAdmin, is_admin
from prairie.serve.guard import Guard
from prairie.serve.limits import Limits
from prairie.serve.metrics import CONTENT_TYPE, Metrics
from prairie.serve.models import MAX_ADAPTERS, Models
from prairie.serve.records import feedback_of
from prairie.serve.reload import Keys, Watcher
from prairie.serve.remote import Remotes
from prairie.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    ErrorBody,
    FeedbackRequest,
    LoadAdapter,
    TokenizeRequest,
    UnloadAdapter,
)
from prairie.serve.stream import Chat, EventStream, Text, Whole
from prairie.serve.tokenizing import detokenized, tokenized
from prairie.serve.tracing import Tracing
from prairie.serve.worker import Worker
from prairie.store.audit import record

if TYPE_CHECKING:
    from prairie.engine.remote import Remote
    from prairie.runtime import Runtime
    from prairie.store.home import Home

log = logging.getLogger("prairie.serve")

WEB = Path(__file__).parent.parent / "web"
WEB_FILES = {".html", ".js", ".css", ".svg", ".png", ".ico", ".woff2", ".json", ".webmanifest", ".txt"}
STUCK_S = 120.0
"""A step that takes longer than this is a hang, not work."""
NAME_LIMIT = 200


@dataclass(frozen=True)
class Settings:
    """What may be changed about a server."""

    max_pending: int = 512
    """Answers under way or queued; more are refused with 429."""
    max_pending_tokens: int | None = None
    """Tokens that the prompts and answers of these may come to."""
    requests_per_minute: int | None = None
    """Of each API key; None does not limit."""
    tokens_per_minute: int | None = None
    max_adapters: int = MAX_ADAPTERS
    """Adapters loaded by name that stay in memory although nobody uses them."""
    remotes: Sequence[Remote] = ()
    """Models that other servers answer for."""
    admin_without_key: bool = True
    """Whether what is served may be changed as long as there is no API key: only where nobody else can reach it."""
    max_body_bytes: int = 8 * 2**20
    host_allowed: Callable[[str], bool] = lambda host: True
    """Which Host headers are answered as long as there is no API key."""
    otel: str | None = None
    """Where traces go: the address of an OTLP receiver over HTTP."""
    guard: bool = True
    """Trials and promotions that go badly are taken back."""
    compile_first: bool = False
    """Models are ready when their compiled form is, so that no answer depends on when that came to be."""


class Service:
    """The parts of a running server and their order of starting and stopping."""

    def __init__(
        self, home: Home, names: Sequence[str], settings: Settings, detect: Callable[[], Runtime] | None, **engine: Any
    ) -> None:
        self.home, self.settings = home, settings
        self.metrics = Metrics()
        self.tracing = Tracing(settings.otel) if settings.otel else None
        self.worker = Worker()
        engine = {"may_be_empty": bool(settings.remotes), **engine}
        self.models = Models(home, self.worker, self.metrics, names, detect, **engine)
        self.models.compile_first = settings.compile_first
        self.worker.on_fault = self.models.drop_engine
        self.models.max_adapters = settings.max_adapters
        self.adapters = Adapters(self.models)
        self.keys = Keys(home)
        guard = Guard(home, self.metrics) if settings.guard else None
        self.watcher = Watcher(home, self.models, self.keys, guard=guard)
        limits = Limits(settings.requests_per_minute, settings.tokens_per_minute)
        self.desk = Desk(
            self.models, self.worker, home.feedback, self.metrics, max_pending=settings.max_pending,
            max_pending_tokens=settings.max_pending_tokens, limits=limits,
        )  # fmt: skip
        self.remotes = Remotes(settings.remotes, self.desk)
        self.board = board.BoardRoom(home, self.models)
        self.failure: Exception | None = None
        """Why the first load failed."""
        self.on_ready: Callable[[], None] = lambda: None
        self.on_failure: Callable[[], None] = lambda: None
        self.draining = False
        self._only_server = contextlib.ExitStack()

    async def start(self) -> None:
        try:
            await self.desk.do(self._tidy)
            self.watcher.start()
        except Exception as error:
            self.failure = error
            raise
        self.worker.start(asyncio.get_running_loop().call_soon_threadsafe)
        self._loading = asyncio.create_task(self._load())

    async def _load(self) -> None:
        try:
            await asyncio.wrap_future(self.models.load_first())
        except Exception as error:
            self.failure = error
            self.on_failure()
        else:
            self.on_ready()

    def _tidy(self) -> None:
        """The only server of a home closes the rows that one before it, killed, left open."""
        try:
            self._only_server.enter_context(self.home.lock("serve"))
        except BusyError:
            return
        left = self.home.feedback.abort_started()
        if left:
            log.info("%d answers were cut off by the end of the server before", left)

    async def stop(self) -> None:
        """Ends in the order of who needs whom: requests, watcher, engine, records, store."""
        self.draining = True
        deadline = asyncio.get_running_loop().time() + 10
        while self.desk.pending and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        self._loading.cancel()
        await asyncio.to_thread(self.watcher.stop)
        await asyncio.to_thread(self.models.close)
        await self.desk.drain()
        await self.remotes.close()
        await asyncio.to_thread(self.worker.stop)
        self.desk.close()
        self.board.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)
        self._only_server.close()

    def health(self) -> str | None:
        """None, or why the server should be started anew."""
        if not self.worker.alive:
            return "the engine's thread has ended"
        if self.worker.stuck_s() > STUCK_S:
            return f"the engine has not come round for {self.worker.stuck_s():.0f} s"
        return None

    def admit(self, request: Request) -> str:
        """Who it is. Raises NotAdmin: changing what is served is not for everybody who may ask."""
        name: str = request.state.tenant
        if is_admin(name) if self.keys.required else self.settings.admin_without_key:
            return name or "no key"
        raise NotAdmin(
            "this changes what is served", got=f"the key `{name}`" if name else "no key",
            wanted="an administrator's key", mend="make one with `prairie keys create admin`",
        )  # fmt: skip

    def readiness(self) -> str | None:
        """None, or why requests should not be sent here now."""
        if self.draining:
            return "the server is stopping"
        return self.health() or (None if self.models.ready else "the models are being loaded")


def create_app(
    home: Home,
    names: Sequence[str] = (),
    settings: Settings | None = None,
    detect: Callable[[], Runtime] | None = None,
    **engine_settings: Any,
) -> FastAPI:
    """The application; `app.state.service` are its parts. Raises NotFoundError if there is nothing to serve."""
    settings = settings or Settings()
    service = Service(home, names, settings, detect, **engine_settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="Prairie", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan,
        description="OpenAI's API, and votes on its answers.",
    )  # fmt: skip
    app.state.service = service
    app.add_middleware(
        Gate, keys=service.keys, metrics=service.metrics, max_body_bytes=settings.max_body_bytes,
        host_allowed=settings.host_allowed, tracing=service.tracing,
    )  # fmt: skip
    errors.install(app)
    _completions(app, service)
    _embeddings(app, service)
    _tokens(app, service)
    _models(app, service)
    _adapters(app, service)
    _feedback(app, service)
    board.routes(app, service.board)
    studio.routes(app, studio.Studio(home, service.desk), service.admit)
    _operations(app, service)
    _web(app)
    _describe(app)
    return app


SurfaceHeader = Annotated[str | None, Header(alias="X-Prairie-Surface", max_length=NAME_LIMIT)]
PurposeHeader = Annotated[str | None, Header(alias="X-Prairie-Purpose")]
KeyHeader = Annotated[str | None, Header(alias="Idempotency-Key", max_length=NAME_LIMIT)]


def _caller(request: Request, user: str | None, surface: str | None, purpose: str | None) -> Caller:
    """Raises RequestError for an unknown purpose: a gate's answers must not be taken for a user's."""
    if purpose not in (None, "", "chat", "gate"):
        raise RequestError(
            "unknown X-Prairie-Purpose", got=repr(purpose), wanted="chat | gate", param="X-Prairie-Purpose"
        )
    return Caller(user or None, surface or "api", purpose or "chat", request.state.tenant, request.state.trace)


def _completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", tags=["openai"])
    async def chat_completions(
        body: ChatRequest, request: Request, surface: SurfaceHeader = None, purpose: PurposeHeader = None
    ) -> Response:
        """An answer to a conversation; `stream` for server-sent events."""
        caller = _caller(request, body.user, surface, purpose)
        if body.model in service.remotes.of:
            return service.remotes.chat(body, caller)
        answer = await service.desk.chat(body, caller)
        form = Chat(answer)
        return EventStream(answer, form, body.wants_usage()) if body.stream else Whole(answer, form)

    @app.post("/v1/completions", tags=["openai"])
    async def completions(
        body: CompletionRequest, request: Request, surface: SurfaceHeader = None, purpose: PurposeHeader = None
    ) -> Response:
        """Raw text continued; `echo` with `logprobs` scores the prompt, `max_tokens` 0 only that."""
        caller = _caller(request, body.user, surface, purpose)
        if body.model in service.remotes.of:
            return service.remotes.complete(body, caller)
        answer = await service.desk.complete(body, caller)
        form = Text(answer, bool(body.echo))
        return EventStream(answer, form, body.wants_usage()) if body.stream else Whole(answer, form)


def _embeddings(app: FastAPI, service: Service) -> None:
    @app.post("/v1/embeddings", tags=["openai"])
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """A vector of each text, from an encoder or a language model."""
        return Response(await service.desk.embed(body, request.state.tenant), media_type="application/json")


def _tokens(app: FastAPI, service: Service) -> None:
    async def said(work: Callable[..., dict[str, Any]], body: TokenizeRequest | DetokenizeRequest) -> dict[str, Any]:
        resident = await service.models.acquire(body.model)
        try:
            return await service.desk.do(work, resident, body)
        finally:
            service.models.release(resident)

    @app.post("/tokenize", tags=["tokens"])
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The token ids that a text or a conversation would be answered from, as vLLM's route says them."""
        return await said(tokenized, body)

    @app.post("/detokenize", tags=["tokens"])
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids."""
        return await said(detokenized, body)


def _models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", tags=["openai"])
    async def list_models() -> dict[str, Any]:
        """Every name that is served, with the version that answers to it."""
        return {"object": "list", "data": [*service.models.listing(), *service.remotes.listing()]}

    @app.get("/v1/models/{model}", tags=["openai"])
    async def get_model(model: str) -> dict[str, Any]:
        remote = [each for each in service.remotes.listing() if each["id"] == model]
        return remote[0] if remote else await service.desk.do(service.models.describe, model)


def _adapters(app: FastAPI, service: Service) -> None:
    @app.post("/v1/load_lora_adapter", tags=["admin"])
    async def load_lora_adapter(body: LoadAdapter, request: Request) -> dict[str, Any]:
        """An adapter folder of this machine answers to a name from now on."""
        facts = {"name": body.lora_name, "path": body.lora_path, "request_id": request.state.request_id}
        await service.desk.do(
            functools.partial(record, service.home.root, service.admit(request), "load adapter", **facts)
        )
        path = Path(body.lora_path)
        return await service.desk.do(service.adapters.load, body.lora_name, path, body.base_model_name)

    @app.post("/v1/unload_lora_adapter", tags=["admin"])
    async def unload_lora_adapter(body: UnloadAdapter, request: Request) -> dict[str, Any]:
        """The name is free again; answers under way end with the adapter."""
        facts = {"name": body.lora_name, "request_id": request.state.request_id}
        await service.desk.do(
            functools.partial(record, service.home.root, service.admit(request), "unload adapter", **facts)
        )
        await service.desk.do(service.adapters.unload, body.lora_name)
        return {"id": body.lora_name, "object": "model", "deleted": True}


def _feedback(app: FastAPI, service: Service) -> None:
    @app.post("/v1/feedback", status_code=201, tags=["feedback"])
    async def give_feedback(
        body: FeedbackRequest, surface: SurfaceHeader = None, idempotency_key: KeyHeader = None
    ) -> JSONResponse:
        """A vote, edit, comment or retraction: 201 once it is on disk, 200 and the same id for the same key again."""
        from prairie.store.feedback import FeedbackEvent

        event = FeedbackEvent(body.response_id, body.kind, body.value, body.user or None, surface or "api")
        id, created = await service.desk.do(home_feedback.add, event, idempotency_key)
        if created:
            service.metrics.votes.labels(body.kind).inc()
        answer = {"id": id, "object": "feedback", "response_id": event.response_id, "kind": event.kind}
        return JSONResponse(answer, 201 if created else 200)

    @app.get("/v1/feedback/{response_id}", tags=["feedback"])
    async def get_feedback(response_id: str) -> dict[str, Any]:
        """What was said of an answer, and what of it counts now."""
        return await service.desk.do(feedback_of, service.home, response_id)

    home_feedback = service.home.feedback


def _operations(app: FastAPI, service: Service) -> None:
    def state(problem: str | None) -> JSONResponse:
        if problem is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": problem}, 503, {"Retry-After": "1"})

    @app.get("/healthz", tags=["operations"])
    async def healthz() -> JSONResponse:
        """503 when the server should be restarted."""
        return state(service.health())

    @app.get("/readyz", tags=["operations"])
    async def readyz() -> JSONResponse:
        """503 while it loads or drains."""
        return state(service.readiness())

    @app.get("/metrics", tags=["operations"])
    async def prometheus() -> Response:
        """For Prometheus."""
        service.models.count_engines()
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)


def _web(app: FastAPI) -> None:
    files = StaticFiles(directory=WEB)

    def file(request: Request, path: Path) -> Response:
        path = path.resolve()
        if not path.is_relative_to(WEB) or path.suffix not in WEB_FILES or not path.is_file():
            raise HTTPException(404)
        response = files.file_response(path, path.stat(), request.scope)
        # Asked for anew each time, answered by 304 while it is unchanged: a new version is never half an old one.
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return file(request, WEB / "index.html")

    @app.get("/go", include_in_schema=False)
    async def go_page(request: Request) -> Response:
        return file(request, WEB / "go.html")

    @app.get("/studio", include_in_schema=False)
    async def studio_page(request: Request) -> Response:
        return file(request, WEB / "studio.html")

    @app.get("/favicon.ico", include_in_schema=False)
    async def favicon(request: Request) -> Response:
        return file(request, WEB / "icon.svg")

    @app.get("/static/{path:path}", include_in_schema=False)
    async def static(request: Request, path: str) -> Response:
        return file(request, WEB / path)


def _describe(app: FastAPI) -> None:
    """/openapi.json without FastAPI's 422, which is never sent, and with the error object that is."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            parts = schema.setdefault("components", {}).setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                parts.pop(name, None)
            parts["Error"] = ErrorBody.model_json_schema(ref_template="#/components/schemas/{model}")
            parts |= parts["Error"].pop("$defs", {})
            content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
            for operations in schema["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    operation["responses"]["default"] = {
                        "description": "The refusal, in one sentence",
                        "content": content,
                    }
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
