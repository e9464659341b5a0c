"""A whole step of a decoder as one compiled function: all layers, all tokens, keys and values in the paged cache.

torch's product of a few rows with a weight reads memory at a quarter of what this chip can, and each of its operators
costs microseconds of Python: a step of a small model is spent there. numba compiles these loops on the user's machine
without a compiler; the heart is a tile of up to 4 x 4 dot products kept in registers, written in LLVM's own terms
because no vectoriser finds it. Weights are float32, bfloat16 or int8 with a scale a row; all arithmetic is float32.
Not here: which models can be computed so and who calls it (`engine.compiled`), torch's form, which is the reference
(`models.transformer`).

Kept in one file: numba's cache on disk knows a kernel is stale by the date of the file it stands in.

Legend: N tokens of the step, D width, H query heads, K kv heads, G = H / K, E size of a head, F width of the MLP,
L layers, V vocabulary, T threads, R rows that want logits, S segments of tokens that share an adapter.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8
"""Numbers in a vector. Rows of every weight must be whole vectors."""
FLOAT32, BFLOAT16, INT8 = 0, 1, 2
TOKENS_AT_ONCE = 32
"""Tokens whose inputs stay in the second cache while all rows of a weight pass by."""
QKV, OUT, GATE_UP, DOWN = 0, 1, 2, 3
PARTS = 3
"""The most layers that are fused into one (q, k, v)."""
_LOG2E = np.float32(math.log2(math.e))


def _tile(kind: int, rows: int, tokens: int) -> Any:
    """An intrinsic: `rows` x `tokens` dot products of `length` numbers, all sums in registers.

    tile(w, w_step, scales, x, x_step, y, y_step, length, adds): addresses, and steps in numbers from one row to the
    next; y[token, row] becomes the product times the row's scale (INT8), or gains it where `adds`.
    """
    i64, f32 = ir.IntType(64), ir.FloatType()
    element = {FLOAT32: f32, BFLOAT16: ir.IntType(16), INT8: ir.IntType(8)}[kind]
    size = {FLOAT32: 4, BFLOAT16: 2, INT8: 1}[kind]
    vector = ir.VectorType(f32, LANES)

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        w, w_step, scales, x, x_step, y, y_step, length, adds = args

        def number(value: int) -> Any:
            return ir.Constant(i64, value)

        def address(base: Any, index: Any, bytes_each: int) -> Any:
            return b.add(base, b.mul(index, number(bytes_each)))

        def load(at: Any, kind_of: Any, align: int) -> Any:
            return b.load(b.inttoptr(at, ir.PointerType(kind_of)), align=align)

        w_rows = [address(w, b.mul(w_step, number(m)), size) for m in range(rows)]
        x_rows = [address(x, b.mul(x_step, number(n)), 4) for n in range(tokens)]
        zero = ir.Constant(vector, [0.0] * LANES)
        sums = [[cgutils.alloca_once_value(b, zero) for _ in range(tokens)] for _ in range(rows)]
        with cgutils.for_range_slice(b, number(0), length, number(LANES), i64) as (at, _):
            values = [
                _widened(b, kind, load(address(row, at, size), ir.VectorType(element, LANES), size)) for row in w_rows
            ]
            for n in range(tokens):  # weights before inputs: 12 sums, 3 weights and an input fill 16 registers
                x_n = load(address(x_rows[n], at, 4), vector, 4)
                for m in range(rows):
                    product = b.fmul(values[m], x_n, flags=("fast",))
                    b.store(b.fadd(b.load(sums[m][n]), product, flags=("fast",)), sums[m][n])
        for m in range(rows):
            scale = load(address(scales, number(m), 4), f32, 4) if kind == INT8 else None
            for n in range(tokens):
                total = _sum_of(b, b.load(sums[m][n]))
                if scale is not None:
                    total = b.fmul(total, scale)
                place = address(y, b.add(b.mul(y_step, number(n)), number(m)), 4)
                before = b.select(b.icmp_signed("!=", adds, number(0)), load(place, f32, 4), ir.Constant(f32, 0.0))
                b.store(b.fadd(before, total), b.inttoptr(place, ir.PointerType(f32)))
        return context.get_dummy_value()

    @intrinsic
    def tile(typing: Any, w: Any, w_step: Any, scales: Any, x: Any, x_step: Any, y: Any, y_step: Any, length: Any, adds: Any) -> Any:  # fmt: skip # noqa: E501
        return types.void(*[types.int64] * 9), codegen

    return tile


def _widened(b: Any, kind: int, values: Any) -> Any:
    """Numbers of a weight as float32."""
    vector, wide = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
    if kind == BFLOAT16:
        return b.bitcast(b.shl(b.zext(values, wide), ir.Constant(wide, [16] * LANES)), vector)
    return b.sitofp(b.sext(values, wide), vector) if kind == INT8 else values


def _sum_of(b: Any, vector: Any) -> Any:
    """The sum of the lanes, by halves."""
    width = LANES
    while width > 1:
        width //= 2
        i32 = ir.IntType(32)
        low = ir.Constant(ir.VectorType(i32, width), list(range(width)))
        high = ir.Constant(ir.VectorType(i32, width), list(range(width, 2 * width)))
        vector = b.fadd(b.shuffle_vector(vector, vector, low), b.shuffle_vector(vector, vector, high))
    return b.extract_element(vector, ir.Constant(ir.IntType(32), 0))


def _products(kind: int) -> Any:
    """products(w, w_step, scales, x, x_step, y, y_step, length, low, high, tokens, adds): rows low..high of a weight
    of this kind with all tokens; addresses are those of row 0 and token 0."""
    size = np.int64({FLOAT32: 4, BFLOAT16: 2, INT8: 1}[kind])
    tile41, tile42, tile43, tile34 = _tile(kind, 4, 1), _tile(kind, 4, 2), _tile(kind, 4, 3), _tile(kind, 3, 4)
    tile11, tile12, tile13, tile14 = (_tile(kind, 1, tokens) for tokens in (1, 2, 3, 4))

    @njit(nogil=True, error_model="numpy")
    def narrow(w, w_step, scales, x, x_step, y, y_step, length, low, high, tokens, adds):  # type: ignore[no-untyped-def]
        """Up to 3 tokens."""
        row = low
        while row + 4 <= high:
            wr, sr, yr = w + row * w_step * size, scales + row * 4, y + row * 4
            if tokens == 1:
                tile41(wr, w_step, sr, x, x_step, yr, y_step, length, adds)
            elif tokens == 2:
                tile42(wr, w_step, sr, x, x_step, yr, y_step, length, adds)
            else:
                tile43(wr, w_step, sr, x, x_step, yr, y_step, length, adds)
            row += 4
        while row < high:
            wr, sr, yr = w + row * w_step * size, scales + row * 4, y + row * 4
            if tokens == 1:
                tile11(wr, w_step, sr, x, x_step, yr, y_step, length, adds)
            elif tokens == 2:
                tile12(wr, w_step, sr, x, x_step, yr, y_step, length, adds)
            else:
                tile13(wr, w_step, sr, x, x_step, yr, y_step, length, adds)
            row += 1

    @njit(nogil=True, error_model="numpy")
    def wide(w, w_step, scales, x, x_step, y, y_step, length, low, high, fours, adds):  # type: ignore[no-untyped-def]
        """So many times 4 tokens."""
        row = low
        while row < high:
            wr, sr = w + row * w_step * size, scales + row * 4
            whole = row + 3 <= high
            for four in range(fours):
                xr, yr = x + four * 4 * x_step * 4, y + (row + four * 4 * y_step) * 4
                if whole:
                    tile34(wr, w_step, sr, xr, x_step, yr, y_step, length, adds)
                else:
                    tile14(wr, w_step, sr, xr, x_step, yr, y_step, length, adds)
            row += 3 if whole else 1

    @njit(nogil=True, error_model="numpy")
    def products(w, w_step, scales, x, x_step, y, y_step, length, low, high, tokens, adds):  # type: ignore[no-untyped-def]
        for start in range(0, tokens, TOKENS_AT_ONCE):
            count = min(tokens - start, TOKENS_AT_ONCE)
            xs, ys, fours = x + start * x_step * 4, y + start * y_step * 4, count // 4
            if fours:
                wide(w, w_step, scales, xs, x_step, ys, y_step, length, low, high, fours, adds)
            if count % 4:
                xs, ys = xs + fours * 4 * x_step * 4, ys + fours * 4 * y_step * 4
                narrow(w, w_step, scales, xs, x_step, ys, y_step, length, low, high, count % 4, adds)

    return products


_products_f32, _products_bf16, _products_int8 = _products(FLOAT32), _products(BFLOAT16), _products(INT8)


@njit(nogil=True, error_model="numpy")
def _product(kind, w, scales, x, y, low, high, tokens, adds):  # type: ignore[no-untyped-def]
    """Rows low..high of y_NO = x_NI W^T (or += where `adds`), W by its address."""
    length, x_at, y_at, o = x.shape[1], x.ctypes.data, y.ctypes.data, y.shape[1]
    if kind == FLOAT32:
        _products_f32(w, length, scales, x_at, length, y_at, o, length, low, high, tokens, adds)
    elif kind == BFLOAT16:
        _products_bf16(w, length, scales, x_at, length, y_at, o, length, low, high, tokens, adds)
    else:
        _products_int8(w, length, scales, x_at, length, y_at, o, length, low, high, tokens, adds)


@intrinsic
def _float_of_bits(typing: Any, bits: Any) -> Any:
    return types.float32(types.int32), lambda context, b, signature, args: b.bitcast(args[0], ir.FloatType())


@njit(nogil=True, fastmath={"contract", "nsz"}, error_model="numpy", inline="always")
def _exp(x):  # type: ignore[no-untyped-def]
    """e^x in float32 to 2e-7 of itself, in operations that vectorise: 2^n times a polynomial of the rest."""
    t = max(min(x, np.float32(88.0)), np.float32(-87.0)) * _LOG2E
    n = np.floor(t + np.float32(0.5))
    r = (t - n) * np.float32(0.6931471805599453)
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    return p * _float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@njit(nogil=True, fastmath=True, error_model="numpy")
def _norm(x, weight, eps, out, count):  # type: ignore[no-untyped-def]
    """RMS norm of the first `count` rows."""
    size = x.shape[1]
    for n in range(count):
        row, to = x[n], out[n]
        total = np.float32(0.0)
        for j in range(size):
            total += row[j] * row[j]
        inverse = np.float32(1.0) / np.sqrt(total / np.float32(size) + eps)
        for j in range(size):
            to[j] = row[j] * inverse * weight[j]


@njit(nogil=True, fastmath=True, error_model="numpy")
def _place_heads(qkv, bias, norms, eps, turns, slots, kv, layer, head_dim, heads, kv_heads, scale, count):  # type: ignore[no-untyped-def]
    """Bias, norm and rotation of queries and keys in place; keys and values of all tokens go into the cache.

    `norms` (2, E), or without rows where heads are not normed; `turns` (N, E): cosines, then sines, of each pair.
    """
    pairs = head_dim // 2
    for n in range(count):
        row = qkv[n]
        if bias.shape[0]:
            for j in range(row.shape[0]):
                row[j] += bias[j]
        for head in range(heads + kv_heads):
            part = row[head * head_dim : (head + 1) * head_dim]
            if norms.shape[0]:
                weight = norms[0] if head < heads else norms[1]
                total = np.float32(0.0)
                for j in range(head_dim):
                    total += part[j] * part[j]
                inverse = np.float32(1.0) / np.sqrt(total / np.float32(head_dim) + eps)
                for j in range(head_dim):
                    part[j] = part[j] * inverse * weight[j]
            for j in range(pairs):
                cosine, sine, a, b = turns[n, j], turns[n, pairs + j], part[2 * j], part[2 * j + 1]
                part[2 * j] = a * cosine - b * sine
                part[2 * j + 1] = a * sine + b * cosine
            if head < heads:
                for j in range(head_dim):
                    part[j] *= scale
        for head in range(kv_heads):
            key, value = kv[layer, 0, slots[n], head], kv[layer, 1, slots[n], head]
            at = (heads + head) * head_dim
            behind = kv_heads * head_dim
            for j in range(head_dim):
                key[j] = row[at + j]
                value[j] = row[at + behind + j]


@njit(nogil=True, fastmath={"contract", "nsz", "reassoc", "arcp", "afn"}, error_model="numpy")
def _attend(q, kv, layer, head, table, size, first, last, out):  # type: ignore[no-untyped-def]
    """One token's G queries of one kv head over the keys first..last of its row: softmax(q k) v.

    `q`, `out` (G, E) contiguous; `table` the row's blocks of `size` slots.
    """
    queries, head_dim = q.shape
    scores = np.empty((queries, last - first), dtype=np.float32)
    step = kv.shape[3] * head_dim
    base, scores_at, q_at, keys = kv.ctypes.data, scores.ctypes.data, q.ctypes.data, last - first
    t = first
    while t < last:
        until = min(last, (t // size + 1) * size)
        slot = table[t // size] * size + t % size
        at = base + (((layer * 2 * kv.shape[2]) + slot) * step + head * head_dim) * 4
        _products_f32(
            at, step, at, q_at, head_dim, scores_at + (t - first) * 4, keys, head_dim, 0, until - t, queries, 0
        )
        t = until
    for g in range(queries):
        row, to = scores[g], out[g]
        most = row[0]
        for i in range(keys):
            most = max(most, row[i])
        total = np.float32(0.0)
        for i in range(keys):
            e = _exp(row[i] - most)
            row[i] = e
            total += e
        inverse = np.float32(1.0) / total
        to[:] = np.float32(0.0)
        t = first
        while t < last:
            until = min(last, (t // size + 1) * size)
            slot = table[t // size] * size + t % size
            while t + 4 <= until:
                i = t - first
                p0, p1, p2, p3 = row[i] * inverse, row[i + 1] * inverse, row[i + 2] * inverse, row[i + 3] * inverse
                v0, v1 = kv[layer, 1, slot, head], kv[layer, 1, slot + 1, head]
                v2, v3 = kv[layer, 1, slot + 2, head], kv[layer, 1, slot + 3, head]
                for j in range(head_dim):
                    to[j] += p0 * v0[j] + p1 * v1[j] + p2 * v2[j] + p3 * v3[j]
                t += 4
                slot += 4
            while t < until:
                p, v = row[t - first] * inverse, kv[layer, 1, slot, head]
                for j in range(head_dim):
                    to[j] += p * v[j]
                t += 1
                slot += 1


@njit(nogil=True, fastmath={"contract", "nsz", "arcp"}, error_model="numpy")
def _gate(gate_up, bias, act, low, high, count):  # type: ignore[no-untyped-def]
    """Columns low..high of act = silu(gate) * up."""
    size = act.shape[1]
    for n in range(count):
        gate, up, to = gate_up[n, low:high], gate_up[n, size + low : size + high], act[n, low:high]
        if bias.shape[0]:
            for j in range(high - low):
                gate[j] += bias[low + j]
                up[j] += bias[size + low + j]
        for j in range(high - low):
            g = gate[j]
            to[j] = g / (np.float32(1.0) + _exp(-g)) * up[j]


@njit(nogil=True, error_model="numpy")
def _bounds(part, parts, size):  # type: ignore[no-untyped-def]
    """Where a part of `size` rows begins and ends, in whole tiles of 12."""
    each = ((size + parts - 1) // parts + 11) // 12 * 12
    return min(part * each, size), min((part + 1) * each, size)


@njit(nogil=True, error_model="numpy")
def _inner(segment, segments, pairs, layer, group, x, inner):  # type: ignore[no-untyped-def]
    """What a segment's adapter reads of x, for each part of a layer: inner_N,part,r = A x."""
    start, count = segments[segment, 0], segments[segment, 1]
    width, length = inner.shape[2], x.shape[1]
    for part in range(PARTS):
        rank, a = pairs[segment, layer, group, part, 0], pairs[segment, layer, group, part, 1]
        if rank:
            _products_f32(
                a, length, a, x.ctypes.data + start * length * 4, length,
                inner.ctypes.data + (start * PARTS + part) * width * 4, PARTS * width, length, 0, rank, count, 0,
            )  # fmt: skip


