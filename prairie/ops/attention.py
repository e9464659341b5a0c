"""Attention over packed rows, and rotary positions.

Tokens are flat: the rows of a batch lie one behind the other, nothing is padded outside this file. Causal attention
over the whole row, which nearly every step wants, has fast forms; windows, caps and sight in both directions go by a
mask.
Not here: the paged cache that serving uses (the engine brings its own `Attend`), weights.

Legend: N tokens of all rows, B rows of a bucket, T padded length of a bucket, H query heads, K key/value heads,
D size of a head, S query heads that share a key head (H / K), G = B x K pairs of a row and a key head, P places of
all buckets, M = N x heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prairie.ops.elementwise import softcap
from prairie.ops.relative import RelativeBias
from prairie.ops.threads import by_bands, kernels, share_out, worth_compiling

MATRIX_LENGTH = 512
"""Longest row for which written-out products beat torch's flash kernel on a CPU (measured, forward and backward)."""
COMPILED_WORK = 1 << 25
"""Least sum over the rows of length x length x heads x size, for each thread, for which the compiled loops
(`ops.attention_kernel`) are asked: a few milliseconds of work. Below it numba is not even imported."""
HALVES = (torch.float16, torch.bfloat16)
QUERY_BLOCK = 64
"""Queries of one row handled at once; keys behind a block's end are never touched, which saves up to half the work."""
SEEN_BLOCK = 256
"""The same for sight other than causal, where each block has a mask of its own."""
CACHED_NUMBERS = 1 << 18
"""Attention weights handled at once: 1 MB in float32 stays in a core's own cache."""


class Sight(NamedTuple):
    """What a token of some layer sees of its row."""

    causal: bool = True
    """Nothing behind itself."""
    window: int = 0
    """Above 0: only tokens less than this far away."""
    softcap: float = 0.0
    """Above 0: scores are capped (`ops.elementwise.softcap`) before the softmax."""

    def within(self, length: int) -> Sight:
        """The same for rows of at most `length` tokens: a window that holds the whole row is none."""
        return self if self.window < length else self._replace(window=0)

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """bool, broadcast: which keys at these places the queries at those places see."""
        distance = queries - keys
        seen = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        return seen & (distance.abs() < self.window) if self.window else seen

    def reach(self, first: int, last: int, length: int) -> tuple[int, int]:
        """The keys of a row of `length` that queries first..last may see lie within these bounds."""
        low = max(0, first - self.window + 1) if self.window else 0
        high = min(length, last + self.window - 1) if self.window else length
        return low, last if self.causal else high


CAUSAL = Sight()


class Attend(Protocol):
    """What a Transformer asks of whoever holds the context: where each token stands, and what it sees."""

    positions_N: Tensor

    @property
    def row_lengths_N(self) -> Tensor:
        """How long each token's row is, as far as it is known."""
        ...

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, sight: Sight = CAUSAL) -> Tensor:
        """Returns o_NHD: each token's mix of the values it may see, in layer `layer`; scale is 1/sqrt(D)."""
        ...


class Prefix(NamedTuple):
    """What a row goes on from: the first `tokens` tokens of an earlier row, which itself goes on from none."""

    row: int = 0
    tokens: int = 0


NO_PREFIX = Prefix()


def attention_reference(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, lengths: Sequence[int], sight: Sight = CAUSAL
) -> Tensor:
    """The plain form of `PackedDocuments`: one row after the other, softmax written out. Slow, for tests."""
    groups = q_NHD.shape[1] // k_NKD.shape[1]
    rows, start = [], 0
    for length in lengths:
        q, k, v = (x[start : start + length].transpose(0, 1) for x in (q_NHD, k_NKD, v_NKD))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores_HTT = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if sight.softcap:
            scores_HTT = softcap(scores_HTT, sight.softcap)
        places_T = torch.arange(length, device=q.device)
        unseen_TT = ~sight.visible(places_T[:, None], places_T)
        weights_HTT = scores_HTT.float().masked_fill(unseen_TT, float("-inf")).softmax(-1).to(q.dtype)
        rows.append((weights_HTT @ v).transpose(0, 1))
        start += length
    return torch.cat(rows) if rows else torch.empty_like(q_NHD)


