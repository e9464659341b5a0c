"""The compiled form of a model's step, for models and requests that it covers: what `ops.decoder` needs, laid out once.

It computes what `Transformer.forward` and `.logits` compute, from the same weights, on the same cache; whatever it does
not cover goes through those. Compiling takes half a minute the first time on a machine and a second after that, in a
thread of its own: `ready` says when, until then torch answers.
Not here: the loops (`ops.decoder`), which tokens a step computes (`scheduler`).

Legend: as in `ops.decoder`.
"""

from __future__ import annotations

import logging
import threading
import weakref
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prairie.models.rope import depends_on_length, rope_frequencies, rope_magnitudes
from prairie.models.transformer import Transformer
from prairie.ops.attention import rotary_turns
from prairie.ops.packed import PackedWeight

if TYPE_CHECKING:
    from prairie.engine.kv_cache import KVCache
    from prairie.engine.scheduler import Step
    from prairie.models.lora import LoRA

log = logging.getLogger("prairie.engine")
GROUPS = ("qkv", "o", "gate_up", "down")
LANES, PARTS = 8, 3
"""As in `ops.decoder`, which is imported late."""
NOWHERE = np.zeros(0, dtype=np.int64)


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
    return plain and whole and model.embed.dtype == torch.float32 and model.embed.device.type == "cpu" and _kinds(model)


def _kinds(model: Transformer) -> bool:
    """All matrices of the blocks are kept alike, in a way that is computed with here."""
    weights = [getattr(block, group) for block in model.layers for group in GROUPS]
    kinds = {weight.bits if isinstance(weight, PackedWeight) else str(weight.dtype) for weight in weights}
    return len(kinds) == 1 and kinds <= {"torch.float32", "bf16", "int8"}


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
    """(L, 4, PARTS, 5)"""
    rank: int
    tensors: tuple[Tensor, ...]
    """What the addresses in `pairs` point to."""


