"""Attention of a step over the paged cache: runs of tokens of one sequence over the keys they see, where these lie.

Legend: as in `ops.decoder`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from prairie.ops.addresses import exp_f32, floats_at, hold, wholes_at
from prairie.ops.micro_kernels import mixture_tile
from prairie.ops.products import call_products, score_one
from prairie.ops.weight_forms import FLOAT32, LANES

_mix_one, _mix_four = mixture_tile(1), mixture_tile(4)


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
                call_products(p.products, (
                    np.int64(FLOAT32), at + head * size * 4, step, at, queries + place * size * 4, q_step,
                    scores + row * tokens * keys * 4, keys, size, np.int64(0), count, tokens, np.int64(0),
                ))  # fmt: skip
        return
    for key in range(count):  # heads of a key lie side by side: memory is read in a line
        for head in range(low, high):
            k, place, row = at + (key * step + head * size) * 4, head * groups, (head - low) * groups
            for g in range(groups):
                to = scores + ((row + g) * keys + key) * 4
                score_one(k, size, queries + (place + g) * size * 4, size, to, keys, size, 0, 2 * step * 4)


@njit(nogil=True, fastmath={"contract", "nsz", "reassoc", "arcp", "afn"}, error_model="numpy", forceinline=True)
def _soften(row):
    """Softmax, in place."""
    most = row[0]
    for j in range(row.shape[0]):
        most = max(most, row[j])
    total = np.float32(0.0)
    for j in range(row.shape[0]):
        e = exp_f32(row[j] - most)
        row[j] = e
        total += e
    inverse = np.float32(1.0) / total
    for j in range(row.shape[0]):
        row[j] *= inverse


@njit(nogil=True, error_model="numpy")
def attend(p, layer, run, low, high):
    """The queries of the kv heads low..high, of some tokens of one sequence, over the keys they see: softmax(q k) v."""
    kv_heads, size, block, groups = p.kv_heads, p.head_dim, p.block_size, p.heads // p.kv_heads
    runs, positions = wholes_at(p.runs, (p.run_count, 2)), wholes_at(p.positions, (p.tokens,))
    start, count = runs[run, 0], runs[run, 1]
    window = wholes_at(p.windows, (p.layers,))[layer]
    last = positions[start] + count
    first = max(0, positions[start] + 1 - window) if window else 0
    keys = last - first
    table = wholes_at(p.tables, (wholes_at(p.of_row, (p.tokens,))[start] + 1, p.blocks))[-1]
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
        floats_at(p.mixed, (p.tokens, p.heads * size))[start + i, low * groups * size : high * groups * size] = 0.0
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
    hold(scores)
