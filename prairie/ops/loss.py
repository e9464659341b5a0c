"""The vocabulary's end: cross entropy and log probabilities straight from hidden states.

Only supervised tokens get logits, in chunks, so the (N, V) matrix never exists as a whole; the gradient is made while
they are there (the idea of Liger Kernel, arXiv 2410.10989), so logits are made once.
A chunk's logits lie with the vocabulary as rows: the three products with a large vocabulary run at the speed of square
ones so, and a third slower the other way round (docs/performance.md). They are raised to e^logit by tiles, as soon as
a tile is made and while it is in the cache; nothing is divided by the sums but a chunk's few hidden states.
Not here: averaging (the caller divides by the whole step's count), masks other than label -100.

Legend: N tokens, S supervised tokens, C tokens of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prairie.ops import elementwise

IGNORED = -100
"""Label of a token that is not supervised."""

CHUNK_NUMBERS = 1 << 24
"""Logits held at once where the vocabulary allows it: 64 MB in float32. With fewer tokens in a chunk the products are
slow, as the vocabulary's matrix is read for each."""
LEAST_CHUNK = 256
ALIGNED = 16
"""Each row of logits begins at a multiple of so many numbers: a cache line. Products into others are a third slower."""
MOST_CHUNK = 512
TILE_NUMBERS = 1 << 21
"""Logits of one tile of the vocabulary: 8 MB in float32 stay in the last cache until they are raised."""
KEPT_NUMBERS = 1 << 27
"""Up to so many exponentials (512 MB) are kept from the forward to the backward pass of log probabilities, where the
vocabulary's matrix learns: a quarter less work."""
SUMS = 1e-20, 1e30
"""Between these a sum of e^logit is exact to the last bits and what is made of it is finite; beyond them the largest
logit is taken off first."""
RARE = 1e-30
"""An e^logit below this is near float32's end; its logarithm is taken from the logit instead."""


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk: int | None = None, softcap: float = 0.0
) -> Tensor:
    """SUM over supervised tokens of -log softmax(hidden @ weight.T)[label], a float32 scalar; logits are capped by
    `softcap` (`ops.elementwise.softcap`) if it is above 0.

    `chunk` is the number of tokens whose logits are held at once. Differentiable in hidden and weight; a frozen
    weight costs nothing.
    """
    chunk = chunk or chunk_of(len(weight_VD))
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, chunk, softcap)


def linear_logprobs(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk: int | None = None, softcap: float = 0.0
) -> Tensor:
    """(N,) float32 log p(label) of every token, 0 where the label is -100. Differentiable in hidden and weight."""
    return _LinearLogprobs.apply(hidden_ND, weight_VD, labels_N, chunk or chunk_of(len(weight_VD)), softcap)


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


