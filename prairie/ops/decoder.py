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
from numba import cfunc, njit, prange, types
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


def _tile(kind: int, rows: int, tokens: int, chains: int = 1) -> Any:
    """An intrinsic: `rows` x `tokens` dot products of `length` numbers, all sums in registers.

    tile(w, w_step, scales, x, x_step, y, y_step, length, adds): addresses, and steps in numbers from one row to the
    next; y[token, row] becomes the product times the row's scale (INT8), or gains it where `adds`. Each product is kept
    in so many `chains` of sums, which do not wait for each other.
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
        sums = [
            [[cgutils.alloca_once_value(b, zero) for _ in range(chains)] for _ in range(tokens)] for _ in range(rows)
        ]

        def advance(at: Any, chain: int) -> None:
            wide = ir.VectorType(element, LANES)
            values = [_widened(b, kind, load(address(row, at, size), wide, size)) for row in w_rows]
            for n in range(tokens):  # weights before inputs: 12 sums, 3 weights and an input fill 16 registers
                x_n = load(address(x_rows[n], at, 4), vector, 4)
                for m in range(rows):
                    kept = sums[m][n][chain]
                    b.store(b.fadd(b.load(kept), b.fmul(values[m], x_n, flags=("fast",)), flags=("fast",)), kept)

        whole = b.sub(length, b.srem(length, number(LANES * chains)))
        with cgutils.for_range_slice(b, number(0), whole, number(LANES * chains), i64) as (at, _):
            for chain in range(chains):
                advance(b.add(at, number(chain * LANES)), chain)
        if chains > 1:
            with cgutils.for_range_slice(b, whole, length, number(LANES), i64) as (at, _):
                advance(at, 0)
        for m in range(rows):
            scale = load(address(scales, number(m), 4), f32, 4) if kind == INT8 else None
            for n in range(tokens):
                total = b.load(sums[m][n][0])
                for chain in sums[m][n][1:]:
                    total = b.fadd(total, b.load(chain))
                total = _sum_of(b, total)
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


@intrinsic
def _prefetch_line(typing: Any, address: Any) -> Any:
    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        i32, pointer = ir.IntType(32), ir.PointerType(ir.IntType(8))
        name = b.module.declare_intrinsic(
            "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
        )
        b.call(name, [b.inttoptr(args[0], pointer), i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@njit(nogil=True, error_model="numpy")
def _prefetch(address, size):
    """Asks for `size` bytes that are read soon; rows are short, and the chip does not guess where the next begins."""
    for at in range(0, size, 64):
        _prefetch_line(address + at)


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
    tile11, tile21, tile22 = _tile(kind, 1, 1, 4), _tile(kind, 2, 1, 2), _tile(kind, 2, 2, 2)
    tile12, tile14, tile34 = _tile(kind, 1, 2), _tile(kind, 1, 4), _tile(kind, 3, 4)

    @njit(nogil=True, error_model="numpy")
    def products(w, w_step, scales, x, x_step, y, y_step, length, low, high, tokens, adds):
        for start in range(0, tokens, TOKENS_AT_ONCE):
            count = min(tokens - start, TOKENS_AT_ONCE)
            xs, ys, fours = x + start * x_step * 4, y + start * y_step * 4, count // 4
            row = low
            while fours and row < high:
                wr, sr, whole = w + row * w_step * size, scales + row * 4, row + 3 <= high
                _prefetch(wr + 3 * w_step * size, 3 * w_step * size)
                for four in range(fours):
                    xr, yr = xs + four * 4 * x_step * 4, ys + (row + four * 4 * y_step) * 4
                    if whole:
                        tile34(wr, w_step, sr, xr, x_step, yr, y_step, length, adds)
                    else:
                        tile14(wr, w_step, sr, xr, x_step, yr, y_step, length, adds)
                row += 3 if whole else 1
            xs, ys = xs + fours * 4 * x_step * 4, ys + fours * 4 * y_step * 4
            row = low
            while count % 4 >= 2 and row < high:
                wr, sr, yr, whole = w + row * w_step * size, scales + row * 4, ys + row * 4, row + 2 <= high
                if whole:
                    tile22(wr, w_step, sr, xs, x_step, yr, y_step, length, adds)
                else:
                    tile12(wr, w_step, sr, xs, x_step, yr, y_step, length, adds)
                row += 2 if whole else 1
            if count % 4 >= 2:
                xs, ys = xs + 2 * x_step * 4, ys + 2 * y_step * 4
            row = low
            while count % 2 and row < high:
                wr, sr, yr, whole = w + row * w_step * size, scales + row * 4, ys + row * 4, row + 2 <= high
                if whole:
                    tile21(wr, w_step, sr, xs, x_step, yr, y_step, length, adds)
                else:
                    tile11(wr, w_step, sr, xs, x_step, yr, y_step, length, adds)
                row += 2 if whole else 1

    return products


_products_f32, _products_bf16, _products_int8 = _products(FLOAT32), _products(BFLOAT16), _products(INT8)


@cfunc(types.void(*[types.int64] * 13), error_model="numpy", cache=True)
def products(kind, w, w_step, scales, x, x_step, y, y_step, length, low, high, tokens, adds):
    """`_products` of any kind behind one address: the loops below call it, and are not compiled with it inside."""
    if kind == FLOAT32:
        _products_f32(w, w_step, scales, x, x_step, y, y_step, length, low, high, tokens, adds)
    elif kind == BFLOAT16:
        _products_bf16(w, w_step, scales, x, x_step, y, y_step, length, low, high, tokens, adds)
    else:
        _products_int8(w, w_step, scales, x, x_step, y, y_step, length, low, high, tokens, adds)


@intrinsic
def _call(typing: Any, address: Any, numbers: Any) -> Any:
    """Calls `products` by its address with a tuple of 13 whole numbers."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        i64 = ir.IntType(64)
        kind_of = ir.FunctionType(ir.VoidType(), [i64] * 13)
        given = [b.extract_value(args[1], i) for i in range(13)]
        b.call(b.inttoptr(args[0], ir.PointerType(kind_of)), given)
        return context.get_dummy_value()

    return types.void(types.int64, types.UniTuple(types.int64, 13)), codegen


