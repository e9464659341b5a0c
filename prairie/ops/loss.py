"""The vocabulary's end: cross entropy and log probabilities straight from hidden states.

Only supervised tokens get logits, in chunks, so the (N, V) matrix never exists as a whole; the gradient is made in the
forward pass (the idea of Liger Kernel, arXiv 2410.10989), so logits are made once.
Not here: averaging (the caller divides by the whole step's count), masks other than label -100.

Legend: N tokens, S supervised tokens, C tokens of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prairie.ops import elementwise

IGNORED = -100
"""Label of a token that is not supervised."""

CHUNK_NUMBERS = 1 << 20
"""Logits held at once where the vocabulary allows it: 4 MB in float32 stays near the cache of a CPU core."""
LEAST_CHUNK = 256
"""Fewer tokens at once make the products with a large vocabulary slow: its matrix is read for every chunk."""
RARE = 1e-30
"""Probabilities below this are near float32's end; their logarithm is taken from the logits instead."""


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk: int | None = None, softcap: float = 0.0
) -> Tensor:
    """SUM over supervised tokens of -log softmax(hidden @ weight.T)[label], a float32 scalar; logits are capped by
    `softcap` (`ops.elementwise.softcap`) if it is above 0.

    `chunk` is the number of tokens whose logits are held at once. Differentiable in hidden and weight; a frozen
    weight costs nothing.
    """
    chunk = chunk or _chunk_of(weight_VD)
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, chunk, softcap)


def linear_logprobs(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk: int | None = None, softcap: float = 0.0
) -> Tensor:
    """(N,) float32 log p(label) of every token, 0 where the label is -100. Differentiable in hidden and weight."""
    return _LinearLogprobs.apply(hidden_ND, weight_VD, labels_N, chunk or _chunk_of(weight_VD), softcap)


def linear_cross_entropy_reference(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, softcap: float = 0.0
) -> Tensor:
    """The plain form of `linear_cross_entropy`."""
    logits = _capped((hidden_ND @ weight_VD.T).float(), softcap)
    return F.cross_entropy(logits, labels_N, ignore_index=IGNORED, reduction="sum")


def linear_logprobs_reference(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, softcap: float = 0.0) -> Tensor:
    """The plain form of `linear_logprobs`."""
    logprobs = _capped((hidden_ND @ weight_VD.T).float(), softcap).log_softmax(-1)
    picked = logprobs.gather(1, labels_N.clamp_min(0)[:, None])[:, 0]
    return picked.where(labels_N != IGNORED, picked.new_zeros(()))


def _capped(logits: Tensor, cap: float) -> Tensor:
    return elementwise.softcap(logits, cap) if cap else logits


