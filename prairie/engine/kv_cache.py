"""Keys and values of all running sequences in fixed blocks of one pool, shared between equal prefixes.

A full block is known by a hash that chains over (weights, adapter, template, salt) and all tokens up to its end, so
two sequences share it exactly if everything that shaped its content is the same; after a swap of weights or adapter
nothing old can be found (vllm#42125 and its kin). Blocks are counted by reference; free blocks keep their content until
they are needed, the least recently used go first. Paging: arXiv 2309.06180.

Not here: who gets blocks when there are too few (`scheduler`), the attention arithmetic of training (`ops.attention`).

Shapes: N tokens of the step, flat; S sequences; B sequences of a bucket; n queries and L keys of each, padded;
H heads, K kv heads, G = H/K, D head dim.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from prairie.engine.request import Sequence

BUCKET_SLACK = 1024
"""Padded keys that cost less than the calls of one more bucket (measured: about 50 us a layer on one core)."""


def root_hash(weights_hash: str, adapter_hash: str | None, template_hash: str, salt: str) -> bytes:
    """Where a block chain starts: everything but the tokens that shapes keys and values."""
    return sha256(repr((weights_hash, adapter_hash, template_hash, salt)).encode()).digest()


class BlockPool:
    """Who holds which block. Every block is held (references > 0), free and known, or free and blank."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.references = [0] * blocks
        self._blank = list(range(blocks - 1, -1, -1))
        self._known_free: OrderedDict[int, None] = OrderedDict()
        """Least recently used first."""
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Blocks that `take` could hand out."""
        return len(self._blank) + len(self._known_free)

    def take(self) -> int:
        """A block nobody holds; its content is forgotten. The caller has looked at `available`."""
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._known_free.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        self.references[block] = 1
        return block

    def find(self, block_hash: bytes) -> int | None:
        """The block of this content, now held by one more; None if it is not here."""
        block = self._block_of.get(block_hash)
        if block is not None:
            if self.references[block] == 0:
                del self._known_free[block]
            self.references[block] += 1
        return block

    def publish(self, block: int, block_hash: bytes) -> None:
        """From now on `find` knows this block; of two with equal content the first stays."""
        if block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def give_back(self, blocks: Iterable[int]) -> None:
        """One holder less for each; the first given back is the first to be evicted."""
        for block in blocks:
            self.references[block] -= 1
            if self.references[block] == 0:
                if block in self._hash_of:
                    self._known_free[block] = None
                else:
                    self._blank.append(block)

    def forget_all(self) -> None:
        """No content is known any more: what was promised may not have been written."""
        self._blank.extend(self._known_free)
        self._known_free.clear()
        self._block_of.clear()
        self._hash_of.clear()

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Raises AssertionError unless every block is accounted for exactly once; for tests."""
        held = Counter(block for sequence in sequences for block in sequence.blocks)
        assert [held[block] for block in range(self.blocks)] == self.references, "references do not match the holders"
        free = [*self._blank, *self._known_free]
        assert len(free) == len(set(free)), "a block is free twice"
        assert set(free) == {b for b in range(self.blocks) if self.references[b] == 0}, "a block leaked"
        assert {h: b for b, h in self._hash_of.items()} == self._block_of, "the two directions of the index disagree"
        assert not set(self._blank) & set(self._hash_of), "a blank block is known"


