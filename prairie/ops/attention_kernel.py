"""Causal attention of packed rows as compiled loops (FlashAttention-2's order, arXiv 2307.08691): scores are made by
blocks, never leave the cache, and are made again for the gradient.

torch's own kernel runs at half of what this chip multiplies at, and products of 64 x 64 matrices one by one at less.
numba compiles these loops on the user's machine; the heart is one tile of 6 x 16 sums kept in registers, written in
LLVM's own terms because no vectoriser finds it. Everything is laid out in whole tiles before it is multiplied.
A task is a key head of one row and of the rows that go on from it, so no two tasks write to one place and the result
does not depend on how many threads there are.
Not here: which rows there are and who calls this (`ops.attention`), the plain form (`attention_reference` there).

`_exp`, `_floats` and what they are made of stand in `ops.addresses` and `ops.elementwise_kernel` too: numba's cache on
disk knows that a kernel is stale by the date of its own file alone, unless it closes over more (`ops.kernel_cache`).

Legend: N tokens, H query heads, K key heads, D size of a head, R rows, T keys of a row, Q queries of a block.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8
ROWS, COLUMNS = 6, 16
"""Of the tile: 12 sums, 2 vectors of B and one number of A fill 15 of 16 registers."""
QUERIES = 48
"""Of a block; whole tiles."""
KEYS = 192
"""Of a block; whole tiles either way. Scores and their gradients, 72 KB, stay in the second cache."""
_LOG2E = np.float32(math.log2(math.e))
STRIDE = 32
"""What LLVM unrolls a loop over numbers to: a row that does not fill it would end with numbers one by one."""
UNSEEN = np.float32(-1e30)
OWN_START, OWN, PREFIX_START, PREFIX = 0, 1, 2, 3
"""Columns of `rows`."""
JOB = np.dtype(
    [(name, np.int64) for name in (
        # how many there are of each; `longest` is that of the rows
        "tokens", "heads", "kv_heads", "size", "task_count", "group_count", "row_count", "longest",
        # addresses: tickets (2,), how many tasks were taken and how many done; tasks (M, 2), a group of rows and a key
        # head; groups (G, 2), a group's first row and the one after its last; rows (R, 4), see the columns above
        "tickets", "tasks", "groups", "rows",
        # addresses of numbers: q, out, dout, dq (N, H, D); k, v, dk, dv (N, K, D); log_sums (N, H), of the weights
        # before they are divided
        "q", "k", "v", "out", "log_sums", "dout", "dq", "dk", "dv",
    )] + [("scale", np.float32)],
    align=True,
)  # fmt: skip
"""What the loops are given: an array of one, read where it lies by all threads."""
ENTRY = types.void(types.CPointer(from_dtype(JOB)))


@intrinsic
def _tile(
    typing: Any, a: Any, a_row: Any, a_step: Any, b: Any, b_step: Any, c: Any, c_row: Any, length: Any, adds: Any
) -> Any:
    """C[i, j] = (C[i, j] if adds) + sum over k of A[i, k] B[k, j], for ROWS x COLUMNS and k below `length`.

    Addresses, and steps in numbers: A[i, k] stands at i * a_row + k * a_step, B's and C's rows are contiguous.
    """
    i64, f32 = ir.IntType(64), ir.FloatType()
    vector = ir.VectorType(f32, LANES)

    def codegen(context: Any, b_: Any, signature: Any, args: Any) -> Any:
        a, a_row, a_step, b, b_step, c, c_row, length, adds = args

        def address(base: Any, index: Any) -> Any:
            return b_.add(base, b_.mul(index, ir.Constant(i64, 4)))

        def load(at: Any, kind: Any) -> Any:
            return b_.load(b_.inttoptr(at, ir.PointerType(kind)), align=4)

        def number(value: int) -> Any:
            return ir.Constant(i64, value)

        zero = ir.Constant(vector, [0.0] * LANES)
        places = [
            [address(c, b_.add(b_.mul(c_row, number(i)), number(j * LANES))) for j in range(COLUMNS // LANES)]
            for i in range(ROWS)
        ]
        sums = [[cgutils.alloca_once_value(b_, zero) for _ in line] for line in places]
        with b_.if_then(b_.icmp_signed("!=", adds, number(0))):
            for line, kept_line in zip(places, sums, strict=True):
                for place, kept in zip(line, kept_line, strict=True):
                    b_.store(load(place, vector), kept)
        a_rows = [address(a, b_.mul(a_row, number(i))) for i in range(ROWS)]
        with cgutils.for_range(b_, length, intp=i64) as loop:
            k = loop.index
            b_k = address(b, b_.mul(b_step, k))
            values = [load(b_.add(b_k, number(4 * j * LANES)), vector) for j in range(COLUMNS // LANES)]
            for i in range(ROWS):
                one = load(address(a_rows[i], b_.mul(a_step, k)), f32)
                first = b_.insert_element(ir.Constant(vector, ir.Undefined), one, ir.Constant(ir.IntType(32), 0))
                spread = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
                wide = b_.shuffle_vector(first, ir.Constant(vector, ir.Undefined), spread)
                for j, value in enumerate(values):
                    kept = sums[i][j]
                    b_.store(b_.fadd(b_.load(kept), b_.fmul(wide, value, flags=("fast",)), flags=("fast",)), kept)
        for line, kept_line in zip(places, sums, strict=True):
            for place, kept in zip(line, kept_line, strict=True):
                b_.store(b_.load(kept), b_.inttoptr(place, ir.PointerType(vector)), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), codegen


@intrinsic
def _float_of_bits(typing: Any, bits: Any) -> Any:
    return types.float32(types.int32), lambda context, b, signature, args: b.bitcast(args[0], ir.FloatType())


@intrinsic
def _float_pointer(typing: Any, address: Any) -> Any:
    return types.CPointer(types.float32)(types.int64), lambda context, b, signature, args: b.inttoptr(
        args[0], ir.PointerType(ir.FloatType())
    )


@intrinsic
def _whole_pointer(typing: Any, address: Any) -> Any:
    return types.CPointer(types.int64)(types.int64), lambda context, b, signature, args: b.inttoptr(
        args[0], ir.PointerType(ir.IntType(64))
    )


@njit(nogil=True, inline="always")
def _floats(address, shape):
    return carray(_float_pointer(address), shape)


@njit(nogil=True, inline="always")
def _wholes(address, shape):
    return carray(_whole_pointer(address), shape)


@intrinsic
def _next(typing: Any, counter: Any) -> Any:
    """The number that stands at this address, which is one higher afterwards; no two threads get the same."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        i64 = ir.IntType(64)
        return b.atomic_rmw("add", b.inttoptr(args[0], ir.PointerType(i64)), ir.Constant(i64, 1), "monotonic")

    return types.int64(types.int64), codegen