def _chunk_of(weight_VD: Tensor) -> int:
    return max(LEAST_CHUNK, CHUNK_NUMBERS // weight_VD.shape[0])


def _supervised(hidden_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden_SD, labels_S and their places (None when every token is supervised)."""
    places_S = (labels_N != IGNORED).nonzero()[:, 0]
    if len(places_S) == len(labels_N):
        return hidden_ND, labels_N, None
    return hidden_ND.index_select(0, places_S), labels_N.index_select(0, places_S), places_S


def _spread(grad_SD: Tensor, places_S: Tensor | None, count: int) -> Tensor:
    """Rows back to their places, zeros elsewhere."""
    if places_S is None:
        return grad_SD
    return grad_SD.new_zeros(count, grad_SD.shape[1]).index_copy_(0, places_S, grad_SD)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk: int, cap: float) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_SD, labels_S, places_S = _supervised(hidden_ND, labels_N)
        weight = _working(weight_VD)
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_SD = torch.empty_like(hidden_SD) if wants_hidden else None
        grad_VD = torch.zeros_like(weight_VD) if wants_weight else None
        for start in range(0, len(labels_S), chunk):
            part = slice(start, start + chunk)
            hidden_CD, labels_C1 = hidden_SD[part].to(weight.dtype), labels_S[part, None]
            logits_CV = _capped(hidden_CD @ weight.T, cap)
            slope_CV = 1 - (logits_CV / cap).square() if cap else None
            probs_CV = _softmax(logits_CV)
            picked_C1 = probs_CV.gather(1, labels_C1)
            total -= _logs(picked_C1, hidden_CD, weight, labels_C1, cap).sum()
            if grad_SD is None and grad_VD is None:
                continue
            probs_CV.scatter_(1, labels_C1, picked_C1 - 1.0)  # softmax - one-hot is the gradient of the logits
            if slope_CV is not None:
                probs_CV.mul_(slope_CV)
            grad_CV = probs_CV.to(weight.dtype)
            if grad_SD is not None:
                grad_SD[part] = grad_CV @ weight
            if grad_VD is not None:
                _add_product(grad_VD, grad_CV, hidden_CD)
        ctx.save_for_backward(grad_SD, grad_VD, places_S)
        ctx.count = len(labels_N)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_SD, grad_VD, places_S = ctx.saved_tensors
        scale = grads[0]
        grad_ND = None if grad_SD is None else _spread(grad_SD * scale, places_S, ctx.count)
        return grad_ND, None if grad_VD is None else grad_VD * scale, None, None, None


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk: int, cap: float) -> Tensor:
        hidden_SD, labels_S, places_S = _supervised(hidden_ND, labels_N)
        weight = _working(weight_VD)
        norm_S = torch.empty(len(labels_S), dtype=torch.float32, device=hidden_ND.device)
        picked_S = torch.empty_like(norm_S)
        for start in range(0, len(labels_S), chunk):
            part = slice(start, start + chunk)
            logits_CV = _capped((hidden_SD[part].to(weight.dtype) @ weight.T).float(), cap)
            norm_S[part] = logits_CV.logsumexp(1)
            picked_S[part] = logits_CV.gather(1, labels_S[part, None])[:, 0]
        ctx.save_for_backward(hidden_SD, weight_VD, labels_S, places_S, norm_S)
        ctx.count, ctx.chunk, ctx.cap, ctx.working = len(labels_N), chunk, cap, weight.dtype
        logprobs_S = picked_S - norm_S
        if places_S is None:
            return logprobs_S
        return logprobs_S.new_zeros(len(labels_N)).index_copy_(0, places_S, logprobs_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        # Logits are made a second time here: the gradient needs each token's weight, known only now.
        hidden_SD, weight_VD, labels_S, places_S, norm_S = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_S = grads[0] if places_S is None else grads[0].index_select(0, places_S)
        weight = weight_VD.to(ctx.working)
        grad_SD = torch.empty_like(hidden_SD) if wants_hidden else None
        grad_VD = torch.zeros_like(weight_VD) if wants_weight else None
        for start in range(0, len(labels_S), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            hidden_CD, grad_C1 = hidden_SD[part].to(weight.dtype), grad_S[part, None]
            logits_CV = _capped((hidden_CD @ weight.T).float(), ctx.cap)
            slope_CV = 1 - (logits_CV / ctx.cap).square() if ctx.cap else None
            grad_CV = logits_CV.sub_(norm_S[part, None]).exp_().mul_(-grad_C1)
            grad_CV.scatter_add_(1, labels_S[part, None], grad_C1)
            if slope_CV is not None:
                grad_CV.mul_(slope_CV)
            grad_CV = grad_CV.to(weight.dtype)
            if grad_SD is not None:
                grad_SD[part] = grad_CV @ weight
            if grad_VD is not None:
                _add_product(grad_VD, grad_CV, hidden_CD)
        return None if grad_SD is None else _spread(grad_SD, places_S, ctx.count), grad_VD, None, None, None


def _softmax(logits_CV: Tensor) -> Tensor:
    """float32 softmax of each row, written over the logits when they are float32."""
    logits_CV = logits_CV.float()
    return torch._softmax(logits_CV, -1, False, out=logits_CV)


def _logs(picked_C1: Tensor, hidden_CD: Tensor, weight: Tensor, labels_C1: Tensor, cap: float) -> Tensor:
    """log of the labels' probabilities; where these are too small to be exact, from the logits."""
    logs_C1 = picked_C1.log()
    rare = (picked_C1 < RARE).nonzero()[:, 0]
    if len(rare):
        logits = _capped((hidden_CD[rare] @ weight.T).float(), cap)
        logs_C1[rare] = logits.gather(1, labels_C1[rare]) - logits.logsumexp(1, keepdim=True)
    return logs_C1


def _add_product(grad_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
    """grad += grad_CV.T @ hidden, without a temporary when the dtypes agree."""
    if grad_VD.dtype == grad_CV.dtype == hidden_CD.dtype:
        grad_VD.addmm_(grad_CV.T, hidden_CD)
    else:
        grad_VD += grad_CV.T @ hidden_CD


def _working(weight: Tensor) -> Tensor:
    """The weight in the dtype that products are computed in: autocast's when it is on."""
    kind = weight.device.type
    return weight.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else weight