@njit(nogil=True, error_model="numpy")
def _outer(segments, pairs, layer, group, inner, y, low, high):  # type: ignore[no-untyped-def]
    """Adds what the adapters write to the columns low..high of y: y += B inner."""
    width = inner.shape[2]
    for segment in range(segments.shape[0]):
        start, count = segments[segment, 0], segments[segment, 1]
        for part in range(PARTS):
            rank, b = pairs[segment, layer, group, part, 0], pairs[segment, layer, group, part, 2]
            first, last = pairs[segment, layer, group, part, 3], pairs[segment, layer, group, part, 4]
            begin, end = max(low, first), min(high, last)
            if rank and begin < end:
                _products_f32(
                    b, rank, b, inner.ctypes.data + (start * PARTS + part) * width * 4, PARTS * width,
                    y.ctypes.data + (start * y.shape[1] + first) * 4, y.shape[1], rank, begin - first, end - first,
                    count, 1,
                )  # fmt: skip


@njit(nogil=True, fastmath={"contract", "nsz", "reassoc"}, error_model="numpy")
def _best(logits, low, high, best, found):  # type: ignore[no-untyped-def]
    """Of each row's logits low..high the place of the largest, and found (R, 2): it, and the sum of e^(logit - it)."""
    for r in range(logits.shape[0]):
        row = logits[r, low:high]
        most = np.float32(-np.inf)
        for j in range(row.shape[0]):
            most = max(most, row[j])
        place = 0
        for j in range(row.shape[0]):
            if row[j] == most:
                place = j
                break
        total, broken = np.float32(0.0), np.float32(0.0)
        for j in range(row.shape[0]):
            total += _exp(row[j] - most)
            broken += row[j] * np.float32(0.0)  # stays 0 unless a logit is no finite number
        best[r], found[r, 0], found[r, 1] = low + place, most, total + broken


