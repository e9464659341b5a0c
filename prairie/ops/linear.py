"""Products with weights: a linear layer, and the low-rank change of it that LoRA (arXiv 2106.09685) and DoRA
(arXiv 2402.09353) learn.

Not here: which parts of a model carry an adapter (`models.lora`), weights in fewer bits (`packed`), the vocabulary's
head (`ops.loss`).

Legend: N tokens, I input columns, O output columns, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prairie.ops.packed import PackedWeight


def linear(x_NI: Tensor, weight_OI: Tensor | PackedWeight, bias_O: Tensor | None = None) -> Tensor:
    """(N, O) x W^T + b, however the weight is kept."""
    if not isinstance(weight_OI, PackedWeight):
        return F.linear(x_NI, weight_OI, bias_O)
    y_NO = weight_OI.product(x_NI)
    return y_NO if bias_O is None else y_NO + bias_O


class LowRank(NamedTuple):
    """What an adapter does to the output of one linear layer: y * gain + shift + x A^T B^T."""

    a_RI: Tensor
    b_OR: Tensor
    """Holds the scale, and the gain where there is one."""
    gain_O: Tensor | None = None
    """DoRA: the learnt length of each row of the weight over the length that it has; None is 1 (LoRA)."""
    shift_O: Tensor | None = None
    """DoRA: gives the layer's bias back what the gain took from it."""


def adapt(y_NO: Tensor, x_NI: Tensor, change: LowRank, rows: slice | None) -> Tensor:
    """The changed output for all N tokens, or for the tokens `rows` only, in the dtype of y.

    May write into `y_NO`, which must be the caller's own fresh output.
    """
    a_RI, b_OR = change.a_RI.to(y_NO.dtype), change.b_OR.to(y_NO.dtype)
    if rows is None:
        return torch.addmm(_turned(y_NO, change), x_NI.to(y_NO.dtype) @ a_RI.T, b_OR.T)
    if change.gain_O is not None:
        y_NO[rows] = _turned(y_NO[rows].clone(), change)  # a copy: the backward pass wants what stood there
    y_NO[rows].addmm_(x_NI[rows].to(y_NO.dtype) @ a_RI.T, b_OR.T)
    return y_NO


class Addition(NamedTuple):
    """What an adapter adds to some columns of a linear layer's output: scale * x A^T B^T."""

    a_RI: Tensor
    b_OR: Tensor
    columns: slice
    scale: float = 1.0
    sources_O: Tensor | None = None
    """Column i of those belongs to row sources[i] of B; None: to row i."""


def adapted_linear(
    x_NI: Tensor,
    weight_OI: Tensor | PackedWeight,
    bias_O: Tensor | None,
    additions: Sequence[tuple[slice, Sequence[Addition]]],
) -> Tensor:
    """(N, O) x W^T + b, and on each slice of the tokens what its adapter adds there, as one operator.

    Products of adapters are made where the layer's own result lies, forward and backward, so nothing of the size of x
    or y is copied or added for them; those of one adapter that read x are one product.
    """
    pieces = [piece for _, its in additions for piece in its]
    tensors = [tensor for piece in pieces for tensor in (piece.a_RI, piece.b_OR)]
    out: Tensor
    if isinstance(weight_OI, PackedWeight) or weight_OI.requires_grad or (bias_O is not None and bias_O.requires_grad):
        out = _AdaptedLinear.apply(x_NI, linear(x_NI, weight_OI, bias_O), None, None, additions, *tensors)
    else:
        out = _AdaptedLinear.apply(x_NI, None, weight_OI, bias_O, additions, *tensors)
    return out


def adapted_linear_reference(
    x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, additions: Sequence[tuple[slice, Sequence[Addition]]]
) -> Tensor:
    """The plain form of `adapted_linear`."""
    y_NO = F.linear(x_NI, weight_OI, bias_O)
    for rows, pieces in additions:
        for a_RI, b_OR, columns, scale, sources_O in pieces:
            b_OR = b_OR if sources_O is None else b_OR[sources_O]
            added = torch.zeros_like(y_NO)
            added[rows, columns] = (x_NI[rows] @ a_RI.T @ b_OR.T) * scale
            y_NO = y_NO + added
    return y_NO


class _Place(NamedTuple):
    """Where a piece of an adapter stands: its inner columns, and what `Addition` says of it."""

    inner: slice
    columns: slice
    scale: float
    sources_O: Tensor | None
    dtype: torch.dtype

    def gradient_of_b(self, dy_NO: Tensor, u_NR: Tensor) -> Tensor:
        db_OR = (dy_NO.T @ u_NR).to(self.dtype)
        return db_OR if self.sources_O is None else torch.empty_like(db_OR).index_copy_(0, self.sources_O, db_OR)