class PackedDocuments:
    """Attention inside each row of a flat batch; no row sees another.

    Rows of one length are only reshaped. Otherwise rows of like length are padded together into a few buckets; the
    index tensors are made once here and serve every layer.

    With `prefixes` several rows go on from one: the tokens that they share stand once in the batch, in the row that
    begins with them, and the gradients that reach those add up. `lengths` are then the tokens that a row adds.
    """

    def __init__(
        self, lengths: Sequence[int], device: torch.device | str = "cpu", prefixes: Sequence[Prefix] = ()
    ) -> None:
        """Raises ValueError for an empty row and for a prefix that does not stand in an earlier, whole row."""
        own = [int(length) for length in lengths]
        if not own or min(own) < 1:
            raise ValueError(f"rows must hold at least one token, got lengths {own[:8]}")
        prefixes = list(prefixes) or [NO_PREFIX] * len(own)
        _check_prefixes(own, prefixes)
        self.lengths = [prefix.tokens + length for prefix, length in zip(prefixes, own, strict=True)]
        self.device = torch.device(device)
        self.longest = max(self.lengths)
        self.shared = any(prefix.tokens for prefix in prefixes)
        own_R, prefix_R = torch.tensor(own), torch.tensor([prefix.tokens for prefix in prefixes])
        starts_R = own_R.cumsum(0) - own_R
        self.positions_N = (torch.arange(sum(own)) - (starts_R - prefix_R).repeat_interleave(own_R)).to(device)
        self.equal = len(set(self.lengths)) == 1 and not self.shared
        rows_of = [list(range(len(own)))] if self.equal else buckets_of(self.lengths, [p.tokens for p in prefixes])
        self.buckets = [(len(rows), max(self.lengths[r] for r in rows)) for rows in rows_of]
        self.first_queries = [min(prefixes[r].tokens for r in rows) // QUERY_BLOCK * QUERY_BLOCK for rows in rows_of]
        """Per bucket: the place before which no row has a token of its own."""
        self._tokens: list[Tensor] = []  # per bucket (B, T): the token at each place, -1 where a row has ended
        self._own: list[Tensor] = []  # per bucket (B, T): False where a row's token is another row's, or none
        if not self.equal:
            from_R = torch.stack([starts_R[prefix.row] for prefix in prefixes])
            ends_R = prefix_R + own_R
            for rows, (_, longest) in zip(rows_of, self.buckets, strict=True):
                places_T, r = torch.arange(longest), torch.tensor(rows)
                shared_BT = places_T < prefix_R[r, None]
                tokens_BT = torch.where(shared_BT, from_R[r, None], (starts_R - prefix_R)[r, None]) + places_T
                ended_BT = places_T >= ends_R[r, None]
                self._tokens.append(tokens_BT.masked_fill(ended_BT, -1))
                self._own.append(~(shared_BT | ended_BT))
        self._indices: dict[int, _Places] = {}
        self._masks: dict[tuple[int, int, int], Tensor] = {}
        self._rows_of, self._own_R, self._prefixes = rows_of, own_R, prefixes
        self._work = sum(length * mine for length, mine in zip(self.lengths, own, strict=True))
        self._tasks: dict[int, _Tasks] = {}
        self._sights: dict[tuple[int, Sight, int], Tensor] = {}
        self._ends: Tensor | None = None

    @property
    def row_lengths_N(self) -> Tensor:
        return torch.tensor(self.lengths).repeat_interleave(self._own_R).to(self.device)

    def __call__(
        self,
        layer: int,
        q_NHD: Tensor,
        k_NKD: Tensor,
        v_NKD: Tensor,
        sight: Sight = CAUSAL,
        bias: RelativeBias | None = None,
    ) -> Tensor:
        """o_NHD for every token; `layer` is not needed, there is no cache. `bias` is added to the scaled scores."""
        sight = sight.within(self.longest)
        if sight != CAUSAL or bias is not None:
            return self._masked_attention(q_NHD, k_NKD, v_NKD, sight, bias)
        on_cpu = q_NHD.device.type == "cpu" and q_NHD.dtype == torch.float32
        if on_cpu and is_worth_compiling(self._work, *q_NHD.shape[1:]):
            out: Tensor = _CompiledAttention.apply(q_NHD, k_NKD, v_NKD, self)
            return out
        if on_cpu and self.longest <= MATRIX_LENGTH:
            out = _MatrixAttention.apply(q_NHD, k_NKD, v_NKD, self)
            return out
        return self._kernel_attention(q_NHD, k_NKD, v_NKD)

    def tasks(self, kv_heads: int) -> _Tasks:
        """What the compiled loops do, for so many key heads."""
        if kv_heads not in self._tasks:
            self._tasks[kv_heads] = _tasks_of(self._own_R.tolist(), self._prefixes, kv_heads)
        return self._tasks[kv_heads]

    def _kernel_attention(self, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        """torch's fused kernel, bucket by bucket: for long rows and for other chips than a CPU. On CUDA, in half
        precision, rows of any lengths lie side by side as they are."""
        grouped = q_NHD.shape[1] != k_NKD.shape[1]
        if q_NHD.device.type == "cuda" and q_NHD.dtype in HALVES and not (self.equal or self.shared):
            return self._side_by_side(q_NHD, k_NKD, v_NKD, grouped)
        if self.equal:
            rows, length = self.buckets[0]
            q, k, v = (x.reshape(rows, length, *x.shape[1:]).transpose(1, 2) for x in (q_NHD, k_NKD, v_NKD))
            o_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            return o_BHTD.transpose(1, 2).reshape(q_NHD.shape)
        padded = [_Pad.apply(x, self) for x in (q_NHD, k_NKD, v_NKD)]
        outs, start = [], 0
        for rows, length in self.buckets:
            q, k, v = (
                x[start * x_N.shape[1] : (start + rows * length) * x_N.shape[1]].view(rows, x_N.shape[1], length, -1)
                for x, x_N in zip(padded, (q_NHD, k_NKD, v_NKD), strict=True)
            )
            outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).flatten(0, 2))
            start += rows * length
        out: Tensor = _Unpad.apply(torch.cat(outs), self, q_NHD.shape[1])
        return out

    def _masked_attention(
        self, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, sight: Sight, bias: RelativeBias | None
    ) -> Tensor:
        """Every other kind of sight, by explicit masks: a block of queries and the keys that it may see at a time.
        A cap on the scores is written out."""
        (H, D), K = q_NHD.shape[1:], k_NKD.shape[1]
        padded = [_Pad.apply(x, self) for x in (q_NHD, k_NKD, v_NKD)]
        outs, start = [], 0
        for number, (rows, length) in enumerate(self.buckets):
            q, k, v = (
                x[start * heads : (start + rows * length) * heads].view(rows, heads, length, -1)
                for x, heads in zip(padded, (H, K, K), strict=True)
            )
            blocks = []
            for first in range(0, length, SEEN_BLOCK):
                last = min(first + SEEN_BLOCK, length)
                low, high = sight.reach(first, last, length)
                mask = self._seen(number, sight, first, last)
                if bias is not None:
                    mask = bias(first, last, high)[..., low:].masked_fill(~mask, float("-inf"))
                blocks.append(_seen_attention(q[:, :, first:last], k[:, :, low:high], v[:, :, low:high], mask, sight))
            o = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)
            outs.append(o.reshape(-1, D))
            start += rows * length
        out: Tensor = _Unpad.apply(torch.cat(outs), self, H)
        return out

    def _seen(self, bucket: int, sight: Sight, first: int, last: int) -> Tensor:
        """(B or 1, 1, queries, keys) bool, True where a query of first..last sees a key in its reach. A place behind
        its row's end sees anything: what it gets is dropped, and a softmax over nothing would be no number."""
        key = (bucket, sight, first)
        if key not in self._sights:
            low, high = sight.reach(first, last, self.buckets[bucket][1])
            queries, keys = torch.arange(first, last)[:, None], torch.arange(low, high)
            seen = sight.visible(queries, keys)[None]
            if not (self.equal or sight.causal):
                ends_B11 = torch.tensor([self.lengths[r] for r in self._rows_of[bucket]])[:, None, None]
                seen = (seen & (keys < ends_B11)) | (queries >= ends_B11)
            self._sights[key] = seen[:, None].to(self.device)
        return self._sights[key]

    def _side_by_side(self, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, grouped: bool) -> Tensor:
        """FlashAttention's form for rows of unlike lengths (arXiv 2307.08691): no bucket, no padding."""
        from torch.nn.attention.varlen import varlen_attn  # imports more than a CPU needs

        if self._ends is None:
            self._ends = F.pad(self._own_R.cumsum(0), (1, 0)).to(self.device, torch.int32)
        out = varlen_attn(
            q_NHD.contiguous(), k_NKD.contiguous(), v_NKD.contiguous(), self._ends, self._ends, self.longest,
            self.longest, window_size=(-1, 0), enable_gqa=grouped,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    def pad(self, x_NHW: Tensor) -> Tensor:
        """(places, W): all buckets one behind the other, each ordered by row, head, place. Places behind a row's end
        hold some token; causality keeps them unseen."""
        heads, width = x_NHW.shape[1:]
        if self.equal:
            return x_NHW.reshape(*self.buckets[0], heads, width).transpose(1, 2).reshape(-1, width)
        return x_NHW.reshape(-1, width).index_select(0, self._index(heads).source)

    def pad_zero(self, x_NHW: Tensor) -> Tensor:
        """Like `pad`, with zeros where a row has no token of its own."""
        padded = self.pad(x_NHW)
        return padded if self.equal else padded.index_fill_(0, self._index(x_NHW.shape[1]).foreign, 0.0)

    def unpad(self, x_PW: Tensor, heads: int) -> Tensor:
        """(N, heads, W): each token's place in its own row."""
        if self.equal:
            rows, length = self.buckets[0]
            return x_PW.view(rows, heads, length, -1).transpose(1, 2).reshape(rows * length, heads, -1)
        return x_PW.index_select(0, self._index(heads).own).view(-1, heads, x_PW.shape[1])

    def unpad_sum(self, x_PW: Tensor, heads: int) -> Tensor:
        """(N, heads, W): the sum over every place where a token stands, the rows that go on from it included."""
        if not self.shared:
            return self.unpad(x_PW, heads)
        places, firsts = self._index(heads).all_places()
        summed, *_ = torch.embedding_bag(x_PW, places, firsts)
        return summed.view(-1, heads, x_PW.shape[1])

    def _index(self, heads: int) -> _Places:
        if heads not in self._indices:
            heads_H1 = torch.arange(heads)[:, None]
            tokens_P, own_P = [], []
            for tokens_BT, own_BT in zip(self._tokens, self._own, strict=True):
                tokens_BHT = torch.where(tokens_BT[:, None] < 0, -1, tokens_BT[:, None] * heads + heads_H1)
                tokens_P.append(tokens_BHT.flatten())
                own_P.append(own_BT[:, None].expand_as(tokens_BHT).flatten())
            self._indices[heads] = _Places(torch.cat(tokens_P), torch.cat(own_P), self.device)
        return self._indices[heads]

    def mask(self, start: int, stop: int, shared: int) -> Tensor:
        """(queries x shared, stop) of 0 and -inf: query i of start..stop sees keys up to i."""
        key = (start, stop, shared)
        if key not in self._masks:
            mask = torch.full((stop - start, stop), float("-inf")).triu_(start + 1)
            self._masks[key] = mask.repeat_interleave(shared, 0)
        return self._masks[key]


class _Places:
    """Which (token, head) each place of the padded layout holds, and where each is found there."""

    def __init__(self, tokens_P: Tensor, own_P: Tensor, device: torch.device) -> None:
        """`tokens_P`: token x heads + head, -1 where a row has ended; `own_P`: whether the token is the row's own."""
        self.source = tokens_P.clamp_min(0).to(device)
        """(P,) what each place reads; where a row has ended, some token."""
        places = own_P.nonzero()[:, 0]
        own = torch.empty(len(places), dtype=torch.long)
        own[tokens_P[places]] = places
        self.own = own.to(device)
        """(M,) each (token, head)'s place in its own row."""
        self.foreign = (~own_P).nonzero()[:, 0].to(device)
        """The places that hold no token of their own row."""
        self._tokens_P = tokens_P
        self._all: tuple[Tensor, Tensor] | None = None

    def all_places(self) -> tuple[Tensor, Tensor]:
        """Every place of every (token, head), in the order of those, and (M,) where each one's places begin."""
        if self._all is None:
            filled = (self._tokens_P >= 0).nonzero()[:, 0]
            tokens = self._tokens_P[filled]
            counts = torch.bincount(tokens, minlength=len(self.own))
            places = filled[tokens.argsort(stable=True)]
            self._all = places.to(self.own.device), (counts.cumsum(0) - counts).to(self.own.device)
        return self._all


def _check_prefixes(own: Sequence[int], prefixes: Sequence[Prefix]) -> None:
    for row, prefix in enumerate(prefixes):
        if prefix.tokens and (
            prefix.row >= row or prefixes[prefix.row].tokens or not 0 < prefix.tokens <= own[prefix.row]
        ):
            raise ValueError(f"row {row} goes on from {prefix}, which is no part of an earlier, whole row")


def buckets_of(lengths: Sequence[int], prefixes: Sequence[int] = ()) -> list[list[int]]:
    """Groups row numbers so that rows of like length and like prefix share a bucket: padding stays below a fifth,
    buckets few."""

    def like(many: int, more: int) -> bool:
        return many >= 0.8 * more - 4

    prefixes = prefixes or [0] * len(lengths)
    buckets: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda r: (-prefixes[r], -lengths[r])):
        for bucket in buckets:
            first = bucket[0]
            if like(prefixes[row], prefixes[first]) and like(*sorted((lengths[row], lengths[first]))):
                bucket.append(row)
                break
        else:
            buckets.append([row])
    return buckets