@njit(nogil=True, inline="always")
def _plan(j):
    """tasks, groups, rows"""
    tasks, groups = _wholes(j.tasks, (j.task_count, 2)), _wholes(j.groups, (j.group_count, 2))
    return tasks, groups, _wholes(j.rows, (j.row_count, 4))


@njit(nogil=True, inline="always")
def _heads(j, address, heads):
    return _floats(address, (j.tokens, heads, j.size))


@njit(nogil=True, fastmath={"contract", "nsz"}, error_model="numpy", inline="always")
def _exp(x):
    """e^x of x <= 0 to 2e-7 of itself, in operations that vectorise; not a number for what is none."""
    inside = max(x, np.float32(-87.0))
    n = np.floor(inside * _LOG2E + np.float32(0.5))
    r = (inside - n * np.float32(0.693145751953125)) - n * np.float32(1.42860677e-6)
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    return p * _float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23)) + x * np.float32(0.0)


@njit(nogil=True, fastmath=True, error_model="numpy", forceinline=True)
def _largest(x, most):
    for j in range(x.shape[0]):
        if x[j] > most:
            most = x[j]
    return most


@njit(nogil=True, fastmath={"contract", "nsz", "reassoc"}, error_model="numpy", forceinline=True)
def _raise(x, most):
    """x becomes e^(x - most); their sum."""
    total = np.float32(0.0)
    for j in range(x.shape[0]):
        e = _exp(x[j] - most)
        x[j] = e
        total += e
    return total


