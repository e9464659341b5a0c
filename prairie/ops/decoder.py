"""A whole step of a decoder as one compiled function: all layers, all tokens, keys and values in the paged cache.

torch's product of a few rows with a weight reads memory at a quarter of what this chip can, and each of its operators
costs microseconds of Python: a step of a small model is spent there. numba compiles these loops on the user's machine
without a compiler; the heart are two tiles of sums kept in registers, written in LLVM's own terms because no vectoriser
finds them: 6 tokens with 16 rows of a weight in panels, and 3 x 4 dot products where rows lie as they are (float32
weights, keys). Weights are float32, bfloat16, int8 with a scale a row, or int4 with a scale and a least value for every
32 columns of a row; all arithmetic is float32.

A step is a row of phases, each of them pieces that any thread may take (a ticket). A phase is over when its pieces are
done, not when all threads have come: one that the machine has set aside holds nobody up unless it holds a piece.
Between steps helpers wait at a semaphore.
Not here: which models can be computed so and who calls it (`engine.compiled`), torch's form, which is the reference
(`models.transformer`).

Kept in one file: numba's cache on disk knows a kernel is stale by the date of the file it stands in.

Legend: N tokens of the step, D width, H query heads, K kv heads, G = H / K, E size of a head, F width of the MLP,
L layers, V vocabulary, T threads, R rows that want logits, S segments: neighbouring tokens that share an adapter, M
runs of tokens of one sequence.
"""

from __future__ import annotations

import math
import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8
"""Numbers in a vector. Rows of every weight must be whole vectors."""
FLOAT32, BFLOAT16, INT8, PANELS, INT4 = 0, 1, 2, 3, 4
"""Forms of a weight: float32 as it is; in panels (`ops.packed`) bfloat16, int8 with a scale a row, float32, int4."""
SIZES = {FLOAT32: 4, BFLOAT16: 2, INT8: 1, PANELS: 4}
"""Bytes of a number."""
PANEL = 16
"""Rows of a weight that lie together, column by column."""
COLUMNS, COLUMNS_BYTES = 32, 320
"""INT4: columns that share a scale, and what they take of a panel (`ops.packed.in_panels_of_nibbles`)."""
AHEAD_BYTES = 2048
"""How far ahead of a product its weight is asked for."""
TOKENS_AT_ONCE = 48
"""Tokens whose inputs stay in the second cache while all rows of a weight pass by."""
COLUMNS_AT_ONCE = 512
"""Of a panel: they stay in the first cache while a block of tokens passes by."""
GROUP = 6
"""Tokens, at most, that are multiplied with a panel at once: 12 sums, 2 vectors of the panel, a number of an input and
a mask fill 16 registers."""
QKV, OUT, GATE_UP, DOWN = 0, 1, 2, 3
PARTS = 3
"""The most layers that are fused into one (q, k, v)."""
A, INNER, PART = 0, 1, 2
AT, RANK, B, FIRST, LAST = 0, 1, 2, 3, 4
PAIRS = PART + 5 * PARTS
"""What there is to know of an adapter's change of a fused layer: the address of A in narrow panels, whose rows are the
ranks of all parts, and how many rows that makes; then, for each part, which row is its first, how
many it has (whole vectors, or none), the address of its B, 8 columns rank by rank and
then the next 8, its first and last column."""
PIECE_BYTES = 1 << 17
"""Of a weight, at most, in a piece: it stays in the second cache while blocks of tokens pass by."""
PIECES_EACH = 6
"""At least so many pieces of a phase for each thread."""
TILE_ROWS = 24
"""Rows of a weight in rows come in whole multiples of this in a piece: whole tiles, and whole vectors of what they
write."""
HEAD_ROWS = 96
"""Rows of the head whose logits are looked through while they are in the first cache."""
RUN = 8
"""Tokens of one sequence, at most, that look back together."""
SPINS = 2000
"""How often a thread looks again before it offers its core to others."""
DOOR_BYTES = 64
"""Room for a semaphore."""
STATE, DONE, STEP, GATE_BYTES = 0, 64, 128, 192
"""Where in the gate the three words lie on which threads meet: phase and tickets, pieces done, number of the step."""
PHASE_BITS, TICKET_BITS = 12, 20
PLAN = np.dtype(
    [(name, np.int64) for name in (
        # the model; weights and scales (L, 4) addresses, of QKV, OUT, GATE_UP, DOWN
        "kind", "layers", "dim", "heads", "kv_heads", "head_dim", "ffn", "weights", "scales",
        # rows of a weight and heads in a piece come in whole multiples of these
        "rows_at_once", "heads_at_once",
        # norms (L, 2, D), last_norm (D,), qk_norms (L, 2, E), biases (L, columns); 0 where there are none
        "norms", "last_norm", "qk_norms", "qkv_bias", "out_bias", "mlp_bias", "down_bias",
        # windows (L,) how many tokens a layer sees, 0 for all; turned (L,) whether it turns queries and keys
        "windows", "turned", "head_kind", "head", "head_scales", "vocab",
        # the cache: kv (L, 2, slots, K, E), tables (rows, blocks)
        "kv", "slots", "tables", "blocks", "block_size",
        # embeddings (V, D), FLOAT32 or in panels, and of each position (.., E) cosines, then sines
        "embed_kind", "embeddings", "embed_scales", "all_turns",
        # the step: of its sequences (S,) the row in tables, the first token's position, how many tokens; ids (N,)
        "sequences", "rows", "starts", "counts", "tokens", "ids",
        # what follows from that. x (N, D) holds embeddings before and hidden states, not yet normed, afterwards; turns
        # and plain (N, E) cosines, then sines, for layers that turn and for those that do not; position, row in tables
        # and own slot of each token (N,); runs (M, 2) first token and count
        "x", "turns", "plain", "positions", "of_row", "own_slots", "runs", "run_count",
        # adapters, if there are any: segments (S, 3) first token, count, address of pairs (L, 4, PAIRS);
        # inner (N, inner_width) A x, of each token by its adapter
        "segments", "segment_count", "adapter_kind", "inner", "inner_width",
        # scratch; y has a copy for each thread
        "y", "qkv", "mixed", "gate_up", "act",
        # ready (R,) tokens that want logits (R, V). Of the first `sampled` tokens each one's likeliest goes to best[0];
        # found[0] (R, 3): its logit, the largest logit of all, the sum of e^(logit - that). One for each piece. Then
        # logs (2, R): the log-probability of the likeliest, the log of the sum of e^logit
        "ready", "ready_count", "sampled", "logits", "best", "found", "head_pieces", "logs",
        # who meets where: addresses of the gate, of T doors (semaphores), and of functions
        "threads", "gate", "doors", "stop", "products", "post", "wait", "try_wait", "give_way",
    )] + [("eps", np.float32), ("query_scale", np.float32), ("embed_scale", np.float32)],
    align=True,
)  # fmt: skip
"""What a step needs, as numbers and addresses, in an array of one: threads that help read it where it lies."""
_LOG2E = np.float32(math.log2(math.e))


