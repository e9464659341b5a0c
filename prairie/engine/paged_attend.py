"""Attention of a serving step: every token looks back into the paged cache.

Prompt chunks and single tokens of many sequences are mixed. Single tokens of like length look into `HotRows`, where
nothing need be gathered; the others into the pool, in buckets of like size.
Not here: who holds which block (`kv_cache`), the attention of training (`ops.attention`).

Shapes: N tokens of the step, flat; S sequences; B sequences of a bucket; n queries and L keys of each, padded;
H heads, K kv heads, G = H/K, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from prairie.engine.hot_rows import HotView
from prairie.engine.kv_cache import KVCache

BUCKET_SLACK = 1024
"""Padded keys that cost less than the calls of one more bucket (measured: about 50 us a layer on one core)."""


@dataclass(slots=True)
class Bucket:
    """Sequences that attend in one call: B of them, n queries and L keys each, padded."""

    shape: tuple[int, int, int]
    """B, n, L"""
    queries: Tensor | slice
    """(B*n,) which of the N tokens ask; a padded query repeats its sequence's last one."""
    blocks: Tensor
    """(B * blocks per sequence,)"""
    mask: Tensor | None
    """(B, 1, 1 or n, L) added to the scores: 0 or -inf."""
    real: Tensor | None
    """Which of the B*n queries are not padding; None: all."""
    answers: Tensor | slice
    """Where the real ones go among the N tokens."""


