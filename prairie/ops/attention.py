"""Causal attention over packed rows, and rotary positions.

Tokens are flat: the rows of a batch lie one behind the other, nothing is padded outside this file.
Not here: the paged cache that serving uses (the engine brings its own `Attend`), weights, masks other than causal.

Legend: N tokens of all rows, B rows of a bucket, T padded length of a bucket, H query heads, K key/value heads,
D size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attend(Protocol):
    """What a Transformer asks of whoever holds the context: where each token stands, and what it sees."""

    positions_N: Tensor

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        """Returns o_NHD: each token's mix of the values it may see, in layer `layer`; scale is 1/sqrt(D)."""
        ...


def attention_reference(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, lengths: Sequence[int]) -> Tensor:
    """The plain form of `PackedDocuments`: one row after the other, softmax written out. Slow, for tests."""
    groups = q_NHD.shape[1] // k_NKD.shape[1]
    rows, start = [], 0
    for length in lengths:
        q, k, v = (x[start : start + length].transpose(0, 1) for x in (q_NHD, k_NKD, v_NKD))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores_HTT = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        unseen_TT = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        weights_HTT = scores_HTT.float().masked_fill(unseen_TT, float("-inf")).softmax(-1).to(q.dtype)
        rows.append((weights_HTT @ v).transpose(0, 1))
        start += length
    return torch.cat(rows) if rows else torch.empty_like(q_NHD)


class PackedDocuments:
    """Causal attention inside each row of a flat batch; no row sees another.

    Rows of one length are only reshaped. Otherwise rows of like length are padded together into a few buckets; the
    index tensors are made once here and serve every layer.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.lengths = [int(length) for length in lengths]
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"rows must hold at least one token, got lengths {self.lengths[:8]}")
        lengths_R = torch.tensor(self.lengths)
        starts_R = lengths_R.cumsum(0) - lengths_R
        count = int(lengths_R.sum())
        positions_N = torch.arange(count) - starts_R.repeat_interleave(lengths_R)
        self.positions_N = positions_N.to(device)
        self.equal = len(set(self.lengths)) == 1
        self.buckets: list[tuple[int, int]] = [(len(self.lengths), self.lengths[0])] if self.equal else []
        if self.equal:
            return
        slots: list[Tensor] = []  # token held by each padded place, -1 for none
        for rows in buckets_of(self.lengths):
            longest = max(self.lengths[r] for r in rows)
            self.buckets.append((len(rows), longest))
            places_T = torch.arange(longest)
            rows_B = torch.tensor(rows)
            tokens_BT = starts_R[rows_B, None] + places_T
            slots.append(torch.where(places_T < lengths_R[rows_B, None], tokens_BT, -1).flatten())
        token_of_P = torch.cat(slots)
        empty_P = token_of_P < 0
        place_of_N = torch.empty(count, dtype=torch.long)
        place_of_N[token_of_P[~empty_P]] = (~empty_P).nonzero()[:, 0]
        self.token_of_P = token_of_P.clamp_min(0).to(device)
        self.place_of_N = place_of_N.to(device)
        self.empty_places = empty_P.nonzero()[:, 0].to(device)

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        """o_NHD for every token; `layer` is not needed, there is no cache."""
        if self.equal:
            rows, length = self.buckets[0]
            return _causal(q_NHD, k_NKD, v_NKD, rows, length)
        q, k, v = (_Pad.apply(x, self) for x in (q_NHD, k_NKD, v_NKD))
        outs, start = [], 0
        for rows, length in self.buckets:
            part = slice(start, start + rows * length)
            outs.append(_causal(q[part], k[part], v[part], rows, length))
            start += rows * length
        return _Unpad.apply(torch.cat(outs) if len(outs) > 1 else outs[0], self)


def buckets_of(lengths: Sequence[int]) -> list[list[int]]:
    """Groups row numbers so that rows of like length share a bucket: padding stays below a fifth, buckets few."""
    order = sorted(range(len(lengths)), key=lambda r: -lengths[r])
    buckets: list[list[int]] = []
    for row in order:
        if buckets and lengths[row] >= 0.8 * lengths[buckets[-1][0]] - 4:
            buckets[-1].append(row)
        else:
            buckets.append([row])
    return buckets


def _causal(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, rows: int, length: int) -> Tensor:
    """Causal attention of `rows` rows of one length."""
    q, k, v = (x.view(rows, length, *x.shape[1:]).transpose(1, 2) for x in (q_NHD, k_NKD, v_NKD))
    grouped = q.shape[1] != k.shape[1]
    o_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return o_BHTD.transpose(1, 2).reshape(q_NHD.shape)


class _Pad(torch.autograd.Function):
    """Flat tokens to bucket places; empty places hold some token, causality keeps them unseen."""

    @staticmethod
    def forward(ctx: Any, x_N: Tensor, packed: PackedDocuments) -> Tensor:
        ctx.packed = packed
        return x_N.index_select(0, packed.token_of_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.packed.place_of_N), None


class _Unpad(torch.autograd.Function):
    """Bucket places back to flat tokens; in backward, empty places get a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, x_P: Tensor, packed: PackedDocuments) -> Tensor:
        ctx.packed = packed
        return x_P.index_select(0, packed.place_of_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_P = grads[0].index_select(0, ctx.packed.token_of_P)
        return grad_P.index_fill_(0, ctx.packed.empty_places, 0.0), None


def rotary_angles(positions_N: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each (N, 1, D/2) float32, of RoFormer's rotation (arXiv 2104.09864)."""
    angles = positions_N.to(torch.float32)[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x_NHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each head by its token's position; the pair of column i is i + D/2 (Hugging Face's layout)."""
    first, second = x_NHD.chunk(2, dim=-1)
    cos, sin = cos.to(x_NHD.dtype), sin.to(x_NHD.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
