"""What compiled loops need of memory and chip and numba has no word for: arrays at an address, words that threads
share, calls by address, a fast exponential. Nothing of models.
"""

from __future__ import annotations

import math
import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

_LOG2E = np.float32(math.log2(math.e))


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
def words_at(address, shape):
    return carray(_word_pointer(address), shape)


@njit(nogil=True, inline="always")
def floats_at(address, shape):
    return carray(_float_pointer(address), shape)


@njit(nogil=True, inline="always")
def wholes_at(address, shape):
    return carray(_whole_pointer(address), shape)


@njit(nogil=True, error_model="numpy")
def hold(array):
    """Keeps the memory of an array until here. Numba frees it behind the last use of its name, and an address is none:
    what is read by address alone may be another thread's by then."""


# --- words that threads share -----------------------------------------------------------------------------------------


def _word(b: Any, address: Any) -> Any:
    return b.inttoptr(address, ir.PointerType(ir.IntType(64)))


@intrinsic
def load_word(typing: Any, address: Any) -> Any:
    """What other threads wrote before they stored this word is seen after it."""
    return types.int64(types.int64), lambda context, b, signature, args: b.load_atomic(
        _word(b, args[0]), "acquire", 8, typ=ir.IntType(64)
    )


@intrinsic
def store_word(typing: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        b.store_atomic(args[1], _word(b, args[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def add_to_word(typing: Any, address: Any, value: Any) -> Any:
    """The word as it was before."""
    return types.int64(types.int64, types.int64), lambda context, b, signature, args: b.atomic_rmw(
        "add", _word(b, args[0]), args[1], "seq_cst"
    )


@intrinsic
def exchanged(typing: Any, address: Any, old: Any, new: Any) -> Any:
    """Whether the word was `old`, and is `new` now."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        found = b.cmpxchg(_word(b, args[0]), args[1], args[2], "seq_cst", "seq_cst")
        return b.extract_value(found, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def pause(typing: Any) -> Any:
    """Tells the chip that this is a loop that waits, where it has a word for it."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if platform.machine() in ("x86_64", "AMD64"):
            b.call(b.module.declare_intrinsic("llvm.x86.sse2.pause", [], ir.FunctionType(ir.VoidType(), [])), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call_c(typing: Any, function: Any, argument: Any) -> Any:
    """Calls a C function `int f(void *)` by its address."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(64)])
        return b.call(b.inttoptr(args[0], ir.PointerType(kind)), [args[1]])

    return types.int32(types.int64, types.int64), codegen


# --- numbers ----------------------------------------------------------------------------------------------------------


@intrinsic
def float_of_bits(typing: Any, bits: Any) -> Any:
    return types.float32(types.int32), lambda context, b, signature, args: b.bitcast(args[0], ir.FloatType())


@njit(nogil=True, fastmath={"contract", "nsz"}, error_model="numpy", inline="always")
def exp_f32(x):
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
    return p * float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))
