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
import weakref
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prairie.models.rope import depends_on_length, rope_frequencies, rope_magnitudes
from prairie.models.transformer import Transformer
from prairie.ops.attention import rotary_turns
from prairie.ops.packed import PANEL, PackedWeight, in_one_piece, in_panels, lay_in_panels

if TYPE_CHECKING:
    from prairie.engine.kv_cache import KVCache
    from prairie.engine.scheduler import Step
    from prairie.models.lora import LoRA
    from prairie.ops.linear import LowRank

log = logging.getLogger("prairie.engine")
GROUPS = ("qkv", "o", "gate_up", "down")
LANES = 8
"""As in `ops.decoder`, which is imported late."""
MOST_LAYERS = 400
"""The phases of a step have numbers of 12 bits."""
MOST_THREADS = 64
HEAD_PIECES = 16
"""Pieces of the head for each thread."""
SEGMENT = 48
"""Tokens, at most, that one thread takes through an adapter at once."""
NOTHING = np.zeros(0, dtype=np.int64)


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
    return len(kinds) == 1 and kinds <= {"torch.float32", "bf16", "int8"}


def _weights(model: Transformer) -> list[Tensor | PackedWeight]:
    """The matrices of the blocks."""
    return [getattr(block, group) for block in model.layers for group in GROUPS]


@cache
def _kernels() -> ModuleType | None:
    """`ops.decoder`; None where numba is not installed."""
    try:
        from prairie.ops import decoder
    except ImportError as error:
        log.info("numba is not there, steps are computed by torch: %s", error)
        return None
    return decoder


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
        self.gate = np.zeros(decoder.GATE_BYTES + 64, dtype=np.uint8)
        self.doors = np.zeros((MOST_THREADS, decoder.DOOR_BYTES), dtype=np.uint8)
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
        return address(self.doors) + helper * int(self.decoder.DOOR_BYTES)