class _Joined(NamedTuple):
    """The pieces of one adapter, in the dtype that is computed in."""

    a_QI: Tensor
    """All A one behind the other, each scaled: so every product is, and there are fewest numbers here."""
    b_OR: list[Tensor]
    """Their rows in the order of columns."""
    places: list[_Place]

    @classmethod
    def of(cls, pieces: Sequence[Addition], dtype: torch.dtype) -> _Joined:
        ends = accumulate(len(piece.a_RI) for piece in pieces)
        places = [
            _Place(slice(end - len(p.a_RI), end), *p[2:], p.a_RI.dtype) for end, p in zip(ends, pieces, strict=True)
        ]
        ordered = [p.b_OR if p.sources_O is None else p.b_OR.index_select(0, p.sources_O) for p in pieces]
        a_QI = torch.cat([piece.a_RI for piece in pieces]).to(dtype)
        return cls(_scaled(a_QI, places), [b_OR.to(dtype) for b_OR in ordered], places)


def _scaled(a_QI: Tensor, places: Sequence[_Place]) -> Tensor:
    """Each piece times its scale, in place."""
    if len({place.scale for place in places}) == 1:
        return a_QI.mul_(places[0].scale)
    for place in places:
        a_QI[place.inner].mul_(place.scale)
    return a_QI


class _AdaptedLinear(torch.autograd.Function):
    """With a frozen weight the layer's product is made here, otherwise `y_NO` is its fresh result."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        y_NO: Tensor | None,
        weight_OI: Tensor | None,
        bias_O: Tensor | None,
        additions: Sequence[tuple[slice, Sequence[Addition]]],
        *tensors: Tensor,
    ) -> Tensor:
        if y_NO is None:
            assert weight_OI is not None
            y_NO = F.linear(x_NI, weight_OI, bias_O)
        else:
            ctx.mark_dirty(y_NO)
        ctx.additions = []
        kept: list[Tensor] = []
        for rows, pieces in additions:
            joined, y_MO = _Joined.of(pieces, y_NO.dtype), y_NO[rows]
            u_MQ = x_NI[rows].to(y_NO.dtype) @ joined.a_QI.T
            for place, b_OR in zip(joined.places, joined.b_OR, strict=True):
                y_MO[:, place.columns].addmm_(u_MQ[:, place.inner], b_OR.T)
            ctx.additions.append((rows, joined.places))
            kept += (u_MQ, joined.a_QI, *joined.b_OR)
        ctx.save_for_backward(x_NI, weight_OI, *kept)
        return y_NO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """With A scaled and u = x A^T: dB = dy^T u, du = dy B, dA = scale du^T x, and x gains du A."""
        (dy_NO,) = grads
        x_NI, weight_OI, *rest = ctx.saved_tensors
        kept, wanted = iter(rest), iter(ctx.needs_input_grad[5:])
        dx_NI: Tensor | None = None
        if ctx.needs_input_grad[0]:
            like = torch.zeros_like if weight_OI is None else torch.empty_like
            dx_NI = like(x_NI, dtype=dy_NO.dtype)
            if weight_OI is not None:
                torch.mm(dy_NO, weight_OI.to(dy_NO.dtype), out=dx_NI)
        found: list[Tensor | None] = []
        for rows, places in ctx.additions:
            u_MQ, a_QI, dy_MO, x_MI = next(kept), next(kept), dy_NO[rows], x_NI[rows].to(dy_NO.dtype)
            du_MQ = torch.empty_like(u_MQ, dtype=dy_NO.dtype)
            for place in places:
                torch.mm(dy_MO[:, place.columns], next(kept), out=du_MQ[:, place.inner])
            da_QI = _scaled(du_MQ.T @ x_MI, places)
            for place in places:
                found.append(da_QI[place.inner].to(place.dtype) if next(wanted) else None)
                wants_b = next(wanted)
                found.append(place.gradient_of_b(dy_MO[:, place.columns], u_MQ[:, place.inner]) if wants_b else None)
            if dx_NI is not None:
                dx_NI[rows].addmm_(du_MQ, a_QI)
        gains = None if dx_NI is None else dx_NI.to(x_NI.dtype)
        return gains, dy_NO if ctx.needs_input_grad[1] else None, None, None, None, *found


def adapt_embedding(x_NO: Tensor, tokens_N: Tensor, change: LowRank, rows: slice | None) -> Tensor:
    """The changed embeddings of tokens. An embedding is the product of a one-hot token with its (O, I) transpose: here
    I is the vocabulary and O the width."""
    at = slice(None) if rows is None else rows
    found_NR = F.embedding(tokens_N[at], change.a_RI.T.to(x_NO.dtype))
    changed = torch.addmm(_turned(x_NO[at], change), found_NR, change.b_OR.T.to(x_NO.dtype))
    return changed if rows is None else torch.cat([x_NO[: rows.start], changed, x_NO[rows.stop :]])


def adapted_weight(weight_OI: Tensor, change: LowRank) -> Tensor:
    """The weight whose plain product is the changed output: gain * W + B A."""
    turned = weight_OI if change.gain_O is None else weight_OI * change.gain_O[:, None]
    return turned + change.b_OR @ change.a_RI


def row_lengths(weight_OI: Tensor) -> Tensor:
    """(O,) the length of each row of a weight."""
    return torch.linalg.vector_norm(weight_OI, dim=1)


def _turned(y_NO: Tensor, change: LowRank) -> Tensor:
    if change.gain_O is None:
        return y_NO
    gain_O = change.gain_O.to(y_NO.dtype)
    return y_NO * gain_O if change.shift_O is None else torch.addcmul(change.shift_O.to(y_NO.dtype), y_NO, gain_O)
