"""Norm, gate and rotation of training as compiled loops: each number is read and written once, where torch's operators
do so five or ten times. numba compiles them on the user's machine, apart from attention's, which take longer.

Tokens are cut in bands; a band is a task that any thread may take, so the result does not depend on how many there are.
Not here: who calls this and the plain forms (`ops.elementwise`, `ops.attention`), threads (`ops.threads`). What stands
in `ops.attention_kernel` too stands there for the reason that is given there.

Legend: N tokens, H query heads, K key heads, D size of a head, W width, F width inside the gated layer.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.extending import intrinsic

_LOG2E = np.float32(math.log2(math.e))
BAND = 32
"""Tokens of a task that works by elements."""
JOB = np.dtype(
    [(name, np.int64) for name in (
        # of the input: how many tokens, and numbers of each; of queries and keys: how many heads of what size
        "tokens", "width", "heads", "kv_heads", "size", "tickets",
        # addresses: x and gain, its gradient, are of the width; out and grad of the result's; weight (W,), inverse (N,)
        # 1 / rms, sums (tasks, W) of the weight's gradient, 0 if none is wanted; turns (N, D) cosine, sine by turns
        "x", "gain", "out", "grad", "weight", "inverse", "sums", "turns",
        # (N, H, D), (N, K, D), (N, K, D)
        "q", "k", "v",
    )] + [("eps", np.float32), ("way", np.float32)],
    align=True,
)  # fmt: skip
"""What the loops by elements are given. `way` 1 turns forward, -1 back."""
ENTRY = types.void(types.CPointer(from_dtype(JOB)))


@intrinsic
def _float_pointer(typing: Any, address: Any) -> Any:
    return types.CPointer(types.float32)(types.int64), lambda context, b, signature, args: b.inttoptr(
        args[0], ir.PointerType(ir.FloatType())
    )


@njit(nogil=True, inline="always")
def _floats(address, shape):
    return carray(_float_pointer(address), shape)


@intrinsic
def _next(typing: Any, counter: Any) -> Any:
    """The number that stands at this address, which is one higher afterwards; no two threads get the same."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        i64 = ir.IntType(64)
        return b.atomic_rmw("add", b.inttoptr(args[0], ir.PointerType(i64)), ir.Constant(i64, 1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def _float_of_bits(typing: Any, bits: Any) -> Any:
    return types.float32(types.int32), lambda context, b, signature, args: b.bitcast(args[0], ir.FloatType())


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


@njit(nogil=True, fastmath={"contract", "nsz", "reassoc"}, error_model="numpy", forceinline=True)
def _dot(x, y):
    total = np.float32(0.0)
    for j in range(x.shape[0]):
        total += x[j] * y[j]
    return total


@njit(nogil=True, error_model="numpy")
def _bands(j):
    """Tasks that no other thread has taken: the first token of each and the one after its last. What was done with one
    is counted when the next is asked for."""
    while True:
        low = _next(j.tickets) * BAND
        if low >= j.tokens:
            return
        yield low, min(low + BAND, j.tokens)
        _next(j.tickets + 8)


@njit(nogil=True, fastmath={"contract", "nsz"}, error_model="numpy", inline="always")
def _sigmoid(x):
    e = _exp(-abs(x))
    return (np.float32(1.0) if x >= np.float32(0.0) else e) / (np.float32(1.0) + e)


@njit(nogil=True, fastmath={"contract", "nsz"}, error_model="numpy", forceinline=True)
def _gate(x, out):
    size = out.shape[0]
    for f in range(size):
        out[f] = x[f] * _sigmoid(x[f]) * x[size + f]


@njit(nogil=True, fastmath={"contract", "nsz"}, error_model="numpy", forceinline=True)
def _gate_back(x, grad, gain):
    size = grad.shape[0]
    for f in range(size):
        sigmoid = _sigmoid(x[f])
        gain[size + f] = grad[f] * x[f] * sigmoid
        gain[f] = grad[f] * x[size + f] * sigmoid * (np.float32(1.0) + x[f] * (np.float32(1.0) - sigmoid))


@njit(nogil=True, fastmath={"contract", "nsz"}, error_model="numpy", forceinline=True)
def _norm(x, weight, inverse, out):
    for d in range(x.shape[0]):
        out[d] = x[d] * inverse * weight[d]


@njit(nogil=True, fastmath={"contract", "nsz", "reassoc"}, error_model="numpy", forceinline=True)
def _pull(x, weight, grad):
    total = np.float32(0.0)
    for d in range(x.shape[0]):
        total += grad[d] * weight[d] * x[d]
    return total


@njit(nogil=True, fastmath={"contract", "nsz"}, error_model="numpy", forceinline=True)
def _norm_back(x, weight, grad, inverse, pull, gain):
    for d in range(x.shape[0]):
        gain[d] = (grad[d] * weight[d] - x[d] * pull) * inverse


@njit(nogil=True, fastmath={"contract", "nsz"}, error_model="numpy", forceinline=True)
def _add_scaled(x, grad, inverse, sums):
    for d in range(x.shape[0]):
        sums[d] += grad[d] * x[d] * inverse


@njit(nogil=True, fastmath={"contract", "nsz"}, error_model="numpy", forceinline=True)
def _turn(x, turn, way, out):
    for d in range(0, x.shape[0], 2):
        cosine, sine = turn[d], turn[d + 1] * way
        out[d] = x[d] * cosine - x[d + 1] * sine
        out[d + 1] = x[d] * sine + x[d + 1] * cosine


@cfunc(ENTRY, error_model="numpy", cache=True)
def swiglu(job):
    """out (N, F) = silu(gate) * up of x (N, 2 F)."""
    j = carray(job, 1)[0]
    x, out = _floats(j.x, (j.tokens, j.width)), _floats(j.out, (j.tokens, j.width // 2))
    for low, high in _bands(j):
        for t in range(low, high):
            _gate(x[t], out[t])


@cfunc(ENTRY, error_model="numpy", cache=True)
def swiglu_backward(job):
    """gain (N, 2 F) of x and grad (N, F)."""
    j = carray(job, 1)[0]
    x, gain = _floats(j.x, (j.tokens, j.width)), _floats(j.gain, (j.tokens, j.width))
    grad = _floats(j.grad, (j.tokens, j.width // 2))
    for low, high in _bands(j):
        for t in range(low, high):
            _gate_back(x[t], grad[t], gain[t])


@cfunc(ENTRY, error_model="numpy", cache=True)
def rms_norm(job):
    """out (N, W) and inverse (N,) of x and weight."""
    j = carray(job, 1)[0]
    x, out = _floats(j.x, (j.tokens, j.width)), _floats(j.out, (j.tokens, j.width))
    weight, inverse = _floats(j.weight, (j.width,)), _floats(j.inverse, (j.tokens,))
    for low, high in _bands(j):
        for t in range(low, high):
            inverse[t] = np.float32(1.0) / np.sqrt(_dot(x[t], x[t]) / np.float32(j.width) + j.eps)
            _norm(x[t], weight, inverse[t], out[t])


@cfunc(ENTRY, error_model="numpy", cache=True)
def rms_norm_backward(job):
    """gain (N, W) and sums (tasks, W) of x, weight, inverse and grad; with r = 1 / rms: r (g w - x r^2 mean(g w x))."""
    j = carray(job, 1)[0]
    x, gain, grad = (
        _floats(j.x, (j.tokens, j.width)),
        _floats(j.gain, (j.tokens, j.width)),
        _floats(j.grad, (j.tokens, j.width)),
    )
    weight, inverse = _floats(j.weight, (j.width,)), _floats(j.inverse, (j.tokens,))
    sums = _floats(j.sums, ((j.tokens + BAND - 1) // BAND, j.width))
    for low, high in _bands(j):
        if j.sums != 0:
            sums[low // BAND, :] = np.float32(0.0)
        for t in range(low, high):
            pull = _pull(x[t], weight, grad[t]) * inverse[t] * inverse[t] / np.float32(j.width)
            _norm_back(x[t], weight, grad[t], inverse[t], pull, gain[t])
            if j.sums != 0:
                _add_scaled(x[t], grad[t], inverse[t], sums[low // BAND])


@cfunc(ENTRY, error_model="numpy", cache=True)
def turn_heads(job):
    """q, k turned and v as it is, of x (N, (H + 2 K) D)."""
    j = carray(job, 1)[0]
    x, turns = _floats(j.x, (j.tokens, j.heads + 2 * j.kv_heads, j.size)), _floats(j.turns, (j.tokens, j.size))
    q, k = _floats(j.q, (j.tokens, j.heads, j.size)), _floats(j.k, (j.tokens, j.kv_heads, j.size))
    v = _floats(j.v, (j.tokens, j.kv_heads, j.size))
    for low, high in _bands(j):
        for t in range(low, high):
            for head in range(j.heads):
                _turn(x[t, head], turns[t], j.way, q[t, head])
            for head in range(j.kv_heads):
                _turn(x[t, j.heads + head], turns[t], j.way, k[t, head])
                v[t, head] = x[t, j.heads + j.kv_heads + head]


@cfunc(ENTRY, error_model="numpy", cache=True)
def turn_heads_backward(job):
    """gain (N, (H + 2 K) D) of the gradients q, k, v."""
    j = carray(job, 1)[0]
    gain, turns = _floats(j.gain, (j.tokens, j.heads + 2 * j.kv_heads, j.size)), _floats(j.turns, (j.tokens, j.size))
    q, k = _floats(j.q, (j.tokens, j.heads, j.size)), _floats(j.k, (j.tokens, j.kv_heads, j.size))
    v = _floats(j.v, (j.tokens, j.kv_heads, j.size))
    for low, high in _bands(j):
        for t in range(low, high):
            for head in range(j.heads):
                _turn(q[t, head], turns[t], j.way, gain[t, head])
            for head in range(j.kv_heads):
                _turn(k[t, head], turns[t], j.way, gain[t, j.heads + head])
                gain[t, j.heads + j.kv_heads + head] = v[t, head]
