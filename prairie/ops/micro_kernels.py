"""Micro-kernels: sums of products that are kept in registers, written in LLVM's own terms because no vectoriser finds
them. 6 tokens with 16 rows of a weight in panels, 3 x 4 dot products where rows lie as they are (float32 weights,
keys), and sums of vectors by shares.

Weights are float32, bfloat16, int8 with a scale a row, or int4 with a scale and a least value for every 32 columns of a
row; all arithmetic is float32. Each function here makes one intrinsic for numba's loops.
Not here: the loops over all rows and tokens (`ops.products`), how panels are laid (`ops.packed`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from prairie.ops.weight_forms import BFLOAT16, COLUMNS, COLUMNS_BYTES, FLOAT32, INT8, LANES, PANEL, SIZES

AHEAD_BYTES = 2048
"""How far ahead of a product its weight is asked for."""


def dot_tile(rows: int, tokens: int, chains: int = 1, strides: int = 1) -> Any:
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


def panel_tile(kind: int, tokens: int, chains: int = 1, narrow: bool = False) -> Any:
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


def nibble_tile(tokens: int, chains: int = 1) -> Any:
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


def mixture_tile(rows: int, kind: int = FLOAT32, rows_a_line: int = 1) -> Any:
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
