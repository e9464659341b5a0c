"""One request's answers while they are written: admission, prompts, records, tokens as they come, the end.

The order that everything rests on: the rows of all choices are committed before the first byte is sent; a choice's
whole answer is committed before its last byte is sent; whatever ends early (client gone, engine fault, shutdown) is
cancelled at the next step and recorded as aborted with what it had said. Database work happens in threads, never on the
event loop.
Not here: HTTP (`app`, `stream`), JSON shapes (`answers`).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from prairie.data.records import Message, Tools
from prairie.data.tool_calls import CallFormat
from prairie.engine.constraint import Constraint, ConstraintError
from prairie.errors import ContextLengthError, OverloadedError, PrairieError, RequestError, StorageFullError
from prairie.serve.answers import Head, TokenText
from prairie.serve.embedding import embedding_list, pieces, token_rows, vectors_of
from prairie.serve.forms import call_form
from prairie.serve.limits import Limits
from prairie.serve.metrics import Metrics
from prairie.serve.models import Models, Resident
from prairie.serve.schema import ChatRequest, CompletionRequest, Demand, EmbeddingRequest, Sampling
from prairie.serve.scoring import Score, score
from prairie.serve.tracing import RequestTrace, Told
from prairie.serve.worker import EngineFault, Stopping, Worker

if TYPE_CHECKING:
    from torch import Tensor

    from prairie.engine.request import Completion, Output, Request, SamplingParams
    from prairie.store.feedback import FeedbackStore, Response

log = logging.getLogger("prairie.serve")
T = TypeVar("T")

DEFAULT_MAX_TOKENS = 1024
"""Of a chat answer whose length the client leaves open; the context may end it sooner."""
DEFAULT_TEXT_TOKENS = 16
"""Of a text completion, as OpenAI's."""
RETRY_AFTER_S = 2
FULL_RETRY_S = 30
COMPILE_S = 5.0
"""How long a request waits for its schema to become a grammar."""


class QueueFull(OverloadedError):
    retry_after_s = RETRY_AFTER_S


class RecordsFull(OverloadedError):
    """The disk under the records is full: new work is refused until there is space, reads go on."""

    http_status = 503
    code = "storage_full"
    retry_after_s = FULL_RETRY_S


Prompt = tuple[Message, ...] | str | list[int]
"""A conversation, raw text, or the token ids of one."""


@dataclass(frozen=True)
class Order:
    """What is to be made, as both kinds of request say it."""

    prompts: Sequence[Prompt]
    n: int
    """Answers to each prompt."""
    best: int | None = None
    """Of which only so many are given, the likeliest; None: all."""
    limit: int = DEFAULT_MAX_TOKENS
    """Tokens of an answer; 0 only scores the prompt."""
    top: int | None = None
    """Alternatives shown beside each token; None: no log-probabilities."""
    stops: tuple[str, ...] = ()
    scored: bool = False
    """The prompts' own tokens get log-probabilities too, where they are echoed."""
    prompt_top: int | None = None
    """The same beside the answer, with so many alternatives; None: not there."""
    tools: Tools = ()
    """What a chat's model may call."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the chat template."""
    form: Constraint | None = None
    """What the answers must look like."""
    demand: Demand | None = None
    """The call that must be made."""
    one_call: bool = False
    """Of several calls only the first is passed on."""
    special: bool = True
    """A text begins with bos where the model's documents do."""


@dataclass(frozen=True)
class Caller:
    """Who asks, as far as the request says."""

    user: str | None = None
    surface: str | None = None
    purpose: str = "chat"
    tenant: str = ""
    """Name of the API key."""
    trace: RequestTrace | None = None

    @property
    def somebody(self) -> str:
        """Who gets the same version each time while one is on trial: the user, else the holder of the key. Judges of a
        gate ask for what they are to judge."""
        return (self.user or self.tenant) if self.purpose == "chat" else ""

    @property
    def owner(self) -> str:
        """Whose requests wait together: a key's, and within it a user's."""
        return f"{self.tenant}/{self.user or ''}"


