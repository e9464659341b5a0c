"""The compiled form of a model's step, for models and requests that it covers: what `ops.decoder` needs, laid out once.

It computes what `Transformer.forward` and `.logits` compute, from the same weights, on the same cache; whatever it does
not cover goes through those. Compiling takes half a minute the first time on a machine and a second after that, in a
thread of its own: `ready` says when, until then torch answers.
Not here: the loops (`ops.decoder`), which tokens a step computes (`scheduler`).

Legend: as in `ops.decoder`.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import threading
import time
import weakref
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prairie.engine.probe import Choice, numbers_to_try, of_dtype, probe
from prairie.models.rope import depends_on_length, rope_frequencies, rope_magnitudes
from prairie.models.transformer import Transformer
from prairie.models.weights import hash_of
from prairie.ops import decoder_plan
from prairie.ops.attention import rotary_turns
from prairie.ops.packed import (
    IN_PANELS,
    Bits,
    PackedWeight,
    in_narrow_panels,
    in_one_piece,
    in_panels,
    is_bfloat16,
    lay_in_panels,
)  # fmt: skip
from prairie.ops.weight_forms import BFLOAT16, FLOAT32, LANES, PANEL, PANELS
from prairie.runtime import give_back

if TYPE_CHECKING:
    from prairie.engine.kv_cache import KVCache
    from prairie.models.lora import LoRA
    from prairie.ops.linear import LowRank

log = logging.getLogger("prairie.engine")
GROUPS = ("qkv", "o", "gate_up", "down")
MOST_LAYERS = 400
"""The phases of a step have numbers of 12 bits."""
MOST_THREADS = 64
PROBED_CONTEXT = 128
"""Tokens that a step of the probe looks back at."""
REST_S = 60e-6
"""Between two steps of the probe: what the engine needs there, while helpers fall asleep."""
HEAD_PIECES = 16
"""Pieces of the head for each thread."""
SEGMENT = 48
"""Tokens, at most, that one thread takes through an adapter at once."""
NOTHING = np.zeros(0, dtype=np.int64)
COPIED_BYTES = 32 << 20
"""Weights in float32 that are not more than this are copied into panels: reading those is a third faster for one token,
and the copy costs less than what a large page does. Larger ones are read where they lie."""
SAID = (
    "tokens", "sequences", "ready_count", "sampled", "threads", "head_pieces", "segment_count", "segments"
)  # fmt: skip
"""Of the plan: what each step says itself."""


Dtype = Literal["auto", "float32"]
"""In what weights that were read in float32 are kept: auto takes bfloat16 where it loses nothing and is faster."""


def covers(model: Transformer) -> bool:
    """Whether every operator of this model is in `ops.decoder`: Llama, Mistral, Qwen 2 and 3, what is built alike."""
    c = model.config
    plain = (
        c.kind == "decoder" and c.writes and c.norm == "rms" and not c.norm_bias and c.norm_at == "input"
        and c.first_norm and c.final_norm and not c.embed_norm and c.gated and c.activation == "silu" and not c.experts
        and c.positions == "rotary" and not depends_on_length(c) and not c.window_rope_theta and not c.segments
        and not c.parallel_residual and c.residual_scale == 1.0 and c.logit_scale == 1.0 and c.qk_norm != "width"
        and not c.attention_softcap and not c.logit_softcap and not c.logit_bias
    )  # fmt: skip
    whole = all(size % LANES == 0 for size in (c.dim, c.q_dim, c.ffn_dim, c.head_dim))
    packed = isinstance(model.layers[0].qkv, PackedWeight)
    return (
        plain
        and whole
        and (not packed or c.ffn_dim % PANEL == 0)  # a panel belongs to gates or to ups
        and c.layers <= MOST_LAYERS
        and model.embed.dtype == torch.float32
        and model.embed.device.type == "cpu"
        and _kinds(model)
    )


def _kinds(model: Transformer) -> bool:
    """All matrices of the blocks are kept alike, in a way that is computed with here."""
    kinds = {weight.bits if isinstance(weight, PackedWeight) else str(weight.dtype) for weight in _weights(model)}
    return len(kinds) == 1 and kinds <= {"torch.float32", *IN_PANELS}


def _weights(model: Transformer) -> list[Tensor | PackedWeight]:
    """The matrices of the blocks."""
    return [getattr(block, group) for block in model.layers for group in GROUPS]


@dataclass(frozen=True)
class Matrices:
    """The large matrices of a model, as a step multiplies them."""

    blocks: list[Tensor | PackedWeight]
    """Of each layer, by `GROUPS`."""
    embed: Tensor | PackedWeight
    head: Tensor | PackedWeight
    """`embed` itself where they are tied."""

    @classmethod
    def of(cls, model: Transformer) -> Matrices:
        """The model's own; a vocabulary that holds only numbers of a quantised form is kept in it."""
        found = cls(_weights(model), model.embed, model.head_weight)
        quantization = model.quantization
        if quantization is not None:
            lay_in_panels([weight for weight in found.blocks if isinstance(weight, PackedWeight)])
            if quantization.head is not None and isinstance(found.embed, Tensor):
                return cls(found.blocks, *found.vocabulary_in(quantization.head))
        return found

    def in_bfloat16(self) -> Matrices | None:
        """The same numbers in bfloat16; None where some of the blocks' are no such numbers."""
        plain = [weight for weight in self.blocks if isinstance(weight, Tensor)]
        if len(plain) < len(self.blocks) or not all(map(is_bfloat16, plain)):
            return None
        packed = [PackedWeight(weight, "bf16", exact=True) for weight in plain]
        lay_in_panels(packed)
        whole = all(isinstance(weight, Tensor) and is_bfloat16(weight) for weight in (self.embed, self.head))
        return Matrices([*packed], *(self.vocabulary_in("bf16") if whole else (self.embed, self.head)))

    def vocabulary_in(self, bits: Bits) -> tuple[PackedWeight, PackedWeight]:
        """Embedding and head in a form that loses nothing of them."""
        assert isinstance(self.embed, Tensor) and isinstance(self.head, Tensor)
        embed = PackedWeight(self.embed, bits, exact=True)
        head = embed if self.head is self.embed else PackedWeight(self.head, bits, exact=True)
        lay_in_panels([embed] if head is embed else [embed, head])
        return embed, head