class CompiledDecoder:
    """A model and its cache, as arrays and addresses. Everything that an address points to is held here."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        c = model.config
        self.model, self.cache, self.config = model, cache, c
        self.held: list[Tensor | np.ndarray] = []
        self.adapters: weakref.WeakKeyDictionary[LoRA, Adapter | None] = weakref.WeakKeyDictionary()
        self.scratch: dict[str, np.ndarray] = {}
        self.embeddings = model.embed.detach().numpy()
        turns = rotary_turns(torch.arange(c.max_context), rope_frequencies(c), rope_magnitudes(c))[:, 0]
        self.turns = torch.cat([turns.real, turns.imag], 1).contiguous().numpy()
        self.plain_turn = np.repeat(np.array([1.0, 0.0], dtype=np.float32), c.head_dim // 2)
        self.plan = np.zeros(0)
        self.ready = threading.Event()
        self.compiling = threading.Lock()

    # ---- compiling

    def start(self) -> None:
        """`compile`, beside whatever runs now."""
        if not self.ready.is_set():
            threading.Thread(target=self.compile, name="prairie-compile").start()

    def compile(self) -> bool:
        """Compiles, or loads what an earlier process compiled; False if that cannot be done here, which is logged."""
        with self.compiling:
            if self.ready.is_set():
                return True
            decoder = _kernels()
            if decoder is None:
                return False
            try:
                self.plan = np.zeros(1, decoder.PLAN)
                self.plan[0]["stop"] = 1
                decoder.decoder_step(self.plan, 0)  # compiles, and computes nothing
                self._describe_model(decoder)
            except Exception:
                log.exception("steps are computed by torch: the compiled form cannot be made here")
                return False
            self.ready.set()
            return True

    def _describe_model(self, decoder: ModuleType) -> None:
        """What the plan says of every step."""
        model, cache, c, record = self.model, self.cache, self.config, self.plan[0]
        for name in ("layers", "dim", "heads", "kv_heads", "head_dim"):
            record[name] = getattr(c, name)
        record["ffn"], record["vocab"] = c.ffn_dim, c.vocab_size
        record["eps"], record["query_scale"] = c.norm_eps, model.query_scale * c.head_dim**-0.5
        packed = [weight for weight in _weights(model) if isinstance(weight, PackedWeight)]
        lay_in_panels(packed)
        bits = packed[0].bits if packed else "float32"
        record["kind"] = {"float32": decoder.FLOAT32, "bf16": decoder.BFLOAT16, "int8": decoder.INT8}[bits]
        record["rows_at_once"] = PANEL if packed else decoder.TILE_ROWS
        record["heads_at_once"] = PANEL // math.gcd(PANEL, c.head_dim) if packed else 1
        record["adapter_kind"] = decoder.BFLOAT16 if packed else decoder.PANELS
        weights = [[self._addresses(getattr(block, name)) for name in GROUPS] for block in model.layers]
        self._keep("weights", np.array([[numbers for numbers, _ in row] for row in weights]))
        self._keep("scales", np.array([[scales for _, scales in row] for row in weights]))
        record["head"], record["head_scales"] = self._addresses(model.head_weight)
        if model.quantization is not None and model.quantization.head:
            head = PackedWeight(model.head_weight, model.quantization.bits)
            lay_in_panels([head])
            record["head_kind"] = record["kind"]
            record["head"], record["head_scales"] = self._addresses(head)

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
        record["products"] = decoder.products.address
        helpers = Helpers(self.plan, decoder)
        weakref.finalize(self, helpers.dismiss).atexit = False  # at the end of the process they sleep on
        self.helpers = helpers
        record["stop"] = 0

    def _keep(self, name: str, values: np.ndarray) -> None:
        """Something of the model, by its address."""
        kept = np.ascontiguousarray(values)
        self.held.append(kept)
        self.plan[0][name] = address(kept)

    def _addresses(self, weight: Tensor | PackedWeight) -> tuple[int, int]:
        """Of the numbers and of their scales, 0 where there are none."""
        if isinstance(weight, PackedWeight):
            self.held += [weight.numbers, weight.scales]
            return weight.numbers.data_ptr(), weight.scales.data_ptr() if weight.bits == "int8" else 0
        held = weight.detach().contiguous()
        self.held.append(held)
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
        decoder = _kernels()
        assert decoder is not None
        dtype = torch.bfloat16 if self.plan[0]["adapter_kind"] == decoder.BFLOAT16 else torch.float32
        pairs = np.zeros((self.config.layers, len(GROUPS), decoder.PAIRS), dtype=np.int64)
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
                    place = decoder.PART + 5 * number
                    pair[place + decoder.FIRST], pair[place + decoder.LAST] = rows.start, rows.stop
                    a_RI, b_OR = _used(changes, rows)
                    if len(a_RI):
                        pair[place + decoder.AT], pair[place + decoder.RANK] = sum(len(a) for a in read), len(a_RI)
                        read.append(a_RI)
                        written.append(in_panels(b_OR.to(dtype)))
                        places.append((layer, group, place + decoder.B))
                if read:
                    places.insert(len(places) - len(written), (layer, group, decoder.A))
                    a_PIR = in_panels(torch.cat(read).to(dtype))
                    pair[decoder.INNER] = PANEL * len(a_PIR)
                    tensors += [a_PIR, *written]  # in the order in which they are wanted
        lora.forget_changes()
        tensors = in_one_piece(tensors)
        for place, tensor in zip(places, tensors, strict=True):
            pairs[place] = tensor.data_ptr()
        return Adapter(pairs, int(pairs[:, :, decoder.INNER].max()), tensors)

    # ---- a step

    def takes(self, step: Step) -> bool:
        """Whether it is compiled by now, and covers all adapters of the step."""
        return self.ready.is_set() and all(self.adapter(lora) is not None for lora, _ in step.adapters)

    def run(
        self, step: Step, tokens: list[int], ready: list[int], sampled: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Computes a step, given its tokens (N,); keys and values of all are in the cache afterwards.

        Of the last tokens of the sequences `ready` (R,), if there are any: the logits (R, V), overwritten by the next
        call; the likeliest of the first `sampled` tokens (R,); the logarithm of the sum of e^logit (R,).
        """
        decoder, c, record, cache, threads = _kernels(), self.config, self.plan[0], self.cache, self.threads()
        assert decoder is not None
        count, wanted = len(tokens), len(ready)
        positions, of_row, last = _places(step, count)
        own_slots = (
            cache.tables[of_row, positions // cache.block_size] * cache.block_size + positions % cache.block_size
        )
        runs = _runs(step.counts, count, decoder.RUN)
        record["tokens"], record["run_count"], record["ready_count"] = count, len(runs), wanted
        record["sampled"], record["threads"] = sampled, threads
        segments = self._segments(step.adapters, count)
        given = (positions, of_row, own_slots, runs, last[ready], segments)
        names = ("positions", "of_row", "own_slots", "runs", "ready", "segments")
        for name, array in zip(names, given, strict=True):
            record[name] = address(array)
        x = self._room("x", count, c.dim)
        for name, columns in (
            ("qkv", c.qkv_dim), ("mixed", c.q_dim), ("gate_up", 2 * c.ffn_dim), ("act", c.ffn_dim)
        ):  # fmt: skip
            self._room(name, count, columns)
        self._room("y", count * threads, c.dim)
        np.take(self.embeddings, tokens, axis=0, out=x)
        if c.embed_scale != 1.0:
            x *= np.float32(c.embed_scale)
        np.take(self.turns, positions, axis=0, out=self._room("turns", count, c.head_dim))
        if c.nope_layers:
            self._room("plain", count, c.head_dim)[:] = self.plain_turn
        pieces = HEAD_PIECES * threads
        logits = self._room("logits", wanted, c.vocab_size)
        best = self._room("best", pieces * wanted, 1, np.int64)
        found = self._room("found", pieces * wanted, 3)
        record["head_pieces"] = pieces
        self.helpers.have(threads)
        decoder.decoder_step(self.plan, 0)
        if not wanted:
            return None
        with np.errstate(invalid="ignore"):
            return logits, best[:wanted, 0], found[:wanted, 1] + np.log(found[:wanted, 2])

    def _segments(self, adapters: list[tuple[LoRA, slice]], count: int) -> np.ndarray:
        """(S, 3) the tokens of a step in segments: first token, count, address of their adapter's `pairs`, 0 for none.
        No segments where there is no adapter."""
        found: list[tuple[int, int, int]] = []
        end, width = 0, PANEL

        def cut(until: int, pairs: int) -> None:
            found.extend((start, min(SEGMENT, until - start), pairs) for start in range(end, until, SEGMENT))

        for lora, rows in adapters:
            adapter = self.adapter(lora)
            assert adapter is not None
            cut(rows.start, 0)
            end = rows.start
            cut(rows.stop, address(adapter.pairs))
            end, width = rows.stop, max(width, adapter.width)
        if found:
            cut(count, 0)
            self.plan[0]["inner_width"] = width
            self._room("inner", count * width, 1)
        self.plan[0]["segment_count"] = len(found)
        return np.array(found, dtype=np.int64) if found else NOTHING

    def _room(self, name: str, count: int, columns: int, dtype: type = np.float32) -> np.ndarray:
        """The first `count` rows of a scratch array, which grows by powers of two and is kept."""
        known = self.scratch.get(name)
        if known is None or len(known) < count:
            known = self.scratch[name] = np.zeros((1 << max(3, count - 1).bit_length(), columns), dtype=dtype)
            self.plan[0][name] = address(known)
        return known[:count]

    @staticmethod
    def threads() -> int:
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


def _places(step: Step, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each of its tokens (N,): where in its sequence it stands, and the row of the cache's tables; and of each
    sequence its last token."""
    if count == len(step.sequences):
        return step.starts, step.rows, np.arange(count)
    of = np.repeat(np.arange(len(step.counts)), step.counts)
    last = np.cumsum(step.counts) - 1
    return step.starts[of] + np.arange(count) - (last + 1 - step.counts)[of], step.rows[of], last


def _runs(counts: np.ndarray, tokens: int, longest: int) -> np.ndarray:
    """(M, 2) first token and count: the tokens of each sequence in runs that are not too long."""
    if tokens == len(counts):
        return np.stack([np.arange(tokens), np.ones(tokens, dtype=np.int64)], 1)
    runs = -(-counts // longest)
    of = np.repeat(np.arange(len(counts)), runs)
    before = (np.arange(len(of)) - (np.cumsum(runs) - runs)[of]) * longest
    starts = (np.cumsum(counts) - counts)[of] + before
    return np.stack([starts, np.minimum(longest, counts[of] - before)], 1)
