"""Answers on the wire: a whole JSON object, or server-sent events as the tokens come.

Both watch the client while they work: when it leaves, the answer is closed, which cancels it at the engine's next step.
Plain ASGI responses, because the end of a stream must give everything back whatever ended it.
Not here: tokens and records (`choices`), the shape of the objects (`answers`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterator, Sequence
from functools import cached_property
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prairie.data.tokenizer import Detokenizer
from prairie.data.tool_calls import CallFormat, Said
from prairie.serve.answers import DONE, Top, chat_logprobs, event, prompt_logprobs, text_logprobs, to_json, usage
from prairie.serve.choices import Answer, Choice, Part
from prairie.serve.errors import body_of

log = logging.getLogger("prairie.serve")


class Calls:
    """The tool calls in one choice, and as much of its text as is surely none."""

    def __init__(self, answer: Answer, choice: Choice, format: CallFormat) -> None:
        self.answer, self.choice, self.format = answer, choice, format
        self.mark = answer.resident.tokenizer.special_tokens.get(format.opening)
        """The token that opens a call, where it is one that gives no text."""
        self._heard, self._sent, self._marked = "", 0, False

    @cached_property
    def said(self) -> Said:
        """The whole answer taken apart; its calls get their ids here, once."""
        text, ids = self.choice.text, self.choice.token_ids[: self.choice.shown(self.answer.stop_ids)]
        if self.mark is not None and self.mark in ids:
            tokenizer, place = self.answer.resident.tokenizer, ids.index(self.mark)
            before = "".join(map(Detokenizer(tokenizer).push, ids[:place]))
            text = before + tokenizer.decode(ids[place:], skip_special=False)
        said = self.format.read(text, [tool["function"]["name"] for tool in self.answer.order.tools])
        return Said(said.content, said.calls[:1]) if self.answer.order.one_call else said

    def new_text(self, part: Part) -> str:
        """What may be sent of the content now."""
        self._heard += part.text
        self._marked = self._marked or self.mark in part.token_ids
        if part.last:
            whole, end = self.said.content, len(self.said.content)
        else:
            whole = self._heard
            end = self._sent if self._marked else self.format.shown(whole)
        start, self._sent = self._sent, max(self._sent, end)
        return whole[start : self._sent]


class Chat:
    """A chat answer's objects."""

    whole, chunk = "chat.completion", "chat.completion.chunk"

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        format = answer.call_format
        self._calls = {} if format is None else {c.index: Calls(answer, c, format) for c in answer.choices}

    def choice(self, choice: Choice) -> dict[str, Any]:
        shown = choice.shown(self.answer.stop_ids)
        said = self._said(choice)
        message: dict[str, Any] = {"role": "assistant", "content": said.content, "refusal": None}
        if said.calls:
            message |= {"content": said.content or None, "tool_calls": [call.to_json() for call in said.calls]}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.token_ids[:shown], choice.logprobs[:shown], choice.tops[:shown]),
            "finish_reason": _finish_reason(choice, said),
            "response_id": choice.id,
        }

    def beside(self) -> dict[str, Any]:
        """What stands beside the choices: all of them have one prompt."""
        return _of_prompt(self.answer, self.answer.choices[0])

    def _said(self, choice: Choice) -> Said:
        """Its text and its calls; without tools all is text."""
        return self._calls[choice.index].said if self._calls else Said(choice.text, ())

    def opening(self, choice: Choice) -> Iterator[dict[str, Any]]:
        yield self._piece(choice, {"role": "assistant", "content": ""})

    def part(self, part: Part) -> Iterator[dict[str, Any]]:
        """The pieces of one part: its text if it has any, and one finish piece at the end."""
        tokens = part.token_ids
        if part.last:
            # A stop token is no text and has no log-probability to show.
            tokens = tokens[: len(tokens) - len(part.choice.token_ids) + part.choice.shown(self.answer.stop_ids)]
        count = len(tokens)
        logprobs = self._logprobs(tokens, part.logprobs[:count], part.tops[:count]) if count else None
        text = self._calls[part.choice.index].new_text(part) if self._calls else part.text
        if text or logprobs is not None:
            yield self._piece(part.choice, {"content": text}, logprobs)
        if part.last:
            said = self._said(part.choice)
            for number, call in enumerate(said.calls):
                yield self._piece(part.choice, {"tool_calls": [{"index": number} | call.to_json()]})
            yield self._piece(part.choice, {}, finish_reason=_finish_reason(part.choice, said))

    def _piece(
        self, choice: Choice, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        return {
            "index": choice.index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "response_id": choice.id,
        }

    def _logprobs(self, tokens: Sequence[int], logprobs: Sequence[float], tops: Sequence[Top]) -> Any:
        return None if self.answer.top is None else chat_logprobs(self.answer.names, tokens, logprobs, tops)


def _finish_reason(choice: Choice, said: Said) -> str | None:
    return "tool_calls" if said.calls and choice.finish_reason == "stop" else choice.finish_reason


class Text:
    """A text completion's objects. With echo the prompt stands before the text, scored if logprobs are asked for."""

    whole = chunk = "text_completion"

    def __init__(self, answer: Answer, echo: bool) -> None:
        self.answer, self.echo = answer, echo
        self._offsets = {choice.index: 0 for choice in answer.choices}

    def choice(self, choice: Choice) -> dict[str, Any]:
        opening = next(self.opening(choice), None)
        text, logprobs = "", None
        if opening is not None:
            text, logprobs = opening["text"], opening["logprobs"]
        # A stop token too: it is no text, and programs that score count one entry for each token that was drawn.
        said = self._logprobs(choice, choice.token_ids, choice.logprobs, choice.tops, choice.text)
        piece = self._piece(choice, text + choice.text, _joined(logprobs, said), choice.finish_reason)
        return piece | _of_prompt(self.answer, choice)

    def beside(self) -> dict[str, Any]:
        return {}

    def opening(self, choice: Choice) -> Iterator[dict[str, Any]]:
        """With echo: the prompt."""
        if not self.echo:
            return
        text, logprobs = self._prompt_text(choice), None
        if choice.score is not None:
            tops = choice.score.best(self.answer.top or 0)
            logprobs = self._logprobs(choice, choice.prompt_ids, choice.score.logprobs, tops, text)
        else:
            self._offsets[choice.index] += len(text)
        yield self._piece(choice, text, logprobs)

    def part(self, part: Part) -> Iterator[dict[str, Any]]:
        logprobs = None
        if part.token_ids:
            logprobs = self._logprobs(part.choice, part.token_ids, part.logprobs, part.tops, part.text)
        if part.text or logprobs is not None:
            yield self._piece(part.choice, part.text, logprobs)
        if part.last:
            yield self._piece(part.choice, "", finish_reason=part.choice.finish_reason)

    def _prompt_text(self, choice: Choice) -> str:
        return choice.prompt if isinstance(choice.prompt, str) else ""

    def _piece(
        self, choice: Choice, text: str, logprobs: Any = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "response_id": choice.id,
        }

    def _logprobs(
        self,
        choice: Choice,
        tokens: Sequence[int],
        logprobs: Sequence[float | None],
        tops: Sequence[Top | None],
        text: str,
    ) -> Any:
        start = self._offsets[choice.index]
        self._offsets[choice.index] += len(text)
        if self.answer.top is None:
            return None
        return text_logprobs(self.answer.names, tokens, logprobs, tops, start)


def _of_prompt(answer: Answer, choice: Choice) -> dict[str, Any]:
    """vLLM's `prompt_logprobs`, where they were asked for."""
    top = answer.order.prompt_top
    if top is None or choice.score is None:
        return {}
    return {"prompt_logprobs": prompt_logprobs(answer.names, choice.prompt_ids, choice.score, top)}


def _joined(first: dict[str, Any] | None, second: dict[str, Any] | None) -> dict[str, Any] | None:
    """Two log-probability objects, one after the other."""
    if first is None or second is None:
        return first if second is None else second
    return {
        key: None if first[key] is None and second[key] is None else [*(first[key] or []), *(second[key] or [])]
        for key in second
    }


Form = Chat | Text


class Answering(Response):
    """Base of both: runs `write` until it ends or the client leaves, then closes the answer. Raises what `write` raises
    before the first byte; after it the error is the stream's last event."""

    def __init__(self, answer: Answer, form: Form) -> None:
        self.answer, self.form = answer, form
        self.background = None
        self.status_code = 200
        self.init_headers({"Cache-Control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_left(self.write(send), receive)
        finally:
            await self.answer.close()

    async def write(self, send: Send) -> None:
        raise NotImplementedError

    def usage(self) -> dict[str, Any]:
        """Prompts count once, however many choices were asked for each."""
        prompts = {id(choice.prompt_ids): len(choice.prompt_ids) for choice in self.answer.choices}
        cached = {id(choice.prompt_ids): choice.cached_tokens for choice in reversed(self.answer.choices)}
        said = sum(len(choice.token_ids) for choice in self.answer.choices)
        return usage(sum(prompts.values()), said, sum(cached.values()))


class Whole(Answering):
    """One JSON object when all choices have ended."""

    media_type = "application/json"

    async def write(self, send: Send) -> None:
        await self.answer.finished()
        choices = [self.form.choice(one) | {"index": place} for place, one in enumerate(self.answer.given())]
        body = to_json(self.answer.head.wrap(self.form.whole, choices, self.usage()) | self.form.beside())
        headers = [*self.raw_headers, (b"content-length", str(len(body)).encode())]
        # What is sent from here on is a whole answer: it counts as delivered.
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})


class EventStream(Answering):
    """Server-sent events: the opening of each choice, its text, one finish chunk each, usage if asked, [DONE]."""

    media_type = "text/event-stream"
    charset = "utf-8"

    def __init__(self, answer: Answer, form: Form, with_usage: bool) -> None:
        super().__init__(answer, form)
        self.with_usage = with_usage
        # Proxies are not to collect a stream.
        self.headers["X-Accel-Buffering"] = "no"
        # All but the choice is the same in every chunk; it is made into JSON once.
        frame = answer.head.wrap(form.chunk, [{}])
        frame |= {"usage": None} if with_usage else {}  # with usage asked for, OpenAI's chunks all have the key
        self.before, self.after = event(frame).split(b'"choices":[{}]')

    async def write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

        async def put(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        await put(b"".join(self._event(piece) for choice in self.answer.choices for piece in self.form.opening(choice)))
        try:
            async for parts in self.answer.news():
                data = b"".join(self._event(piece) for part in parts for piece in self.form.part(part))
                if data:
                    await put(data)
        except Exception as error:
            log.warning("%s ended early: %s", self.answer.head.id, error)
            await put(event(body_of(error)[1]), more=False)
            return
        last = b""
        if self.with_usage:
            last = event(self.answer.head.wrap(self.form.chunk, [], self.usage()))
        await put(last + DONE, more=False)

    def _event(self, piece: dict[str, Any]) -> bytes:
        return self.before + b'"choices":[' + to_json(piece) + b"]" + self.after


async def until_left(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Runs `work` until it ends or the client leaves, which cancels it. Raises what `work` raises."""
    writing, leaving = asyncio.create_task(work), asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if writing.done():
            writing.result()
    finally:
        for task in (writing, leaving):
            task.cancel()
        await asyncio.gather(writing, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
