"""Attention of a serving step: every token looks back into the paged cache.

Prompt chunks and single tokens of many sequences are mixed, and look back in one of three ways: a prompt that begins in
this step sees only itself (`ops.attention.PackedDocuments`); single tokens of like length look into `HotRows`, where
nothing need be gathered; all others gather their blocks out of the pool, in buckets of like size.
Not here: who holds which block (`kv_cache`).

Shapes: N tokens of the step, flat; S sequences; B sequences of a bucket; n queries and L keys of each, padded; M tokens
of a part; H heads, K kv heads, G = H/K, D head dim.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from prairie.engine.kv_cache import KVCache
from prairie.ops.attention import CAUSAL, PackedDocuments, Sight
from prairie.ops.elementwise import softcap

BUCKET_SLACK = 1024
"""Padded keys that cost less than the calls of one more bucket (measured: about 50 us a layer on one core)."""


class Part(Protocol):
    """How some of the step's tokens look back. The pool holds the new keys and values already."""

    def __call__(self, layer: int, q_MHD: Tensor, k_MKD: Tensor, v_MKD: Tensor, sight: Sight, /) -> Tensor:
        """(M, H, D)"""
        ...


class PagedAttend:
    """`ops.attention.Attend` over the paged cache: stores the step's keys and values, then every token looks back.

    `rows`, `starts`, `counts` (S,): sequence s brings its tokens starts[s] .. starts[s] + counts[s], in this order.
    `lengths` (S,): the tokens of each sequence that are known, those of later steps included.
    """

    def __init__(
        self,
        cache: KVCache,
        rows: np.ndarray,
        starts: np.ndarray,
        counts: np.ndarray,
        lengths: np.ndarray | None = None,
    ) -> None:
        self.cache = cache
        size = cache.block_size
        first = np.cumsum(counts) - counts
        of = np.repeat(np.arange(len(counts)), counts)
        positions = starts[of] + np.arange(len(of)) - first[of]
        slots = cache.tables[rows[of], positions // size] * size + positions % size
        self.lengths_N = (starts + counts if lengths is None else lengths)[of]
        self.positions_N = torch.from_numpy(positions).to(cache.device)
        self.slots_N = torch.from_numpy(slots).to(cache.device)
        self.parts: list[tuple[Tensor | slice, Part]] = []

        def add(members: np.ndarray, part: Part) -> None:
            mine = np.zeros(len(counts), dtype=bool)
            mine[members] = True
            self.parts.append((_slice_or_index(np.flatnonzero(mine[of]), cache.device), part))

        single = np.flatnonzero(counts == 1)
        fresh = np.flatnonzero((counts > 1) & (starts == 0))
        other = np.flatnonzero((counts > 1) & (starts > 0))
        taken = cache.hot.choose(rows[single], starts[single] + 1)
        if taken.any():
            members, single = single[taken], single[~taken]
            add(members, cache.hot.view(rows[members], starts[members] + 1))
        if len(fresh):
            add(fresh, PackedDocuments(counts[fresh].tolist(), cache.device))
        for rest in (single, other):
            for members in _split(rest, counts[rest], (starts + counts)[rest]):
                add(members, Bucket(cache, rows[members], starts[members], counts[members]))

    @property
    def row_lengths_N(self) -> Tensor:
        return torch.from_numpy(self.lengths_N).to(self.cache.device)

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, sight: Sight = CAUSAL) -> Tensor:
        """(N, H, D); keys and values of the N tokens are in the cache afterwards."""
        keys, values = self.cache.by_slot[layer]
        keys.index_copy_(0, self.slots_N, k_NKD)
        values.index_copy_(0, self.slots_N, v_NKD)
        if len(self.parts) == 1:
            return self.parts[0][1](layer, q_NHD, k_NKD, v_NKD, sight)
        o_NHD = torch.empty_like(q_NHD)
        for tokens, part in self.parts:
            o_NHD[tokens] = part(layer, q_NHD[tokens], k_NKD[tokens], v_NKD[tokens], sight)
        return o_NHD