@njit(nogil=True, error_model="numpy")
def _product(call, kind, w, scales, x, y, low, high, tokens, adds):
    """Rows low..high of y_NO = x_NI W^T (or += where `adds`), W by its address."""
    length = x.shape[1]
    _call(call, (
        np.int64(kind), w, length, scales, np.int64(x.ctypes.data), length, np.int64(y.ctypes.data), y.shape[1], length,
        low, high, tokens, np.int64(adds),
    ))  # fmt: skip


@intrinsic
def _float_of_bits(typing: Any, bits: Any) -> Any:
    return types.float32(types.int32), lambda context, b, signature, args: b.bitcast(args[0], ir.FloatType())


@njit(nogil=True, fastmath={"contract", "nsz"}, error_model="numpy", inline="always")
def _exp(x):
    """e^x in float32 to 2e-7 of itself, in operations that vectorise: 2^n times a polynomial of the rest."""
    x = max(min(x, np.float32(88.0)), np.float32(-87.0))
    n = np.floor(x * _LOG2E + np.float32(0.5))
    r = (x - n * np.float32(0.693145751953125)) - n * np.float32(1.42860677e-6)
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
def _norm(x, weight, eps, out, count):
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
def _place_heads(qkv, bias, norms, eps, turns, slots, kv, layer, head_dim, heads, kv_heads, scale, count):
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
def _attend(call, q, kv, layer, head, table, size, first, last, out):
    """One token's G queries of one kv head over the keys first..last of its row: softmax(q k) v.

    `q`, `out` (G, E) contiguous; `table` the row's blocks of `size` slots.
    """
    queries, head_dim = q.shape
    scores = np.empty((queries, last - first), dtype=np.float32)
    step = kv.shape[3] * head_dim
    base, scores_at, q_at = np.int64(kv.ctypes.data), np.int64(scores.ctypes.data), np.int64(q.ctypes.data)
    keys = last - first
    t = first
    while t < last:
        until = min(last, (t // size + 1) * size)
        slot = table[t // size] * size + t % size
        at = base + (((layer * 2 * kv.shape[2]) + slot) * step + head * head_dim) * 4
        _call(call, (
            np.int64(FLOAT32), at, step, at, q_at, head_dim, scores_at + (t - first) * 4, keys, head_dim, np.int64(0),
            until - t, queries, np.int64(0),
        ))  # fmt: skip
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
def _gate(gate_up, bias, act, low, high, count):
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
def _bounds(part, parts, size):
    """Where a part of `size` rows begins and ends, in whole tiles of 12."""
    each = ((size + parts - 1) // parts + 11) // 12 * 12
    return min(part * each, size), min((part + 1) * each, size)


@njit(nogil=True, error_model="numpy")
def _inner(call, segment, segments, pairs, layer, group, x, inner):
    """What a segment's adapter reads of x, for each part of a layer: inner_N,part,r = A x."""
    start, count = segments[segment, 0], segments[segment, 1]
    width, length = inner.shape[2], x.shape[1]
    for part in range(PARTS):
        rank, a = pairs[segment, layer, group, part, 0], pairs[segment, layer, group, part, 1]
        if rank:
            to = np.int64(inner.ctypes.data) + (start * PARTS + part) * width * 4
            _call(call, (
                np.int64(FLOAT32), a, length, a, np.int64(x.ctypes.data) + start * length * 4, length, to,
                PARTS * width, length, np.int64(0), rank, count, np.int64(0),
            ))  # fmt: skip


@njit(nogil=True, error_model="numpy")
def _outer(call, segments, pairs, layer, group, inner, y, low, high):
    """Adds what the adapters write to the columns low..high of y: y += B inner."""
    width = inner.shape[2]
    for segment in range(segments.shape[0]):
        start, count = segments[segment, 0], segments[segment, 1]
        for part in range(PARTS):
            rank, b = pairs[segment, layer, group, part, 0], pairs[segment, layer, group, part, 2]
            first, last = pairs[segment, layer, group, part, 3], pairs[segment, layer, group, part, 4]
            begin, end = max(low, first), min(high, last)
            if rank and begin < end:
                read = np.int64(inner.ctypes.data) + (start * PARTS + part) * width * 4
                to = np.int64(y.ctypes.data) + (start * y.shape[1] + first) * 4
                _call(call, (
                    np.int64(FLOAT32), b, rank, b, read, PARTS * width, to, y.shape[1], rank, begin - first,
                    end - first, count, np.int64(1),
                ))  # fmt: skip


@njit(nogil=True, fastmath={"contract", "nsz", "reassoc"}, error_model="numpy")
def _best(logits, low, high, best, found):
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
    call, threads, kind, weights, scales, norms, last_norm, qk_norms, qkv_biases, out_biases, mlp_biases, down_biases,
    windows, eps, query_scale, turns, plain_turns, turned, positions, of_row, slots, tables, size, kv, heads, segments,
    pairs, x, y, qkv, mixed, gate_up, act, inner,
):  # fmt: skip
    """All layers of N tokens: x (N, D) holds embeddings before and hidden states, not yet normed, afterwards.

    `call` is the address of `products`. `weights`, `scales` (L, 4) addresses, of QKV, OUT, GATE_UP, DOWN; `norms`
    (L, 2, D); `qk_norms` (L, 2 or 0, E); biases (L, columns or 0). `windows` (L,) how many tokens a layer sees, 0 for
    all. `turns`, `plain_turns` (N, E) cosines and sines for layers that turn and for those that do not (`turned` (L,)).
    `positions`, `of_row`, `slots` (N,): where a token stands, in which row of `tables` its blocks are, its own slot.
    `kv` (L, 2, slots, K, E). `segments` (S, 2): first token and count; `pairs` (S, L, 4, PARTS, 5): rank (whole
    vectors), addresses of A and B, first and last column. The rest is scratch.
    """
    count, layers, kv_heads, head_dim = x.shape[0], norms.shape[0], kv.shape[3], kv.shape[4]
    groups = heads // kv_heads
    adapted = segments.shape[0]
    for layer in range(layers):
        _norm(x, norms[layer, 0], eps, y, count)
        if adapted:
            for s in prange(adapted):
                _inner(call, s, segments, pairs, layer, QKV, y, inner)
        for part in prange(threads):
            low, high = _bounds(part, threads, qkv.shape[1])
            _product(call, kind, weights[layer, QKV], scales[layer, QKV], y, qkv, low, high, count, 0)
            if adapted:
                _outer(call, segments, pairs, layer, QKV, inner, qkv, low, high)
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
            _attend(call, own, kv, layer, head, tables[of_row[n]], size, first, last, to)
        if adapted:
            for s in prange(adapted):
                _inner(call, s, segments, pairs, layer, OUT, mixed, inner)
        for part in prange(threads):
            low, high = _bounds(part, threads, x.shape[1])
            _product(call, kind, weights[layer, OUT], scales[layer, OUT], mixed, x, low, high, count, 1)
            if adapted:
                _outer(call, segments, pairs, layer, OUT, inner, x, low, high)
        if out_biases.shape[1]:
            for n in range(count):
                x[n] += out_biases[layer]
        _norm(x, norms[layer, 1], eps, y, count)
        if adapted:
            for s in prange(adapted):
                _inner(call, s, segments, pairs, layer, GATE_UP, y, inner)
        for part in prange(threads):
            width = act.shape[1]
            low, high = _bounds(part, threads, width)
            w, s = weights[layer, GATE_UP], scales[layer, GATE_UP]
            _product(call, kind, w, s, y, gate_up, low, high, count, 0)
            _product(call, kind, w, s, y, gate_up, width + low, width + high, count, 0)
            if adapted:
                _outer(call, segments, pairs, layer, GATE_UP, inner, gate_up, low, high)
                _outer(call, segments, pairs, layer, GATE_UP, inner, gate_up, width + low, width + high)
            _gate(gate_up, mlp_biases[layer], act, low, high, count)
        if adapted:
            for s in prange(adapted):
                _inner(call, s, segments, pairs, layer, DOWN, act, inner)
        for part in prange(threads):
            low, high = _bounds(part, threads, x.shape[1])
            _product(call, kind, weights[layer, DOWN], scales[layer, DOWN], act, x, low, high, count, 1)
            if adapted:
                _outer(call, segments, pairs, layer, DOWN, inner, x, low, high)
        if down_biases.shape[1]:
            for n in range(count):
                x[n] += down_biases[layer]
    _norm(x, last_norm, eps, y, count)


@njit(parallel=True, nogil=True, error_model="numpy", cache=True)
def head_step(call, threads, kind, weight, scales, hidden, logits, sampled, best, found):
    """Logits (R, V) of hidden states (R, D). Of the first `sampled` tokens each row's likeliest goes to best[0], and
    over all tokens found[0] (R, 2) is the largest logit and the sum of e^(logit - it).

    `best` (T, R) and `found` (T, R, 2) hold what each thread found."""
    size = logits.shape[1]
    within = np.empty((threads, logits.shape[0], 2), dtype=np.float32)
    elsewhere = np.empty((threads, logits.shape[0]), dtype=np.int64)
    for part in prange(threads):
        low, high = _bounds(part, threads, size)
        _product(call, kind, weight, scales, hidden, logits, low, high, logits.shape[0], 0)
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