def is_worth_compiling(work: int, heads: int, size: int) -> bool:
    """Whether causal attention on a CPU goes through the compiled loops; `work`: the sum of length x length over the
    rows. The same batch is always computed in the same way by so many threads, so that a run repeats its bits."""
    large = size % 16 == 0 and work * heads * size > COMPILED_WORK * torch.get_num_threads()
    return large and kernels("attention_kernel") is not None


class _Tasks(NamedTuple):
    """See `attention_kernel.forward`."""

    tasks: np.ndarray
    groups: np.ndarray
    rows: np.ndarray
    longest: int


def _tasks_of(own: Sequence[int], prefixes: Sequence[Prefix], kv_heads: int) -> _Tasks:
    """Rows that go on from one make a group with it; the tasks that take longest come first."""
    starts = np.cumsum([0, *own])
    members: dict[int, list[int]] = {row: [row] for row, prefix in enumerate(prefixes) if not prefix.tokens}
    for row, prefix in enumerate(prefixes):
        if prefix.tokens:
            members[prefix.row].append(row)
    rows = [
        (starts[r], own[r], starts[prefixes[r].row], prefixes[r].tokens) for group in members.values() for r in group
    ]
    ends = np.cumsum([len(group) for group in members.values()])
    groups = np.stack([ends - [len(group) for group in members.values()], ends], 1)
    costs = np.array([sum(own[r] * (prefixes[r].tokens + own[r]) for r in group) for group in members.values()])
    order = np.argsort(-costs, kind="stable")
    tasks = np.stack([order.repeat(kv_heads), np.tile(np.arange(kv_heads), len(order))], 1)
    longest = max(length + prefix for _, length, _, prefix in rows)
    return _Tasks(tasks.astype(np.int64), groups.astype(np.int64), np.array(rows, np.int64), int(longest))


