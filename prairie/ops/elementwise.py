"""Operators that only touch memory: norms, gates, caps; the ones of every step with their gradient written out.

On a CPU these cost as much as the matrix products when autograd composes them from small steps: each step reads and
writes the whole batch. Not here: products with weights (`linear`), attention, the loss.

Legend: N tokens, D width, F width inside the gated layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prairie.ops.threads import bands, by_bands, worth_compiling

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "tanh": torch.tanh,
}
"""The functions inside an MLP, by name (gelu: arXiv 1606.08415)."""


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467); half precision is computed in float32."""
    if torch.is_grad_enabled() and (x.requires_grad or weight_D.requires_grad):
        out: Tensor = _RMSNorm.apply(x, weight_D, eps)
        return out
    return _scaled(x, _inverse_rms(x, eps), weight_D)


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The plain form of `rms_norm`."""
    normal = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (normal * weight_D.float()).to(x.dtype)


def swiglu(gate_up_NF2: Tensor) -> Tensor:
    """(N, F): silu(gate) * up of the fused columns gate, up (arXiv 2002.05202)."""
    if torch.is_grad_enabled() and gate_up_NF2.requires_grad:
        out: Tensor = _SwiGLU.apply(gate_up_NF2)
        return out
    gate, up = gate_up_NF2.chunk(2, -1)
    return F.silu(gate).mul_(up)


def gated(gate_up_NF2: Tensor, activation: str) -> Tensor:
    """(N, F): activation(gate) * up of the fused columns gate, up."""
    if activation == "silu":
        return swiglu(gate_up_NF2)
    gate, up = gate_up_NF2.chunk(2, -1)
    return ACTIVATIONS[activation](gate) * up


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / std * weight + bias over the last dimension (arXiv 1607.06450)."""
    return F.layer_norm(x, x.shape[-1:], weight_D, bias_D, eps)


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap): nearly x while it is small, never beyond the cap (Gemma 2, arXiv 2408.00118)."""
    return torch.tanh(x / cap) * cap


def swiglu_reference(gate_up_NF2: Tensor) -> Tensor:
    """The plain form of `swiglu`."""
    gate, up = gate_up_NF2.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _scaled(x: Tensor, inverse: Tensor, weight_D: Tensor) -> Tensor:
    return (x * inverse).mul_(weight_D).to(x.dtype)  # a half-precision x is promoted by the float32 inverse


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.compiled = worth_compiling(x) and weight_D.dtype == torch.float32
        if ctx.compiled:
            out, inverse = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
            given = {"x": x, "weight": weight_D.contiguous(), "inverse": inverse, "out": out}
            by_bands("rms_norm", given, **_size(x), eps=eps)
        else:
            inverse = _inverse_rms(x, eps)
            out = _scaled(x, inverse, weight_D)
        ctx.save_for_backward(x, weight_D, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """With r = 1/rms: dx = r (g w - x r^2 mean(g w x)), dw = sum of g x r; sums over D or N are matrix-vector."""
        x, weight_D, inverse = ctx.saved_tensors
        size = x.shape[-1]
        if ctx.compiled:
            gain = torch.empty_like(x)
            given = {"x": x, "weight": weight_D.contiguous(), "inverse": inverse, "grad": grads[0].contiguous()}
            sums = x.new_empty(bands(inverse.numel()), size) if ctx.needs_input_grad[1] else None
            more = {} if sums is None else {"sums": sums}
            by_bands("rms_norm_backward", {**given, **more, "gain": gain}, **_size(x))
            return gain, None if sums is None else sums.sum(0), None
        grad_ND, x_ND, inverse_N = grads[0].reshape(-1, size).float(), x.reshape(-1, size).float(), inverse.flatten()
        weight = weight_D.float()
        product_ND = grad_ND * x_ND
        dw = (inverse_N @ product_ND).to(weight_D.dtype) if ctx.needs_input_grad[1] else None
        dx = None
        if ctx.needs_input_grad[0]:
            pull_N = (product_ND @ weight).mul_(inverse_N.square()).div_(-size)
            dx_ND = torch.mul(grad_ND, weight, out=product_ND)
            dx = dx_ND.addcmul_(x_ND, pull_N[:, None]).mul_(inverse_N[:, None]).view(x.shape).to(x.dtype)
        return dx, dw, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_NF2: Tensor) -> Tensor:
        ctx.compiled = worth_compiling(gate_up_NF2)
        if ctx.compiled:
            out = gate_up_NF2.new_empty(*gate_up_NF2.shape[:-1], gate_up_NF2.shape[-1] // 2)
            by_bands("swiglu", {"x": gate_up_NF2, "out": out}, **_size(gate_up_NF2))
            ctx.save_for_backward(gate_up_NF2)
            return out
        gate, up = gate_up_NF2.chunk(2, -1)
        silu = F.silu(gate)
        ctx.save_for_backward(gate_up_NF2, silu)
        return silu * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        gate_up_NF2, *kept = ctx.saved_tensors
        grad = torch.empty_like(gate_up_NF2)
        if ctx.compiled:
            given = {"x": gate_up_NF2, "grad": grads[0].contiguous(), "gain": grad}
            by_bands("swiglu_backward", given, **_size(gate_up_NF2))
            return grad
        gate, up = gate_up_NF2.chunk(2, -1)
        d_gate, d_up = grad.chunk(2, -1)
        torch.mul(grads[0], kept[0], out=d_up)
        torch.mul(grads[0], up, out=d_gate)
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        return grad


def _size(x: Tensor) -> dict[str, int]:
    return {"tokens": x.numel() // x.shape[-1], "width": x.shape[-1]}