def _tile(rows: int, tokens: int, chains: int = 1, strides: int = 1) -> Any:
    """An intrinsic: `rows` x `tokens` dot products of `length` numbers, all sums in registers.

    tile(w, w_step, x, x_step, y, y_step, length, adds, ahead): addresses, and steps in numbers from one row to the
    next; y[token, row] becomes the product, or gains it where `adds`. Each is kept in so many `chains` of sums, which
    do not wait for each other; a turn of the loop goes on by so many `strides` of vectors in each, and asks for what
    lies `ahead` bytes behind what it reads of the weight.
    """
    i64, f32 = ir.IntType(64), ir.FloatType()
    vector = ir.VectorType(f32, LANES)

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        w, w_step, x, x_step, y, y_step, length, adds, ahead = args

        def number(value: int) -> Any:
            return ir.Constant(i64, value)

        def address(base: Any, index: Any) -> Any:
            return b.add(base, b.mul(index, number(4)))

        def load(at: Any, kind_of: Any) -> Any:
            return b.load(b.inttoptr(at, ir.PointerType(kind_of)), align=4)

        w_rows = [address(w, b.mul(w_step, number(m))) for m in range(rows)]
        x_rows = [address(x, b.mul(x_step, number(n))) for n in range(tokens)]
        zero = ir.Constant(vector, [0.0] * LANES)
        sums = [
            [[cgutils.alloca_once_value(b, zero) for _ in range(chains)] for _ in range(tokens)] for _ in range(rows)
        ]

        def advance(at: Any, chain: int) -> None:
            values = [load(address(row, at), vector) for row in w_rows]
            for n in range(tokens):  # weights before inputs: 12 sums, 3 weights and an input fill 16 registers
                x_n = load(address(x_rows[n], at), vector)
                for m in range(rows):
                    _gain(b, sums[m][n][chain], values[m], x_n)

        turn = LANES * chains * strides
        whole = b.sub(length, b.srem(length, number(turn)))
        with cgutils.for_range_slice(b, number(0), whole, number(turn), i64) as (at, _):
            for row in w_rows:
                for line in range(0, turn * 4, 64):
                    _ask_for(b, b.add(address(row, at), b.add(ahead, number(line))))
            for step in range(chains * strides):
                advance(b.add(at, number(step * LANES)), step % chains)
        if turn > LANES:
            with cgutils.for_range_slice(b, whole, length, number(LANES), i64) as (at, _):
                advance(at, 0)
        for m in range(rows):
            for n in range(tokens):
                total = _sum_of(b, _joined(b, sums[m][n]))
                place = address(y, b.add(b.mul(y_step, number(n)), number(m)))
                before = b.select(b.icmp_signed("!=", adds, number(0)), load(place, f32), ir.Constant(f32, 0.0))
                b.store(b.fadd(before, total), b.inttoptr(place, ir.PointerType(f32)))
        return context.get_dummy_value()

    @intrinsic
    def tile(typing: Any, w: Any, w_step: Any, x: Any, x_step: Any, y: Any, y_step: Any, length: Any, adds: Any, ahead: Any) -> Any:  # fmt: skip # noqa: E501
        return types.void(*[types.int64] * 9), codegen

    return tile


def _panel_tile(kind: int, tokens: int, chains: int = 1, narrow: bool = False) -> Any:
    """An intrinsic: the products of `tokens` inputs with a panel of a weight, all sums in registers.

    tile(w, scales, x, x_step, y, y_step, length, adds): addresses, and steps in numbers from one token to the next;
    y[token, 0..16] becomes the product of `length` columns times the rows' scales (INT8), or gains it where `adds`.
    A `narrow` panel has 8 rows, and where others have rows 8..16 of a column these of the next column: y[token, 0..8]
    becomes the product of 2 `length` columns.
    """
    i64, f32, i32 = ir.IntType(64), ir.FloatType(), ir.IntType(32)
    vector, words, bytes_of = ir.VectorType(f32, LANES), ir.VectorType(i32, LANES), ir.VectorType(ir.IntType(8), LANES)
    column, turn = PANEL * SIZES[kind], 4

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        w, scales, x, x_step, y, y_step, length, adds = args

        def number(value: int) -> Any:
            return ir.Constant(i64, value)

        def load(at: Any, kind_of: Any, align: int = 4) -> Any:
            return b.load(b.inttoptr(at, ir.PointerType(kind_of)), align=align)

        def widened(at: Any) -> tuple[Any, Any]:
            """A column of the panel: rows 0..8 and 8..16."""
            if kind == BFLOAT16:  # rows r and r + 8 are the halves of a word
                both = load(at, words, 2)
                low, high = (
                    b.shl(both, ir.Constant(words, [16] * LANES)),
                    b.and_(both, ir.Constant(words, [-(1 << 16)] * LANES)),
                )
                return b.bitcast(low, vector), b.bitcast(high, vector)
            if kind == INT8:
                low, high = (b.sext(load(b.add(at, number(half)), bytes_of, 1), words) for half in (0, LANES))
                return b.sitofp(low, vector), b.sitofp(high, vector)
            return load(at, vector), load(b.add(at, number(4 * LANES)), vector)

        zero = ir.Constant(vector, [0.0] * LANES)
        sums = [[[cgutils.alloca_once_value(b, zero) for _ in range(chains)] for _ in range(2)] for _ in range(tokens)]
        rows = [b.add(x, b.mul(x_step, number(4 * n))) for n in range(tokens)]
        with cgutils.for_range_slice(b, number(0), length, number(turn), i64) as (at, _):
            start = b.add(w, b.mul(at, number(column)))
            for line in range(0, turn * column, 64):
                _ask_for(b, b.add(start, number(AHEAD_BYTES + line)))
            for step in range(turn):
                halves = widened(b.add(start, number(step * column)))
                place = b.mul(b.add(at, number(step)), number(8 if narrow else 4))
                for n in range(tokens):
                    x_n = _spread(b, load(b.add(rows[n], place), f32))
                    for half in range(2):
                        if narrow and half:
                            x_n = _spread(b, load(b.add(rows[n], b.add(place, number(4))), f32))
                        _gain(b, sums[n][half][step % chains], halves[half], x_n)
        if narrow:
            for n in range(tokens):
                both = b.fadd(_joined(b, sums[n][0]), _joined(b, sums[n][1]))
                b.store(both, b.inttoptr(b.add(y, b.mul(y_step, number(4 * n))), ir.PointerType(vector)), align=4)
            return context.get_dummy_value()
        for half in range(2):
            offset = number(4 * LANES * half)
            scale = load(b.add(scales, offset), vector) if kind == INT8 else None
            for n in range(tokens):
                total = _joined(b, sums[n][half])
                if scale is not None:
                    total = b.fmul(total, scale)
                place = b.add(b.add(y, b.mul(y_step, number(4 * n))), offset)
                before = b.select(b.icmp_signed("!=", adds, number(0)), load(place, vector), zero)
                b.store(b.fadd(before, total), b.inttoptr(place, ir.PointerType(vector)), align=4)
        return context.get_dummy_value()

    @intrinsic
    def tile(typing: Any, w: Any, scales: Any, x: Any, x_step: Any, y: Any, y_step: Any, length: Any, adds: Any) -> Any:
        return types.void(*[types.int64] * 8), codegen

    return tile


