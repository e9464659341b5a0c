"""Products with weights: a linear layer, and the low-rank change of it that LoRA (arXiv 2106.09685) and DoRA
(arXiv 2402.09353) learn.

Not here: which parts of a model carry an adapter (`models.lora`), weights in fewer bits (`packed`), the vocabulary's
head (`ops.loss`).

Legend: N tokens, I input columns, O output columns, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def adapt_rows(y_NO: Tensor, x_NI: Tensor, changes: Sequence[tuple[LowRank, slice]]) -> Tensor:
    """What `adapt` makes of y with each change on its own tokens, as one operator: nothing of the size of y or x is
    copied for each change, forward or backward. For changes without a gain; writes into `y_NO`."""
    tensors = [tensor for change, _ in changes for tensor in (change.a_RI, change.b_OR)]
    out: Tensor = _AdaptRows.apply(y_NO, x_NI, [rows for _, rows in changes], *tensors)
    return out


class _AdaptRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_NO: Tensor, x_NI: Tensor, rows: list[slice], *tensors: Tensor) -> Tensor:
        pairs = [(a.to(y_NO.dtype), b.to(y_NO.dtype)) for a, b in zip(tensors[0::2], tensors[1::2], strict=True)]
        inner = [x_NI[part].to(y_NO.dtype) @ a_RI.T for part, (a_RI, _) in zip(rows, pairs, strict=True)]
        for part, u_NR, (_, b_OR) in zip(rows, inner, pairs, strict=True):
            y_NO[part].addmm_(u_NR, b_OR.T)
        ctx.mark_dirty(y_NO)
        ctx.save_for_backward(x_NI, *tensors, *inner)
        ctx.rows = rows
        return y_NO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """With u = x A^T: dB = dy^T u, du = dy B, dA = du^T x, and x gains du A. The gradient of y is dy itself."""
        (dy_NO,), rows = grads, ctx.rows
        x_NI, *rest = ctx.saved_tensors
        tensors, inner = rest[: 2 * len(rows)], rest[2 * len(rows) :]
        dx_NI = torch.zeros_like(x_NI) if ctx.needs_input_grad[1] else None
        found: list[Tensor | None] = []
        for i, part in enumerate(rows):
            a_RI, b_OR, dy, x = tensors[2 * i], tensors[2 * i + 1], dy_NO[part], x_NI[part]
            wants_a, wants_b = ctx.needs_input_grad[3 + 2 * i : 5 + 2 * i]
            du_NR = dy @ b_OR.to(dy.dtype)
            found.append((du_NR.T @ x.to(dy.dtype)).to(a_RI.dtype) if wants_a else None)
            found.append((dy.T @ inner[i]).to(b_OR.dtype) if wants_b else None)
            if dx_NI is not None:
                dx_NI[part] += (du_NR @ a_RI.to(dy.dtype)).to(dx_NI.dtype)
        return dy_NO, dx_NI, None, *found


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
