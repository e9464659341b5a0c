"""Learned numbers by how far apart two tokens of a row stand, added to the scores of attention (T5, arXiv 1910.10683).

Not here: the attention that adds them (`attention`).

Legend: R buckets of distances, H heads, T queries, S keys.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def distance_buckets(distances: Tensor, buckets: int, furthest: int, causal: bool) -> Tensor:
    """The bucket of each distance (place of the key minus place of the query).

    Half of the buckets are for one distance each, the others grow logarithmically up to `furthest`, beyond which all
    distances are alike. Unless `causal`, half of all buckets are for keys behind the query.
    """
    behind = torch.zeros_like(distances)
    if causal:
        distances = -distances.clamp_max(0)
    else:
        buckets //= 2
        behind = (distances > 0) * buckets
        distances = distances.abs()
    exact = buckets // 2
    share = torch.log(distances.float() / exact) / math.log(furthest / exact)
    far = (exact + (share * (buckets - exact)).long()).clamp_max(buckets - 1)
    return behind + torch.where(distances < exact, distances, far)


class RelativeBias:
    """The numbers of one forward pass; each rectangle of places is looked up once and serves every layer."""

    def __init__(self, table_RH: Tensor, furthest: int, causal: bool) -> None:
        self.table_RH, self.furthest, self.causal = table_RH, furthest, causal
        self._made: dict[tuple[int, int, int], Tensor] = {}

    def __call__(self, start: int, stop: int, length: int) -> Tensor:
        """(H, T, S) for queries at places start..stop and keys at 0..length."""
        key = (start, stop, length)
        if key not in self._made:
            queries_T, keys_S = torch.arange(start, stop), torch.arange(length)
            distances_TS = (keys_S - queries_T[:, None]).to(self.table_RH.device)
            buckets_TS = distance_buckets(distances_TS, len(self.table_RH), self.furthest, self.causal)
            self._made[key] = F.embedding(buckets_TS, self.table_RH).permute(2, 0, 1)
        return self._made[key]