@njit(parallel=True, nogil=True, error_model="numpy", cache=True)
def decoder_step(
    threads, kind, weights, scales, norms, last_norm, qk_norms, qkv_biases, out_biases, mlp_biases, down_biases,
    windows, eps, query_scale, turns, plain_turns, turned, positions, of_row, slots, tables, size, kv, heads, segments,
    pairs, x, y, qkv, mixed, gate_up, act, inner,
):  # type: ignore[no-untyped-def] # fmt: skip
    """All layers of N tokens: x (N, D) holds embeddings before and hidden states, not yet normed, afterwards.

    `weights`, `scales` (L, 4) addresses, of QKV, OUT, GATE_UP, DOWN; `norms` (L, 2, D); `qk_norms` (L, 2 or 0, E);
    biases (L, columns or 0). `windows` (L,) how many tokens a layer sees, 0 for all. `turns`, `plain_turns` (N, E)
    cosines and sines for layers that turn and for those that do not (`turned` (L,)). `positions`, `of_row`, `slots`
    (N,): where a token stands, in which row of `tables` its blocks are, its own slot. `kv` (L, 2, slots, K, E).
    `segments` (S, 2): first token and count; `pairs` (S, L, 4, PARTS, 5): rank (whole vectors), addresses of A and B,
    first and last column. The rest is scratch.
    """
    count, layers, kv_heads, head_dim = x.shape[0], norms.shape[0], kv.shape[3], kv.shape[4]
    groups = heads // kv_heads
    adapted = segments.shape[0]
    for layer in range(layers):
        _norm(x, norms[layer, 0], eps, y, count)
        if adapted:
            for s in prange(adapted):
                _inner(s, segments, pairs, layer, QKV, y, inner)
        for part in prange(threads):
            low, high = _bounds(part, threads, qkv.shape[1])
            _product(kind, weights[layer, QKV], scales[layer, QKV], y, qkv, low, high, count, 0)
            if adapted:
                _outer(segments, pairs, layer, QKV, inner, qkv, low, high)
        _place_heads(
            qkv, qkv_biases[layer], qk_norms[layer], eps, turns if turned[layer] else plain_turns, slots, kv, layer,
            head_dim, heads, kv_heads, query_scale, count,
        )  # fmt: skip
        for item in prange(count * kv_heads):
            n, head = item // kv_heads, item % kv_heads
            last = positions[n] + 1
            first = max(0, last - windows[layer]) if windows[layer] else 0
            own = qkv[n, head * groups * head_dim : (head + 1) * groups * head_dim].reshape(groups, head_dim)
            to = mixed[n, head * groups * head_dim : (head + 1) * groups * head_dim].reshape(groups, head_dim)
            _attend(own, kv, layer, head, tables[of_row[n]], size, first, last, to)
        if adapted:
            for s in prange(adapted):
                _inner(s, segments, pairs, layer, OUT, mixed, inner)
        for part in prange(threads):
            low, high = _bounds(part, threads, x.shape[1])
            _product(kind, weights[layer, OUT], scales[layer, OUT], mixed, x, low, high, count, 1)
            if adapted:
                _outer(segments, pairs, layer, OUT, inner, x, low, high)
        if out_biases.shape[1]:
            for n in range(count):
                x[n] += out_biases[layer]
        _norm(x, norms[layer, 1], eps, y, count)
        if adapted:
            for s in prange(adapted):
                _inner(s, segments, pairs, layer, GATE_UP, y, inner)
        for part in prange(threads):
            width = act.shape[1]
            low, high = _bounds(part, threads, width)
            w, s = weights[layer, GATE_UP], scales[layer, GATE_UP]
            _product(kind, w, s, y, gate_up, low, high, count, 0)
            _product(kind, w, s, y, gate_up, width + low, width + high, count, 0)
            if adapted:
                _outer(segments, pairs, layer, GATE_UP, inner, gate_up, low, high)
                _outer(segments, pairs, layer, GATE_UP, inner, gate_up, width + low, width + high)
            _gate(gate_up, mlp_biases[layer], act, low, high, count)
        if adapted:
            for s in prange(adapted):
                _inner(s, segments, pairs, layer, DOWN, act, inner)
        for part in prange(threads):
            low, high = _bounds(part, threads, x.shape[1])
            _product(kind, weights[layer, DOWN], scales[layer, DOWN], act, x, low, high, count, 1)
            if adapted:
                _outer(segments, pairs, layer, DOWN, inner, x, low, high)
        if down_biases.shape[1]:
            for n in range(count):
                x[n] += down_biases[layer]
    _norm(x, last_norm, eps, y, count)