class KVCache:
    """The pool's tensors, and the block tables of the sequences that run."""

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        tokens: int,
        max_batch: int,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        blocks = max(1, tokens // block_size)
        self.block_size = block_size
        self.tokens = blocks * block_size
        self.reuse = True
        """False: nothing is shared between sequences."""
        self.pool = BlockPool(blocks)
        self.tables = np.zeros((max_batch, blocks), dtype=np.int64)
        """Row of a running sequence -> its blocks, in order; entries behind the last are stale but valid."""
        self.device = torch.device(device)
        # (layer, key or value, block, slot in the block, K, D)
        self.store = _zeros((layers, 2, blocks, block_size, kv_heads, head_dim), dtype, self.device)
        self._blocks_of = [(layer[0], layer[1]) for layer in self.store]
        self._slots_of = [(keys.flatten(0, 1), values.flatten(0, 1)) for keys, values in self._blocks_of]

    @staticmethod
    def bytes_per_token(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return 2 * layers * kv_heads * head_dim * dtype.itemsize

    def match_prefix(self, sequence: Sequence) -> None:
        """Gives a sequence the known blocks of its beginning; at least its last token is left to compute."""
        assert not sequence.blocks and sequence.computed == 0
        if not self.reuse:
            return
        for block_hash in self._hashes(sequence, (len(sequence.ids) - 1) // self.block_size):
            block = self.pool.find(block_hash)
            if block is None:
                break
            sequence.blocks.append(block)
        sequence.computed = len(sequence.blocks) * self.block_size

    def lacks(self, sequence: Sequence, length: int) -> int:
        """Blocks missing for the first `length` tokens."""
        return -(-length // self.block_size) - len(sequence.blocks)

    def grow(self, sequence: Sequence, length: int) -> None:
        """Blocks for the first `length` tokens, from the pool; the caller has looked at `lacks` and `available`."""
        for _ in range(self.lacks(sequence, length)):
            block = self.pool.take()
            self.tables[sequence.row, len(sequence.blocks)] = block
            sequence.blocks.append(block)

    def seat(self, sequence: Sequence, row: int) -> None:
        """The sequence runs in `row` from now on."""
        sequence.row = row
        self.tables[row, : len(sequence.blocks)] = sequence.blocks

    def publish(self, sequence: Sequence, before: int, after: int) -> None:
        """Makes the blocks known that become full when the tokens `before` .. `after` are computed.

        May be called before the forward pass that computes them: in each layer all keys and values of a step are
        written before any is read, so sequences of one step can share what the step itself computes.
        """
        first, last = before // self.block_size, after // self.block_size
        if self.reuse and last > first:
            hashes = self._hashes(sequence, last)
            for index in range(first, last):
                self.pool.publish(sequence.blocks[index], hashes[index])

    def free(self, sequence: Sequence) -> None:
        """Gives all blocks back; the end of a sequence is evicted before its beginning, which others may share."""
        self.pool.give_back(reversed(sequence.blocks))
        sequence.blocks.clear()
        sequence.computed = 0

    def _hashes(self, sequence: Sequence, count: int) -> list[bytes]:
        hashes, size = sequence.block_hashes, self.block_size
        while len(hashes) < count:
            start = len(hashes) * size
            before = hashes[-1] if hashes else sequence.root_hash
            hashes.append(sha256(before + array("q", sequence.ids[start : start + size]).tobytes()).digest())
        return hashes[:count]


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
        self.buckets = [
            self._bucket(members, rows, starts, counts, first) for members in _group(counts, starts + counts)
        ]

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        """(N, H, D); keys and values of the N tokens are in the cache afterwards."""
        keys, values = self.cache._slots_of[layer]
        keys.index_copy_(0, self.slots_N, k_NKD)
        values.index_copy_(0, self.slots_N, v_NKD)
        first = self.buckets[0]
        if len(self.buckets) == 1 and first.real is None and isinstance(first.queries, slice):
            return self._look_back(layer, first, q_NHD)
        o_NHD = torch.empty_like(q_NHD)
        for bucket in self.buckets:
            o = self._look_back(layer, bucket, q_NHD[bucket.queries])
            o_NHD[bucket.answers] = o if bucket.real is None else o[bucket.real]
        return o_NHD

    def _look_back(self, layer: int, bucket: Bucket, q_MHD: Tensor) -> Tensor:
        """(B*n, H, D) -> (B*n, H, D). The G heads that share a kv head stand as extra queries: nothing is repeated."""
        B, n, L = bucket.shape
        keys, values = self.cache._blocks_of[layer]
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


def _group(counts: np.ndarray, context: np.ndarray) -> list[np.ndarray]:
    """Splits sequences (S,) into buckets of like size, so that a short one does not pay for a long one."""
    everyone = np.arange(len(counts))
    single = counts == 1
    groups = []
    for members in (everyone[single], everyone[~single]):
        if len(members):
            groups += _split(members, counts[members], context[members])
    return groups


def _split(members: np.ndarray, counts: np.ndarray, context: np.ndarray) -> list[np.ndarray]:
    """Cuts where padding would waste more than another bucket costs."""

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


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, committed as they are first written. Not garbage: NaN times an attention weight of 0 is NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