class _CompiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, packed: PackedDocuments) -> Tensor:
        q, k, v = q_NHD.contiguous(), k_NKD.contiguous(), v_NKD.contiguous()
        out, log_sums_NH = torch.empty_like(q), torch.empty(q.shape[:2])
        given = {"q": q, "k": k, "v": v, "out": out, "log_sums": log_sums_NH}
        _in_threads("forward", packed.tasks(k.shape[1]), given)
        ctx.save_for_backward(q, k, v, out, log_sums_NH)
        ctx.packed = packed
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, log_sums_NH = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        given = {"q": q, "k": k, "v": v, "out": out, "log_sums": log_sums_NH, "dout": grads[0].contiguous()}
        _in_threads("backward", ctx.packed.tasks(k.shape[1]), {**given, "dq": dq, "dk": dk, "dv": dv})
        return dq, dk, dv, None


def _in_threads(name: str, tasks: _Tasks, tensors: Mapping[str, Tensor]) -> None:
    """A function of `ops.attention_kernel` on all threads."""
    loops = kernels("attention_kernel")
    assert loops is not None
    (N, H, D), K = tensors["q"].shape, tensors["k"].shape[1]
    fields = {
        "tokens": N, "heads": H, "kv_heads": K, "size": D, "task_count": len(tasks.tasks),
        "group_count": len(tasks.groups), "row_count": len(tasks.rows), "longest": tasks.longest, "scale": D**-0.5,
        "tasks": tasks.tasks.ctypes.data, "groups": tasks.groups.ctypes.data, "rows": tasks.rows.ctypes.data,
        **{field: tensor.data_ptr() for field, tensor in tensors.items()},
    }  # fmt: skip
    share_out(getattr(loops, name), loops.JOB, len(tasks.tasks), fields)