class CompiledDecoder:
    """A model and its cache, as arrays and addresses. Everything that an address points to is held here."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        c = model.config
        self.model, self.cache, self.config = model, cache, c
        kind = getattr(model.layers[0].qkv, "bits", "float32")
        self.kind = ("float32", "bf16", "int8").index(kind)
        self.held: list[Tensor] = []
        self.weights = np.zeros((c.layers, 4), dtype=np.int64)
        self.scales = np.zeros((c.layers, 4), dtype=np.int64)
        for layer, block in enumerate(model.layers):
            for group, name in enumerate(GROUPS):
                self.weights[layer, group], self.scales[layer, group] = self._addresses(getattr(block, name))
        packed = model.quantization
        self.head_kind = self.kind if packed is not None and packed.head else 0
        self.head = self._addresses(
            PackedWeight(model.head_weight, packed.bits) if packed is not None and packed.head else model.head_weight
        )
        self.embeddings = model.embed.detach().numpy()

        def stacked(name: str, width: int) -> np.ndarray:
            rows = [getattr(block, name) for block in model.layers]
            if rows[0] is None:
                return np.zeros((c.layers, 0), dtype=np.float32)
            return torch.stack([row.detach().float() for row in rows]).numpy().reshape(c.layers, width)

        offset = np.float32(1.0 if c.norm_offset else 0.0)
        norms = [stacked(name, c.dim) + offset for name in ("attention_norm", "mlp_norm")]
        self.norms = np.ascontiguousarray(np.stack(norms, 1))
        assert model.norm is not None
        self.last_norm = model.norm.detach().float().numpy() + offset
        if c.qk_norm:
            self.qk_norms = np.stack([stacked(name, c.head_dim) + offset for name in ("q_norm", "k_norm")], 1)
        else:
            self.qk_norms = np.zeros((c.layers, 0, c.head_dim), dtype=np.float32)
        self.qk_norms = np.ascontiguousarray(self.qk_norms)
        self.qkv_biases, self.out_biases = stacked("qkv_bias", c.qkv_dim), stacked("o_bias", c.dim)
        self.mlp_biases, self.down_biases = stacked("gate_up_bias", 2 * c.ffn_dim), stacked("down_bias", c.dim)
        self.windows = np.array([c.window(layer) for layer in range(c.layers)], dtype=np.int64)
        self.turned = np.array([layer not in c.nope_layers for layer in range(c.layers)])
        turns = rotary_turns(torch.arange(c.max_context), rope_frequencies(c), rope_magnitudes(c))[:, 0]
        self.turns = torch.cat([turns.real, turns.imag], 1).contiguous().numpy()
        self.plain_turn = np.repeat(np.array([1.0, 0.0], dtype=np.float32), c.head_dim // 2)
        self.kv = cache.store.numpy().reshape(c.layers, 2, -1, c.kv_heads, c.head_dim)
        self.adapters: weakref.WeakKeyDictionary[LoRA, Adapter | None] = weakref.WeakKeyDictionary()
        self.scratch: dict[str, np.ndarray] = {}
        self.ready = threading.Event()
        self.compiling = threading.Lock()

    def _addresses(self, weight: Tensor | PackedWeight) -> tuple[int, int]:
        """Of the numbers and of their scales, 0 where there are none."""
        if isinstance(weight, PackedWeight):
            self.held += [weight.numbers, weight.scales]
            return weight.numbers.data_ptr(), weight.scales.data_ptr() if weight.bits == "int8" else 0
        held = weight.detach().contiguous()
        self.held.append(held)
        return held.data_ptr(), 0

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
                decoder.decoder_step(*self._arguments({}, 0, []))
                decoder.head_step(*self._head_arguments({}, 0))
            except Exception:
                log.exception("steps are computed by torch: the compiled form cannot be made here")
                return False
            self.ready.set()
            return True

    # ---- adapters

    def adapter(self, lora: LoRA) -> Adapter | None:
        """An adapter laid out; None for one that changes more than sums (DoRA), the embedding or the head."""
        if lora not in self.adapters:
            self.adapters[lora] = self._laid_out(lora)
        return self.adapters[lora]

    def _laid_out(self, lora: LoRA) -> Adapter | None:
        if lora.touches(self.model.linear(None, "embed")) or lora.touches(self.model.linear(None, "head")):
            return None
        pairs = np.zeros((self.config.layers, len(GROUPS), PARTS, 5), dtype=np.int64)
        tensors: list[Tensor] = []
        widest = LANES
        for layer in range(self.config.layers):
            for group, name in enumerate(GROUPS):
                at = self.model.linear(layer, name)
                changes = lora.plain_changes(at)
                if changes is None:
                    return None
                if not changes:
                    continue
                a_RI = torch.cat([change.a_RI for change in changes]).detach().float()
                b_OR = torch.cat([change.b_OR for change in changes], 1).detach().float()
                for number, (_, rows) in enumerate(at.rows()):
                    used = b_OR[rows].abs().amax(0) > 0
                    if not used.any():
                        continue
                    short = -int(used.sum()) % LANES
                    a = F.pad(a_RI[used], (0, 0, 0, short)).contiguous()
                    b = F.pad(b_OR[rows][:, used], (0, short)).contiguous()
                    tensors += [a, b]
                    pairs[layer, group, number] = len(a), a.data_ptr(), b.data_ptr(), rows.start, rows.stop
                    widest = max(widest, len(a))
        return Adapter(pairs, widest, tuple(tensors))

    # ---- a step

    def takes(self, step: Step) -> bool:
        """Whether it is compiled by now, and covers all adapters of the step."""
        return self.ready.is_set() and all(self.adapter(lora) is not None for lora, _ in step.adapters)

    def hidden(
        self, tokens: np.ndarray, positions: np.ndarray, of_row: np.ndarray, adapters: list[tuple[LoRA, slice]]
    ) -> np.ndarray:
        """(N, D) after the last norm; keys and values of all tokens are in the cache afterwards.

        `tokens`, `positions`, `of_row` (N,): which, where in their row, and the row of the cache's tables. The result
        is overwritten by the next call.
        """
        decoder, count = _kernels(), len(tokens)
        assert decoder is not None
        arguments = self._arguments(self.scratch, count, adapters, positions, of_row)
        x = self.scratch["x"][:count]
        np.take(self.embeddings, tokens, axis=0, out=x)
        if self.config.embed_scale != 1.0:
            x *= np.float32(self.config.embed_scale)
        np.take(self.turns, positions, axis=0, out=self.scratch["turns"][:count])
        _use_threads()
        decoder.decoder_step(*arguments)
        return self.scratch["y"][:count]

    def logits(self, hidden: np.ndarray, ready: np.ndarray, sampled: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logits (R, V) of the tokens `ready` (R,), the likeliest of the first `sampled` tokens (R,), and (R,) the
        logarithm of the sum of e^logit. The logits are overwritten by the next call."""
        decoder, count = _kernels(), len(ready)
        assert decoder is not None
        arguments = self._head_arguments(self.scratch, count, sampled)
        np.take(hidden, ready, axis=0, out=self.scratch["last"][:count])
        decoder.head_step(*arguments)
        logits, _, best, found = arguments[-4:]
        with np.errstate(invalid="ignore"):
            return logits, best[0], found[0, :, 0] + np.log(found[0, :, 1])

    def _arguments(
        self,
        scratch: dict[str, np.ndarray],
        count: int,
        adapters: list[tuple[LoRA, slice]],
        positions: np.ndarray = NOWHERE,
        of_row: np.ndarray = NOWHERE,
    ) -> tuple[Any, ...]:
        """What `decoder_step` takes, with room for `count` tokens in `scratch`."""
        c, cache, decoder = self.config, self.cache, _kernels()
        assert decoder is not None
        segments = np.zeros((len(adapters), 2), dtype=np.int64)
        pairs = np.zeros((len(adapters), c.layers, len(GROUPS), PARTS, 5), dtype=np.int64)
        width = LANES
        for number, (lora, rows) in enumerate(adapters):
            adapter = self.adapter(lora)
            assert adapter is not None
            segments[number] = rows.start, rows.stop - rows.start
            pairs[number] = adapter.pairs
            width = max(width, adapter.rank)
        slots = cache.tables[of_row, positions // cache.block_size] * cache.block_size + positions % cache.block_size
        x, y, turns, plain, qkv, mixed, gate_up, act = (
            _rows(scratch, name, count, columns) for name, columns in (
                ("x", c.dim), ("y", c.dim), ("turns", c.head_dim), ("plain", c.head_dim), ("qkv", c.qkv_dim),
                ("mixed", c.q_dim), ("gate_up", 2 * c.ffn_dim), ("act", c.ffn_dim),
            )
        )  # fmt: skip
        if c.nope_layers:
            plain[:] = self.plain_turn
        inner = _rows(scratch, f"inner {width}", count if adapters else 0, PARTS * width).reshape(-1, PARTS, width)
        return (
            decoder.products.address, self.threads(), self.kind, self.weights, self.scales, self.norms, self.last_norm,
            self.qk_norms, self.qkv_biases, self.out_biases, self.mlp_biases, self.down_biases, self.windows,
            np.float32(c.norm_eps), np.float32(self.model.query_scale * c.head_dim**-0.5), turns, plain, self.turned,
            positions, of_row, slots, cache.tables, cache.block_size, self.kv, c.heads, segments, pairs, x, y, qkv,
            mixed, gate_up, act, inner,
        )  # fmt: skip

    def _head_arguments(self, scratch: dict[str, np.ndarray], count: int, sampled: int = 0) -> tuple[Any, ...]:
        c, threads, decoder = self.config, self.threads(), _kernels()
        assert decoder is not None
        last, logits = _rows(scratch, "last", count, c.dim), _rows(scratch, "logits", count, c.vocab_size)
        best, found = np.zeros((threads, count), dtype=np.int64), np.zeros((threads, count, 2), dtype=np.float32)
        return decoder.products.address, threads, self.head_kind, *self.head, last, logits, sampled, best, found

    @staticmethod
    def threads() -> int:
        return torch.get_num_threads()


def _rows(scratch: dict[str, np.ndarray], name: str, count: int, columns: int) -> np.ndarray:
    """The first `count` rows of a scratch array, which grows by powers of two and is kept."""
    known = scratch.get(name)
    if known is None or len(known) < count:
        known = scratch[name] = np.zeros((1 << max(3, count - 1).bit_length(), columns), dtype=np.float32)
    return known[:count]


def _use_threads() -> None:
    """As many as torch; numba's number is a setting of the calling thread."""
    import numba

    most: int = vars(numba.config)["NUMBA_NUM_THREADS"]
    numba.set_num_threads(min(torch.get_num_threads(), most))
