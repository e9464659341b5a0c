"""`prairie chat`: talk to a model in the terminal; no server needed.

With a model of the registry, answers of a conversation are recorded as a server records them, and can be voted on.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prairie.cli.options import HomeOption, JsonOption, ThreadsOption, emit, open_home, say
from prairie.errors import PrairieError, RequestError, UsageError

if TYPE_CHECKING:
    from prairie.data.records import Message
    from prairie.engine.language_model import LanguageModel
    from prairie.engine.request import Completion, SamplingParams
    from prairie.engine.seq2seq import Seq2Seq
    from prairie.runtime import Runtime
    from prairie.store.home import Home
    from prairie.store.registry import Version

COMMANDS = """\
/up, /down      vote on the last answer
/better TEXT    say what the last answer should have been
/again          another answer to the last question
/new            forget the conversation and start anew
/quit           end (or Ctrl-D); Ctrl-C stops an answer"""


def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A line, a version or a model folder.")],
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="[PROMPT]", help="One question; - reads it from stdin. None: a conversation."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message before the conversation.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: always the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Draw from the likeliest tokens of this sum.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same answer.")] = None,
    threads: ThreadsOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Talk to a model in the terminal, one question or a whole conversation."""
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise UsageError("no question came on stdin", mend="prairie chat MODEL 'your question'")
    if prompt is None and as_json:
        raise UsageError("--json wants one question", mend="prairie chat MODEL 'your question' --json")
    from prairie.data.records import Message
    from prairie.engine.request import SamplingParams
    from prairie.runtime import Runtime

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    opening = (Message("system", system),) if system else ()
    store, version = None, None
    if not Path(model).expanduser().is_dir():
        # Before torch is imported: a name that is unknown is said at once.
        store = open_home(home)
        version = store.registry.resolve(model)
    runtime = Runtime.detect(threads=threads)
    loaded = (
        _load_folder(model, runtime) if store is None or version is None else _load_version(store, version, runtime)
    )
    if prompt is None:
        Conversation(loaded, params, opening, model, store, version).run()
        return
    shown = (lambda text: None) if as_json else _print_piece
    completion = answer(loaded, (*opening, Message("user", prompt)), params, shown)
    if not as_json:
        print()
    result = {
        "model": version.name if version else loaded.name,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": len(completion.token_ids),
    }
    emit(result, as_json)


def answer(
    model: LanguageModel | Seq2Seq,
    messages: tuple[Message, ...],
    params: SamplingParams,
    shown: Callable[[str], object],
) -> Completion:
    """One answer, its text given to `shown` as it comes. Ctrl-C ends it early with what was said."""
    from prairie.engine.seq2seq import Seq2Seq

    if isinstance(model, Seq2Seq):
        return model.answer(messages, params, shown)
    id = f"chat-{secrets.token_hex(8)}"
    model.engine.add(model.engine.chat_request(id, messages, params, adapter=model.adapter_hash))
    try:
        while True:
            for output in model.engine.step():
                shown(output.text_delta)
                if output.completion is not None:
                    return output.completion
    except KeyboardInterrupt:
        completion = model.engine.cancel(id)
        if completion is None:
            raise
        return completion


