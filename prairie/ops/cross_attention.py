"""Attention of each row over the tokens of another row: a decoder's looks at what an encoder made (arXiv 1706.03762).

Not here: attention inside a row (`attention`).

Legend: N query tokens of all rows, M tokens looked at, B rows, T and S their padded lengths, H heads, K key/value
heads, D size of a head, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Project = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Hidden states (M, W) to keys (M, K, D) and values (M, K, D) of one layer."""


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
        device = hidden_MW.device
        lengths_B1 = torch.tensor(self.lengths, device=device)[:, None]
        self.seen_B11S = (torch.arange(max(self.lengths), device=device) < lengths_B1)[:, None, None]
        self.even = len(set(self.lengths)) == 1
        queries_B1 = torch.tensor(self.query_lengths, device=device)[:, None]
        self.real_BT = torch.arange(max(self.query_lengths), device=device) < queries_B1
        self.keep = keep
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, q_NHD: Tensor, project: Project) -> Tensor:
        """o_NHD: each token's mix of the values of its own row; scale is 1/sqrt(D)."""
        if layer in self.kept:
            k_BKSD, v_BKSD = self.kept[layer]
        else:
            k_BKSD, v_BKSD = (_padded(x_MKD, self.lengths) for x_MKD in project(self.hidden_MW))
            if self.keep:
                self.kept[layer] = k_BKSD, v_BKSD
        q_BHTD = _padded(q_NHD, self.query_lengths)
        o_BHTD = F.scaled_dot_product_attention(
            q_BHTD, k_BKSD, v_BKSD, attn_mask=None if self.even else self.seen_B11S,
            enable_gqa=q_BHTD.shape[1] != k_BKSD.shape[1],
        )  # fmt: skip
        return o_BHTD.transpose(1, 2)[self.real_BT]


def _padded(x_NHD: Tensor, lengths: list[int]) -> Tensor:
    """(B, H, T, D)"""
    return pad_sequence(x_NHD.split(lengths), batch_first=True).transpose(1, 2)