class Bucket:
    """Sequences of like size that gather their blocks and attend in one call: B of them, n queries and L keys each."""

    def __init__(self, cache: KVCache, rows: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> None:
        """`rows`, `starts`, `counts` (B,)"""
        self.cache, device = cache, cache.device
        B, n, L = len(rows), int(counts.max()), int((starts + counts).max())
        self.shape = (B, n, L)
        blocks = cache.tables[rows, : -(-L // cache.block_size)]
        self.blocks = torch.from_numpy(blocks.ravel()).to(device)
        offsets = np.minimum(np.arange(n), counts[:, None] - 1)
        self.places_Bn = torch.from_numpy(starts[:, None] + offsets)
        self.masks: dict[tuple[Sight, int], Tensor | None] = {}
        """What `_mask` has made."""
        self.padded: Tensor | None = None
        """(B*n,) the token behind each place, the last of a sequence again for its padding; None: there is none."""
        self.real: Tensor | None = None
        """(M,) the place of each token."""
        if (counts < n).any():
            first = np.cumsum(counts) - counts
            self.padded = torch.from_numpy((first[:, None] + offsets).ravel()).to(device)
            self.real = torch.from_numpy(np.flatnonzero(np.arange(n) < counts[:, None])).to(device)

    def __call__(self, layer: int, q_MHD: Tensor, k_MKD: Tensor, v_MKD: Tensor, sight: Sight = CAUSAL) -> Tensor:
        """(M, H, D). The G heads that share a kv head stand as extra queries: nothing is repeated."""
        (B, n, L), (H, D) = self.shape, q_MHD.shape[1:]
        keys, values = self.cache.by_block[layer]
        K = keys.shape[2]
        G = H // K
        k_BKLD, v_BKLD = (
            x.index_select(0, self.blocks).view(B, -1, K, D)[:, :L].transpose(1, 2) for x in (keys, values)
        )
        q = q_MHD if self.padded is None else q_MHD.index_select(0, self.padded)
        q = q.reshape(B, n, K, G, D).permute(0, 2, 3, 1, 4).reshape(B, K, G * n, D)
        mask = self._mask(sight.within(L), G)
        if sight.softcap:
            scores = softcap(q @ k_BKLD.mT * D**-0.5, sight.softcap)
            scores = scores if mask is None else scores + mask
            o = scores.float().softmax(-1).to(q.dtype) @ v_BKLD
        else:
            o = scaled_dot_product_attention(q, k_BKLD, v_BKLD, attn_mask=mask)
        o = o.view(B, K, G, n, D).permute(0, 3, 1, 2, 4).reshape(B * n, H, D)
        return o if self.real is None else o.index_select(0, self.real)

    def _mask(self, sight: Sight, G: int) -> Tensor | None:
        """(B, 1, G * n, L) added to the scores, 0 or -inf; None if all is seen."""
        if (sight, G) not in self.masks:
            B, n, L = self.shape
            unseen_BnL = ~sight.visible(self.places_Bn[:, :, None], torch.arange(L))
            mask = None
            if unseen_BnL.any():
                additive = torch.zeros((B, 1, 1, n, L), dtype=self.cache.store.dtype)
                additive.masked_fill_(unseen_BnL[:, None, None], float("-inf"))
                mask = additive.expand(B, 1, G, n, L).reshape(B, 1, G * n, L).to(self.cache.device)
            self.masks[sight, G] = mask
        return self.masks[sight, G]


def _split(members: np.ndarray, counts: np.ndarray, context: np.ndarray) -> list[np.ndarray]:
    """Splits sequences (S,) into buckets of like size, where padding would waste more than another bucket costs."""

    def cost(n: np.ndarray, L: np.ndarray) -> np.ndarray:
        return L * (1 + n // 8)  # in keys read: the gather, and the products of n queries with them

    if not len(members):
        return []
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
