"""Keys and values of all running sequences in fixed blocks of one pool, shared between equal prefixes.

A full block is known by a hash that chains over (weights, adapter, template, salt) and all tokens up to its end, so
two sequences share it exactly if everything that shaped its content is the same; after a swap of weights or adapter
nothing old can be found (vllm#42125 and its kin). Blocks are counted by reference; free blocks keep their content until
they are needed, the least recently used go first. Paging: arXiv 2309.06180.

Not here: who gets blocks when there are too few (`scheduler`), how tokens look back into them (`paged_attend`).

Shapes: K kv heads, D head dim.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from prairie.engine.hot_rows import JUST_SEATED, HotRows
from prairie.engine.request import Sequence


def root_hash(weights_hash: str, adapter_hash: str | None, template_hash: str, salt: str, turned_as: int = 0) -> bytes:
    """Where a block chain starts: everything but the tokens that shapes keys and values. `turned_as` as in
    `models.rope.alike`."""
    return sha256(repr((weights_hash, adapter_hash, template_hash, salt, turned_as)).encode()).digest()


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
        self.store = lazy_zeros((layers, 2, blocks, block_size, kv_heads, head_dim), dtype, self.device)
        self.by_block = [(layer[0], layer[1]) for layer in self.store]
        self.by_slot = [(keys.flatten(0, 1), values.flatten(0, 1)) for keys, values in self.by_block]
        self.hot = HotRows(self.by_slot, self.tables, block_size)

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
        self.hot.held[row] = JUST_SEATED
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


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, committed as they are first written. Not garbage: NaN times an attention weight of 0 is NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