class _MatrixAttention(torch.autograd.Function):
    """Attention of short rows as batched matrix products, forward and backward written out.

    Query heads that share a key head lie in one matrix, so keys are never repeated and their gradient sums by itself.
    Each row is cut in blocks of queries and each product in pieces that fit the cache.
    """

    @staticmethod
    def forward(ctx: Any, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, packed: PackedDocuments) -> Tensor:
        heads, size = k_NKD.shape[1:]
        shared = q_NHD.shape[1] // heads
        keep = any(ctx.needs_input_grad)
        q, k, v = packed.pad(q_NHD.reshape(-1, heads, shared * size)), packed.pad(k_NKD), packed.pad(v_NKD)
        out = torch.empty_like(q)
        weights: list[Tensor] = []
        for part, length, first in _segments(packed, heads):
            q_G, k_G, v_G, o_G = (_by_pair(x, part, length, size) for x in (q, k, v, out))
            for start in range(first, length, QUERY_BLOCK):
                stop = min(start + QUERY_BLOCK, length)
                block, mask = slice(start * shared, stop * shared), packed.mask(start, stop, shared)
                weights_G = torch.empty(len(k_G), *mask.shape)
                for pairs in _pieces(weights_G):
                    piece = weights_G[pairs]
                    torch.baddbmm(mask, q_G[pairs, block], k_G[pairs, :stop].mT, alpha=size**-0.5, out=piece)
                    torch._softmax(piece, -1, False, out=piece)
                    o_G[pairs, block].baddbmm_(piece, v_G[pairs, :stop], beta=0)
                if keep:
                    weights.append(weights_G)
        if keep:
            ctx.save_for_backward(q, k, v, *weights)
            ctx.packed, ctx.heads, ctx.shared, ctx.shape = packed, heads, shared, q_NHD.shape
        return packed.unpad(out, heads).reshape(q_NHD.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *weights = ctx.saved_tensors
        packed, heads, shared, size = ctx.packed, ctx.heads, ctx.shared, k.shape[1]
        grad = packed.pad_zero(grads[0].reshape(-1, heads, shared * size))
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        done = len(weights)
        for part, length, first in reversed(_segments(packed, heads)):
            q_G, k_G, v_G, g_G = (_by_pair(x, part, length, size) for x in (q, k, v, grad))
            dq_G, dk_G, dv_G = (_by_pair(x, part, length, size) for x in (dq, dk, dv))
            for start in reversed(range(first, length, QUERY_BLOCK)):
                stop = min(start + QUERY_BLOCK, length)
                block = slice(start * shared, stop * shared)
                beta = 0.0 if stop == length else 1.0  # the last block reaches every key: it sets, the others add
                done -= 1
                weights_G = weights[done]
                for pairs in _pieces(weights_G):
                    piece, g = weights_G[pairs], g_G[pairs, block]
                    dv_G[pairs, :stop].baddbmm_(piece.mT, g, beta=beta)
                    scores = torch.bmm(g, v_G[pairs, :stop].mT)
                    torch._softmax_backward_data(scores, piece, -1, torch.float32, grad_input=scores)
                    dq_G[pairs, block].baddbmm_(scores, k_G[pairs, :stop], beta=0, alpha=size**-0.5)
                    dk_G[pairs, :stop].baddbmm_(scores.mT, q_G[pairs, block], beta=beta, alpha=size**-0.5)
        dq_NHD = packed.unpad(dq, heads).reshape(ctx.shape)
        return dq_NHD, packed.unpad_sum(dk, heads), packed.unpad_sum(dv, heads), None


def _seen_attention(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor, sight: Sight) -> Tensor:
    """(B, H, T, D): what the queries take from the keys that the mask (bool or additive) shows them."""
    (B, H, T, D), K = q_BHTD.shape, k_BKSD.shape[1]
    if not sight.softcap:
        return F.scaled_dot_product_attention(q_BHTD, k_BKSD, v_BKSD, attn_mask=mask, enable_gqa=H != K)
    q = q_BHTD.reshape(B, K, H // K, T, D)
    scores = softcap(q @ k_BKSD[:, :, None].mT * D**-0.5, sight.softcap)
    weights = scores.float().masked_fill(~mask[:, None], float("-inf")).softmax(-1).to(v_BKSD.dtype)
    return (weights @ v_BKSD[:, :, None]).reshape(B, H, T, D)


def _segments(packed: PackedDocuments, heads: int) -> list[tuple[slice, int, int]]:
    """Each bucket's places in the padded layout, its length, and where its queries begin."""
    segments, start = [], 0
    for (rows, length), first in zip(packed.buckets, packed.first_queries, strict=True):
        stop = start + rows * length * heads
        segments.append((slice(start, stop), length, first))
        start = stop
    return segments


def _by_pair(x_PW: Tensor, part: slice, length: int, size: int) -> Tensor:
    """(G, T x S, D) of one bucket; S is 1 for keys and values."""
    x = x_PW[part]
    return x.view(len(x) // length, -1, size)


def _pieces(weights_G: Tensor) -> list[slice]:
    """Pairs of row and head whose attention weights fit the cache together."""
    step = max(1, CACHED_NUMBERS // max(1, weights_G[0].numel()))
    return [slice(start, start + step) for start in range(0, len(weights_G), step)]


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NHD: Tensor, packed: PackedDocuments) -> Tensor:
        ctx.packed, ctx.heads = packed, x_NHD.shape[1]
        return packed.pad(x_NHD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.packed.unpad_sum(grads[0].contiguous(), ctx.heads), None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, packed: PackedDocuments, heads: int) -> Tensor:
        ctx.packed = packed
        return packed.unpad(x_PD, heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.packed.pad_zero(grads[0]), None, None


def rotary_turns(positions_N: Tensor, frequencies: Tensor, magnitudes: Tensor | None = None) -> Tensor:
    """(N, 1, D/2) complex: the rotation of each pair of columns at each position (RoFormer, arXiv 2104.09864).

    `frequencies` (D/2,) for all tokens or (N, 1, D/2) for each; `magnitudes` (D/2,): what turning multiplies by.
    """
    angles = positions_N.to(torch.float32)[:, None, None] * frequencies
    return torch.polar(torch.ones_like(angles) if magnitudes is None else magnitudes.expand_as(angles), angles)


def rotate(x_NHD: Tensor, turns: Tensor) -> Tensor:
    """Rotates each head by its token's position. The two columns of a pair lie side by side (`pairs_together`), so the
    rotation is one complex product; float32 inside, the result has the dtype of x."""
    if not torch.is_grad_enabled():
        return _turn(x_NHD, turns)
    out: Tensor = _Rotate.apply(x_NHD, turns)
    return out


def split_and_rotate(qkv_NC: Tensor, heads: int, kv_heads: int, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q_NHD, k_NKD, both rotated, and v_NKD from the fused columns C = (H + 2 K) x D."""
    if torch.is_grad_enabled() and qkv_NC.requires_grad:
        out: tuple[Tensor, Tensor, Tensor] = _SplitAndRotate.apply(qkv_NC, heads, kv_heads, turns)
        return out
    q, k, v = qkv_NC.view(len(qkv_NC), heads + 2 * kv_heads, -1).split([heads, kv_heads, kv_heads], 1)
    return _turn(q, turns), _turn(k, turns), v


def pairs_together(x: Tensor, head_dim: int, rotary_dim: int = 0) -> Tensor:
    """Reorders the first dimension (heads x head_dim): of the first `rotary_dim` columns of a head (0: of all) column i
    moves beside i + rotary_dim / 2, its partner in Hugging Face's layout. Attention does not notice, as q and k are
    reordered alike."""
    heads, size = x.unflatten(0, (-1, head_dim)), rotary_dim or head_dim
    turning = heads[:, :size].unflatten(1, (2, size // 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat([turning, heads[:, size:]], 1).reshape(x.shape)


def _turn(x_NHD: Tensor, turns: Tensor) -> Tensor:
    return torch.view_as_real(_complex(x_NHD.float()) * turns).flatten(-2).to(x_NHD.dtype)


def _complex(x_NHD: Tensor) -> Tensor:
    return torch.view_as_complex(x_NHD.unflatten(-1, (-1, 2)))


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NHD: Tensor, turns: Tensor) -> Tensor:
        ctx.save_for_backward(turns)
        return _turn(x_NHD, turns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _turn(grads[0], ctx.saved_tensors[0].conj().resolve_conj()), None


class _SplitAndRotate(torch.autograd.Function):
    """One pass each way: the backward writes the three gradients into one buffer instead of joining them."""

    @staticmethod
    def forward(ctx: Any, qkv_NC: Tensor, heads: int, kv_heads: int, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(turns)
        N, size = len(qkv_NC), qkv_NC.shape[1] // (heads + 2 * kv_heads)
        ctx.numbers = {"tokens": N, "heads": heads, "kv_heads": kv_heads, "size": size}
        ctx.compiled = worth_compiling(qkv_NC)
        if ctx.compiled:
            q, k, v = (qkv_NC.new_empty(N, count, size) for count in (heads, kv_heads, kv_heads))
            cosines = torch.view_as_real(turns).contiguous()
            by_bands("turn_heads", {"x": qkv_NC, "turns": cosines, "q": q, "k": k, "v": v}, **ctx.numbers, way=1)
            return q, k, v
        q, k, v = qkv_NC.view(N, heads + 2 * kv_heads, -1).split([heads, kv_heads, kv_heads], 1)
        return _turn(q, turns), _turn(k, turns), v.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        q, k, v = grads
        heads, kv_heads = q.shape[1], k.shape[1]
        grad = q.new_empty(len(q), heads + 2 * kv_heads, q.shape[2])
        if ctx.compiled:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
            given = {
                "gain": grad,
                "turns": torch.view_as_real(ctx.saved_tensors[0]).contiguous(),
                "q": q,
                "k": k,
                "v": v,
            }
            by_bands("turn_heads_backward", given, **ctx.numbers, way=-1)
            return grad.flatten(1), None, None, None
        back = ctx.saved_tensors[0].conj().resolve_conj()
        for part, turned in ((slice(0, heads), q), (slice(heads, heads + kv_heads), k)):
            if grad.dtype == torch.float32:
                torch.mul(_complex(turned), back, out=_complex(grad[:, part]))
            else:
                grad[:, part] = _turn(turned, back)
        grad[:, heads + kv_heads :] = v
        return grad.flatten(1), None, None, None
