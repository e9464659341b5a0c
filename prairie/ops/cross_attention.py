"""Attention of each row over the tokens of another row: a decoder's looks at what an encoder made (arXiv 1706.03762).

Not here: attention inside a row (`attention`).

Legend: N query tokens of all rows, M tokens looked at, B rows, T and S their padded lengths, H heads, K key/value
heads, D size of a head, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Project = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Hidden states (M, W) to keys (M, K, D) and values (M, K, D) of one layer."""
ROW_WORK = 2048
"""Queries times tokens looked at of a row, on average, from which a CPU goes through uneven rows one by one: then what
padding and its mask cost is more than what each call does."""


class Memory:
    """The hidden states that an encoder made of each row, for the same rows of a decoder to look at.

    With `keep`, each layer's keys and values are made once and kept: for decoding token by token.
    """

    def __init__(
        self, hidden_MW: Tensor, lengths: Sequence[int], query_lengths: Sequence[int], keep: bool = False
    ) -> None:
        if len(lengths) != len(query_lengths):
            raise ValueError(f"{len(query_lengths)} rows cannot look at {len(lengths)} others")
        self.hidden_MW, self.lengths, self.query_lengths = hidden_MW, list(lengths), list(query_lengths)
        self.even = len(set(self.lengths)) == 1
        self.keep = keep
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        work = sum(read * asked for read, asked in zip(self.lengths, self.query_lengths, strict=True))
        on_cpu = hidden_MW.device.type == "cpu"
        self.one_by_one = on_cpu and not (keep or self.even) and work >= ROW_WORK * len(self.lengths)

    @cached_property
    def seen_B11S(self) -> Tensor:
        """Which places hold a token to look at."""
        return _held(self.lengths, self.hidden_MW.device)[:, None, None]

    @cached_property
    def real_BT(self) -> Tensor:
        """Which places hold a query."""
        return _held(self.query_lengths, self.hidden_MW.device)

    def __call__(self, layer: int, q_NHD: Tensor, project: Project) -> Tensor:
        """o_NHD: each token's mix of the values of its own row; scale is 1/sqrt(D)."""
        if self.one_by_one:
            k_MKD, v_MKD = project(self.hidden_MW)
            rows = zip(
                q_NHD.split(self.query_lengths), k_MKD.split(self.lengths), v_MKD.split(self.lengths), strict=True
            )
            return torch.cat([_mixed(*(x.transpose(0, 1) for x in row)).transpose(0, 1) for row in rows])
        if layer in self.kept:
            k_BKSD, v_BKSD = self.kept[layer]
        else:
            k_BKSD, v_BKSD = (_padded(x_MKD, self.lengths) for x_MKD in project(self.hidden_MW))
            if self.keep:
                self.kept[layer] = k_BKSD, v_BKSD
        o_BHTD = _mixed(_padded(q_NHD, self.query_lengths), k_BKSD, v_BKSD, None if self.even else self.seen_B11S)
        return o_BHTD.transpose(1, 2)[self.real_BT]


def _mixed(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=q.shape[-3] != k.shape[-3])


def _held(lengths: list[int], device: torch.device) -> Tensor:
    """(B, longest) bool"""
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]


def _padded(x_NHD: Tensor, lengths: list[int]) -> Tensor:
    """(B, H, T, D)"""
    return pad_sequence(x_NHD.split(lengths), batch_first=True).transpose(1, 2)