def _nibble_tile(tokens: int, chains: int = 1) -> Any:
    """An intrinsic: the products of `tokens` inputs with a panel of an int4 weight.

    tile(w, totals, totals_step, x, x_step, y, y_step, length): addresses, and steps in numbers from one token to the
    next; y[token, 0..16] gains the product of `length` columns. totals[token, g]: the sum of x over the columns of
    group g. A number is scale * n + least; four bits n put into the fraction of a float that stands for 2^k are
    2^k + n, so a group's sum of (2^k + n) x times its scale, and the sum of x times (least - 2^k scale), make its
    product.
    """
    i64, f32, i32 = ir.IntType(64), ir.FloatType(), ir.IntType(32)
    vector, words = ir.VectorType(f32, LANES), ir.VectorType(i32, LANES)
    halves = ((15, 256.0), (19, 16.0))  # rows 0..8 and 8..16: where their four bits go, and what 1 x 2^k then is
    half_exponents = 2.0**112  # between those of float16, whose bits are put into a float32, and of float32

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        w, totals, totals_step, x, x_step, y, y_step, length = args

        def number(value: int) -> Any:
            return ir.Constant(i64, value)

        def same(value: int) -> Any:
            return ir.Constant(words, [value] * LANES)

        def floats(value: float) -> Any:
            return ir.Constant(vector, [value] * LANES)

        def load(at: Any, kind_of: Any) -> Any:
            return b.load(b.inttoptr(at, ir.PointerType(kind_of)), align=4)

        def bits_of(value: float) -> int:
            return int(np.float32(value).view(np.int32))

        zero = floats(0.0)
        sums = [[[cgutils.alloca_once_value(b, zero) for _ in range(chains)] for _ in range(2)] for _ in range(tokens)]
        rows = [b.add(x, b.mul(x_step, number(4 * n))) for n in range(tokens)]
        with cgutils.for_range_slice(b, number(0), length, number(COLUMNS), i64) as (at, _):
            group = b.udiv(at, number(COLUMNS))
            start = b.add(w, b.mul(group, number(COLUMNS_BYTES)))
            for line in range(0, COLUMNS_BYTES, 64):
                _ask_for(b, b.add(start, number(AHEAD_BYTES + line)))
            for kept in (chain for token in sums for half in token for chain in half):
                b.store(zero, kept)
            left = b.sub(length, at)
            count = b.select(b.icmp_signed("<", left, number(COLUMNS)), left, number(COLUMNS))
            with cgutils.for_range_slice(b, number(0), count, number(4), i64) as (inner, _):
                word = load(b.add(start, b.add(number(4 * PANEL), b.mul(inner, number(LANES)))), words)
                place = b.mul(b.add(at, inner), number(4))
                for column in range(4):  # its rows' bits are byte `column` of the words
                    to_left = halves[0][0] - 8 * column
                    moved = b.shl(word, same(to_left)) if to_left > 0 else b.lshr(word, same(-to_left))
                    values = [
                        b.bitcast(b.or_(b.and_(moved, same(15 << bit)), same(bits_of(one))), vector)
                        for bit, one in halves
                    ]
                    for n in range(tokens):
                        x_n = _spread(b, load(b.add(rows[n], b.add(place, number(4 * column))), f32))
                        for half in range(2):
                            _gain(b, sums[n][half][column % chains], values[half], x_n)
            for half, (_, one) in enumerate(halves):
                both = load(b.add(start, number(4 * LANES * half)), words)  # scale below, least above, float16 each
                low, high = b.shl(b.and_(both, same(0x7FFF)), same(13)), b.lshr(both, same(3))
                high = b.or_(b.and_(both, same(-(1 << 31))), b.and_(high, same(0x7FFF << 13)))
                scale, least = (b.fmul(b.bitcast(bits, vector), floats(half_exponents)) for bits in (low, high))
                least = b.fsub(least, b.fmul(scale, floats(one)))
                for n in range(tokens):
                    its = b.mul(b.add(b.mul(totals_step, number(n)), group), number(4))
                    total = _spread(b, load(b.add(totals, its), f32))
                    to = b.add(b.add(y, b.mul(y_step, number(4 * n))), number(4 * LANES * half))
                    gained = b.fmul(scale, _joined(b, sums[n][half]), flags=("fast",))
                    gained = b.fadd(gained, b.fmul(least, total, flags=("fast",)), flags=("fast",))
                    kept = b.inttoptr(to, ir.PointerType(vector))
                    b.store(b.fadd(load(to, vector), gained, flags=("fast",)), kept, align=4)
        return context.get_dummy_value()

    @intrinsic
    def tile(typing: Any, w: Any, totals: Any, totals_step: Any, x: Any, x_step: Any, y: Any, y_step: Any, length: Any) -> Any:  # fmt: skip # noqa: E501
        return types.void(*[types.int64] * 8), codegen

    return tile


def _gain(b: Any, kept: Any, one: Any, other: Any) -> None:
    """A sum gains a product, rounded once; sums keep their order."""
    b.store(b.fadd(b.load(kept), b.fmul(one, other, flags=("contract",)), flags=("contract",)), kept)


def _joined(b: Any, chains: Any) -> Any:
    """What the chains of a sum come to."""
    total = b.load(chains[0])
    for chain in chains[1:]:
        total = b.fadd(total, b.load(chain))
    return total


def _spread(b: Any, value: Any) -> Any:
    """A vector of one number."""
    i32, vector = ir.IntType(32), ir.VectorType(ir.FloatType(), LANES)
    one = b.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(i32, 0))
    return b.shuffle_vector(one, one, ir.Constant(ir.VectorType(i32, LANES), [0] * LANES))


def _ask_for(b: Any, address: Any) -> None:
    """Has a line of memory brought into the first cache."""
    i32, pointer = ir.IntType(32), ir.PointerType(ir.IntType(8))
    name = b.module.declare_intrinsic(
        "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
    )
    b.call(name, [b.inttoptr(address, pointer), i32(0), i32(3), i32(1)])


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


def _pointer(kind: Any, written: Any) -> Any:
    """An intrinsic: an address as a pointer to numbers of a kind, which LLVM calls `written`."""

    @intrinsic
    def pointer(typing: Any, address: Any) -> Any:
        return types.CPointer(kind)(types.int64), lambda context, b, signature, args: b.inttoptr(
            args[0], ir.PointerType(written)
        )

    return pointer


_float_pointer, _whole_pointer = _pointer(types.float32, ir.FloatType()), _pointer(types.int64, ir.IntType(64))
_word_pointer = _pointer(types.int32, ir.IntType(32))


@njit(nogil=True, inline="always")
def _words(address, shape):
    return carray(_word_pointer(address), shape)


@njit(nogil=True, inline="always")
def _floats(address, shape):
    return carray(_float_pointer(address), shape)


@njit(nogil=True, inline="always")
def _wholes(address, shape):
    return carray(_whole_pointer(address), shape)


# Each has one chain: a product is summed in the same order whichever tile it falls into, so that of float32 and
# bfloat16 weights an answer's bits do not depend on what else is in the step.
_score, _row_two = _tile(1, 1, strides=4), _tile(1, 2, strides=4)
_row_three, _row_four = _tile(1, 3, strides=2), _tile(1, 4)
_rows_by_tokens = _tile(3, 4, strides=2)


