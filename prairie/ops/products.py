"""Products of a few tokens with a weight of any form, y_NO = x_NI W^T, as compiled loops over micro-kernels.

torch's product of a few rows with a weight reads memory at a quarter of what this chip can. numba compiles these loops
on the user's machine without a compiler.
Not here: the tiles of sums (`ops.micro_kernels`), threads (`ops.threads`), a whole step (`ops.decoder`).

Legend: N tokens, I input columns, O output rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.extending import intrinsic

from prairie.ops.addresses import add_to_word, floats_at
from prairie.ops.kernel_cache import revision
from prairie.ops.micro_kernels import AHEAD_BYTES, dot_tile, nibble_tile, panel_tile
from prairie.ops.weight_forms import (
    BFLOAT16,
    COLUMNS,
    COLUMNS_BYTES,
    FLOAT32,
    INT4,
    INT8,
    LANES,
    PANEL,
    PANELS,
    SIZES,
)

TOKENS_AT_ONCE = 48
"""Tokens whose inputs stay in the second cache while all rows of a weight pass by."""
COLUMNS_AT_ONCE = 512
"""Of a panel: they stay in the first cache while a block of tokens passes by."""
GROUP = 6
"""Tokens, at most, that are multiplied with a panel at once: 12 sums, 2 vectors of the panel, a number of an input and
a mask fill 16 registers."""

# Each has one chain: a product is summed in the same order whichever tile it falls into, so that of float32 and
# bfloat16 weights an answer's bits do not depend on what else is in the step.
score_one, _row_two = dot_tile(1, 1, strides=4), dot_tile(1, 2, strides=4)
_row_three, _row_four = dot_tile(1, 3, strides=2), dot_tile(1, 4)
_rows_by_tokens = dot_tile(3, 4, strides=2)


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
                score_one(wr, w_step, xs, x_step, yr, y_step, length, adds, ahead)
            elif left == 2:
                _row_two(wr, w_step, xs, x_step, yr, y_step, length, adds, ahead)
            else:
                _row_three(wr, w_step, xs, x_step, yr, y_step, length, adds, ahead)


def _of_some_tokens(tiles: Any) -> Any:
    """of_some_tokens(tokens, ...): calls the tile for so many tokens, 1 to `GROUP` of them, with all that it takes."""
    one, two, three, four, five, six = tiles

    @njit(nogil=True, error_model="numpy")
    def of_some_tokens(tokens, *given):
        if tokens == 6:
            six(*given)
        elif tokens == 5:
            five(*given)
        elif tokens == 4:
            four(*given)
        elif tokens == 3:
            three(*given)
        elif tokens == 2:
            two(*given)
        else:
            one(*given)

    return of_some_tokens


def _panel_products(kind: int) -> Any:
    """panel_products(w, scales, x, x_step, y, y_step, length, low, high, tokens, adds): rows low..high of a weight in
    panels with all tokens; `low` begins a panel. Addresses are those of row 0 and token 0."""
    size = np.int64(SIZES[kind])
    # But for int8 the order of sums is one for all, as in rows.
    chains = (4, 2, 2, 1, 1, 1) if kind == INT8 else (1,) * GROUP
    tile = _of_some_tokens([panel_tile(kind, n + 1, chains[n]) for n in range(GROUP)])

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
                tile(own, ws, scales, xs, x_step, ys, y_step, columns, gains)
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
                        out = floats_at(ys + (n * y_step + row) * 4, (some,))
                        for j in range(some):
                            out[j] = whole[n, j] + (out[j] if adds else np.float32(0.0))

    return panel_products


def _narrow_products(kind: int) -> Any:
    """narrow_products(w, x, x_step, y, y_step, length, rows, tokens): all rows of a weight in narrow panels."""
    size = np.int64(SIZES[kind])
    one, two, three = (panel_tile(kind, n + 1, chains=2, narrow=True) for n in range(3))

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


narrow_bf16, narrow_f32 = _narrow_products(BFLOAT16), _narrow_products(PANELS)
_nibbles = _of_some_tokens([nibble_tile(n + 1, 1 if n else 2) for n in range(GROUP)])


@njit(nogil=True, error_model="numpy")
def _nibble_panel(w, totals, groups, x, x_step, y, y_step, length, count):
    """A panel of an int4 weight with some tokens, in parts of about the same size."""
    parts, token = (count + GROUP - 1) // GROUP, 0
    for part in range(parts):
        own = (count - token) // (parts - part)
        xs, ys, its = x + token * x_step * 4, y + token * y_step * 4, totals + token * groups * 4
        _nibbles(own, w, its, groups, xs, x_step, ys, y_step, length)
        token += own


@njit(nogil=True, fastmath=True, error_model="numpy", forceinline=True)
def _products_int4(w, scales, x, x_step, y, y_step, length, low, high, tokens, adds):
    """As those of `_panel_products`; scales lie with the numbers."""
    groups = (length + COLUMNS - 1) // COLUMNS
    totals, whole = np.empty((TOKENS_AT_ONCE, groups), np.float32), np.empty((TOKENS_AT_ONCE, PANEL), np.float32)
    for start in range(0, tokens, TOKENS_AT_ONCE):
        count = min(tokens - start, TOKENS_AT_ONCE)
        xs, ys = x + start * x_step * 4, y + start * y_step * 4
        for n in range(count):
            row = floats_at(xs + n * x_step * 4, (length,))
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
                        floats_at(ys + (n * y_step + row) * 4, (PANEL,))[:] = 0.0
                _nibble_panel(wr, at, groups, xs, x_step, ys + row * 4, y_step, length, count)
            else:  # nothing may be written behind the last row
                whole[:count] = 0.0
                _nibble_panel(wr, at, groups, xs, x_step, np.int64(whole.ctypes.data), PANEL, length, count)
                for n in range(count):
                    out = floats_at(ys + (n * y_step + row) * 4, (some,))
                    for j in range(some):
                        out[j] = whole[n, j] + (out[j] if adds else np.float32(0.0))


_products_bf16, _products_int8, _products_f32 = (_panel_products(kind) for kind in (BFLOAT16, INT8, PANELS))


def _products(made_of: int) -> Any:
    @cfunc(types.void(*[types.int64] * 13), error_model="numpy", cache=True)
    def products(kind, w, w_step, scales, x, x_step, y, y_step, length, low, high, tokens, adds):
        """y_NO = x_NI W^T, or += where `adds`, for the rows low..high of a weight of any kind, by addresses (of scales
        only for INT8) and steps from one row to the next. Behind one address: other loops call it, and are not compiled
        with it inside."""
        if made_of < 0:  # never: what is closed over says when this is stale (`ops.kernel_cache`)
            return
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

    return products


products = _products(revision("products", "micro_kernels", "weight_forms", "addresses"))


PRODUCT = np.dtype(
    [(name, np.int64) for name in (
        "tickets", "products", "kind", "w", "scales", "x", "y", "columns", "rows", "tokens", "each"
    )],
    align=True,
)  # fmt: skip
"""A product for `shared_product`, rows of the weight in pieces of `each`, whole panels; tickets: of pieces taken and
done."""


@intrinsic
def call_products(typing: Any, address: Any, numbers: Any) -> Any:
    """Calls `products` by its address with a tuple of 13 whole numbers."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        i64 = ir.IntType(64)
        kind_of = ir.FunctionType(ir.VoidType(), [i64] * 13)
        given = [b.extract_value(args[1], i) for i in range(13)]
        b.call(b.inttoptr(args[0], ir.PointerType(kind_of)), given)
        return context.get_dummy_value()

    return types.void(types.int64, types.UniTuple(types.int64, 13)), codegen


def _shared_product(made_of: int) -> Any:
    @cfunc(types.void(types.CPointer(from_dtype(PRODUCT))), error_model="numpy", cache=True)
    def shared_product(product):
        """A PRODUCT, by as many threads as call this (`ops.threads`)."""
        if made_of < 0:  # never: what is closed over says when this is stale (`ops.kernel_cache`)
            return
        p = carray(product, 1)[0]
        low = add_to_word(p.tickets, 1) * p.each
        while low < p.rows:
            high = min(p.rows, low + p.each)
            call_products(p.products, (
                p.kind, p.w, p.columns, p.scales, p.x, p.columns, p.y, p.rows, p.columns, low, high, p.tokens,
                np.int64(0),
            ))  # fmt: skip
            add_to_word(p.tickets + 8, 1)
            low = add_to_word(p.tickets, 1) * p.each

    return shared_product


shared_product = _shared_product(revision("products", "addresses"))