class Conversation:
    """Questions and answers in turn, until the end of input."""

    def __init__(
        self,
        model: LanguageModel | Seq2Seq,
        params: SamplingParams,
        opening: tuple[Message, ...],
        asked: str,
        store: Home | None,
        version: Version | None,
    ) -> None:
        self.model, self.params, self.opening, self.asked = model, params, opening, asked
        self.store, self.version = store, version
        self.messages = opening
        self.last: tuple[tuple[Message, ...], str | None] | None = None
        """(the messages that were answered, id of the recorded answer)"""

    def run(self) -> None:
        say(f"{self.version.name if self.version else self.model.name}   /help lists the commands")
        while True:
            try:
                line = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                print(file=sys.stderr)
                return
            if line == "/quit":
                return
            if line:
                try:
                    self._command(line) if line.startswith("/") else self._ask(line)
                except PrairieError as error:
                    say(f"error: {error}")

    def _command(self, line: str) -> None:
        name, _, text = line.partition(" ")
        if name in ("/up", "/down"):
            self._vote("thumb", name[1:])
        elif name == "/better" and text.strip():
            self._vote("edit", {"text": text.strip()})
        elif name == "/again" and self.last:
            self._answer(self.last[0])
        elif name == "/new":
            self.messages, self.last = self.opening, None
        else:
            say(COMMANDS)

    def _ask(self, text: str) -> None:
        from prairie.data.records import Message

        self._answer((*self.messages, Message("user", text)))

    def _answer(self, messages: tuple[Message, ...]) -> None:
        from dataclasses import replace

        from prairie.data.records import Message
        from prairie.engine.seq2seq import Seq2Seq

        seed = self.params.seed if self.params.seed is not None else secrets.randbits(48)
        params = replace(self.params, seed=seed)
        id = self._record_start(messages, params)
        completion = answer(self.model, messages, params, _print_piece)
        print()
        if self.store is not None and id is not None:
            close = self.store.feedback.finish_response
            if completion.finish_reason == "cancelled":
                close = self.store.feedback.abort_response
            close(id, completion.token_ids, completion.logprobs, completion.text, completion.finish_reason)
        # An encoder-decoder answers each text by itself.
        goes_on = not isinstance(self.model, Seq2Seq)
        self.messages = (*messages, Message("assistant", completion.text)) if goes_on else self.opening
        self.last = (messages, id)

    def _record_start(self, messages: tuple[Message, ...], params: SamplingParams) -> str | None:
        if self.store is None or self.version is None:
            return None
        from prairie.engine.seq2seq import Seq2Seq
        from prairie.store.feedback import Response

        sampling = {"temperature": params.temperature, "top_p": params.top_p, "max_tokens": params.max_tokens}
        response = Response(
            id=f"chatcmpl-{secrets.token_hex(12)}",
            model=self.asked,
            prompt=messages,
            line=self.version.line,
            version_id=self.version.artifact_id,
            weights_hash=self.model.weights_hash,
            adapter_hash=self.model.adapter_hash,
            template_hash=None if isinstance(self.model, Seq2Seq) else self.model.template.hash,
            sampling=sampling | {"seed": params.seed},
            surface="terminal",
        )
        self.store.feedback.start_response(response)
        return response.id

    def _vote(self, kind: str, value: Any) -> None:
        from prairie.store.feedback import FeedbackEvent

        if self.last is None or self.last[1] is None or self.store is None:
            say("nothing to vote on" if self.store else "votes are kept for models of the registry, not for folders")
            return
        self.store.feedback.add(FeedbackEvent(self.last[1], kind, value, surface="terminal"))
        say("saved")


def _load_folder(folder: str, runtime: Runtime) -> LanguageModel | Seq2Seq:
    return _writing(Path(folder).expanduser(), None, runtime)


def _load_version(store: Home, version: Version, runtime: Runtime) -> LanguageModel | Seq2Seq:
    folder = store.artifacts.get(version.artifact_id).path
    if version.base_artifact_id is None:
        return _writing(folder, None, runtime)
    return _writing(store.artifacts.get(version.base_artifact_id).path, folder, runtime)


def _writing(folder: Path, adapter: Path | None, runtime: Runtime) -> LanguageModel | Seq2Seq:
    """Raises RequestError for a model that only reads."""
    from prairie.engine.loading import load
    from prairie.engine.reader import Reader

    model = load(folder, adapter, runtime)
    if isinstance(model, Reader):
        raise RequestError(
            f"{model.name} reads texts and writes none",
            mend="prairie.load(DIR).embed(...), or `prairie serve DIR` and POST /v1/embeddings",
        )
    return model


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)