@njit(nogil=True, error_model="numpy")
def _row_products(w, w_step, x, x_step, y, y_step, length, low, high, tokens, adds):
    """Rows low..high of a weight in rows with all tokens; addresses are those of row 0 and token 0."""
    ahead = w_step * 4 * max(1, AHEAD_BYTES // (length * 8))
    for start in range(0, tokens, TOKENS_AT_ONCE):
        count = min(tokens - start, TOKENS_AT_ONCE)
        xs, ys, fours, left = x + start * x_step * 4, y + start * y_step * 4, count // 4, count % 4
        row = low
        while fours and row < high:
            wr, whole = w + row * w_step * 4, row + 3 <= high
            for four in range(fours):
                xr, yr = xs + four * 4 * x_step * 4, ys + (row + four * 4 * y_step) * 4
                if whole:
                    _rows_by_tokens(wr, w_step, xr, x_step, yr, y_step, length, adds, 3 * w_step * 4)
                else:
                    _row_four(wr, w_step, xr, x_step, yr, y_step, length, adds, ahead)
            row += 3 if whole else 1
        xs, ys = xs + fours * 4 * x_step * 4, ys + fours * 4 * y_step * 4
        for row in range(low, high if left else low):
            wr, yr = w + row * w_step * 4, ys + row * 4
            if left == 1:
                _score(wr, w_step, xs, x_step, yr, y_step, length, adds, ahead)
            elif left == 2:
                _row_two(wr, w_step, xs, x_step, yr, y_step, length, adds, ahead)
            else:
                _row_three(wr, w_step, xs, x_step, yr, y_step, length, adds, ahead)


def _panel_products(kind: int) -> Any:
    """panel_products(w, scales, x, x_step, y, y_step, length, low, high, tokens, adds): rows low..high of a weight in
    panels with all tokens; `low` begins a panel. Addresses are those of row 0 and token 0."""
    size = np.int64(SIZES[kind])
    chains = (4, 2, 2) if kind == INT8 else (1, 1, 1)  # but for int8 the order of sums is one for all, as in rows
    one, two, three = (_panel_tile(kind, n + 1, chains[n]) for n in range(3))
    four, five, six = _panel_tile(kind, 4), _panel_tile(kind, 5), _panel_tile(kind, 6)

    @njit(nogil=True, error_model="numpy")
    def panel(w, scales, x, x_step, y, y_step, length, count, adds):
        """A panel with some tokens, in groups of about the same size."""
        groups = (count + GROUP - 1) // GROUP
        for start in range(0, length, COLUMNS_AT_ONCE):
            columns, gains = min(COLUMNS_AT_ONCE, length - start), adds or start > 0
            ws, token = w + start * PANEL * size, 0
            for group in range(groups):
                own = (count - token) // (groups - group)
                xs, ys = x + (token * x_step + start) * 4, y + token * y_step * 4
                if own == 6:
                    six(ws, scales, xs, x_step, ys, y_step, columns, gains)
                elif own == 5:
                    five(ws, scales, xs, x_step, ys, y_step, columns, gains)
                elif own == 4:
                    four(ws, scales, xs, x_step, ys, y_step, columns, gains)
                elif own == 3:
                    three(ws, scales, xs, x_step, ys, y_step, columns, gains)
                elif own == 2:
                    two(ws, scales, xs, x_step, ys, y_step, columns, gains)
                else:
                    one(ws, scales, xs, x_step, ys, y_step, columns, gains)
                token += own

    @njit(nogil=True, error_model="numpy")
    def panel_products(w, scales, x, x_step, y, y_step, length, low, high, tokens, adds):
        for start in range(0, tokens, TOKENS_AT_ONCE):
            count = min(tokens - start, TOKENS_AT_ONCE)
            xs, ys = x + start * x_step * 4, y + start * y_step * 4
            for row in range(low, high, PANEL):
                wr, sr = w + row * length * size, scales + row * 4
                if row + PANEL <= high:
                    panel(wr, sr, xs, x_step, ys + row * 4, y_step, length, count, adds)
                else:  # nothing may be written behind the last row
                    whole, some = np.empty((count, PANEL), dtype=np.float32), high - row
                    panel(wr, sr, xs, x_step, np.int64(whole.ctypes.data), PANEL, length, count, 0)
                    for n in range(count):
                        out = _floats(ys + (n * y_step + row) * 4, (some,))
                        for j in range(some):
                            out[j] = whole[n, j] + (out[j] if adds else np.float32(0.0))

    return panel_products


def _narrow_products(kind: int) -> Any:
    """narrow_products(w, x, x_step, y, y_step, length, rows, tokens): all rows of a weight in narrow panels."""
    size = np.int64(SIZES[kind])
    one, two, three = (_panel_tile(kind, n + 1, chains=2, narrow=True) for n in range(3))

    @njit(nogil=True, error_model="numpy")
    def narrow_products(w, x, x_step, y, y_step, length, rows, tokens):
        for row in range(0, rows, LANES):
            wr, token = w + row * length * size, 0
            while token < tokens:
                xs, ys, left = x + token * x_step * 4, y + (token * y_step + row) * 4, tokens - token
                if left == 1:
                    one(wr, 0, xs, x_step, ys, y_step, length // 2, 0)
                elif left == 2:
                    two(wr, 0, xs, x_step, ys, y_step, length // 2, 0)
                else:
                    three(wr, 0, xs, x_step, ys, y_step, length // 2, 0)
                token += 3

    return narrow_products


_narrow_bf16, _narrow_f32 = _narrow_products(BFLOAT16), _narrow_products(PANELS)
_nibbles_one, _nibbles_two, _nibbles_three = _nibble_tile(1, 2), _nibble_tile(2), _nibble_tile(3)
_nibbles_four, _nibbles_five, _nibbles_six = _nibble_tile(4), _nibble_tile(5), _nibble_tile(6)


@njit(nogil=True, error_model="numpy")
def _nibble_panel(w, totals, groups, x, x_step, y, y_step, length, count):
    """A panel of an int4 weight with some tokens, in parts of about the same size."""
    parts, token = (count + GROUP - 1) // GROUP, 0
    for part in range(parts):
        own = (count - token) // (parts - part)
        xs, ys, its = x + token * x_step * 4, y + token * y_step * 4, totals + token * groups * 4
        if own == 6:
            _nibbles_six(w, its, groups, xs, x_step, ys, y_step, length)
        elif own == 5:
            _nibbles_five(w, its, groups, xs, x_step, ys, y_step, length)
        elif own == 4:
            _nibbles_four(w, its, groups, xs, x_step, ys, y_step, length)
        elif own == 3:
            _nibbles_three(w, its, groups, xs, x_step, ys, y_step, length)
        elif own == 2:
            _nibbles_two(w, its, groups, xs, x_step, ys, y_step, length)
        else:
            _nibbles_one(w, its, groups, xs, x_step, ys, y_step, length)
        token += own


@njit(nogil=True, fastmath=True, error_model="numpy")
def _products_int4(w, scales, x, x_step, y, y_step, length, low, high, tokens, adds):
    """As those of `_panel_products`; scales lie with the numbers."""
    groups = (length + COLUMNS - 1) // COLUMNS
    totals, whole = np.empty((TOKENS_AT_ONCE, groups), np.float32), np.empty((TOKENS_AT_ONCE, PANEL), np.float32)
    for start in range(0, tokens, TOKENS_AT_ONCE):
        count = min(tokens - start, TOKENS_AT_ONCE)
        xs, ys = x + start * x_step * 4, y + start * y_step * 4
        for n in range(count):
            row = _floats(xs + n * x_step * 4, (length,))
            for group in range(groups):
                total = np.float32(0.0)
                for column in range(group * COLUMNS, min(length, (group + 1) * COLUMNS)):
                    total += row[column]
                totals[n, group] = total
        at = np.int64(totals.ctypes.data)
        for row in range(low, high, PANEL):
            wr, some = w + row // PANEL * groups * COLUMNS_BYTES, min(PANEL, high - row)
            if some == PANEL:
                if not adds:
                    for n in range(count):
                        _floats(ys + (n * y_step + row) * 4, (PANEL,))[:] = 0.0
                _nibble_panel(wr, at, groups, xs, x_step, ys + row * 4, y_step, length, count)
            else:  # nothing may be written behind the last row
                whole[:count] = 0.0
                _nibble_panel(wr, at, groups, xs, x_step, np.int64(whole.ctypes.data), PANEL, length, count)
                for n in range(count):
                    out = _floats(ys + (n * y_step + row) * 4, (some,))
                    for j in range(some):
                        out[j] = whole[n, j] + (out[j] if adds else np.float32(0.0))


_products_bf16, _products_int8, _products_f32 = (_panel_products(kind) for kind in (BFLOAT16, INT8, PANELS))


@cfunc(types.void(*[types.int64] * 13), error_model="numpy", cache=True)
def products(kind, w, w_step, scales, x, x_step, y, y_step, length, low, high, tokens, adds):
    """y_NO = x_NI W^T, or += where `adds`, for the rows low..high of a weight of any kind, by addresses (of scales only
    for INT8) and steps from one row to the next. Behind one address: the loops below call it, and are not compiled
    with it inside."""
    if kind == FLOAT32:
        _row_products(w, w_step, x, x_step, y, y_step, length, low, high, tokens, adds)
    elif kind == BFLOAT16:
        _products_bf16(w, scales, x, x_step, y, y_step, length, low, high, tokens, adds)
    elif kind == INT8:
        _products_int8(w, scales, x, x_step, y, y_step, length, low, high, tokens, adds)
    elif kind == INT4:
        _products_int4(w, scales, x, x_step, y, y_step, length, low, high, tokens, adds)
    else:
        _products_f32(w, scales, x, x_step, y, y_step, length, low, high, tokens, adds)


PRODUCT = np.dtype(
    [(name, np.int64) for name in (
        "tickets", "products", "kind", "w", "scales", "x", "y", "columns", "rows", "tokens", "each"
    )],
    align=True,
)  # fmt: skip
"""A product for `shared_product`, rows of the weight in pieces of `each`, whole panels; tickets: of pieces taken and
done."""


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


# --- where threads meet -----------------------------------------------------------------------------------------------


def _word(b: Any, address: Any) -> Any:
    return b.inttoptr(address, ir.PointerType(ir.IntType(64)))


@intrinsic
def _load(typing: Any, address: Any) -> Any:
    """What other threads wrote before they stored this word is seen after it."""
    return types.int64(types.int64), lambda context, b, signature, args: b.load_atomic(
        _word(b, args[0]), "acquire", 8, typ=ir.IntType(64)
    )


@intrinsic
def _store(typing: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        b.store_atomic(args[1], _word(b, args[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _add(typing: Any, address: Any, value: Any) -> Any:
    """The word as it was before."""
    return types.int64(types.int64, types.int64), lambda context, b, signature, args: b.atomic_rmw(
        "add", _word(b, args[0]), args[1], "seq_cst"
    )


@cfunc(types.void(types.CPointer(from_dtype(PRODUCT))), error_model="numpy", cache=True)
def shared_product(product):
    """A PRODUCT, by as many threads as call this (`ops.threads`)."""
    p = carray(product, 1)[0]
    low = _add(p.tickets, 1) * p.each
    while low < p.rows:
        high = min(p.rows, low + p.each)
        _call(p.products, (
            p.kind, p.w, p.columns, p.scales, p.x, p.columns, p.y, p.rows, p.columns, low, high, p.tokens, np.int64(0),
        ))  # fmt: skip
        _add(p.tickets + 8, 1)
        low = _add(p.tickets, 1) * p.each


@intrinsic
def _exchanged(typing: Any, address: Any, old: Any, new: Any) -> Any:
    """Whether the word was `old`, and is `new` now."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        found = b.cmpxchg(_word(b, args[0]), args[1], args[2], "seq_cst", "seq_cst")
        return b.extract_value(found, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def _pause(typing: Any) -> Any:
    """Tells the chip that this is a loop that waits, where it has a word for it."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if platform.machine() in ("x86_64", "AMD64"):
            b.call(b.module.declare_intrinsic("llvm.x86.sse2.pause", [], ir.FunctionType(ir.VoidType(), [])), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _foreign(typing: Any, function: Any, argument: Any) -> Any:
    """Calls a C function `int f(void *)` by its address."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(64)])
        return b.call(b.inttoptr(args[0], ir.PointerType(kind)), [args[1]])

    return types.int32(types.int64, types.int64), codegen


@njit(nogil=True, error_model="numpy")
def _ticket(p, phase, pieces):
    """A piece of this phase for the caller, -1 when the phase is over. Waits for those who still work on their pieces.

    Nothing of the plan but its constants may be used without a ticket in hand: a thread that comes late would read
    what is being written for the next step. A ticket is only given while its step lasts.
    """
    gate, looks = p.gate, 0
    while True:
        state: int = _load(gate + STATE)
        now, piece = state >> TICKET_BITS, state & ((1 << TICKET_BITS) - 1)
        if now > phase:
            return -1
        if now == phase and piece < pieces:
            if _exchanged(gate + STATE, state, state + 1):
                return piece
        else:
            looks += 1
            if looks < SPINS:
                _pause()
            else:
                _foreign(p.give_way, 0)


@njit(nogil=True, error_model="numpy")
def _done(p, phase, pieces):
    """A piece is done; with the last one the next phase begins."""
    if _add(p.gate + DONE, 1) == pieces - 1:
        _store(p.gate + DONE, 0)
        _store(p.gate + STATE, (phase + 1) << TICKET_BITS)


@njit(nogil=True, error_model="numpy")
def _pieces(threads, units, bytes_each):
    """How many units a piece has, and how many pieces there are."""
    each = max(1, PIECE_BYTES // bytes_each)
    if threads > 1:
        each = min(each, max(1, units // (PIECES_EACH * threads)))
    return each, (units + each - 1) // each


# --- what a step is made of -------------------------------------------------------------------------------------------


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


@njit(nogil=True, error_model="numpy")
def _product(p, kind, w, scales, x, length, y, y_step, low, high, start, count, adds):
    """Columns low..high of y_NO = x_NI W^T (or += where `adds`) for `count` tokens from `start` on; all by address."""
    x, y = x + start * length * 4, y + start * y_step * 4
    _call(p.products, (kind, w, length, scales, x, length, y, y_step, length, low, high, count, np.int64(adds)))


@njit(nogil=True, error_model="numpy")
def _of_group(p, layer, group):
    """Addresses of a weight and its scales."""
    shape = (p.layers, 4)
    return _wholes(p.weights, shape)[layer, group], _wholes(p.scales, shape)[layer, group]


@njit(nogil=True, fastmath=True, error_model="numpy")
def _norm(row, weight, eps, out):
    """RMS norm."""
    size = row.shape[0]
    total = np.float32(0.0)
    for j in range(size):
        total += row[j] * row[j]
    inverse = np.float32(1.0) / np.sqrt(total / np.float32(size) + eps)
    for j in range(size):
        out[j] = row[j] * inverse * weight[j]


@njit(nogil=True, error_model="numpy")
def _normed(p, thread, layer, which):
    """The address of this thread's own copy of all tokens, normed: that is cheaper than a meeting."""
    to = p.y + thread * p.tokens * p.dim * 4
    x, y = _floats(p.x, (p.tokens, p.dim)), _floats(to, (p.tokens, p.dim))
    weight = _floats(p.norms, (p.layers, 2, p.dim))[layer, which]
    for n in range(p.tokens):
        _norm(x[n], weight, p.eps, y[n])
    return to


@njit(nogil=True, error_model="numpy")
def _add_bias(y, bias, low, high, start, count):
    for n in range(start, start + count):
        row = y[n]
        for j in range(low, high):
            row[j] += bias[j]


@njit(nogil=True, fastmath=True, error_model="numpy")
def _turn(part, turns, pairs):
    """Rotates neighbours; `turns`: cosines, then sines."""
    for j in range(pairs):
        cosine, sine, a, b = turns[j], turns[pairs + j], part[2 * j], part[2 * j + 1]
        part[2 * j] = a * cosine - b * sine
        part[2 * j + 1] = a * sine + b * cosine


@njit(nogil=True, fastmath=True, error_model="numpy")
def _place(p, layer, low, high, start, some):
    """Bias, norm and rotation of the heads low..high of (queries, keys, values) in place, of `some` tokens from `start`
    on; keys and values go into the cache."""
    count, size, heads, kv_heads = p.tokens, p.head_dim, p.heads, p.kv_heads
    width = (heads + 2 * kv_heads) * size
    qkv, slots = _floats(p.qkv, (count, width)), _wholes(p.own_slots, (count,))
    kv = _floats(p.kv, (p.layers, 2, p.slots, kv_heads, size))
    turned = _wholes(p.turned, (p.layers,))[layer]
    turns = _floats(p.turns if turned else p.plain, (count, size))
    if p.qkv_bias:
        _add_bias(qkv, _floats(p.qkv_bias, (p.layers, width))[layer], low * size, high * size, start, some)
    for n in range(start, start + some):
        for head in range(low, high):
            part = qkv[n, head * size : (head + 1) * size]
            if head < heads + kv_heads:
                if p.qk_norms:
                    _norm(part, _floats(p.qk_norms, (p.layers, 2, size))[layer, np.int64(head >= heads)], p.eps, part)
                _turn(part, turns[n], size // 2)
            if head < heads:
                for j in range(size):
                    part[j] *= p.query_scale
            else:
                side, own = (head - heads) // kv_heads, (head - heads) % kv_heads
                kv[layer, side, slots[n], own] = part


def _mixture(rows: int, kind: int = FLOAT32, rows_a_line: int = 1) -> Any:
    """An intrinsic: mixture(to, shares, v, v_step, v_next, size, ahead): to_E gains the sum of `rows` vectors v_E of
    FLOAT32 or BFLOAT16, each times its share; asks for what lies `ahead` bytes behind them, once for so many rows that
    share a line of memory. In bytes, `v_step` leads from one to the next and `v_next` from their first 8 numbers to
    the next 8."""
    i64, i32, f32 = ir.IntType(64), ir.IntType(32), ir.FloatType()
    vector, words, halves = (ir.VectorType(kind_of, LANES) for kind_of in (f32, i32, ir.IntType(16)))

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        to, shares, v, v_step, v_next, size, ahead = args

        def number(value: int) -> Any:
            return ir.Constant(i64, value)

        def at(base: Any, offset: Any, kind_of: Any) -> Any:
            return b.inttoptr(b.add(base, offset), ir.PointerType(kind_of))

        def values_at(start: Any, offset: Any) -> Any:
            if kind == FLOAT32:
                return b.load(at(start, offset, vector), align=4)
            narrow = b.load(at(start, offset, halves), align=2)
            return b.bitcast(b.shl(b.zext(narrow, words), ir.Constant(words, [16] * LANES)), vector)

        weights = [_spread(b, b.load(at(shares, number(4 * m), f32), align=4)) for m in range(rows)]
        starts = [b.add(v, b.mul(v_step, number(m))) for m in range(rows)]
        with cgutils.for_range_slice(b, number(0), b.mul(size, number(4)), number(4 * LANES), i64) as (offset, eights):
            total = b.load(at(to, offset, vector), align=4)
            place = b.mul(eights, v_next)
            for row, (start, weight) in enumerate(zip(starts, weights, strict=True)):
                if row % rows_a_line == 0:
                    _ask_for(b, b.add(b.add(start, place), ahead))
                values = values_at(start, place)
                total = b.fadd(total, b.fmul(values, weight, flags=("contract",)), flags=("contract",))
            b.store(total, at(to, offset, vector), align=4)
        return context.get_dummy_value()

    @intrinsic
    def mixture(typing: Any, to: Any, shares: Any, v: Any, v_step: Any, v_next: Any, size: Any, ahead: Any) -> Any:
        return types.void(*[types.int64] * 7), codegen

    return mixture


_mix_one, _mix_four = _mixture(1), _mixture(4)
_mix_lanes, _mix_lanes_bf16 = _mixture(LANES, FLOAT32, 2), _mixture(LANES, BFLOAT16, 4)


@njit(nogil=True, error_model="numpy")
def _score_keys(p, at, count, low, high, queries, q_step, tokens, scores, keys):
    """Scores of `count` neighbouring keys, the first slot of which is at address `at`, for the heads low..high.

    `scores` is the address of the first key's in (high - low, G, tokens, keys); `queries` that of the first token's.
    """
    size, groups, step = p.head_dim, p.heads // p.kv_heads, p.kv_heads * p.head_dim
    if tokens > 1:
        for head in range(low, high):
            for g in range(groups):
                place, row = head * groups + g, (head - low) * groups + g
                _call(p.products, (
                    np.int64(FLOAT32), at + head * size * 4, step, at, queries + place * size * 4, q_step,
                    scores + row * tokens * keys * 4, keys, size, np.int64(0), count, tokens, np.int64(0),
                ))  # fmt: skip
        return
    for key in range(count):  # heads of a key lie side by side: memory is read in a line
        for head in range(low, high):
            k, place, row = at + (key * step + head * size) * 4, head * groups, (head - low) * groups
            for g in range(groups):
                to = scores + ((row + g) * keys + key) * 4
                _score(k, size, queries + (place + g) * size * 4, size, to, keys, size, 0, 2 * step * 4)


@njit(nogil=True, fastmath={"contract", "nsz", "reassoc", "arcp", "afn"}, error_model="numpy")
def _soften(row):
    """Softmax, in place."""
    most = row[0]
    for j in range(row.shape[0]):
        most = max(most, row[j])
    total = np.float32(0.0)
    for j in range(row.shape[0]):
        e = _exp(row[j] - most)
        row[j] = e
        total += e
    inverse = np.float32(1.0) / total
    for j in range(row.shape[0]):
        row[j] *= inverse


@njit(nogil=True, error_model="numpy")
def _hold(array):
    """Keeps the memory of an array until here. Numba frees it behind the last use of its name, and an address is none:
    what is read by address alone may be another thread's by then."""


@njit(nogil=True, error_model="numpy")
def _attend(p, layer, run, low, high):
    """The queries of the kv heads low..high, of some tokens of one sequence, over the keys they see: softmax(q k) v."""
    kv_heads, size, block, groups = p.kv_heads, p.head_dim, p.block_size, p.heads // p.kv_heads
    runs, positions = _wholes(p.runs, (p.run_count, 2)), _wholes(p.positions, (p.tokens,))
    start, count = runs[run, 0], runs[run, 1]
    window = _wholes(p.windows, (p.layers,))[layer]
    last = positions[start] + count
    first = max(0, positions[start] + 1 - window) if window else 0
    keys = last - first
    table = _wholes(p.tables, (_wholes(p.of_row, (p.tokens,))[start] + 1, p.blocks))[-1]
    width, step = (p.heads + 2 * kv_heads) * size, kv_heads * size
    cached = p.kv + layer * 2 * p.slots * step * 4
    rows = (high - low) * groups * count
    scores = np.empty((rows, keys), dtype=np.float32)
    scores_at = np.int64(scores.ctypes.data)
    t = first
    while t < last:
        until = min(last, (t // block + 1) * block)
        at = cached + (table[t // block] * block + t % block) * step * 4
        _score_keys(
            p, at, until - t, low, high, p.qkv + start * width * 4, width, count, scores_at + (t - first) * 4, keys
        )  # fmt: skip
        t = until
    for row in range(rows):
        end = positions[start] + row % count + 1
        begin = max(first, end - window) if window else first
        scores[row, : begin - first] = 0.0
        scores[row, end - first :] = 0.0
        _soften(scores[row, begin - first : end - first])
    for i in range(count):
        _floats(p.mixed, (p.tokens, p.heads * size))[start + i, low * groups * size : high * groups * size] = 0.0
    t = first
    while t < last:
        until = min(last, (t // block + 1) * block)
        at = cached + (p.slots + table[t // block] * block + t % block) * step * 4
        while t < until:
            four = t + 4 <= until
            for row in range(rows):
                head = low * groups + row // count
                to = p.mixed + ((start + row % count) * p.heads + head) * size * 4
                shares, v = scores_at + (row * keys + t - first) * 4, at + head // groups * size * 4
                if four:
                    _mix_four(to, shares, v, step * 4, LANES * 4, size, 4 * step * 4)
                else:
                    _mix_one(to, shares, v, step * 4, LANES * 4, size, step * 4)
            t, at = t + (4 if four else 1), at + (4 if four else 1) * step * 4
    _hold(scores)


@njit(nogil=True, fastmath={"contract", "nsz", "arcp"}, error_model="numpy")
def _gate(gate_up, act, low, high, start, count):
    """Columns low..high of act = silu(gate) * up, for `count` tokens from `start` on."""
    size = act.shape[1]
    for n in range(start, start + count):
        gate, up, to = gate_up[n, low:high], gate_up[n, size + low : size + high], act[n, low:high]
        for j in range(high - low):
            g = gate[j]
            to[j] = g / (np.float32(1.0) + _exp(-g)) * up[j]


@njit(nogil=True, error_model="numpy")
def _pair(p, layer, group, segment):
    """What there is to know of the change that a segment's adapter makes to a layer."""
    pairs = _wholes(p.segments, (p.segment_count, 3))[segment, 2]
    return _wholes(pairs + (layer * 4 + group) * PAIRS * 8, (PAIRS,))


@njit(nogil=True, error_model="numpy")
def _change(p, layer, group, y, width, low, high, start, count):
    """Columns low..high of y, (N, width), gain what adapters add to them: B times the tokens' `inner`. Of `count`
    tokens from `start` on."""
    segments = _wholes(p.segments, (p.segment_count, 3))
    for segment in range(p.segment_count):
        first, last = max(start, segments[segment, 0]), min(start + count, segments[segment, 0] + segments[segment, 1])
        if first >= last:
            continue
        pair = _pair(p, layer, group, segment)
        for number in range(PARTS):
            part = pair[PART + 5 * number : PART + 5 * (number + 1)]
            left, right = max(low, part[FIRST]), min(high, part[LAST])
            if not part[RANK] or left >= right:
                continue
            step = LANES * (2 if p.adapter_kind == BFLOAT16 else 4)
            ahead = _pair(p, layer, group, min(segment + 1, p.segment_count - 1))[PART + 5 * number + B] - part[B]
            for token in range(first, last):
                to, ranks = y + (token * width + left) * 4, p.inner + (token * p.inner_width + part[AT]) * 4
                b, b_next = part[B] + (left - part[FIRST]) // LANES * part[RANK] * step, part[RANK] * step
                for _ in range(0, part[RANK], LANES):
                    if p.adapter_kind == BFLOAT16:
                        _mix_lanes_bf16(to, ranks, b, step, b_next, right - left, ahead)
                    else:
                        _mix_lanes(to, ranks, b, step, b_next, right - left, ahead)
                    ranks, b = ranks + LANES * 4, b + LANES * step


@njit(nogil=True, fastmath={"contract", "nsz", "reassoc"}, error_model="numpy")
def _look_through(logits, low, high, sampled, best, found):
    """Of each row's logits low..high: best (R,) and found (R, 3) so far, as the plan describes them."""
    for r in range(logits.shape[0]):
        row = logits[r, low:high]
        most = np.float32(-np.inf)
        for j in range(row.shape[0]):
            most = max(most, row[j])
        end = min(high, sampled) - low
        top = most
        if end < row.shape[0]:
            top = np.float32(-np.inf)
            for j in range(end):
                top = max(top, row[j])
        if top > found[r, 0]:
            found[r, 0] = top
            for j in range(end):
                if row[j] == top:
                    best[r] = low + j
                    break
        most = max(most, found[r, 1])
        total, broken = np.float32(0.0), np.float32(0.0)
        for j in range(row.shape[0]):
            total += _exp(row[j] - most)
            broken += row[j] * np.float32(0.0)  # stays 0 unless a logit is no finite number
        found[r, 2] = found[r, 2] * _exp(found[r, 1] - most) + total + broken
        found[r, 1] = most


# --- the phases of a step ---------------------------------------------------------------------------------------------


@njit(nogil=True, error_model="numpy")
def _read_by_adapters(p, thread, layer, group, source, length, phase):
    """`inner`: A x of the layer's inputs, segment by segment. `source` is the address of x; 0: its norm is to be taken
    first. Returns the address of x, 0 if this thread did not need it."""
    pieces = p.segment_count
    piece = _ticket(p, phase, pieces)
    x = source
    while piece >= 0:
        if not x:
            x = _normed(p, thread, layer, np.int64(group == GATE_UP))
        pair, width = _pair(p, layer, group, piece), p.inner_width
        start, count, _ = _wholes(p.segments, (pieces, 3))[piece]
        xs, inner = x + start * length * 4, p.inner + start * width * 4
        if p.adapter_kind == BFLOAT16:
            _narrow_bf16(pair[A], xs, length, inner, width, length, pair[INNER], count)
        else:
            _narrow_f32(pair[A], xs, length, inner, width, length, pair[INNER], count)
        _done(p, phase, pieces)
        piece = _ticket(p, phase, pieces)
    return x


@njit(nogil=True, error_model="numpy")
def _make_heads(p, thread, layer, x, phase):
    """Queries, keys and values of the normed tokens, head by head, ready for attention. `x`: where they are normed, 0
    for nowhere."""
    heads, some = p.heads + 2 * p.kv_heads, p.heads_at_once
    each, pieces = _pieces(p.threads, (heads + some - 1) // some, some * p.head_dim * p.dim * 2)
    piece = _ticket(p, phase, pieces)
    while piece >= 0:
        if not x:
            x = _normed(p, thread, layer, 0)
        low, high = piece * each * some, min(heads, (piece + 1) * each * some)
        w, scales = _of_group(p, layer, QKV)
        first, last, width = low * p.head_dim, high * p.head_dim, heads * p.head_dim
        for start in range(0, p.tokens, TOKENS_AT_ONCE):  # what was made is placed while it is in the cache
            count = min(TOKENS_AT_ONCE, p.tokens - start)
            _product(p, p.kind, w, scales, x, p.dim, p.qkv, width, first, last, start, count, 0)
            _change(p, layer, QKV, p.qkv, width, first, last, start, count)
            _place(p, layer, low, high, start, count)
        _done(p, phase, pieces)
        piece = _ticket(p, phase, pieces)


@njit(nogil=True, error_model="numpy")
def _look_back(p, layer, phase):
    """Attention of every run of tokens; where these are few, by parts of the heads."""
    each = min(p.kv_heads, max(1, p.kv_heads * p.run_count // (2 * p.threads)))
    parts = (p.kv_heads + each - 1) // each
    pieces = p.run_count * parts
    piece = _ticket(p, phase, pieces)
    while piece >= 0:
        low = piece % parts * each
        _attend(p, layer, piece // parts, low, min(p.kv_heads, low + each))
        _done(p, phase, pieces)
        piece = _ticket(p, phase, pieces)


@njit(nogil=True, error_model="numpy")
def _add_to_x(p, layer, group, source, length, bias, phase):
    """x += W source + bias: what attention and the MLP give back."""
    some = p.rows_at_once
    each, pieces = _pieces(p.threads, (p.dim + some - 1) // some, some * length * 2)
    piece = _ticket(p, phase, pieces)
    while piece >= 0:
        low, high = piece * each * some, min(p.dim, (piece + 1) * each * some)
        w, scales = _of_group(p, layer, group)
        _product(p, p.kind, w, scales, source, length, p.x, p.dim, low, high, 0, p.tokens, 1)
        _change(p, layer, group, p.x, p.dim, low, high, 0, p.tokens)
        if bias:
            _add_bias(
                _floats(p.x, (p.tokens, p.dim)), _floats(bias, (p.layers, p.dim))[layer], low, high, 0, p.tokens
            )  # fmt: skip
        _done(p, phase, pieces)
        piece = _ticket(p, phase, pieces)


@njit(nogil=True, error_model="numpy")
def _open_gates(p, thread, layer, x, phase):
    """silu(gate) * up of the normed tokens. `x`: where they are normed, 0 for nowhere."""
    ffn, some = p.ffn, p.rows_at_once
    each, pieces = _pieces(p.threads, (ffn + some - 1) // some, some * p.dim * 4)
    piece = _ticket(p, phase, pieces)
    while piece >= 0:
        if not x:
            x = _normed(p, thread, layer, 1)
        low, high = piece * each * some, min(ffn, (piece + 1) * each * some)
        w, scales = _of_group(p, layer, GATE_UP)
        gate_up = _floats(p.gate_up, (p.tokens, 2 * ffn))
        for start in range(0, p.tokens, TOKENS_AT_ONCE):
            count = min(TOKENS_AT_ONCE, p.tokens - start)
            for side in range(2):
                first, last = side * ffn + low, side * ffn + high
                _product(p, p.kind, w, scales, x, p.dim, p.gate_up, 2 * ffn, first, last, start, count, 0)
                _change(p, layer, GATE_UP, p.gate_up, 2 * ffn, first, last, start, count)
                if p.mlp_bias:
                    _add_bias(gate_up, _floats(p.mlp_bias, (p.layers, 2 * ffn))[layer], first, last, start, count)
            _gate(gate_up, _floats(p.act, (p.tokens, ffn)), low, high, start, count)
        _done(p, phase, pieces)
        piece = _ticket(p, phase, pieces)


@njit(nogil=True, error_model="numpy")
def _make_logits(p, thread, phase):
    """Logits of the tokens that want some, and what is to be known of them."""
    pieces, piece, y = p.head_pieces, _ticket(p, phase, p.head_pieces), np.int64(0)
    while piece >= 0:
        rows = p.ready_count
        if not y:
            y = p.y + thread * p.tokens * p.dim * 4
            x, hidden = _floats(p.x, (p.tokens, p.dim)), _floats(y, (rows, p.dim))
            ready, weight = _wholes(p.ready, (rows,)), _floats(p.last_norm, (p.dim,))
            for r in range(rows):
                _norm(x[ready[r]], weight, p.eps, hidden[r])
        each = ((p.vocab + pieces - 1) // pieces + HEAD_ROWS - 1) // HEAD_ROWS * HEAD_ROWS
        best, found = _wholes(p.best, (pieces, rows))[piece], _floats(p.found, (pieces, rows, 3))[piece]
        best[:] = 0
        found[:, :2] = -np.inf
        found[:, 2] = 0.0
        end = min(p.vocab, (piece + 1) * each)
        for low in range(piece * each, end, HEAD_ROWS):
            high = min(end, low + HEAD_ROWS)
            _product(p, p.head_kind, p.head, p.head_scales, y, p.dim, p.logits, p.vocab, low, high, 0, rows, 0)
            _look_through(_floats(p.logits, (rows, p.vocab)), low, high, p.sampled, best, found)
        _done(p, phase, pieces)
        piece = _ticket(p, phase, pieces)


@njit(nogil=True, error_model="numpy")
def _compare_pieces(p):
    """What the pieces of the head found, joined in the first."""
    logs = _floats(p.logs, (2, p.ready_count))
    best, found = _wholes(p.best, (p.head_pieces, p.ready_count)), _floats(p.found, (p.head_pieces, p.ready_count, 3))
    for r in range(p.ready_count):
        for piece in range(1, p.head_pieces):
            ours, other = found[0, r], found[piece, r]
            if other[0] > ours[0]:
                ours[0], best[0, r] = other[0], best[piece, r]
            if other[2] != 0.0:  # not one that had no rows
                most = max(ours[1], other[1])
                ours[2] = ours[2] * np.exp(ours[1] - most) + other[2] * np.exp(other[1] - most)
                ours[1] = most
        logs[1, r] = found[0, r, 1] + np.log(found[0, r, 2])
        logs[0, r] = found[0, r, 0] - logs[1, r]


@njit(nogil=True, error_model="numpy")
def _lay_out(p):
    """What the step's tokens are and where they stand, from what is said of its sequences."""
    shape = (p.sequences,)
    rows, starts, counts = _wholes(p.rows, shape), _wholes(p.starts, shape), _wholes(p.counts, shape)
    token, run = 0, 0
    for s in range(p.sequences):
        for i in range(counts[s]):
            _lay_out_token(p, token, rows[s], starts[s] + i)
            if i % RUN == 0:
                place = _wholes(p.runs + run * 16, (2,))
                place[0], place[1] = token, min(RUN, counts[s] - i)
                run += 1
            token += 1
    p.run_count = run


@njit(nogil=True, error_model="numpy")
def _lay_out_token(p, token, row, position):
    """A token of a sequence in `row` of the tables."""
    block = _wholes(p.tables + row * p.blocks * 8, (p.blocks,))[position // p.block_size]
    _wholes(p.positions, (p.tokens,))[token] = position
    _wholes(p.of_row, (p.tokens,))[token] = row
    _wholes(p.own_slots, (p.tokens,))[token] = block * p.block_size + position % p.block_size
    _embed(p, _wholes(p.ids, (p.tokens,))[token], _floats(p.x + token * p.dim * 4, (p.dim,)))
    turn = _floats(p.all_turns + position * p.head_dim * 4, (p.head_dim,))
    to = _floats(p.turns + token * p.head_dim * 4, (p.head_dim,))
    for j in range(p.head_dim):
        to[j] = turn[j]


@njit(nogil=True, error_model="numpy")
def _embed(p, number, x):
    """x (D,) becomes a token's row of the embeddings."""
    size, place = p.dim, number % PANEL
    if p.embed_kind == FLOAT32:
        row = _floats(p.embeddings + number * size * 4, (size,))
        for j in range(size):
            x[j] = row[j] * p.embed_scale
    elif p.embed_kind == BFLOAT16:  # rows r and r + 8 of a panel are the halves of a word
        words = _words(p.embeddings + number // PANEL * size * PANEL * 2, (size, PANEL // 2))
        to_left = 0 if place >= PANEL // 2 else 16
        for j in range(size):
            bits = np.int32(words[j, place % (PANEL // 2)] << to_left) & np.int32(-1 << 16)
            x[j] = _float_of_bits(np.int32(bits)) * p.embed_scale
    else:
        words = _words(p.embeddings + number // PANEL * size * PANEL, (size, PANEL // 4))
        scale, to_left = _floats(p.embed_scales + number * 4, (1,))[0], 24 - 8 * (place % 4)
        for j in range(size):
            whole = np.int32(words[j, place // 4] << to_left) >> 24
            x[j] = np.float32(whole) * scale * p.embed_scale


@njit(nogil=True, error_model="numpy")
def _work(p, thread):
    """All phases of the step that is under way."""
    phase = _load(p.gate + STEP) << PHASE_BITS  # before all else: what the plan says was written before this number
    adapted, rows, mixed = p.segment_count > 0, p.ready_count, p.heads * p.head_dim
    x = np.int64(0)
    for layer in range(p.layers):
        if adapted:
            x = _read_by_adapters(p, thread, layer, QKV, 0, p.dim, phase)
            phase += 1
        _make_heads(p, thread, layer, x, phase)
        _look_back(p, layer, phase + 1)
        phase += 2
        if adapted:
            _read_by_adapters(p, thread, layer, OUT, p.mixed, mixed, phase)
            phase += 1
        _add_to_x(p, layer, OUT, p.mixed, mixed, p.out_bias, phase)
        phase += 1
        if adapted:
            x = _read_by_adapters(p, thread, layer, GATE_UP, 0, p.dim, phase)
            phase += 1
        _open_gates(p, thread, layer, x, phase)
        phase += 1
        if adapted:
            _read_by_adapters(p, thread, layer, DOWN, p.act, p.ffn, phase)
            phase += 1
        _add_to_x(p, layer, DOWN, p.act, p.ffn, p.down_bias, phase)
        phase += 1
    if rows:
        _make_logits(p, thread, phase)


@njit(nogil=True, error_model="numpy")
def _enter(p, door):
    """Waits until a step wants help: for a moment awake, then asleep."""
    for _ in range(SPINS):
        if _foreign(p.try_wait, door) == 0:
            return
        _pause()
    while _foreign(p.wait, door) != 0:
        pass


@njit(nogil=True, error_model="numpy", cache=True)
def decoder_step(plan, thread):
    """Thread 0 computes the step that `plan` (one PLAN) describes, with whoever comes to help. The others help with
    every step until `stop` is set."""
    p = plan[0]
    while not p.stop:
        if thread:
            _enter(p, p.doors + thread * DOOR_BYTES)
            if p.stop:
                return
        else:
            _lay_out(p)
            step = _load(p.gate + STEP) + 1
            _store(p.gate + STEP, step)
            _store(p.gate + STATE, (step << PHASE_BITS) << TICKET_BITS)
            for helper in range(1, p.threads):
                _foreign(p.post, p.doors + helper * DOOR_BYTES)
        _work(p, thread)
        if not thread:
            closed = (step << PHASE_BITS) + (1 << PHASE_BITS) - 1  # no helper that is late finds a phase to work on
            _store(p.gate + STATE, closed << TICKET_BITS)
            _compare_pieces(p)
            return
