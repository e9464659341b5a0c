"""A second copy of the running sequences' keys and values, laid out for one query per sequence.

Gathering blocks out of the pool costs more than the attention itself when a sequence brings one token (measured on one
core: 0.98 ms a layer with gathering, 0.37 ms without, 128 sequences of 48 tokens). Here every row of the batch has its
keys in one piece, so all rows attend by two batched products and nothing is copied but the new token. The pool stays
the truth: a row is filled from it when it is first looked at, and may be dropped at any time.
Not here: sharing, blocks (`kv_cache`), prompts and long outliers (`paged_attend`).

Shapes: R rows of the view, S of them with a token in this step; L keys; H heads, K kv heads, G = H/K, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from prairie.ops.attention import CAUSAL, Sight
from prairie.ops.elementwise import softcap

HOT_BYTES = 256 << 20
"""Memory for all layers and rows; longer contexts than fit are read from the pool."""
JUST_SEATED = -1
GATHERING = 2.5
"""What a key costs that is gathered from the pool and then read, in keys that are only read."""


class HotRows:
    """Rows x capacity keys and values of every layer, float32 on a CPU; elsewhere nothing is hot."""

    def __init__(self, pool: Sequence[tuple[Tensor, Tensor]], tables: np.ndarray, block_size: int) -> None:
        """`pool`: of each layer the keys and the values, (slots, K, D); `tables` (rows, blocks): where in it the tokens
        of a row are. Not the cache that has them: each holding the other, hundreds of megabytes would outlive their
        engine until Python looks for cycles."""
        self.pool, self.tables, self.block_size = pool, tables, block_size
        max_batch, keys = len(tables), pool[0][0]
        self.held = np.zeros(max_batch, dtype=np.int64)
        """How many tokens of each row are here, JUST_SEATED until the first step of a sequence is over."""
        slots, heads, head_dim = keys.shape
        fits = HOT_BYTES // (2 * len(pool) * max_batch * heads * head_dim * 4)
        usable = keys.dtype == torch.float32 and keys.device.type == "cpu"
        self.most = min(fits, slots) // block_size * block_size if usable else 0
        """The longest context that may be hot."""
        self.capacity = 0
        self.keys = self.values = torch.empty(0)

    def choose(self, rows: np.ndarray, context: np.ndarray) -> np.ndarray:
        """(S,) bool: which sequences, each with one new token and `context` tokens in all, should look in here.

        The view is as long as the longest chosen one and as high as the highest row, so a few long ones are left out
        where that makes the whole cheaper. A sequence is not chosen in its first step: the blocks that it shares may
        be computed by another one in this very step, and rows are filled before it.
        """
        known = self.held[rows] != JUST_SEATED
        self.held[rows[~known]] = 0
        if not known.all():
            chosen = np.zeros(len(rows), dtype=bool)
            chosen[known] = self.choose(rows[known], context[known])
            return chosen
        if not len(rows) or self.most == 0:
            return np.zeros(len(rows), dtype=bool)
        by_length = np.sort(context)
        left_out = context.sum() - by_length.cumsum()
        cost = (int(rows.max()) + 1) * by_length + GATHERING * left_out
        cost[by_length > self.most] = np.inf
        best = int(cost.argmin())
        if cost[best] > GATHERING * context.sum():
            return np.zeros(len(rows), dtype=bool)
        return context <= by_length[best]

    def view(self, rows: np.ndarray, context: np.ndarray) -> HotView:
        """The rows of this step, filled up to their last token but one."""
        longest = int(context.max())
        if longest > self.capacity:
            self._grow(longest)
        behind = self.held[rows] < context - 1
        if behind.any():
            self._fill(rows[behind], context[behind] - 1)
        self.held[rows] = context
        return HotView(self, rows, context)

    def _grow(self, longest: int) -> None:
        """More room, at least twice as much; everything is filled anew from the pool."""
        size, (_, heads, head_dim) = self.block_size, self.pool[0][0].shape
        wanted = max(longest, 2 * self.capacity, 64)
        self.capacity = min(-(-wanted // size) * size, self.most)
        shape = (len(self.pool), len(self.held), heads, self.capacity, head_dim)
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)
        self.held[:] = 0

    def _fill(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """Copies what is missing of the first `tokens` of each row out of the pool: all of a row that was not looked at
        yet, a few tokens of one that had drafts meanwhile."""
        size, missing = self.block_size, tokens - self.held[rows]
        of = np.repeat(np.arange(len(rows)), missing)
        positions = np.arange(len(of)) + (tokens - missing.cumsum())[of]
        slots = torch.from_numpy(self.tables[rows[of], positions // size] * size + positions % size)
        places = self.places(rows[of], positions)
        for layer, sides in enumerate(self.pool):
            for side, hot in zip(sides, (self.keys[layer], self.values[layer]), strict=True):
                hot.view(-1, hot.shape[-1]).index_copy_(0, places, side.index_select(0, slots).flatten(0, 1))

    def places(self, rows: np.ndarray, positions: np.ndarray) -> Tensor:
        """(M*K,) where tokens go in a layer seen as (rows * K * capacity, D)."""
        heads, capacity = self.keys.shape[2:4]
        of_row = rows[:, None] * heads + np.arange(heads)
        return torch.from_numpy((of_row * capacity + positions[:, None]).ravel())


class HotView:
    """The first R rows and L keys of the hot rows, for one step."""

    def __init__(self, hot: HotRows, rows: np.ndarray, context: np.ndarray) -> None:
        self.hot = hot
        R, L = int(rows.max()) + 1, int(context.max())
        self.shape = (R, L)
        self.rows_S = torch.from_numpy(rows)
        self.places = hot.places(rows, context - 1)
        """Of the new tokens."""
        self.full = len(rows) == R and bool((rows == np.arange(R)).all())
        """Every row has a token, in the order of the rows."""
        self.last_R = torch.full((R,), L)
        """The place of each row's new token; of rows without one, such that nothing they see matters."""
        self.last_R[self.rows_S] = torch.from_numpy(context) - 1
        self.masks: dict[Sight, Tensor] = {}

    def __call__(self, layer: int, q_SHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, sight: Sight = CAUSAL) -> Tensor:
        """Stores the keys and values of the new tokens; (S, H, D) what they see."""
        (R, L), (H, D) = self.shape, q_SHD.shape[1:]
        keys, values = self.hot.keys[layer], self.hot.values[layer]
        keys.view(-1, D).index_copy_(0, self.places, k_SKD.reshape(-1, D))
        values.view(-1, D).index_copy_(0, self.places, v_SKD.reshape(-1, D))
        K, G = keys.shape[1], H // keys.shape[1]
        mask = self._mask(sight.within(L), K, G)
        q_RHD = q_SHD if self.full else q_SHD.new_zeros(R, H, D).index_copy_(0, self.rows_S, q_SHD)
        keys_, values_ = (x[:R].flatten(0, 1)[:, :L] for x in (keys, values))
        q = q_RHD.reshape(R * K, G, D)
        if sight.softcap:
            scores = softcap(torch.bmm(q, keys_.transpose(1, 2)) * D**-0.5, sight.softcap).add_(mask)
        else:
            scores = torch.baddbmm(mask, q, keys_.transpose(1, 2), alpha=D**-0.5)
        o_RHD = torch.bmm(scores.softmax(-1), values_).view(R, H, D)
        return o_RHD if self.full else o_RHD.index_select(0, self.rows_S)

    def _mask(self, sight: Sight, K: int, G: int) -> Tensor:
        """(R * K, G, L) added to the scores, 0 or -inf."""
        if sight not in self.masks:
            R, L = self.shape
            unseen_RL = ~sight.visible(self.last_R[:, None], torch.arange(L))
            unseen_RL[self.last_R == L] = False  # a softmax over nothing would be no number
            mask_RL = torch.zeros(R, L).masked_fill_(unseen_RL, float("-inf"))
            self.masks[sight] = mask_RL[:, None, None, :].expand(R, K, G, L).reshape(R * K, G, L)
        return self.masks[sight]