@njit(nogil=True, fastmath={"contract", "nsz"}, error_model="numpy", forceinline=True)
def _gradient(scores, pulls, log_sum, mean):
    """Scores become weights, what pulls at the weights becomes what pulls at the scores."""
    for j in range(scores.shape[0]):
        weight = _exp(min(scores[j] - log_sum, np.float32(0.0)) + (scores[j] - log_sum) * np.float32(0.0))
        scores[j] = weight
        pulls[j] = weight * (pulls[j] - mean)


@njit(nogil=True, fastmath={"contract", "nsz", "reassoc"}, error_model="numpy", forceinline=True)
def _dot(x, y):
    total = np.float32(0.0)
    for j in range(x.shape[0]):
        total += x[j] * y[j]
    return total


@njit(nogil=True, error_model="numpy", inline="always")
def _fill(x, low, high, value):
    for j in range(low, high):
        x[j] = value


@njit(nogil=True, error_model="numpy")
def _at(x):
    return np.int64(x.ctypes.data)


@njit(nogil=True, error_model="numpy")
def _whole(count, step):
    return (count + step - 1) // step * step


@njit(nogil=True, error_model="numpy")
def _gather(row, x, head, out):
    """The keys or values (T, D) of a row: first those that it goes on from."""
    prefix = row[PREFIX]
    for t in range(prefix + row[OWN]):
        token = row[PREFIX_START] + t if t < prefix else row[OWN_START] + t - prefix
        out[t] = x[token, head]
    out[prefix + row[OWN] : _whole(prefix + row[OWN], QUERIES)] = np.float32(0.0)