class PagedAttend:
    """`ops.attention.Attend` over the paged cache: stores the step's keys and values, then every token looks back.

    `rows`, `starts`, `counts` (S,): sequence s brings its tokens starts[s] .. starts[s] + counts[s], in this order.
    """

    def __init__(self, cache: KVCache, rows: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> None:
        self.cache = cache
        size = cache.block_size
        first = np.cumsum(counts) - counts
        if len(counts) == counts.sum():
            rows_N, positions = rows, starts
        else:
            of = np.repeat(np.arange(len(counts)), counts)
            rows_N, positions = rows[of], starts[of] + np.arange(len(of)) - first[of]
        slots = cache.tables[rows_N, positions // size] * size + positions % size
        self.positions_N = torch.from_numpy(positions).to(cache.device)
        self.slots_N = torch.from_numpy(slots).to(cache.device)
        everyone = np.arange(len(counts))
        single, several = everyone[counts == 1], everyone[counts > 1]
        taken = cache.hot.choose(rows[single], starts[single] + 1)
        self.hot: HotView | None = None
        self.hot_tokens: Tensor | slice = slice(0)
        if taken.any():
            members, single = single[taken], single[~taken]
            self.hot = cache.hot.view(rows[members], starts[members] + 1)
            self.hot_tokens = _slice_or_index(first[members], cache.device)
        self.buckets = [
            self._bucket(part, rows, starts, counts, first)
            for members in (single, several)
            if len(members)
            for part in _split(members, counts[members], (starts + counts)[members])
        ]

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        """(N, H, D); keys and values of the N tokens are in the cache afterwards."""
        keys, values = self.cache.by_slot[layer]
        keys.index_copy_(0, self.slots_N, k_NKD)
        values.index_copy_(0, self.slots_N, v_NKD)
        o_NHD = torch.empty_like(q_NHD)
        if self.hot is not None:
            of = self.hot_tokens
            o = self.hot.look_back(layer, q_NHD[of], k_NKD[of], v_NKD[of])
            if not self.buckets:
                return o
            o_NHD[of] = o
        for bucket in self.buckets:
            o = self._look_back(layer, bucket, q_NHD[bucket.queries])
            o_NHD[bucket.answers] = o if bucket.real is None else o[bucket.real]
        return o_NHD

    def _look_back(self, layer: int, bucket: Bucket, q_MHD: Tensor) -> Tensor:
        """(B*n, H, D) -> (B*n, H, D). The G heads that share a kv head stand as extra queries: nothing is repeated."""
        B, n, L = bucket.shape
        keys, values = self.cache.by_block[layer]
        H, (K, D) = q_MHD.shape[1], keys.shape[2:]
        G = H // K
        k_BLKD = keys.index_select(0, bucket.blocks).view(B, -1, K, D)[:, :L]
        v_BLKD = values.index_select(0, bucket.blocks).view(B, -1, K, D)[:, :L]
        q = q_MHD.reshape(B, n, K, G, D).permute(0, 2, 3, 1, 4).reshape(B, K, G * n, D)
        o = scaled_dot_product_attention(
            q, k_BLKD.transpose(1, 2), v_BLKD.transpose(1, 2), attn_mask=self._mask(bucket, G)
        )
        return o.view(B, K, G, n, D).permute(0, 3, 1, 2, 4).reshape(B * n, H, D)

    @staticmethod
    def _mask(bucket: Bucket, groups: int) -> Tensor | None:
        """(B, 1, G*n, L), made once a step."""
        mask = bucket.mask
        if mask is None:
            return None
        B, n, L = bucket.shape
        if mask.shape[2] != groups * n:
            mask = mask.unsqueeze(2).expand(B, 1, groups, n, L).reshape(B, 1, groups * n, L)
            bucket.mask = mask
        return mask

    def _bucket(
        self, members: np.ndarray, rows: np.ndarray, starts: np.ndarray, counts: np.ndarray, first: np.ndarray
    ) -> Bucket:
        device, counts, first = self.cache.device, counts[members], first[members]
        context = starts[members] + counts
        B, n, L = len(members), int(counts.max()), int(context.max())
        blocks = self.cache.tables[rows[members], : -(-L // self.cache.block_size)]
        offsets = np.minimum(np.arange(n), counts[:, None] - 1)
        queries = (first[:, None] + offsets).ravel()
        last_seen = (starts[members][:, None] + offsets)[:, :, None]
        hidden = np.arange(L) > last_seen
        mask = None
        if hidden.any():
            additive = torch.zeros((B, 1, n, L), dtype=self.cache.store.dtype)
            mask = additive.masked_fill_(torch.from_numpy(hidden).unsqueeze(1), float("-inf")).to(device)
        real = None
        answers = queries
        if n > 1 and (counts < n).any():
            real_np = np.flatnonzero((np.arange(n) < counts[:, None]).ravel())
            real, answers = torch.from_numpy(real_np).to(device), queries[real_np]
        return Bucket(
            shape=(B, n, L),
            queries=_slice_or_index(queries, device),
            blocks=torch.from_numpy(blocks.ravel()).to(device),
            mask=mask,
            real=real,
            answers=_slice_or_index(answers, device),
        )


def _split(members: np.ndarray, counts: np.ndarray, context: np.ndarray) -> list[np.ndarray]:
    """Splits sequences (S,) into buckets of like size, where padding would waste more than another bucket costs."""

    def cost(n: np.ndarray, L: np.ndarray) -> np.ndarray:
        return L * (1 + n // 8)  # in keys read: the gather, and the products of n queries with them

    padded = int(cost(counts.max(), context.max())) * len(members)
    if padded - int(cost(counts, context).sum()) <= BUCKET_SLACK:
        return [members]
    order = np.lexsort((context, counts))[::-1]
    groups, start, spent, n_max, L_max = [], 0, 0, 0, 0
    for i, (n, L) in enumerate(zip(counts[order].tolist(), context[order].tolist(), strict=True)):
        grown_n, grown_L = max(n_max, n), max(L_max, L)
        grown_spent = spent + L * (1 + n // 8)
        waste = grown_L * (1 + grown_n // 8) * (i + 1 - start) - grown_spent
        if i > start and waste > max(BUCKET_SLACK, grown_spent // 4):
            groups.append(np.sort(members[order[start:i]]))
            start, spent, n_max, L_max = i, L * (1 + n // 8), n, L
        else:
            spent, n_max, L_max = grown_spent, grown_n, grown_L
    return [*groups, np.sort(members[order[start:]])]


def _slice_or_index(index: np.ndarray, device: torch.device) -> Tensor | slice:
    if len(index) == int(index[-1]) - int(index[0]) + 1 and (len(index) == 1 or bool((np.diff(index) == 1).all())):
        return slice(int(index[0]), int(index[-1]) + 1)
    return torch.from_numpy(index).to(device)
