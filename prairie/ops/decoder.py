"""A whole step of a decoder as one compiled function: all layers, all tokens, keys and values in the paged cache.

Each of torch's operators costs microseconds of Python: a step of a small model is spent there. All arithmetic is
float32, whatever the form of the weights (`ops.micro_kernels`).
Not here: products (`ops.products`), attention (`ops.paged_attention`), what a step is told (`ops.decoder_plan`), where
threads meet (`ops.phases`), which models can be computed so and who calls it (`engine.compiled`), torch's form, which
is the reference (`models.transformer`).

Legend: N tokens of the step, D width, H query heads, K kv heads, G = H / K, E size of a head, F width of the MLP,
L layers, V vocabulary, T threads, R rows that want logits, S segments: neighbouring tokens that share an adapter, M
runs of tokens of one sequence.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from prairie.ops.addresses import (
    call_c,
    exp_f32,
    float_of_bits,
    floats_at,
    load_word,
    store_word,
    wholes_at,
    words_at,
)  # fmt: skip
from prairie.ops.decoder_plan import (
    AT,
    DOOR_BYTES,
    DOWN,
    FIRST,
    GATE_UP,
    INNER,
    LAST,
    OUT,
    PAIRS,
    PART,
    PARTS,
    PHASE_BITS,
    QKV,
    RANK,
    STATE,
    STEP,
    TICKET_BITS,
    A,
    B,
)
from prairie.ops.kernel_cache import revision
from prairie.ops.micro_kernels import mixture_tile
from prairie.ops.paged_attention import attend
from prairie.ops.phases import piece_done, pieces_of, take_piece, wait_for_step
from prairie.ops.products import TOKENS_AT_ONCE, call_products, narrow_bf16, narrow_f32
from prairie.ops.weight_forms import BFLOAT16, FLOAT32, LANES, PANEL

HEAD_ROWS = 96
"""Rows of the head whose logits are looked through while they are in the first cache."""
RUN = 8
"""Tokens of one sequence, at most, that look back together."""


_mix_lanes, _mix_lanes_bf16 = mixture_tile(LANES, FLOAT32, 2), mixture_tile(LANES, BFLOAT16, 4)


@njit(nogil=True, error_model="numpy")
def _product(p, kind, w, scales, x, length, y, y_step, low, high, start, count, adds):
    """Columns low..high of y_NO = x_NI W^T (or += where `adds`) for `count` tokens from `start` on; all by address."""
    x, y = x + start * length * 4, y + start * y_step * 4
    call_products(p.products, (kind, w, length, scales, x, length, y, y_step, length, low, high, count, np.int64(adds)))


@njit(nogil=True, error_model="numpy")
def _of_group(p, layer, group):
    """Addresses of a weight and its scales."""
    shape = (p.layers, 4)
    return wholes_at(p.weights, shape)[layer, group], wholes_at(p.scales, shape)[layer, group]


@njit(nogil=True, fastmath=True, error_model="numpy", forceinline=True)
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
    x, y = floats_at(p.x, (p.tokens, p.dim)), floats_at(to, (p.tokens, p.dim))
    weight = floats_at(p.norms, (p.layers, 2, p.dim))[layer, which]
    for n in range(p.tokens):
        _norm(x[n], weight, p.eps, y[n])
    return to


@njit(nogil=True, error_model="numpy")
def _add_bias(y, bias, low, high, start, count):
    for n in range(start, start + count):
        row = y[n]
        for j in range(low, high):
            row[j] += bias[j]


@njit(nogil=True, fastmath=True, error_model="numpy", forceinline=True)
def _turn(part, turns, pairs):
    """Rotates neighbours; `turns`: cosines, then sines."""
    for j in range(pairs):
        cosine, sine, a, b = turns[j], turns[pairs + j], part[2 * j], part[2 * j + 1]
        part[2 * j] = a * cosine - b * sine
        part[2 * j + 1] = a * sine + b * cosine


@njit(nogil=True, fastmath=True, error_model="numpy", forceinline=True)
def _place(p, layer, low, high, start, some):
    """Bias, norm and rotation of the heads low..high of (queries, keys, values) in place, of `some` tokens from `start`
    on; keys and values go into the cache."""
    count, size, heads, kv_heads = p.tokens, p.head_dim, p.heads, p.kv_heads
    width = (heads + 2 * kv_heads) * size
    qkv, slots = floats_at(p.qkv, (count, width)), wholes_at(p.own_slots, (count,))
    kv = floats_at(p.kv, (p.layers, 2, p.slots, kv_heads, size))
    turned = wholes_at(p.turned, (p.layers,))[layer]
    turns = floats_at(p.turns if turned else p.plain, (count, size))
    if p.qkv_bias:
        _add_bias(qkv, floats_at(p.qkv_bias, (p.layers, width))[layer], low * size, high * size, start, some)
    for n in range(start, start + some):
        for head in range(low, high):
            part = qkv[n, head * size : (head + 1) * size]
            if head < heads + kv_heads:
                if p.qk_norms:
                    _norm(part, floats_at(p.qk_norms, (p.layers, 2, size))[layer, np.int64(head >= heads)], p.eps, part)
                _turn(part, turns[n], size // 2)
            if head < heads:
                for j in range(size):
                    part[j] *= p.query_scale
            else:
                side, own = (head - heads) // kv_heads, (head - heads) % kv_heads
                kv[layer, side, slots[n], own] = part


@njit(nogil=True, fastmath={"contract", "nsz", "arcp"}, error_model="numpy", forceinline=True)
def _gate(gate_up, act, low, high, start, count):
    """Columns low..high of act = silu(gate) * up, for `count` tokens from `start` on."""
    size = act.shape[1]
    for n in range(start, start + count):
        gate, up, to = gate_up[n, low:high], gate_up[n, size + low : size + high], act[n, low:high]
        for j in range(high - low):
            g = gate[j]
            to[j] = g / (np.float32(1.0) + exp_f32(-g)) * up[j]


@njit(nogil=True, error_model="numpy")
def _pair(p, layer, group, segment):
    """What there is to know of the change that a segment's adapter makes to a layer."""
    pairs = wholes_at(p.segments, (p.segment_count, 3))[segment, 2]
    return wholes_at(pairs + (layer * 4 + group) * PAIRS * 8, (PAIRS,))