@dataclass(eq=False)
class Choice:
    """One answer under way. The token lists grow while it streams."""

    index: int
    id: str
    prompt: tuple[Message, ...] | str
    """As it is recorded."""
    request: Request | None
    """None: nothing is to be generated (`max_tokens` 0)."""
    prompt_ids: Sequence[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[list[tuple[int, float]]] = field(default_factory=list)
    cached_tokens: int = 0
    seated_at: float | None = None
    finish_reason: str | None = None
    done: bool = False
    """Its row is closed."""
    score: Score | None = None
    """Of the prompt, if that was asked for."""

    @property
    def likelihood(self) -> float:
        """Mean log-probability of its tokens, the stop token included."""
        return sum(self.logprobs) / max(1, len(self.logprobs))

    def shown(self, stop_ids: frozenset[int]) -> int:
        """How many of its tokens are text: all but a stop token at the end."""
        stopped = self.finish_reason == "stop" and self.token_ids and self.token_ids[-1] in stop_ids
        return len(self.token_ids) - bool(stopped)


@dataclass(frozen=True)
class Part:
    """News of one choice: some text and tokens, or (`last`) its end."""

    choice: Choice
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    tops: Sequence[Sequence[tuple[int, float]]]
    last: bool = False


class Desk:
    """Where requests come in: it knows the models, the worker and the records, and how much is under way."""

    def __init__(
        self,
        models: Models,
        worker: Worker,
        feedback: FeedbackStore,
        metrics: Metrics,
        *,
        max_pending: int,
        max_pending_tokens: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        """`max_pending`: choices that may be under way or queued, over all models; `max_pending_tokens`: what their
        prompts and answers may come to; `limits`: of each API key."""
        self.models, self.worker, self.feedback, self.metrics = models, worker, feedback, metrics
        self.max_pending = max_pending
        self.limits = limits or Limits()
        self.max_pending_tokens = max_pending_tokens
        self.pending = self.pending_tokens = 0
        self.threads = ThreadPoolExecutor(16, "prairie-records")
        """Enough that writes of many requests meet in one commit."""
        self.compilers = ThreadPoolExecutor(2, "prairie-grammars")
        self._tasks: set[asyncio.Task[None]] = set()

    def keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Starts a task that must end whoever stops waiting for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def drain(self) -> None:
        """Waits for what is being recorded."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def do(self, work: Callable[..., T], *args: Any) -> T:
        """Runs blocking work in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work, *args)

    async def chat(self, body: ChatRequest, caller: Caller) -> Answer:
        """Admits a chat request and starts it. Raises PrairieError; nothing of what is refused is left behind."""
        body.refuse_unsupported()
        limit = body.limit()
        order = Order(
            [body.to_messages()], body.n or 1, limit=DEFAULT_MAX_TOKENS if limit is None else limit, top=body.top(),
            stops=body.stops(), tools=body.to_tools(), options=body.chat_template_kwargs or {}, form=body.form(),
            demand=body.demanded(), one_call=body.parallel_tool_calls is False, prompt_top=body.prompt_top(),
        )  # fmt: skip
        return await self._open(body, caller, order, "chatcmpl")

    async def complete(self, body: CompletionRequest, caller: Caller) -> Answer:
        """The same for a text completion."""
        body.refuse_unsupported()
        limit = DEFAULT_TEXT_TOKENS if body.max_tokens is None else body.max_tokens
        prompt_top = body.prompt_top()
        if limit == 0 and not body.echo and prompt_top is None:
            raise RequestError("max_tokens is 0", wanted="1 or more, or echo, or prompt_logprobs", param="max_tokens")
        scored = bool(body.echo) and body.logprobs is not None
        n, drawn = body.n or 1, body.drawn()
        order = Order(
            body.prompts(), drawn, best=n if n < drawn else None, limit=limit, top=body.logprobs, stops=body.stops(),
            scored=scored, form=body.form(), special=body.add_special_tokens is not False, prompt_top=prompt_top,
        )  # fmt: skip
        return await self._open(body, caller, order, "cmpl")

    async def embed(self, body: EmbeddingRequest, tenant: str = "") -> bytes:
        """The vectors of some texts, as JSON. Nothing is recorded: nobody votes on a vector."""
        self.admit(1, tenant)
        resident: Resident | None = None
        try:
            resident = await self.models.acquire(body.model)
            rows = await self.do(token_rows, resident, body)
            self.limits.charge(tenant, sum(map(len, rows)))
            vectors: list[Tensor] = []
            # Piece by piece, each between two steps of the engines, so that running answers go on.
            for part in pieces(rows):
                work = functools.partial(vectors_of, resident, part)
                vectors.append(await asyncio.wrap_future(self.worker.call(work)))
            self.metrics.tokens.labels(resident.source.line, "prompt").inc(sum(map(len, rows)))
            return await self.do(embedding_list, resident, body, rows, vectors)
        finally:
            self.pending -= 1
            if resident is not None:
                self.models.release(resident)

    async def _open(self, body: Sampling, caller: Caller, order: Order, prefix: str) -> Answer:
        arrived = time.perf_counter()
        count = order.n * len(order.prompts)
        self.admit(count, caller.tenant)
        resident: Resident | None = None
        try:
            resident = await self.models.acquire(body.model, caller.somebody)
            answer = await self._answer(resident, body, caller, order, prefix, arrived)
        except BaseException:
            self.pending -= count
            if resident is not None:
                self.models.release(resident)
            raise
        # From here on the answer itself gives back what it holds, in `close`.
        try:
            await answer.start(body)
        except BaseException:
            await answer.close()
            raise
        shadow = self.models.acquire_shadow(body.model) if caller.purpose == "chat" else None
        if shadow is not None:
            self.keep(self._shadow(shadow, body, caller, order))
        return answer

    async def _form(self, resident: Resident, order: Order) -> Constraint | None:
        """The form of the answers, compiled; what cannot be kept to is refused here, before anything is recorded.

        Compiling is bounded in work; where the bound is not tight the request still ends, and two slow schemas at most
        are computed at a time. Raises ConstraintError.
        """
        if order.form is None and order.demand is None:
            return None
        compiling = asyncio.get_running_loop().run_in_executor(self.compilers, _compiled_form, resident, order)
        try:
            return await asyncio.wait_for(asyncio.shield(compiling), COMPILE_S)
        except TimeoutError:
            compiling.add_done_callback(lambda done: done.exception())
            raise ConstraintError(
                "the form of the answer takes too long to prepare", wanted=f"at most {COMPILE_S:.0f} s",
                mend="make it simpler",
            ) from None  # fmt: skip

    async def _answer(
        self, resident: Resident, body: Sampling, caller: Caller, order: Order, prefix: str, arrived: float
    ) -> Answer:
        id = f"{prefix}-{secrets.token_hex(12)}"
        order = replace(order, form=await self._form(resident, order))
        choices = await self.do(_choices, resident, body, order, id, caller)
        if caller.purpose != "shadow":
            self.limits.charge(caller.tenant, sum(len(choice.prompt_ids) for choice in choices[:: order.n]))
        if order.scored or order.prompt_top is not None:
            shown = order.top or 0 if order.scored else 0
            await self._score(resident, choices, max(shown, order.prompt_top or 0))
        head = Head(id, int(time.time()), body.model, resident.fingerprint, resident.identity())
        answer = Answer(self, resident, head, choices, order, caller, arrived)
        self._admit_tokens(answer.tokens)
        return answer

    async def _shadow(self, resident: Resident, body: Sampling, caller: Caller, order: Order) -> None:
        """The same request, answered by the version on trial, recorded and shown to nobody. It takes no place that a
        user needs: with half of the places taken it is skipped. What goes wrong is counted and reaches nobody."""
        arrived, count, line = time.perf_counter(), len(order.prompts) * order.n, resident.source.line
        end = self.metrics.shadows.labels
        if self.pending + count > self.max_pending // 2:
            self.models.release(resident)
            end(line, "skipped").inc()
            return
        self.pending += count
        try:
            order, caller = replace(order, scored=False, prompt_top=None), replace(caller, purpose="shadow", trace=None)
            answer = await self._answer(resident, body, caller, order, "shadow", arrived)
        except Exception as error:
            self.pending -= count
            self.models.release(resident)
            end(line, "failed").inc()
            log.warning("%s could not be asked in the shadow: %s", resident.source.name, error)
            return
        try:
            await answer.start(body)
            await answer.finished()
            end(line, "done").inc()
        except Exception as error:
            end(line, "failed").inc()
            log.warning("%s failed in the shadow: %s", resident.source.name, error)
        finally:
            await answer.close()

    async def _score(self, resident: Resident, choices: Sequence[Choice], top: int) -> None:
        """Each prompt once, between two steps of the engine, so that running answers go on."""
        scores: dict[int, Score] = {}
        for choice in choices:
            key = id(choice.prompt_ids)
            if key not in scores:
                work = functools.partial(score, resident, choice.prompt_ids, top)
                scores[key] = await asyncio.wrap_future(self.worker.call(work))
            choice.score = scores[key]

    def admit(self, choices: int, tenant: str) -> None:
        """Raises RateLimited for a key that has used up its share, QueueFull when the server has."""
        # One request that is larger than the limit is still served when nothing else runs.
        if self.pending and self.pending + choices > self.max_pending:
            self.metrics.refused.inc()
            raise QueueFull(
                "the server has as many requests as it takes", got=self.pending, wanted=f"at most {self.max_pending}",
                mend=f"try again in {RETRY_AFTER_S} s",
            )  # fmt: skip
        self.limits.admit(tenant)
        self.pending += choices

    def _admit_tokens(self, tokens: int) -> None:
        """Raises QueueFull. As with choices, one request alone is served however large it is."""
        most = self.max_pending_tokens
        if most is not None and self.pending_tokens and self.pending_tokens + tokens > most:
            self.metrics.refused.inc()
            raise QueueFull(
                "the server has as many tokens to compute as it takes", got=self.pending_tokens + tokens,
                wanted=f"at most {most}", mend=f"try again in {RETRY_AFTER_S} s",
            )  # fmt: skip
        self.pending_tokens += tokens

    def close(self) -> None:
        self.threads.shutdown(wait=True)
        self.compilers.shutdown(wait=False, cancel_futures=True)


class Answer:
    """The choices of one request from start to last record. A Sink of the worker; lives on the event loop."""

    def __init__(
        self,
        desk: Desk,
        resident: Resident,
        head: Head,
        choices: Sequence[Choice],
        order: Order,
        caller: Caller,
        arrived: float,
    ) -> None:
        self.desk, self.resident, self.head, self.choices = desk, resident, head, choices
        self.order, self.top, self.caller, self.arrived = order, order.top, caller, arrived
        self.call_format = CallFormat.of(resident.template) if order.tools else None
        self.names = TokenText(resident.tokenizer)
        of_request = choices[0].request.params.stop_ids if choices[0].request is not None else ()
        self.stop_ids = frozenset((*resident.template.stop_ids, *of_request))
        room = resident.engine.max_context
        self.tokens = sum(min(len(choice.prompt_ids) + order.limit, room) for choice in choices)
        """That this may come to."""
        self._by_id = {choice.id: choice for choice in choices}
        self._news: asyncio.Queue[Part | Exception] = asyncio.Queue()
        self._commits: set[asyncio.Task[None]] = set()
        self._started = asyncio.Event()
        """The rows of all choices are on disk, or (`_start_failure`) are not."""
        self._start_failure: Exception | None = None
        self._first_token_at: dict[str, float] = {}
        self._faulty: set[str] = set()
        """Ids of choices that the model or its engine could not end."""
        self._given_back = False
        self._closed = False

    async def start(self, body: Sampling) -> None:
        """Hands the requests to the engine and returns once the rows of all choices are on disk."""
        requests = [choice.request for choice in self.choices if choice.request is not None]
        self.desk.worker.submit(self.resident.engine, requests, self)
        await asyncio.shield(self.desk.keep(self._start_rows([self._row(choice, body) for choice in self.choices])))
        if self._start_failure is not None:
            raise self._start_failure
        for choice in self.choices:
            if choice.request is None:
                choice.finish_reason = "length"
                self._close_row(choice, "")

    # -- Sink, called on the event loop

    def take(self, output: Output) -> None:
        choice = self._by_id[output.request_id]
        if choice.id not in self._first_token_at:
            self._first_token_at[choice.id] = time.perf_counter()
        completion = output.completion
        if completion is None:
            self._add(choice, output)
            self._news.put_nowait(
                Part(choice, output.text_delta, output.token_ids, output.logprobs, output.top_logprobs)
            )
            return
        before = len(choice.token_ids)
        self._whole(choice, completion)
        if output.finish_reason == "constraint":
            self._news.put_nowait(ConstraintError(
                "the form of the answer became too complex to go on with", mend="make it simpler"
            ))  # fmt: skip
            return
        if output.finish_reason not in ("stop", "length"):
            self._faulty.add(choice.id)
            self._news.put_nowait(EngineFault(
                "the model gave no usable probabilities", got=output.finish_reason, mend="promote another version"
            ))  # fmt: skip
            return
        choice.finish_reason = output.finish_reason
        self._close_row(choice, output.text_delta, before)

    def fail(self, request_id: str, error: Exception) -> None:
        if isinstance(error, EngineFault) and not isinstance(error, Stopping):
            self._faulty.add(request_id)
        self._news.put_nowait(error)

    # -- the reader

    async def news(self) -> AsyncIterator[list[Part]]:
        """Parts in the order in which they come, all that are there at once, until every choice has ended.

        Raises the error that ended a choice. The record of a choice is on disk before its last part is given.
        """
        open = len(self.choices)
        while open:
            parts = [await self._news.get()]
            while not self._news.empty():
                parts.append(self._news.get_nowait())
            good: list[Part] = []
            for part in parts:
                if isinstance(part, Exception):
                    raise part
                good.append(part)
                open -= part.last
            yield good

    async def finished(self) -> Sequence[Choice]:
        """All choices, whole. Raises the error that ended one."""
        async for _ in self.news():
            pass
        return self.choices

    def given(self) -> list[Choice]:
        """What the client gets of all that has ended: with `best_of` the likeliest of each prompt, best first."""
        n, best = self.order.n, self.order.best
        if best is None:
            return list(self.choices)
        of_prompts = [self.choices[start : start + n] for start in range(0, len(self.choices), n)]
        return [one for some in of_prompts for one in sorted(some, key=lambda c: -c.likelihood)[:best]]

    async def close(self) -> None:
        """Gives everything back, once; what had not ended is cancelled and recorded as aborted. Cannot be cancelled."""
        if self._closed:
            return
        self._closed = True
        await asyncio.shield(self.desk.keep(self._close()))

    async def _close(self) -> None:
        try:
            await self._started.wait()
            running = [choice.id for choice in self.choices if choice.finish_reason is None]
            if running:
                said = await asyncio.wrap_future(self.desk.worker.cancel(self.resident.engine, running))
                for id, completion in said.items():
                    self._whole(self._by_id[id], completion)
            # What ended by itself meanwhile is recorded as what it is.
            if self._commits:
                await asyncio.wait(self._commits)
            left = [choice for choice in self.choices if not choice.done]
            if self._start_failure is None:
                await asyncio.gather(*(self.desk.do(self._abort, choice) for choice in left))
        finally:
            self._give_back()

    async def _start_rows(self, rows: Sequence[Response]) -> None:
        try:
            await self.desk.do(self.desk.feedback.start_responses, rows)
        except StorageFullError as error:
            self._start_failure = RecordsFull(
                "no new answer can be recorded", got=error.what, mend=f"free some space; try again in {FULL_RETRY_S} s"
            )
        except Exception as error:
            self._start_failure = error
        finally:
            self._started.set()

    def _give_back(self) -> None:
        """The places in the queue and the version. Also when all has been said to a client that does not read it."""
        if not self._given_back:
            self._given_back = True
            self.desk.pending -= len(self.choices)
            self.desk.pending_tokens -= self.tokens
            self.desk.models.release(self.resident)

    # -- inside

    def _add(self, choice: Choice, output: Output) -> None:
        choice.text += output.text_delta
        choice.token_ids += output.token_ids
        choice.logprobs += output.logprobs
        choice.tops += output.top_logprobs

    def _whole(self, choice: Choice, completion: Completion) -> None:
        choice.text, choice.token_ids = completion.text, list(completion.token_ids)
        choice.logprobs, choice.tops = list(completion.logprobs), list(completion.top_logprobs)
        choice.cached_tokens, choice.seated_at = completion.cached_tokens, completion.seated_at

    def _close_row(self, choice: Choice, delta: str, before: int = 0) -> None:
        """Commits a choice's answer in a thread; its last part is news only after that."""
        tokens = choice.token_ids[before:]
        part = Part(choice, delta, tokens, choice.logprobs[before:], choice.tops[before:], last=True)

        async def commit() -> None:
            # The engine may be faster than the disk: a row is closed only after it was opened.
            await self._started.wait()
            if self._start_failure is not None:
                return
            try:
                await self.desk.do(self._finish, choice)
            except Exception as error:
                self._news.put_nowait(error)
            else:
                self._count(choice)
                self._news.put_nowait(part)
                if all(each.done for each in self.choices):
                    self._give_back()

        task = self.desk.keep(commit())
        self._commits.add(task)
        task.add_done_callback(self._commits.discard)

    def _finish(self, choice: Choice) -> None:
        self.desk.feedback.finish_response(
            choice.id,
            choice.token_ids,
            choice.logprobs,
            choice.text,
            choice.finish_reason or "stop",
            self._latency_ms(),
        )
        choice.done = True

    def _abort(self, choice: Choice) -> None:
        """An answer that ended early; a store that cannot take it now is only logged, the client has its error."""
        from prairie.store.feedback import FAULT

        choice.done = True
        reason = FAULT if choice.id in self._faulty else "cancelled"
        try:
            self.desk.feedback.abort_response(
                choice.id, choice.token_ids, choice.logprobs, choice.text, reason, self._latency_ms()
            )
        except PrairieError as error:
            log.warning("the end of %s was not recorded: %s", choice.id, error)
        self.desk.metrics.choices.labels(self.resident.source.line, reason).inc()
        self._trace(choice, reason)

    def _trace(self, choice: Choice, end: str) -> None:
        if self.caller.trace is not None:
            kind = "chat" if isinstance(choice.prompt, tuple) else "text_completion"
            self.caller.trace.answered(Told(
                kind, self.head.model, self.resident.source.name, choice.id, len(choice.prompt_ids),
                choice.cached_tokens, len(choice.token_ids), end, self.arrived, choice.seated_at,
                self._first_token_at.get(choice.id),
            ))  # fmt: skip

    def _latency_ms(self) -> float:
        return round((time.perf_counter() - self.arrived) * 1000, 3)

    def _count(self, choice: Choice) -> None:
        line, metrics, now = self.resident.source.line, self.desk.metrics, time.perf_counter()
        metrics.choices.labels(line, choice.finish_reason).inc()
        metrics.tokens.labels(line, "prompt").inc(len(choice.prompt_ids))
        metrics.tokens.labels(line, "cached").inc(choice.cached_tokens)
        metrics.tokens.labels(line, "completion").inc(len(choice.token_ids))
        if self.caller.purpose != "shadow":
            self.desk.limits.charge(self.caller.tenant, len(choice.token_ids))
        self._trace(choice, choice.finish_reason or "stop")
        if choice.seated_at is not None:
            metrics.queue.labels(line).observe(choice.seated_at - self.arrived)
        first = self._first_token_at.get(choice.id)
        if first is not None and choice.request is not None and choice.request.stream:
            metrics.first_token.labels(line).observe(first - self.arrived)
            if len(choice.token_ids) > 1:
                metrics.per_token.labels(line).observe((now - first) / (len(choice.token_ids) - 1))

    def _row(self, choice: Choice, body: Sampling) -> Response:
        from prairie.store.feedback import Response

        source = self.resident.source
        return Response(
            id=choice.id,
            model=body.model,
            prompt=choice.prompt,
            line=source.line,
            version_id=source.artifact_id,
            weights_hash=self.resident.weights_hash,
            adapter_hash=self.resident.adapter_hash,
            template_hash=self.resident.template.hash,
            sampling=_sampling_record(choice, body, self.order),
            user=self.caller.user,
            surface=self.caller.surface,
            purpose=self.caller.purpose,
        )


def _compiled_form(resident: Resident, order: Order) -> Constraint | None:
    """In a thread: the constraint, once the engine's grammars know it. Raises ConstraintError."""
    form = order.form
    if order.demand is not None:
        format = CallFormat.of(resident.template)
        if format is None:
            raise no_calls()
        form = call_form(format, order.tools, order.demand.name, resident.tokenizer)
    if form is not None:
        resident.engine.grammars.matcher(form)
    return form


def no_calls() -> RequestError:
    """The template's calls cannot be read back."""
    return RequestError(
        "this model writes its tool calls in a way that is not known here", wanted="calls as JSON",
        mend="leave the tools out", param="tools",
    )  # fmt: skip


def _choices(resident: Resident, body: Sampling, order: Order, id: str, caller: Caller) -> list[Choice]:
    """In a thread: prompts rendered and tokenised, a Choice for each answer. RequestError, ContextLengthError."""
    from prairie.engine.request import Request

    seed = body.seed if body.seed is not None else secrets.randbits(48)
    choices: list[Choice] = []
    for prompt in order.prompts:
        prompt_ids, record = _prompt_ids(resident, prompt, order)
        _check_prompt(resident, prompt_ids, order.limit)
        for _ in range(order.n):
            index = len(choices)
            choice_id = id if index == 0 else f"{id}:{index}"
            params = _params(resident, body, order, seed + index, chat=isinstance(prompt, tuple))
            request = None
            if params is not None:
                request = Request(
                    choice_id, prompt_ids, params, resident.adapter_hash, caller.tenant, bool(body.stream), caller.owner
                )
            choices.append(Choice(index, choice_id, record, request, prompt_ids))
    return choices


def _prompt_ids(resident: Resident, prompt: Prompt, order: Order) -> tuple[list[int], tuple[Message, ...] | str]:
    """(token ids, what is recorded of the prompt)."""
    if isinstance(prompt, tuple):
        ids = resident.template.encode_prompt(prompt, order.tools, order.options)
        if order.tools and CallFormat.of(resident.template) is None:
            raise no_calls()
        return ids, prompt
    if isinstance(prompt, str):
        ids = resident.engine.prompt_ids(prompt) if order.special else resident.tokenizer.encode(prompt)
        return ids, prompt
    vocab_size = resident.tokenizer.vocab_size
    wrong = next((t for t in prompt if not 0 <= t < vocab_size), None)
    if wrong is not None:
        raise RequestError(
            "the prompt has an unknown token id", got=wrong, wanted=f"0..{vocab_size - 1}", param="prompt"
        )
    return prompt, resident.tokenizer.decode(prompt, skip_special=False)


def _check_prompt(resident: Resident, prompt_ids: Sequence[int], limit: int) -> None:
    """Refuses before anything is recorded or queued what the engine would refuse after."""
    if not prompt_ids:
        raise RequestError("the prompt is empty", wanted="at least one token", param="prompt")
    room = resident.engine.max_context
    if len(prompt_ids) + min(limit, 1) > room:
        raise ContextLengthError(
            "the prompt leaves no room for an answer in this model's context", got=f"{len(prompt_ids)} tokens",
            wanted=f"at most {room - 1}", mend="shorten the conversation", param="messages",
        )  # fmt: skip


def _params(resident: Resident, body: Sampling, order: Order, seed: int, chat: bool) -> SamplingParams | None:
    """None when nothing is to be generated."""
    from prairie.engine.request import SamplingParams

    if order.limit == 0:
        return None
    stops, ignore_eos = order.stops, bool(body.ignore_eos)
    vocab_size = resident.engine.model.config.vocab_size
    wrong = next((t for t in body.stop_token_ids or () if not 0 <= t < vocab_size), None)
    if wrong is not None:
        raise RequestError("there is no such token", got=wrong, wanted=f"0..{vocab_size - 1}", param="stop_token_ids")
    # An answer of a given form ends by itself, and may hold such a string.
    if chat and not ignore_eos and order.form is None:
        stops = (*stops, *resident.template.stop_strings)
    return SamplingParams(
        max_tokens=order.limit,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        seed=seed,
        stop=stops,
        stop_ids=tuple(body.stop_token_ids or ()),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=body.biases(vocab_size) or None,
        logprobs=order.top,
        ignore_eos=ignore_eos,
        constraint=order.form,
    )


def _sampling_record(choice: Choice, body: Sampling, order: Order) -> dict[str, Any]:
    """All that drew the tokens, the seed included even if the client gave none: the answer can be drawn again."""
    record: dict[str, Any] = {"max_tokens": 0} if choice.request is None else _of_params(choice.request.params)
    if order.form is not None:
        record["constraint"] = order.form.to_json()
    more = {
        "metadata": body.metadata, "tools": [dict(tool) for tool in order.tools], "template": dict(order.options),
        "stop_token_ids": body.stop_token_ids, "best_of": order.n if order.best is not None else None,
    }  # fmt: skip
    return record | {key: value for key, value in more.items() if value}


def _of_params(params: SamplingParams) -> dict[str, Any]:
    return {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "seed": params.seed,
        "max_tokens": params.max_tokens,
        "stop": list(params.stop),
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "logit_bias": {str(token): bias for token, bias in (params.logit_bias or {}).items()},
        "ignore_eos": params.ignore_eos,
    }
