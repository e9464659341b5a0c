"""Blocks, hashes and attention over them."""

import numpy as np
import pytest
import torch
from naive import request

from prairie.engine.hot_rows import HotView
from prairie.engine.kv_cache import BlockPool, KVCache, root_hash
from prairie.engine.paged_attend import Bucket, PagedAttend
from prairie.engine.request import Sequence
from prairie.ops.attention import CAUSAL, Sight, attention_reference


def sequence(ids, row=-1, **key) -> Sequence:
    made = Sequence(
        request("r", ids), arrival=0, seed=0, max_length=99, stop_ids=frozenset(), stream=None, lora=None,
        root_hash=root_hash(**({"weights_hash": "w", "adapter_hash": None, "template_hash": "t", "salt": ""} | key)),
    )  # fmt: skip
    made.row = row
    return made


def cache(tokens=64, block_size=4, max_batch=8, **shape) -> KVCache:
    shape = {"layers": 2, "kv_heads": 2, "head_dim": 8} | shape
    return KVCache(tokens=tokens, block_size=block_size, max_batch=max_batch, **shape)


def test_the_least_recently_used_block_goes_first():
    pool = BlockPool(3)
    first, second, third = pool.take(), pool.take(), pool.take()
    for block, name in ((first, b"1"), (second, b"2"), (third, b"3")):
        pool.publish(block, name)
    pool.give_back([second])
    pool.give_back([first])
    pool.give_back([third])
    assert pool.find(b"2") == second
    pool.give_back([second])
    assert [pool.take(), pool.take()] == [first, third]
    assert pool.find(b"1") is None and pool.find(b"3") is None and pool.find(b"2") == second
    assert pool.available == 0


def test_blank_blocks_are_taken_before_known_ones():
    pool = BlockPool(4)
    known = pool.take()
    pool.publish(known, b"known")
    pool.give_back([known])
    for _ in range(3):
        assert pool.take() != known
    assert pool.find(b"known") == known


@pytest.mark.parametrize(
    "other", [{"weights_hash": "v"}, {"adapter_hash": "a"}, {"template_hash": "u"}, {"salt": "s"}], ids=str
)
def test_equal_tokens_are_shared_only_under_an_equal_key(other):
    subject, ids = cache(), list(range(10))
    one = sequence(ids)
    subject.seat(one, 0)
    subject.grow(one, 10)
    subject.publish(one, 0, 10)
    same, different = sequence(ids), sequence(ids, **other)
    subject.match_prefix(same)
    subject.match_prefix(different)
    assert same.blocks == one.blocks[:2] and same.computed == 8
    assert different.blocks == [] and different.computed == 0
    late = sequence([*ids[:5], 99, *ids[6:]])
    subject.match_prefix(late)
    assert late.blocks == one.blocks[:1], "a block after another token is another block"
    subject.pool.check([one, same, different, late])


def test_the_last_token_is_always_left_to_compute():
    subject, ids = cache(), list(range(8))
    one = sequence(ids)
    subject.seat(one, 0)
    subject.grow(one, 8)
    subject.publish(one, 0, 8)
    subject.free(one)
    again = sequence(ids)
    subject.match_prefix(again)
    assert again.computed == 4


def test_only_full_blocks_become_known():
    subject, ids = cache(), list(range(8))
    one = sequence(ids)
    subject.seat(one, 0)
    subject.grow(one, 8)
    subject.publish(one, 0, 3)
    subject.publish(one, 3, 7)
    two = sequence([*ids, 8])
    subject.match_prefix(two)
    assert two.computed == 4


@pytest.mark.parametrize("hot", [True, False], ids=["hot", "gathered"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
def test_attention_equals_the_reference_while_rows_grow(heads, hot):
    """Rows of very different length, fed in random pieces, in random order, on scattered blocks; one layer sees all,
    one a window, one through a cap."""
    sights = [CAUSAL, Sight(window=11), Sight(softcap=0.7), Sight(window=40, softcap=2.0)]
    layers = range(len(sights))
    H, K = heads
    D, rng = 8, np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    subject = cache(tokens=1024, kv_heads=K, head_dim=D, layers=len(sights))
    subject.hot.most = subject.hot.most if hot else 0
    rng.shuffle(subject.pool._blank)
    lengths = [1, 2, 9, 30, 31, 77, 150]
    rows = [sequence([0] * n) for n in lengths]
    for row, s in zip(rng.permutation(8)[: len(rows)], rows, strict=True):
        subject.seat(s, int(row))
    q, k, v = (
        [[torch.randn(n, heads, D, generator=generator) for n in lengths] for _ in layers] for heads in (H, K, K)
    )
    wanted = [
        [attention_reference(q[x][i], k[x][i], v[x][i], [n], sights[x]) for i, n in enumerate(lengths)] for x in layers
    ]
    used_hot = 0
    while True:
        going = [i for i in rng.permutation(len(rows)) if rows[i].computed < lengths[i]]
        if not going:
            break
        going = going[: rng.integers(1, len(going) + 1)]
        pieces = [min(int(rng.choice((1, 1, 1, 2, 17))), lengths[i] - rows[i].computed) for i in going]
        for i, piece in zip(going, pieces, strict=True):
            subject.grow(rows[i], rows[i].computed + piece)
        starts = [rows[i].computed for i in going]
        attend = PagedAttend(subject, np.array([rows[i].row for i in going]), np.array(starts), np.array(pieces))
        used_hot += any(isinstance(part, HotView) for _, part in attend.parts)
        assert attend.positions_N.tolist() == [
            p for start, piece in zip(starts, pieces, strict=True) for p in range(start, start + piece)
        ]
        for layer in layers:
            new = [
                torch.cat([x[layer][i][s : s + n] for i, s, n in zip(going, starts, pieces, strict=True)])
                for x in (q, k, v, wanted)
            ]
            torch.testing.assert_close(attend(layer, *new[:3], sights[layer]), new[3], atol=2e-6, rtol=1e-5)
        for i, piece in zip(going, pieces, strict=True):
            rows[i].computed += piece
    assert (used_hot > 5) == hot
    subject.pool.check(rows)


def test_a_bucket_does_not_pay_for_one_long_row():
    subject = cache(tokens=16 * 600, max_batch=64)
    subject.hot.most = 0
    rows = [sequence([0] * n) for n in [500] * 2 + [20] * 60]
    for row, s in enumerate(rows):
        subject.seat(s, row)
        subject.grow(s, len(s.ids))
    starts = np.array([len(s.ids) - 1 for s in rows])
    attend = PagedAttend(subject, np.arange(62), starts, np.ones(62, dtype=np.int64))
    (few, _, longest), (many, _, shortest) = (part.shape for _, part in attend.parts)
    assert (few + many, longest, shortest) == (62, 500, 20) and few <= 4
    subject.hot.most = 512
    attend = PagedAttend(subject, np.arange(62), starts, np.ones(62, dtype=np.int64))
    assert [(type(part), part.shape) for _, part in attend.parts] == [(HotView, (62, 20)), (Bucket, (2, 1, 500))]