@njit(parallel=True, nogil=True, error_model="numpy", cache=True)
def head_step(threads, kind, weight, scales, hidden, logits, sampled, best, found):  # type: ignore[no-untyped-def]
    """Logits (R, V) of hidden states (R, D). Of the first `sampled` tokens each row's likeliest goes to best[0], and
    over all tokens found[0] (R, 2) is the largest logit and the sum of e^(logit - it).

    `best` (T, R) and `found` (T, R, 2) hold what each thread found."""
    size = logits.shape[1]
    within = np.empty((threads, logits.shape[0], 2), dtype=np.float32)
    elsewhere = np.empty((threads, logits.shape[0]), dtype=np.int64)
    for part in prange(threads):
        low, high = _bounds(part, threads, size)
        _product(kind, weight, scales, hidden, logits, low, high, logits.shape[0], 0)
        _best(logits, low, min(high, max(low, sampled)), best[part], within[part])
        _best(logits, low, high, elsewhere[part], found[part])
    for r in range(logits.shape[0]):
        for part in range(1, threads):
            if within[part, r, 0] > within[0, r, 0]:
                within[0, r, 0], best[0, r] = within[part, r, 0], best[part, r]
            most = max(found[0, r, 0], found[part, r, 0])
            total = found[0, r, 1] * np.exp(found[0, r, 0] - most) + found[part, r, 1] * np.exp(
                found[part, r, 0] - most
            )
            found[0, r, 0], found[0, r, 1] = most, total