@njit(nogil=True, error_model="numpy")
def _panels(x, count, out):
    """out[p, d, j] = x[16 p + j, d]."""
    for t in range(_whole(count, QUERIES)):
        to = out[t // COLUMNS]
        for d in range(x.shape[1]):
            to[d, t % COLUMNS] = x[t, d]


@njit(nogil=True, error_model="numpy")
def _block(x, start, count, head, scale, out):
    """Up to QUERIES tokens of one head, times `scale`, and zeros."""
    for i in range(count):
        for d in range(out.shape[1]):
            out[i, d] = x[start + i, head, d] * scale
    out[count:] = np.float32(0.0)


@njit(nogil=True, error_model="numpy")
def _scores(queries, panels, first, count, low, width, out):
    """out (Q, KEYS): products of a block of queries with `width` keys from `low` on, as far as any query of a tile
    sees; query i stands at place first + i."""
    size = queries.shape[1]
    for i in range(0, count, ROWS):
        seen = min(width, _whole(max(0, first + i + ROWS - low), COLUMNS))
        for j in range(0, seen, COLUMNS):
            _tile(
                _at(queries) + i * size * 4, size, np.int64(1), _at(panels) + (low + j) * size * 4, np.int64(COLUMNS),
                _at(out) + (i * KEYS + j) * 4, np.int64(KEYS), size, np.int64(0),
            )  # fmt: skip


@njit(nogil=True, error_model="numpy")
def _mix(weights, values, first, count, low, width, out):
    """out (Q, D) += weights (Q, KEYS) times `width` values from `low` on, as far as a tile sees."""
    size = values.shape[1]
    for i in range(0, count, ROWS):
        seen = min(width, first + i + ROWS - low)
        if seen > 0:
            for j in range(0, size, COLUMNS):
                _tile(
                    _at(weights) + i * KEYS * 4, np.int64(KEYS), np.int64(1), _at(values) + (low * size + j) * 4, size,
                    _at(out) + (i * size + j) * 4, size, seen, np.int64(1),
                )  # fmt: skip


@njit(nogil=True, error_model="numpy")
def _mix_back(weights, block, first, count, low, width, out):
    """out (T, D), of the keys: += weights transposed times what stands in the block of queries."""
    size = block.shape[1]
    for t in range(0, width, ROWS):
        begin = max(0, low + t - first)
        if begin < count:
            for j in range(0, size, COLUMNS):
                _tile(
                    _at(weights) + (begin * KEYS + t) * 4, np.int64(1), np.int64(KEYS),
                    _at(block) + (begin * size + j) * 4, size, _at(out) + ((low + t) * size + j) * 4, size,
                    count - begin, np.int64(1),
                )  # fmt: skip


@cfunc(ENTRY, error_model="numpy", cache=True)
def forward(job):
    """`out` and `log_sums` of the tasks that are left: each thread that is here takes the next one, so one that the
    system lets wait holds nobody up. `job`: the address of a JOB, without the gradients."""
    j = carray(job, 1)[0]
    tasks, groups, rows = _plan(j)
    longest, scale = j.longest, j.scale
    q, k, v = _heads(j, j.q, j.heads), _heads(j, j.k, j.kv_heads), _heads(j, j.v, j.kv_heads)
    out, log_sums = _heads(j, j.out, j.heads), _floats(j.log_sums, (j.tokens, j.heads))
    size, shared = q.shape[2], q.shape[1] // k.shape[1]
    room = _whole(longest, KEYS)
    keys, values = np.empty((room, size), np.float32), np.empty((room, size), np.float32)
    panels = np.empty((room // COLUMNS, size, COLUMNS), np.float32)
    queries, mixed = np.empty((QUERIES, size), np.float32), np.empty((QUERIES, size), np.float32)
    scores = np.zeros((QUERIES, KEYS), np.float32)
    most, total = np.empty(QUERIES, np.float32), np.empty(QUERIES, np.float32)
    while True:
        task: int = _next(j.tickets)
        if task >= tasks.shape[0]:
            break
        head = tasks[task, 1]
        for r in range(groups[tasks[task, 0], 0], groups[tasks[task, 0], 1]):
            row = rows[r]
            _gather(row, k, head, keys)
            _gather(row, v, head, values)
            _panels(keys, row[PREFIX] + row[OWN], panels)
            for query_head in range(head * shared, (head + 1) * shared):
                for start in range(0, row[OWN], QUERIES):
                    count, first = min(QUERIES, row[OWN] - start), row[PREFIX] + start
                    token = row[OWN_START] + start
                    _block(q, token, count, query_head, scale, queries)
                    mixed[:] = np.float32(0.0)
                    most[:], total[:] = np.float32(-np.inf), np.float32(0.0)
                    for low in range(0, first + count, KEYS):
                        width = min(KEYS, first + count - low)
                        _scores(queries, panels, first, count, low, width, scores)
                        for i in range(count):
                            seen = min(width, first + i + 1 - low)
                            filled = _whole(max(seen, 0), STRIDE)
                            if seen > 0:
                                _fill(scores[i], seen, filled, UNSEEN)
                                line = scores[i, :filled]
                                larger = _largest(line, most[i])
                                if larger > most[i] and low > 0:
                                    shrink = np.exp(most[i] - larger)
                                    total[i] *= shrink
                                    for d in range(size):
                                        mixed[i, d] *= shrink
                                most[i] = larger
                                total[i] += _raise(line, larger)
                            _fill(scores[i], max(seen, 0), max(filled, width), np.float32(0.0))
                        _mix(scores, values, first, count, low, width, mixed)
                    for i in range(count):
                        inverse = np.float32(1.0) / total[i]
                        for d in range(size):
                            out[token + i, query_head, d] = mixed[i, d] * inverse
                        log_sums[token + i, query_head] = most[i] + np.log(total[i])
        _next(j.tickets + 8)


@cfunc(ENTRY, error_model="numpy", cache=True)
def backward(job):
    """`dq`, `dk`, `dv` of the tasks that are left: from all that `forward` was given and made, and `dout`."""
    j = carray(job, 1)[0]
    tasks, groups, rows = _plan(j)
    longest, scale = j.longest, j.scale
    q, k, v = _heads(j, j.q, j.heads), _heads(j, j.k, j.kv_heads), _heads(j, j.v, j.kv_heads)
    out, log_sums, dout = (
        _heads(j, j.out, j.heads),
        _floats(j.log_sums, (j.tokens, j.heads)),
        _heads(j, j.dout, j.heads),
    )
    dq, dk, dv = _heads(j, j.dq, j.heads), _heads(j, j.dk, j.kv_heads), _heads(j, j.dv, j.kv_heads)
    size, shared = q.shape[2], q.shape[1] // k.shape[1]
    room = _whole(longest, KEYS)
    keys, values = np.empty((room, size), np.float32), np.empty((room, size), np.float32)
    key_panels = np.empty((room // COLUMNS, size, COLUMNS), np.float32)
    value_panels = np.empty((room // COLUMNS, size, COLUMNS), np.float32)
    d_keys, d_values = np.empty((room, size), np.float32), np.empty((room, size), np.float32)
    queries, d_mixed = np.empty((QUERIES, size), np.float32), np.empty((QUERIES, size), np.float32)
    d_queries = np.empty((QUERIES, size), np.float32)
    scores, pulls = np.zeros((QUERIES, KEYS), np.float32), np.zeros((QUERIES, KEYS), np.float32)
    while True:
        task: int = _next(j.tickets)
        if task >= tasks.shape[0]:
            break
        head = tasks[task, 1]
        for r in range(groups[tasks[task, 0], 0], groups[tasks[task, 0], 1]):
            row = rows[r]
            length = row[PREFIX] + row[OWN]
            _gather(row, k, head, keys)
            _gather(row, v, head, values)
            _panels(keys, length, key_panels)
            _panels(values, length, value_panels)
            d_keys[: _whole(length, QUERIES)] = np.float32(0.0)
            d_values[: _whole(length, QUERIES)] = np.float32(0.0)
            for query_head in range(head * shared, (head + 1) * shared):
                for start in range(0, row[OWN], QUERIES):
                    count, first = min(QUERIES, row[OWN] - start), row[PREFIX] + start
                    token = row[OWN_START] + start
                    _block(q, token, count, query_head, scale, queries)
                    _block(dout, token, count, query_head, np.float32(1.0), d_mixed)
                    d_queries[:] = np.float32(0.0)
                    for low in range(0, first + count, KEYS):
                        width = min(KEYS, first + count - low)
                        _scores(queries, key_panels, first, count, low, width, scores)
                        _scores(d_mixed, value_panels, first, count, low, width, pulls)
                        whole = _whole(width, ROWS)
                        for i in range(count):
                            seen = max(0, min(width, first + i + 1 - low))
                            filled = _whole(seen, STRIDE)
                            if seen:
                                _fill(scores[i], seen, filled, UNSEEN)
                                _fill(pulls[i], seen, filled, np.float32(0.0))
                                mean = _dot(d_mixed[i], out[token + i, query_head])
                                log_sum = log_sums[token + i, query_head]
                                _gradient(scores[i, :filled], pulls[i, :filled], log_sum, mean)
                            _fill(scores[i], seen, max(filled, whole), np.float32(0.0))
                            _fill(pulls[i], seen, max(filled, whole), np.float32(0.0))
                        _mix_back(scores, d_mixed, first, count, low, width, d_values)
                        _mix_back(pulls, queries, first, count, low, width, d_keys)
                        _mix(pulls, keys, first, count, low, width, d_queries)
                    for i in range(count):
                        for d in range(size):
                            dq[token + i, query_head, d] = d_queries[i, d] * scale
            for t in range(row[PREFIX]):
                for d in range(size):
                    dk[row[PREFIX_START] + t, head, d] += d_keys[t, d]
                    dv[row[PREFIX_START] + t, head, d] += d_values[t, d]
            for t in range(row[OWN]):
                dk[row[OWN_START] + t, head] = d_keys[row[PREFIX] + t]
                dv[row[OWN_START] + t, head] = d_values[row[PREFIX] + t]
        _next(j.tickets + 8)