@njit(nogil=True, error_model="numpy")
def _change(p, layer, group, y, width, low, high, start, count):
    """Columns low..high of y, (N, width), gain what adapters add to them: B times the tokens' `inner`. Of `count`
    tokens from `start` on."""
    segments = wholes_at(p.segments, (p.segment_count, 3))
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


@njit(nogil=True, fastmath={"contract", "nsz", "reassoc"}, error_model="numpy", forceinline=True)
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
            total += exp_f32(row[j] - most)
            broken += row[j] * np.float32(0.0)  # stays 0 unless a logit is no finite number
        found[r, 2] = found[r, 2] * exp_f32(found[r, 1] - most) + total + broken
        found[r, 1] = most


# --- the phases of a step ---------------------------------------------------------------------------------------------


@njit(nogil=True, error_model="numpy")
def _read_by_adapters(p, thread, layer, group, source, length, phase):
    """`inner`: A x of the layer's inputs, segment by segment. `source` is the address of x; 0: its norm is to be taken
    first. Returns the address of x, 0 if this thread did not need it."""
    pieces = p.segment_count
    piece = take_piece(p, phase, pieces)
    x = source
    while piece >= 0:
        if not x:
            x = _normed(p, thread, layer, np.int64(group == GATE_UP))
        pair, width = _pair(p, layer, group, piece), p.inner_width
        start, count, _ = wholes_at(p.segments, (pieces, 3))[piece]
        xs, inner = x + start * length * 4, p.inner + start * width * 4
        if p.adapter_kind == BFLOAT16:
            narrow_bf16(pair[A], xs, length, inner, width, length, pair[INNER], count)
        else:
            narrow_f32(pair[A], xs, length, inner, width, length, pair[INNER], count)
        piece_done(p, phase, pieces)
        piece = take_piece(p, phase, pieces)
    return x