@cache
def _kernels() -> ModuleType | None:
    """`ops.decoder`; None where numba is not installed."""
    try:
        from prairie.ops import decoder
    except ImportError as error:
        log.info("numba is not there, steps are computed by torch: %s", error)
        return None
    return decoder


class Step(Protocol):
    """Which tokens are computed: of `scheduler.Step`, what is looked at here."""

    rows: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    adapters: list[tuple[LoRA, slice]]


@dataclass(slots=True)
class ComputedStep:
    """A step without requests."""

    rows: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    adapters: list[tuple[LoRA, slice]]


@dataclass(frozen=True, slots=True)
class Found:
    """What a step found out of R tokens. Overwritten by the next one."""

    logits_RV: np.ndarray
    best_R: np.ndarray
    """The likeliest of the tokens that may be drawn."""
    logprobs_R: np.ndarray
    """Its log-probability."""
    norms_R: np.ndarray
    """The logarithm of the sum of e^logit."""


@dataclass(frozen=True)
class Adapter:
    """An adapter as `ops.decoder` takes it."""

    pairs: np.ndarray
    """(L, 4, PAIRS)"""
    width: int
    """The most ranks that a layer has."""
    tensors: list[Tensor]
    """What the addresses in `pairs` point to."""


class Helpers:
    """Threads that compute pieces of a plan's steps beside the caller's, asleep in between. They end with `dismiss` or
    with the process; until then they hold what they look at, but nothing of the model."""

    def __init__(self, plan: np.ndarray, decoder: ModuleType) -> None:
        self.plan, self.decoder = plan, decoder
        self.gate = np.zeros(decoder_plan.GATE_BYTES + 64, dtype=np.uint8)
        self.doors = np.zeros((MOST_THREADS, decoder_plan.DOOR_BYTES), dtype=np.uint8)
        self.libc = ctypes.CDLL(None)
        self.started = 1
        record = plan[0]
        record["gate"] = -(-address(self.gate) // 64) * 64  # each word on a line of memory of its own
        record["doors"] = address(self.doors)
        for name, function in (
            ("post", "sem_post"), ("wait", "sem_wait"), ("try_wait", "sem_trywait"), ("give_way", "sched_yield")
        ):  # fmt: skip
            record[name] = ctypes.cast(getattr(self.libc, function), ctypes.c_void_p).value

    def have(self, threads: int) -> None:
        """From now on this many threads compute, the caller's among them."""
        while self.started < threads:
            self.libc.sem_init(ctypes.c_void_p(self._door(self.started)), 0, 0)
            threading.Thread(target=self._help, args=(self.started,), name="prairie-step", daemon=True).start()
            self.started += 1

    def dismiss(self) -> None:
        self.plan[0]["stop"] = 1
        for helper in range(1, self.started):
            self.libc.sem_post(ctypes.c_void_p(self._door(helper)))

    def _help(self, helper: int) -> None:
        self.decoder.decoder_step(self.plan, helper)

    def _door(self, helper: int) -> int:
        return address(self.doors) + helper * int(decoder_plan.DOOR_BYTES)


class CompiledDecoder:
    """A model and its cache, as arrays and addresses. Everything that an address points to is held here."""

    def __init__(
        self, model: Transformer, cache: KVCache, threads: int | None = None, dtype: Dtype = "float32"
    ) -> None:
        """`threads` of every step; None: found by a probe. `dtype` auto: found by it, too."""
        c = model.config
        self.asked_threads, self.dtype = threads, dtype
        self.choice: Choice | None = None
        """How many threads compute a step, and in what the weights are kept; None until that is known."""
        self.model, self.cache, self.config = model, cache, c
        self.held: dict[str, np.ndarray] = {}
        self.laid: list[Tensor] = []
        """What matrices are read from."""
        self.newer: Matrices | None = None
        """Matrices that the model shall keep from the next step on instead of its own."""
        self.adapters: weakref.WeakKeyDictionary[LoRA, Adapter | None] = weakref.WeakKeyDictionary()
        self.scratch: dict[str, np.ndarray] = {}
        self.room = (0, 0, 0)
        """Tokens, threads and tokens that want logits that the scratch arrays are large enough for."""
        self.plan: Any = np.zeros(0)
        self.said: dict[str, np.ndarray] = {}
        """What is said anew for each step: views of the plan, which are quicker to write to than its records."""
        self.ready = threading.Event()
        self.compiling = threading.Lock()

    # ---- compiling

    def start(self) -> None:
        """`compile`, beside whatever runs now."""
        if not self.ready.is_set():
            threading.Thread(target=self.compile, name="prairie-compile").start()

    def compile(self, known: Choice | None = None) -> bool:
        """Compiles, or loads what an earlier process compiled; False if that cannot be done here, which is logged.
        `known`: what was found best for another model of this shape, so that nothing has to be tried."""
        with self.compiling:
            if self.ready.is_set():
                return True
            decoder = _kernels()
            if decoder is None:
                return False
            try:
                self.plan = np.zeros(1, decoder_plan.PLAN)
                self.plan[0]["stop"] = 1
                decoder.decoder_step(self.plan, 0)  # compiles, and computes nothing
                self._describe_model(decoder)
                self.step = decoder.decoder_step
                self._choose(known)
            except Exception:
                log.exception("steps are computed by torch: the compiled form cannot be made here")
                return False
            self.ready.set()
            give_back()  # what loading and packing needed
            return True

    def _describe_model(self, decoder: ModuleType) -> None:
        """What the plan says of every step."""
        from prairie.ops.products import products

        model, cache, c, record = self.model, self.cache, self.config, self.plan[0]
        for name in ("layers", "dim", "heads", "kv_heads", "head_dim"):
            record[name] = getattr(c, name)
        record["ffn"], record["vocab"] = c.ffn_dim, c.vocab_size
        record["eps"], record["query_scale"] = c.norm_eps, model.query_scale * c.head_dim**-0.5
        record["embed_scale"] = c.embed_scale
        self.said = {name: self.plan[name] for name in SAID}
        turns = rotary_turns(torch.arange(c.max_context), rope_frequencies(c), rope_magnitudes(c))[:, 0]
        self._keep("all_turns", torch.cat([turns.real, turns.imag], 1).numpy())

        def stacked(name: str) -> np.ndarray | None:
            rows = [row.detach().float() for block in model.layers if (row := getattr(block, name, None)) is not None]
            return torch.stack(rows).numpy() if rows else None

        offset = np.float32(1.0 if c.norm_offset else 0.0)
        for name, pair in (("norms", ("attention_norm", "mlp_norm")), ("qk_norms", ("q_norm", "k_norm"))):
            found = [rows + offset for part in pair if (rows := stacked(part)) is not None]
            if found:
                self._keep(name, np.stack(found, 1))
        for name, of_block in (
            ("qkv_bias", "qkv_bias"), ("out_bias", "o_bias"), ("mlp_bias", "gate_up_bias"), ("down_bias", "down_bias")
        ):  # fmt: skip
            bias = stacked(of_block)
            if bias is not None:
                self._keep(name, bias)
        assert model.norm is not None
        self._keep("last_norm", model.norm.detach().float().numpy() + offset)
        self._keep("windows", np.array([c.window(layer) for layer in range(c.layers)], dtype=np.int64))
        self._keep("turned", np.array([layer not in c.nope_layers for layer in range(c.layers)], dtype=np.int64))
        self._keep("kv", cache.store.numpy())
        self._keep("tables", cache.tables)
        record["slots"], record["blocks"], record["block_size"] = cache.tokens, cache.tables.shape[1], cache.block_size
        record["products"] = products.address
        helpers = Helpers(self.plan, decoder)
        weakref.finalize(self, helpers.dismiss).atexit = False  # at the end of the process they sleep on
        self.helpers = helpers
        record["stop"] = 0

    def _choose(self, known: Choice | None) -> None:
        """How the matrices are kept and how many threads compute a step, by trying where it was not said."""
        asked, own = self.asked_threads, Matrices.of(self.model)
        numbers = [asked] if asked is not None else numbers_to_try(most_threads())
        open_question = self.dtype == "auto" and isinstance(own.blocks[0], Tensor) and self.config.ffn_dim % PANEL == 0
        narrow = own.in_bfloat16() if open_question else None
        if known is not None and known.compared != (narrow is not None):
            known = None  # of another question
        if known is not None and narrow is not None and known.dtype == "bfloat16":
            own = narrow
        self._describe_weights(own)
        chosen = Choice(numbers[0], numbers[0])
        if known is not None:
            chosen = known
        elif narrow is not None:
            wide = self._probed(numbers)
            self._describe_weights(narrow)
            chosen = of_dtype(self._probed(numbers), wide)
            if chosen.dtype == "float32":
                self._describe_weights(own)
            else:
                own = narrow
        elif len(numbers) > 1:
            chosen = self._probed(numbers)
        if open_question and narrow is None:
            chosen = replace(chosen, why="bfloat16 would round them")
        self.choice = chosen
        log.info("%s", chosen)
        if own.embed is not self.model.embed or own.blocks[0] is not self.model.layers[0].qkv:
            if self.model.loaded_hashes is None:
                self.model.loaded_hashes = (hash_of(self.model), "")
            self.newer = own

    def _replace_matrices(self, newer: Matrices) -> None:
        """In the engine's thread, between two steps: the model keeps its matrices as they are computed with. They hold
        the same numbers, and what they held them in before is free."""
        model = self.model
        blocks = iter(newer.blocks)
        places: list[tuple[nn.Module, str]] = [(block, group) for block in model.layers for group in GROUPS]
        for owner, name, weight in (
            *((owner, name, next(blocks)) for owner, name in places),
            (model, "embed", newer.embed),
            *([] if model.head is None else [(model, "head", newer.head)]),
        ):
            if getattr(owner, name) is not weight:
                delattr(owner, name)
                setattr(owner, name, weight)
        self.newer = None
        threading.Thread(target=give_back, name="prairie-give-back").start()

    def _describe_weights(self, matrices: Matrices) -> None:
        """The matrices, each as it is multiplied."""
        c, record, self.laid = self.config, self.plan[0], []
        blocks, embed, head = matrices.blocks, matrices.embed, matrices.head
        plain = [weight.detach() for weight in (*blocks, head) if isinstance(weight, Tensor)]
        kind = IN_PANELS[blocks[0].bits] if isinstance(blocks[0], PackedWeight) else FLOAT32
        head_kind = IN_PANELS[head.bits] if isinstance(head, PackedWeight) else FLOAT32
        copied = len(plain) > len(blocks) and c.ffn_dim % PANEL == 0
        if copied and sum(weight.nbytes for weight in plain) <= COPIED_BYTES:
            laid = in_one_piece([in_panels(weight) for weight in plain])
            blocks, head = [*laid[:-1]], laid[-1]
            kind = head_kind = PANELS
        record["kind"], record["head_kind"] = kind, head_kind
        record["rows_at_once"] = decoder_plan.TILE_ROWS if kind == FLOAT32 else PANEL
        record["heads_at_once"] = 1 if kind == FLOAT32 else PANEL // math.gcd(PANEL, c.head_dim)
        record["adapter_kind"] = PANELS if self.model.quantization is None else BFLOAT16
        addresses = np.array([self._addresses(weight) for weight in blocks]).reshape(c.layers, len(GROUPS), 2)
        self._keep("weights", addresses[:, :, 0])
        self._keep("scales", addresses[:, :, 1])
        record["head"], record["head_scales"] = self._addresses(head)
        record["embed_kind"] = IN_PANELS[embed.bits] if isinstance(embed, PackedWeight) else FLOAT32
        record["embeddings"], record["embed_scales"] = self._addresses(embed)

    def _keep(self, name: str, values: np.ndarray) -> None:
        """Something of the model, by its address."""
        kept = self.held[name] = np.ascontiguousarray(values)
        self.plan[0][name] = address(kept)

    def _addresses(self, weight: Tensor | PackedWeight) -> tuple[int, int]:
        """Of the numbers and of their scales, 0 where there are none."""
        if isinstance(weight, PackedWeight):
            self.laid += [weight.numbers, weight.scales]
            return weight.numbers.data_ptr(), weight.scales.data_ptr() if weight.bits == "int8" else 0
        held = weight.detach().contiguous()
        self.laid.append(held)
        return held.data_ptr(), 0

    # ---- adapters

    def adapter(self, lora: LoRA) -> Adapter | None:
        """An adapter laid out; None for one that changes more than sums (DoRA), the embedding or the head."""
        if lora not in self.adapters:
            self.adapters[lora] = self._laid_out(lora)
        return self.adapters[lora]

    def _laid_out(self, lora: LoRA) -> Adapter | None:
        if lora.touches(self.model.linear(None, "embed")) or lora.touches(self.model.linear(None, "head")):
            return None
        dtype = torch.bfloat16 if self.plan[0]["adapter_kind"] == BFLOAT16 else torch.float32
        pairs = np.zeros((self.config.layers, len(GROUPS), decoder_plan.PAIRS), dtype=np.int64)
        tensors: list[Tensor] = []
        places: list[tuple[int, int, int]] = []
        for layer in range(self.config.layers):
            for group, name in enumerate(GROUPS):
                at = self.model.linear(layer, name)
                changes = lora.plain_changes(at)
                if changes is None:
                    return None
                pair = pairs[layer, group]
                read: list[Tensor] = []
                written: list[Tensor] = []
                for number, (_, rows) in enumerate(at.rows()):
                    place = decoder_plan.PART + 5 * number
                    pair[place + decoder_plan.FIRST], pair[place + decoder_plan.LAST] = rows.start, rows.stop
                    a_RI, b_OR = _used(changes, rows)
                    if len(a_RI):
                        pair[place + decoder_plan.AT] = sum(map(len, read))
                        pair[place + decoder_plan.RANK] = len(a_RI)
                        read.append(a_RI)
                        written.append(b_OR.to(dtype).unflatten(0, (-1, LANES)).mT)
                        places.append((layer, group, place + decoder_plan.B))
                if read:
                    places.insert(len(places) - len(written), (layer, group, decoder_plan.A))
                    pair[decoder_plan.INNER] = sum(map(len, read))
                    a_PIR = in_narrow_panels(torch.cat(read).to(dtype))
                    tensors += [a_PIR, *written]  # in the order in which they are wanted
        lora.forget_changes()
        tensors = in_one_piece(tensors)
        for where, tensor in zip(places, tensors, strict=True):
            pairs[where] = tensor.data_ptr()
        return Adapter(pairs, int(pairs[:, :, decoder_plan.INNER].max()), tensors)

    # ---- a step

    def takes(self, step: Step) -> bool:
        """Whether it is compiled by now, and covers all adapters of the step."""
        return self.ready.is_set() and all(self.adapter(lora) is not None for lora, _ in step.adapters)

    def run(self, step: Step, tokens: list[int], places: list[int], sampled: int) -> Found | None:
        """Computes a step, given its tokens (N,); keys and values of all are in the cache afterwards. What is to be
        known of the tokens at `places` (R,), if there are any: of their logits, and of the first `sampled` of these."""
        if self.newer is not None and self.ready.is_set():
            self._replace_matrices(self.newer)
        count, sequences, wanted, threads = len(tokens), len(step.rows), len(places), self.threads(len(tokens))
        self._have_room(count, threads, wanted)
        said, scratch = self.said, self.scratch
        said["tokens"][0], said["sequences"][0], said["ready_count"][0] = count, sequences, wanted
        said["sampled"][0], said["threads"][0], said["head_pieces"][0] = sampled, threads, HEAD_PIECES * threads
        scratch["ids"][:count] = tokens
        scratch["rows"][:sequences] = step.rows
        scratch["starts"][:sequences] = step.starts
        scratch["counts"][:sequences] = step.counts
        scratch["ready"][:wanted] = places
        segments = self._segments(step.adapters, count) if step.adapters else NOTHING
        said["segment_count"][0] = len(segments)
        if len(segments):
            said["segments"][0] = address(segments)
        self.helpers.have(threads)
        self.step(self.plan, 0)
        if not wanted:
            return None
        logits_RV = scratch["logits"][: wanted * self.config.vocab_size].reshape(wanted, -1)
        logs = scratch["logs"]
        return Found(logits_RV, scratch["best"][:wanted], logs[:wanted], logs[wanted : 2 * wanted])

    def _segments(self, adapters: list[tuple[LoRA, slice]], count: int) -> np.ndarray:
        """(S, 3) the tokens that have an adapter in segments: first token, count, address of the adapter's `pairs`."""
        found: list[tuple[int, int, int]] = []
        width = PANEL
        for lora, rows in adapters:
            adapter = self.adapter(lora)
            assert adapter is not None
            pairs, width = address(adapter.pairs), max(width, adapter.width)
            for start in range(rows.start, rows.stop, SEGMENT):
                found.append((start, min(SEGMENT, rows.stop - start), pairs))
        self.plan[0]["inner_width"] = width
        self._scratch("inner", count * width, np.float32)
        return np.array(found, dtype=np.int64)

    def _have_room(self, tokens: int, threads: int, ready: int) -> None:
        """Scratch for a step of so many tokens, threads, and tokens that want logits; it grows by powers of two and is
        kept, so that most steps find what the one before them had."""
        if tokens <= self.room[0] and threads <= self.room[1] and ready <= self.room[2]:
            return
        tokens, threads, ready = (
            max(had, 1 << max(least, needed - 1).bit_length())
            for had, least, needed in zip(self.room, (3, 0, 0), (tokens, threads, ready), strict=True)
        )
        c, whole = self.config, np.int64
        for name, size, dtype in (
            ("x", tokens * c.dim, np.float32), ("y", tokens * c.dim * threads, np.float32),
            ("qkv", tokens * c.qkv_dim, np.float32), ("mixed", tokens * c.q_dim, np.float32),
            ("gate_up", tokens * 2 * c.ffn_dim, np.float32), ("act", tokens * c.ffn_dim, np.float32),
            ("turns", tokens * c.head_dim, np.float32), ("logits", ready * c.vocab_size, np.float32),
            ("ids", tokens, whole), ("positions", tokens, whole), ("of_row", tokens, whole),
            ("own_slots", tokens, whole), ("runs", tokens * 2, whole), ("ready", ready, whole),
            ("rows", tokens, whole), ("starts", tokens, whole), ("counts", tokens, whole),
            ("best", HEAD_PIECES * threads * ready, whole), ("found", HEAD_PIECES * threads * ready * 3, np.float32),
            ("logs", 2 * ready, np.float32),
        ):  # fmt: skip
            self._scratch(name, size, dtype)
        if c.nope_layers:
            turn = np.repeat(np.array([1.0, 0.0], dtype=np.float32), c.head_dim // 2)
            self._scratch("plain", tokens * c.head_dim, np.float32).reshape(tokens, -1)[:] = turn
        self.room = (tokens, threads, ready)

    def _scratch(self, name: str, size: int, dtype: type) -> np.ndarray:
        """A scratch array of at least this size."""
        known = self.scratch.get(name)
        if known is None or len(known) < size:
            known = self.scratch[name] = np.zeros(size, dtype=dtype)
            self.plan[0][name] = address(known)
        return known

    def threads(self, tokens: int) -> int:
        """Threads of a step of so many tokens."""
        assert self.choice is not None
        return min(self.choice.threads(tokens), MOST_THREADS)

    def _probed(self, numbers: list[int]) -> Choice:
        """Tries steps on a cache of their own, while no other thread looks at the plan."""
        record, c, cache = self.plan[0], self.config, self.cache
        names = ("kv", "tables", "slots", "blocks")
        before = {name: record[name].copy() for name in names}
        context = max(1, min(PROBED_CONTEXT // cache.block_size, cache.tables.shape[1])) * cache.block_size
        kv = np.zeros((c.layers, 2, context, c.kv_heads, c.head_dim), dtype=np.float32)
        tables = np.arange(context // cache.block_size, dtype=np.int64)[None]
        record["kv"], record["tables"] = address(kv), address(tables)
        record["slots"], record["blocks"] = context, tables.shape[1]
        start = min(context, c.max_context) - 1

        def step_s(tokens: int, threads: int) -> float:
            self.choice = Choice(threads, threads)
            places = np.zeros(tokens, dtype=np.int64)  # one row of the tables for all: what is stored does not matter
            step = ComputedStep(places, places + start, places + 1, [])
            rest = time.perf_counter() + REST_S
            while time.perf_counter() < rest:
                pass
            began = time.perf_counter()
            self.run(step, [0] * tokens, list(range(tokens)), c.vocab_size)
            return time.perf_counter() - began

        try:
            return probe(step_s, numbers)
        finally:
            for name, value in before.items():
                record[name] = value


def most_threads() -> int:
    """As many as torch, but no more than there are cores for this process: they wait for each other awake."""
    return min(torch.get_num_threads(), len(os.sched_getaffinity(0)), MOST_THREADS)


def address(array: np.ndarray) -> int:
    where: int = array.__array_interface__["data"][0]
    return where


def _used(changes: list[LowRank], rows: slice) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) of the outputs `rows` of a layer, without the ranks that these do not use (of a fused layer
    those of its other parts), filled up to whole vectors."""
    if not changes:
        return torch.empty(0, 0), torch.empty(0, 0)
    b_OR = torch.cat([change.b_OR[rows] for change in changes], 1).detach().float()
    used = b_OR.abs().amax(0) > 0
    short = -int(used.sum()) % LANES
    a_RI = torch.cat([change.a_RI for change in changes]).detach().float()[used]
    return F.pad(a_RI, (0, 0, 0, short)), F.pad(b_OR[:, used], (0, short))