def chunk_of(vocabulary: int) -> int:
    """How many tokens have logits at once."""
    return min(MOST_CHUNK, max(LEAST_CHUNK, CHUNK_NUMBERS // vocabulary))


def _chunks(count: int, most: int) -> list[slice]:
    """`count` tokens in as few chunks as may be, of like size."""
    pieces = max(1, -(-count // most))
    each = -(-count // (pieces * ALIGNED)) * ALIGNED
    return [slice(start, min(start + each, count)) for start in range(0, count, max(1, each))]


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


class _Raised(NamedTuple):
    """The logits of a chunk as exponentials, to what sum, and what the gradient needs."""

    exps_VC: Tensor
    """e^(logit - shift of the token)."""
    sums_C: Tensor
    logs_C: Tensor
    """log p(label)."""
    slope_VC: Tensor | None
    """How a capped logit changes with the logit before it."""


def _raised(hidden_CD: Tensor, weight_VD: Tensor, labels_C: Tensor, cap: float, room_VC: Tensor) -> _Raised:
    """`room_VC` is where the exponentials are to be; both inputs have the dtype that products are computed in."""
    tokens_C = torch.arange(len(labels_C), device=labels_C.device)
    if weight_VD.dtype == torch.float32 and weight_VD.device.type == "cpu" and not cap:
        sums_C = torch.zeros(len(hidden_CD))
        rows = max(1, TILE_NUMBERS // len(hidden_CD))
        for weight, tile in zip(weight_VD.split(rows), room_VC.split(rows), strict=True):
            sums_C += torch.mm(weight, hidden_CD.T, out=tile).exp_().sum(0)
        if bool(((sums_C > SUMS[0]) & (sums_C < SUMS[1])).all()):
            picked_C = room_VC[labels_C, tokens_C]
            logs_C = (picked_C / sums_C).log()
            rare = (picked_C < RARE).nonzero()[:, 0]
            if len(rare):
                logs_C[rare] = (hidden_CD[rare] * weight_VD[labels_C[rare]]).sum(1) - sums_C[rare].log()
            return _Raised(room_VC, sums_C, logs_C, None)
    slope_VC = None
    if weight_VD.dtype == torch.float32:
        torch.mm(weight_VD, hidden_CD.T, out=room_VC)
    else:
        room_VC.copy_(weight_VD @ hidden_CD.T)
    if cap:
        room_VC.copy_(_capped(room_VC, cap))
        slope_VC = 1 - (room_VC / cap).square()
    picked_C = room_VC.sub_(room_VC.amax(0))[labels_C, tokens_C]
    sums_C = room_VC.exp_().sum(0)
    return _Raised(room_VC, sums_C, picked_C - sums_C.log(), slope_VC)


def _slopes(raised: _Raised, labels_C: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """g_VC and f_C: the gradient of -log p(label) by the logits is g times f of the token. Written over the
    exponentials; in half precision f is 1, as sums may be beyond its range."""
    exps_VC, sums_C, _, slope_VC = raised
    factors_C = sums_C.reciprocal()
    if dtype != torch.float32:
        exps_VC *= factors_C
        sums_C, factors_C = torch.ones_like(sums_C), torch.ones_like(factors_C)
    tokens_C = torch.arange(len(labels_C), device=labels_C.device)
    exps_VC[labels_C, tokens_C] -= sums_C
    if slope_VC is not None:
        exps_VC *= slope_VC
    return exps_VC.to(dtype), factors_C


class _Head:
    """What both losses do with the chunks of a batch: the weight, in the dtype of products, and one room for logits."""

    def __init__(self, hidden_SD: Tensor, weight_VD: Tensor, chunk: int, cap: float) -> None:
        self.hidden_SD, self.weight, self.cap = hidden_SD, weight_VD, cap
        self.parts = _chunks(len(hidden_SD), chunk)
        self._room: Tensor | None = None

    def raised(self, part: slice, labels_S: Tensor, *, keep: bool = False) -> _Raised:
        """The exponentials of one chunk; the next chunk is written over them unless they are to `keep`."""
        hidden_CD = self.hidden_SD[part]
        width = -(-len(hidden_CD) // ALIGNED) * ALIGNED
        room = None if keep else self._room
        if room is None or room.shape[1] != width:
            room = torch.empty(len(self.weight), width, dtype=torch.float32, device=hidden_CD.device)
        if not keep:
            self._room = room
        given = hidden_CD.to(self.weight.dtype), self.weight, labels_S[part], self.cap
        return _raised(*given, room[:, : len(hidden_CD)])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk: int, cap: float) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_SD, labels_S, places_S = _supervised(hidden_ND, labels_N)
        head = _Head(hidden_SD, _working(weight_VD), chunk, cap)
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_SD = torch.empty_like(hidden_SD) if wants_hidden else None
        grad_VD = _Sum(weight_VD) if wants_weight else None
        for part in head.parts:
            raised = head.raised(part, labels_S)
            total -= raised.logs_C.sum()
            if grad_SD is None and grad_VD is None:
                continue
            slopes_VC, factors_C = _slopes(raised, labels_S[part], head.weight.dtype)
            if grad_SD is not None:
                grad_SD[part] = (slopes_VC.T @ head.weight) * factors_C[:, None]
            if grad_VD is not None:
                grad_VD.add(slopes_VC, hidden_SD[part], factors_C)
        ctx.grads = grad_SD, None if grad_VD is None else grad_VD.value, places_S
        ctx.count = len(labels_N)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (grad_SD, grad_VD, places_S), scale = _taken(ctx), grads[0]
        grad_ND = None if grad_SD is None else _spread(grad_SD.mul_(scale), places_S, ctx.count)
        return grad_ND, None if grad_VD is None else grad_VD.mul_(scale), None, None, None


class _LinearLogprobs(torch.autograd.Function):
    """A token's gradient is known only in the backward pass, but for a factor: what is made of the hidden states is
    made in the forward pass. That of the weight needs the exponentials once more: they are kept, or made again if
    they are too many."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk: int, cap: float) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_SD, labels_S, places_S = _supervised(hidden_ND, labels_N)
        head = _Head(hidden_SD, _working(weight_VD), chunk, cap)
        keep = wants_weight and len(labels_S) * len(weight_VD) <= KEPT_NUMBERS
        logprobs_S = torch.empty(len(labels_S), dtype=torch.float32, device=hidden_ND.device)
        unit_SD = torch.empty_like(hidden_SD) if wants_hidden else None
        kept: list[tuple[Tensor, Tensor]] = []
        for part in head.parts:
            raised = head.raised(part, labels_S, keep=keep)
            logprobs_S[part] = raised.logs_C
            if not (wants_hidden or keep):
                continue
            slopes_VC, factors_C = _slopes(raised, labels_S[part], head.weight.dtype)
            if unit_SD is not None:
                unit_SD[part] = (slopes_VC.T @ head.weight) * factors_C[:, None]
            if keep:
                kept.append((slopes_VC, factors_C))
        ctx.grads, ctx.count = (unit_SD, kept), len(labels_N)
        ctx.save_for_backward(hidden_SD, weight_VD, labels_S, places_S)
        ctx.chunk, ctx.cap, ctx.working = chunk, cap, head.weight.dtype
        if places_S is None:
            return logprobs_S
        return logprobs_S.new_zeros(len(labels_N)).index_copy_(0, places_S, logprobs_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        unit_SD, kept = _taken(ctx)
        hidden_SD, weight_VD, labels_S, places_S = ctx.saved_tensors
        head = _Head(hidden_SD, weight_VD.to(ctx.working), ctx.chunk, ctx.cap)
        pull_S = -(grads[0] if places_S is None else grads[0].index_select(0, places_S))
        grad_VD = _Sum(weight_VD) if ctx.needs_input_grad[1] else None
        for index, part in enumerate(head.parts if grad_VD is not None else []):
            slopes_VC, factors_C = (
                kept[index] if kept else _slopes(head.raised(part, labels_S), labels_S[part], head.weight.dtype)
            )
            assert grad_VD is not None
            grad_VD.add(slopes_VC, hidden_SD[part], factors_C * pull_S[part])
        grad_ND = None
        if unit_SD is not None:
            grad_ND = _spread(unit_SD.mul_(pull_S[:, None]), places_S, ctx.count)
        return grad_ND, None if grad_VD is None else grad_VD.value, None, None, None


class _Sum:
    """The gradient of the vocabulary's matrix, chunk by chunk; the first one sets it."""

    def __init__(self, weight_VD: Tensor) -> None:
        self._weight_VD = weight_VD
        self._sum_VD: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """(V, D)"""
        return torch.zeros_like(self._weight_VD) if self._sum_VD is None else self._sum_VD

    def add(self, slopes_VC: Tensor, hidden_CD: Tensor, factors_C: Tensor) -> None:
        """value += slopes @ (hidden times each token's factor)."""
        scaled_CD = (hidden_CD * factors_C[:, None]).to(slopes_VC.dtype)
        if self._sum_VD is None:
            self._sum_VD = (slopes_VC @ scaled_CD).to(self._weight_VD.dtype)
        elif self._sum_VD.dtype == slopes_VC.dtype:
            self._sum_VD.addmm_(slopes_VC, scaled_CD)
        else:
            self._sum_VD += slopes_VC @ scaled_CD


def _taken(ctx: Any) -> Any:
    """What the forward pass kept, which the backward pass writes over: it can be had once."""
    grads, ctx.grads = ctx.grads, None
    if grads is None:
        raise RuntimeError("the gradient of the vocabulary's loss was already taken; make its forward pass again")
    return grads


def _working(weight: Tensor) -> Tensor:
    """The weight in the dtype that products are computed in: autocast's when it is on."""
    kind = weight.device.type
    return weight.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else weight