@njit(nogil=True, error_model="numpy")
def _make_heads(p, thread, layer, x, phase):
    """Queries, keys and values of the normed tokens, head by head, ready for attention. `x`: where they are normed, 0
    for nowhere."""
    heads, some = p.heads + 2 * p.kv_heads, p.heads_at_once
    each, pieces = pieces_of(p.threads, (heads + some - 1) // some, some * p.head_dim * p.dim * 2)
    piece = take_piece(p, phase, pieces)
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
        piece_done(p, phase, pieces)
        piece = take_piece(p, phase, pieces)


@njit(nogil=True, error_model="numpy")
def _look_back(p, layer, phase):
    """Attention of every run of tokens; where these are few, by parts of the heads."""
    each = min(p.kv_heads, max(1, p.kv_heads * p.run_count // (2 * p.threads)))
    parts = (p.kv_heads + each - 1) // each
    pieces = p.run_count * parts
    piece = take_piece(p, phase, pieces)
    while piece >= 0:
        low = piece % parts * each
        attend(p, layer, piece // parts, low, min(p.kv_heads, low + each))
        piece_done(p, phase, pieces)
        piece = take_piece(p, phase, pieces)


@njit(nogil=True, error_model="numpy")
def _add_to_x(p, layer, group, source, length, bias, phase):
    """x += W source + bias: what attention and the MLP give back."""
    some = p.rows_at_once
    each, pieces = pieces_of(p.threads, (p.dim + some - 1) // some, some * length * 2)
    piece = take_piece(p, phase, pieces)
    while piece >= 0:
        low, high = piece * each * some, min(p.dim, (piece + 1) * each * some)
        w, scales = _of_group(p, layer, group)
        _product(p, p.kind, w, scales, source, length, p.x, p.dim, low, high, 0, p.tokens, 1)
        _change(p, layer, group, p.x, p.dim, low, high, 0, p.tokens)
        if bias:
            _add_bias(
                floats_at(p.x, (p.tokens, p.dim)), floats_at(bias, (p.layers, p.dim))[layer], low, high, 0, p.tokens
            )  # fmt: skip
        piece_done(p, phase, pieces)
        piece = take_piece(p, phase, pieces)


@njit(nogil=True, error_model="numpy")
def _open_gates(p, thread, layer, x, phase):
    """silu(gate) * up of the normed tokens. `x`: where they are normed, 0 for nowhere."""
    ffn, some = p.ffn, p.rows_at_once
    each, pieces = pieces_of(p.threads, (ffn + some - 1) // some, some * p.dim * 4)
    piece = take_piece(p, phase, pieces)
    while piece >= 0:
        if not x:
            x = _normed(p, thread, layer, 1)
        low, high = piece * each * some, min(ffn, (piece + 1) * each * some)
        w, scales = _of_group(p, layer, GATE_UP)
        gate_up = floats_at(p.gate_up, (p.tokens, 2 * ffn))
        for start in range(0, p.tokens, TOKENS_AT_ONCE):
            count = min(TOKENS_AT_ONCE, p.tokens - start)
            for side in range(2):
                first, last = side * ffn + low, side * ffn + high
                _product(p, p.kind, w, scales, x, p.dim, p.gate_up, 2 * ffn, first, last, start, count, 0)
                _change(p, layer, GATE_UP, p.gate_up, 2 * ffn, first, last, start, count)
                if p.mlp_bias:
                    _add_bias(gate_up, floats_at(p.mlp_bias, (p.layers, 2 * ffn))[layer], first, last, start, count)
            _gate(gate_up, floats_at(p.act, (p.tokens, ffn)), low, high, start, count)
        piece_done(p, phase, pieces)
        piece = take_piece(p, phase, pieces)


@njit(nogil=True, error_model="numpy")
def _make_logits(p, thread, phase):
    """Logits of the tokens that want some, and what is to be known of them."""
    pieces, piece, y = p.head_pieces, take_piece(p, phase, p.head_pieces), np.int64(0)
    while piece >= 0:
        rows = p.ready_count
        if not y:
            y = p.y + thread * p.tokens * p.dim * 4
            x, hidden = floats_at(p.x, (p.tokens, p.dim)), floats_at(y, (rows, p.dim))
            ready, weight = wholes_at(p.ready, (rows,)), floats_at(p.last_norm, (p.dim,))
            for r in range(rows):
                _norm(x[ready[r]], weight, p.eps, hidden[r])
        each = ((p.vocab + pieces - 1) // pieces + HEAD_ROWS - 1) // HEAD_ROWS * HEAD_ROWS
        best, found = wholes_at(p.best, (pieces, rows))[piece], floats_at(p.found, (pieces, rows, 3))[piece]
        best[:] = 0
        found[:, :2] = -np.inf
        found[:, 2] = 0.0
        end = min(p.vocab, (piece + 1) * each)
        for low in range(piece * each, end, HEAD_ROWS):
            high = min(end, low + HEAD_ROWS)
            _product(p, p.head_kind, p.head, p.head_scales, y, p.dim, p.logits, p.vocab, low, high, 0, rows, 0)
            _look_through(floats_at(p.logits, (rows, p.vocab)), low, high, p.sampled, best, found)
        piece_done(p, phase, pieces)
        piece = take_piece(p, phase, pieces)


@njit(nogil=True, error_model="numpy")
def _compare_pieces(p):
    """What the pieces of the head found, joined in the first."""
    logs = floats_at(p.logs, (2, p.ready_count))
    best = wholes_at(p.best, (p.head_pieces, p.ready_count))
    found = floats_at(p.found, (p.head_pieces, p.ready_count, 3))
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
    rows, starts, counts = wholes_at(p.rows, shape), wholes_at(p.starts, shape), wholes_at(p.counts, shape)
    token, run = 0, 0
    for s in range(p.sequences):
        for i in range(counts[s]):
            _lay_out_token(p, token, rows[s], starts[s] + i)
            if i % RUN == 0:
                place = wholes_at(p.runs + run * 16, (2,))
                place[0], place[1] = token, min(RUN, counts[s] - i)
                run += 1
            token += 1
    p.run_count = run


@njit(nogil=True, error_model="numpy")
def _lay_out_token(p, token, row, position):
    """A token of a sequence in `row` of the tables."""
    block = wholes_at(p.tables + row * p.blocks * 8, (p.blocks,))[position // p.block_size]
    wholes_at(p.positions, (p.tokens,))[token] = position
    wholes_at(p.of_row, (p.tokens,))[token] = row
    wholes_at(p.own_slots, (p.tokens,))[token] = block * p.block_size + position % p.block_size
    _embed(p, wholes_at(p.ids, (p.tokens,))[token], floats_at(p.x + token * p.dim * 4, (p.dim,)))
    turn = floats_at(p.all_turns + position * p.head_dim * 4, (p.head_dim,))
    to = floats_at(p.turns + token * p.head_dim * 4, (p.head_dim,))
    for j in range(p.head_dim):
        to[j] = turn[j]


@njit(nogil=True, error_model="numpy")
def _embed(p, number, x):
    """x (D,) becomes a token's row of the embeddings."""
    size, place = p.dim, number % PANEL
    if p.embed_kind == FLOAT32:
        row = floats_at(p.embeddings + number * size * 4, (size,))
        for j in range(size):
            x[j] = row[j] * p.embed_scale
    elif p.embed_kind == BFLOAT16:  # rows r and r + 8 of a panel are the halves of a word
        words = words_at(p.embeddings + number // PANEL * size * PANEL * 2, (size, PANEL // 2))
        to_left = 0 if place >= PANEL // 2 else 16
        for j in range(size):
            bits = np.int32(words[j, place % (PANEL // 2)] << to_left) & np.int32(-1 << 16)
            x[j] = float_of_bits(np.int32(bits)) * p.embed_scale
    else:
        words = words_at(p.embeddings + number // PANEL * size * PANEL, (size, PANEL // 4))
        scale, to_left = floats_at(p.embed_scales + number * 4, (1,))[0], 24 - 8 * (place % 4)
        for j in range(size):
            whole = np.int32(words[j, place // 4] << to_left) >> 24
            x[j] = np.float32(whole) * scale * p.embed_scale


@njit(nogil=True, error_model="numpy")
def _work(p, thread):
    """All phases of the step that is under way."""
    phase = load_word(p.gate + STEP) << PHASE_BITS  # before all else: what the plan says was written before this number
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


def _decoder_step(made_of: int) -> Any:
    @njit(nogil=True, error_model="numpy", cache=True)
    def decoder_step(plan, thread):
        """Thread 0 computes the step that `plan` (one PLAN) describes, with whoever comes to help. The others help with
        every step until `stop` is set."""
        if made_of < 0:  # never: what is closed over says when this is stale (`ops.kernel_cache`)
            return
        p = plan[0]
        while not p.stop:
            if thread:
                wait_for_step(p, p.doors + thread * DOOR_BYTES)
                if p.stop:
                    return
            else:
                _lay_out(p)
                step = load_word(p.gate + STEP) + 1
                store_word(p.gate + STEP, step)
                store_word(p.gate + STATE, (step << PHASE_BITS) << TICKET_BITS)
                for helper in range(1, p.threads):
                    call_c(p.post, p.doors + helper * DOOR_BYTES)
            _work(p, thread)
            if not thread:
                closed = (step << PHASE_BITS) + (1 << PHASE_BITS) - 1  # no helper that is late finds a phase to work on
                store_word(p.gate + STATE, closed << TICKET_BITS)
                _compare_pieces(p)
                return

    return decoder_step


decoder_step = _decoder_step(
    revision(
        "decoder", "decoder_plan", "paged_attention", "phases", "products", "micro_kernels", "weight_forms", "addresses"
    )
)
