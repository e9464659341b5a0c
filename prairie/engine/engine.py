"""Requests -> tokens. `Engine.step` is one turn: schedule, run, accept.

An engine is for one thread. It holds one base and many adapters; weights never change under it: a new version is a new
adapter hash or a new engine. The same requests in the same order give the same answers. Once weights in float32 or
bfloat16 are computed by the compiled form, a seeded answer has the same bits whatever else the engine answers; else it
depends on its neighbours through rounding in the logits: products of another shape may differ in the last bit.
Not here: HTTP (`serve`), text prompts and chats as a library (`language_model`).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING, Literal

from prairie.data.chat_template import ChatTemplate, Options
from prairie.data.records import Message, Tools
from prairie.data.tokenizer import Tokenizer
from prairie.engine.compiled import CompiledDecoder, Dtype, covers
from prairie.engine.constraint import Grammars
from prairie.engine.kv_cache import KVCache, root_hash
from prairie.engine.lookup import Lookup
from prairie.engine.request import Completion, FinishReason, Output, Request, SamplingParams, Sequence, TextStream
from prairie.engine.runner import Runner
from prairie.engine.sampler import Sampled, Sampler
from prairie.engine.scheduler import Scheduler, Step
from prairie.engine.speculation import Speculation
from prairie.errors import AdapterError, ContextLengthError, ModelError, RequestError
from prairie.models.rope import alike, depends_on_length
from prairie.models.transformer import Transformer

if TYPE_CHECKING:
    from prairie.engine.probe import Choice
    from prairie.models.lora import LoRA

KV_BYTES = 512 << 20
"""Memory for keys and values unless `kv_tokens` says otherwise; on a CPU it is committed only as it is used."""


COMPILE_AFTER = 32
"""Steps before the compiled form is made: what answers one question and ends has nothing from it."""


class Engine:
    """One base model with its adapters, answering many requests at once."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        weights_hash: str,
        kv_tokens: int | None = None,
        max_batch: int = 64,
        max_context: int | None = None,
        step_tokens: int = 1024,
        block_size: int = 16,
        prefix_reuse: bool = True,
        compiles: bool = True,
        speculate: Literal["ngram"] | None = None,
        threads: int | None = None,
        dtype: Dtype = "float32",
    ) -> None:
        """`kv_tokens` bounds the tokens in the cache, `step_tokens` those of a forward pass (at least `max_batch`).

        `compiles`: after the first steps the model's compiled form is made ready in the background, where it has one.
        `speculate`: drafts what stood in the text before, where that pays (`speculation`).
        `threads` of its steps; None: at most torch's, as many as are fastest (`probe`).
        `dtype` auto: float32 weights that bfloat16 holds to the last bit are kept in it, if that is faster.
        """
        config = model.config
        context = min(max_context or config.max_context, config.max_context)
        weight = model.head_weight
        if kv_tokens is None:
            each = KVCache.bytes_per_token(config.layers, config.kv_heads, config.head_dim, weight.dtype)
            kv_tokens = min(max_batch, max(4, KV_BYTES // (each * context))) * context
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.weights_hash = weights_hash
        self.adapters: dict[str, LoRA] = {}
        self.max_batch = max_batch
        self.cache = KVCache(
            layers=config.layers,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            tokens=kv_tokens,
            max_batch=max_batch,
            block_size=block_size,
            dtype=weight.dtype,
            device=weight.device,
        )
        self.cache.reuse = prefix_reuse
        self.max_context = min(context, self.cache.tokens)
        self._turns_by_length = depends_on_length(config)
        # The length of a row turns all its keys there, and with a draft it is not known.
        self.speculation = Speculation() if speculate is not None and not self._turns_by_length else None
        self.scheduler = Scheduler(self.cache, max_batch, step_tokens, self.speculation)
        vocab_size = min(tokenizer.vocab_size, config.vocab_size)
        compiled = CompiledDecoder(model, self.cache, threads, dtype) if compiles and covers(model) else None
        self.runner = Runner(model, self.cache, Sampler(max_batch, vocab_size, weight.device), compiled)
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = 0
        self._steps = 0
        self._patient = False
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0

    # ---- adapters

    def add_adapter(self, adapter_hash: str, lora: LoRA) -> None:
        """From now on requests may name this adapter. Raises AdapterError if it stands on another base, or if the name
        is not the hash of its content and is taken."""
        lora.require_base(self.model, adapter_hash[:12])
        known = self.adapters.get(adapter_hash)
        if known is not None and known is not lora and known.hash != lora.hash:
            raise AdapterError(
                "another adapter already has this hash",
                got=adapter_hash[:12],
                wanted="the content hash of the adapter",
                mend="pass lora.hash",
            )
        self.adapters.setdefault(adapter_hash, lora.to(self.model.head_weight.device))
        if self.is_compiled and self.runner.compiled is not None:
            self.runner.compiled.adapter(lora)  # laid out now, and not when the first request comes

    def remove_adapter(self, adapter_hash: str) -> None:
        """New requests cannot name it; requests under way finish with it. Unknown names are ignored."""
        self.adapters.pop(adapter_hash, None)

    # ---- requests

    def chat_request(
        self,
        request_id: str,
        messages: Seq[Message],
        params: SamplingParams,
        *,
        adapter: str | None = None,
        salt: str = "",
        stream: bool = True,
        tools: Tools = (),
        options: Options | None = None,
    ) -> Request:
        """A conversation as a request: rendered by the template with its tools and options, stopped by its strings."""
        if self.template.stop_strings and not params.ignore_eos:
            params = replace(params, stop=(*params.stop, *self.template.stop_strings))
        return Request(request_id, self.template.encode_prompt(messages, tools, options), params, adapter, salt, stream)

    def text_request(
        self,
        request_id: str,
        prompt: str,
        params: SamplingParams,
        *,
        adapter: str | None = None,
        salt: str = "",
        stream: bool = True,
    ) -> Request:
        """A raw prompt to be continued; starts with bos where the tokenizer's documents do."""
        return Request(request_id, self.prompt_ids(prompt), params, adapter, salt, stream)

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of the beginning of a document."""
        ids = self.tokenizer.encode(text)
        bos = self.tokenizer.bos_id
        return [bos, *ids] if self.tokenizer.adds_bos and bos is not None else ids

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises ContextLengthError if the prompt leaves no room for one token, AdapterError for an unknown adapter,
        RequestError for an empty prompt, unknown token ids, an id that is in use or a constraint that cannot be kept.
        """
        self._add(request, request.params.seed if request.params.seed is not None else secrets.randbits(64))

    def cancel(self, request_id: str) -> Completion | None:
        """Stops a request; its blocks are free at once. Returns what was generated; None for an unknown id."""
        sequence = self._sequences.get(request_id)
        return self._finish(sequence, "cancelled").completion if sequence is not None else None

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    # ---- the loop

    def step(self) -> list[Output]:
        """One turn: some sequences compute some tokens. Returns what is new, the last output with the completion.

        If the forward pass raises, the requests are still there and a later step computes them from the start.
        """
        began = perf_counter()
        step = self.scheduler.schedule()
        if step is None:
            return []
        self._steps += 1
        if self._steps == COMPILE_AFTER:
            if self._patient:
                self.compile()
            else:
                self.start_compiling()
        try:
            ready, sampled = self.runner.run(step)
        except BaseException:
            self.scheduler.start_over()
            raise
        outputs = self._accept(step, ready, sampled)
        if self.speculation is not None and len(ready) == step.counts.sum():  # prompts would blur what a token costs
            self.speculation.learn(len(step.sequences), len(ready), perf_counter() - began)
        return outputs

    def generate(
        self, requests: Seq[Request], *, on_done: Callable[[Completion], object] | None = None
    ) -> list[Completion]:
        """Answers all requests, in their order. The same list gives the same answers: a request without a seed gets
        its place in the list as seed, and the compiled form is waited for, so that time does not say which steps it
        computes. `on_done` hears of each answer as it is finished.

        Raises what `add` raises, before anything is computed; ModelError if the logits of a request are not finite.
        """
        if self.has_work:
            raise RequestError("the engine is busy with other requests", mend="use add and step, or wait")
        done: dict[str, Completion] = {}
        self._patient = True
        try:
            for place, request in enumerate(requests):
                seed = request.params.seed
                self._add(replace(request, stream=False), place if seed is None else seed)
            while self.has_work:
                for output in self.step():
                    if output.completion is not None:
                        done[output.request_id] = output.completion
                        if output.finish_reason == "error":
                            raise ModelError(
                                "the model gave logits that are not finite",
                                got=f"request {output.request_id}",
                                mend="check the weights; they may come from a run that diverged",
                            )
                        if on_done is not None:
                            on_done(output.completion)
        finally:
            self._patient = False
            for request_id in list(self._sequences):
                self.cancel(request_id)
        return [done[request.id] for request in requests]

    @property
    def is_compiled(self) -> bool:
        """Steps are computed by the compiled form of the model."""
        return self.runner.compiled is not None and self.runner.compiled.ready.is_set()

    @property
    def choice(self) -> Choice | None:
        """How many threads compute its steps, in what its weights are kept, and why; None before the compiled form is
        there."""
        compiled = self.runner.compiled
        return compiled.choice if compiled is not None and compiled.ready.is_set() else None

    def start_compiling(self) -> None:
        """Makes the compiled form ready in the background, where there is one."""
        if self.runner.compiled is not None:
            self.runner.compiled.start()

    def compile(self, like: Engine | None = None) -> bool:
        """Waits until the compiled form of the model is ready; False if it has none or cannot have one here. `like`: an
        engine of a model of the same shape, whose choice of threads and dtype is taken over instead of tried."""
        compiled = self.runner.compiled
        known = like.choice if like is not None and like.model.config == self.model.config else None
        return compiled is not None and compiled.compile(known)

    def figures(self) -> dict[str, int]:
        """Counts for a metrics page."""
        pool = self.cache.pool
        return {
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "kv_blocks": pool.blocks,
            "kv_blocks_held": pool.blocks - pool.available,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "generated_tokens": self.generated_tokens,
            "preemptions": self.scheduler.preemptions,
            "drafted_tokens": self.speculation.drafted_tokens if self.speculation is not None else 0,
            "accepted_tokens": self.speculation.accepted_tokens if self.speculation is not None else 0,
        }

    @cached_property
    def grammars(self) -> Grammars:
        """What answers of a given form are written in."""
        return Grammars(self.tokenizer, self.template.stop_ids)

    # ---- inside

    def _add(self, request: Request, seed: int) -> None:
        params = request.params
        self._check(request)
        stop_ids = params.stop_ids if params.ignore_eos else (*params.stop_ids, *self.template.stop_ids)
        sequence = Sequence(
            request,
            arrival=self._arrivals,
            seed=seed & (2**64 - 1),
            max_length=min(len(request.prompt_ids) + params.max_tokens, self.max_context),
            stop_ids=frozenset(stop_ids),
            stream=TextStream(self.tokenizer, params.stop) if request.stream or params.stop else None,
            root_hash=self._root_hash(request, len(request.prompt_ids)),
            lora=self.adapters[request.adapter] if request.adapter is not None else None,
            matcher=self.grammars.matcher(params.constraint) if params.constraint is not None else None,
        )
        if self.speculation is not None and self.speculation.may(sequence):
            sequence.lookup = Lookup()
        self._arrivals += 1
        self._sequences[request.id] = sequence
        self.scheduler.add(sequence)

    def _root_hash(self, request: Request, length: int) -> bytes:
        """Of a row of this length: where rotary positions depend on it, so do the keys and values of all its tokens."""
        turned_as = alike(self.model.config, length)
        return root_hash(self.weights_hash, request.adapter, self.template.hash, request.salt, turned_as)

    def _check(self, request: Request) -> None:
        prompt, vocab_size = request.prompt_ids, self.model.config.vocab_size
        if request.id in self._sequences:
            raise RequestError("a request with this id is under way", got=request.id, wanted="a new id")
        if request.adapter is not None and request.adapter not in self.adapters:
            raise AdapterError("no such adapter is loaded", got=request.adapter[:12], mend="add_adapter first")
        if not len(prompt):
            raise RequestError("the prompt is empty", wanted="at least one token", param="prompt")
        if len(prompt) >= self.max_context:
            raise ContextLengthError(
                "the prompt leaves no room for an answer",
                got=f"{len(prompt)} tokens",
                wanted=f"at most {self.max_context - 1}",
                mend="shorten the conversation",
                param="messages",
            )
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise RequestError("the prompt has unknown token ids", wanted=f"0 to {vocab_size - 1}", param="prompt")
        sampled = self.runner.sampler.vocab_size
        for token in request.params.logit_bias or ():
            if not 0 <= token < sampled:
                raise RequestError(
                    "`logit_bias` names no token", got=token, wanted=f"0 to {sampled - 1}", param="logit_bias"
                )

    def _accept(self, step: Step, ready: list[int], sampled: Sampled | None) -> list[Output]:
        """Books what a step computed and says what is new."""
        for sequence in step.sequences:
            sequence.computed += sequence.scheduled - len(sequence.draft)
            sequence.scheduled = 0
        if sampled is None:
            return []
        outputs = []
        place = 0
        while place < len(ready):
            sequence = step.sequences[ready[place]]
            draft, sequence.draft = sequence.draft, []
            output = self._take_drawn(sequence, sampled, place, draft)
            if output is not None:
                outputs.append(output)
            place += 1 + len(draft)
        return outputs

    def _take_drawn(self, sequence: Sequence, sampled: Sampled, place: int, draft: list[int]) -> Output | None:
        """The token that was drawn at `place`, and those behind it for as long as the draft was right."""
        said: Output | None = None
        for right, drafted in enumerate([*draft, None]):
            if sampled.broken and sampled.broken[place + right]:
                output: Output | None = self._finish(sequence, "error")
            else:
                tops = sampled.tops[place + right : place + right + 1] if sequence.request.params.logprobs else []
                output = self._take(sequence, sampled.tokens[place + right], sampled.logprobs[place + right])
                self.generated_tokens += 1
                if tops:
                    sequence.top_logprobs += tops
                if output is not None:
                    output.top_logprobs = tops
            if output is not None:
                said = output if said is None else said.then(output)
            if sequence.row < 0 or drafted != sequence.ids[-1]:
                break
            self.scheduler.keep_drafted(sequence)
        if self.speculation is not None:
            self.speculation.drafted_tokens += len(draft)
            self.speculation.accepted_tokens += right
        return said

    def _take(self, sequence: Sequence, token: int, logprob: float) -> Output | None:
        """One more token of a sequence; None if nobody wants to hear of it yet."""
        sequence.ids.append(token)
        sequence.logprobs.append(logprob)
        stream, delta = sequence.stream, ""
        reason: FinishReason | None = None
        if token in sequence.stop_ids:
            reason = "stop"
        else:
            if stream is not None:
                delta = stream.push(token)
                if stream.stopped:
                    reason = "stop"
            if sequence.matcher is not None:
                sequence.matcher.accept(token)
                if sequence.matcher.broken:
                    reason = "constraint"
                elif sequence.matcher.whole:
                    reason = "stop"
            if reason is None and len(sequence.ids) >= sequence.max_length:
                reason = "length"
        if reason is not None:
            return self._finish(sequence, reason, delta, [token], [logprob])
        root = self._root_hash(sequence.request, len(sequence.ids)) if self._turns_by_length else sequence.root_hash
        if root != sequence.root_hash:
            sequence.root_hash = root
            self.scheduler.recompute(sequence)
        if not sequence.request.stream:
            return None
        return Output(sequence.request.id, delta, [token], [logprob])

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        delta: str = "",
        token_ids: list[int] | None = None,
        logprobs: list[float] | None = None,
    ) -> Output:
        """The sequence leaves; what it held is free."""
        self.scheduler.remove(sequence)
        del self._sequences[sequence.request.id]
        self.prompt_tokens += sequence.prompt_tokens
        self.cached_tokens += max(sequence.cached_tokens, 0)
        stream = sequence.stream
        if stream is None:
            stream = TextStream(self.tokenizer, ())
            for token in sequence.ids[sequence.prompt_tokens :]:
                if token not in sequence.stop_ids:
                    delta += stream.push(token)
        delta += stream.finish()
        completion = sequence.completion(stream.text, reason)
        return Output(sequence.request.id, delta, token_ids or [], logprobs or [], [], reason, completion)
