"""The fast packed attention against the plain form, values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prairie.ops import attention
from prairie.ops.attention import PackedDocuments, Prefix, Sight, attention_reference, buckets_of, rotary_turns, rotate


def inputs(count: int, heads: int, kv_heads: int, size: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    shapes = [(count, heads, size), (count, kv_heads, size), (count, kv_heads, size)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def same_gradients(
    got: torch.Tensor, wanted: torch.Tensor, ours: list[torch.Tensor], plain: list[torch.Tensor], atol: float
) -> None:
    """Of a random sum of both results, in both sets of inputs."""
    seed = torch.randn(got.shape, generator=torch.Generator().manual_seed(9))
    (got * seed).sum().backward()
    (wanted * seed).sum().backward()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=atol)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("lengths", [[6, 6, 6], [1], [1, 30, 2, 29, 28, 11, 1], [150, 3], [130, 130], [64, 65, 128]])
@pytest.mark.parametrize("form", ["matrices", "small pieces", "kernel", "compiled"])
def test_packed_equals_reference(
    lengths: list[int], heads: int, kv_heads: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "kernel":
        monkeypatch.setattr(attention, "MATRIX_LENGTH", 0)
    if form == "small pieces":
        monkeypatch.setattr(attention, "CACHED_NUMBERS", 1000)
        monkeypatch.setattr(attention, "QUERY_BLOCK", 16)
    size = 16 if form == "compiled" else 8
    if form == "compiled":
        monkeypatch.setattr(attention, "COMPILED_WORK", 0)
    ours, plain = inputs(sum(lengths), heads, kv_heads, size), inputs(sum(lengths), heads, kv_heads, size)
    got = PackedDocuments(lengths)(0, *ours)
    wanted = attention_reference(*plain, lengths)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    same_gradients(got, wanted, ours, plain, atol=1e-5)


SIGHTS = {
    "window": Sight(window=9),
    "cap": Sight(softcap=0.8),
    "window and cap": Sight(window=20, softcap=2.0),
    "both ways": Sight(causal=False),
    "both ways, window": Sight(causal=False, window=7),
}


@pytest.mark.parametrize("sight", SIGHTS.values(), ids=SIGHTS.keys())
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("block", [8, 256])
@pytest.mark.parametrize("lengths", [[12, 12], [1, 30, 2, 29, 28, 11, 1]])
def test_every_sight_equals_reference(
    lengths: list[int], heads: int, kv_heads: int, sight: Sight, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SEEN_BLOCK", block)
    ours, plain = inputs(sum(lengths), heads, kv_heads), inputs(sum(lengths), heads, kv_heads)
    got = PackedDocuments(lengths)(0, *ours, sight)
    wanted = attention_reference(*plain, lengths, sight)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    same_gradients(got, wanted, ours, plain, atol=1e-5)
    causal = attention_reference(*plain, lengths)
    assert not torch.allclose(wanted, causal, atol=1e-3), "a sight that changes nothing proves nothing"


def test_a_window_that_holds_every_row_takes_the_fast_form(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.detach() for x in inputs(12, 2, 1))
    packed = PackedDocuments([5, 7])
    monkeypatch.setattr(packed, "_masked_attention", None)
    assert torch.equal(packed(0, q, k, v, Sight(window=7)), packed(0, q, k, v))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_any_lengths_equal_reference(lengths: list[int]) -> None:
    q, k, v = (x.detach() for x in inputs(sum(lengths), 2, 1))
    packed = PackedDocuments(lengths)
    torch.testing.assert_close(packed(0, q, k, v), attention_reference(q, k, v, lengths), rtol=1e-5, atol=1e-5)
    assert packed.positions_N.tolist() == [p for length in lengths for p in range(length)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=60))
def test_buckets_hold_every_row_once_with_little_padding(lengths: list[int]) -> None:
    buckets = buckets_of(lengths)
    assert sorted(row for bucket in buckets for row in bucket) == list(range(len(lengths)))
    padded = sum(len(bucket) * max(lengths[r] for r in bucket) for bucket in buckets)
    assert padded <= 1.5 * sum(lengths) + 16 * len(lengths)


def test_a_row_sees_neither_its_neighbour_nor_its_future() -> None:
    lengths = [5, 9, 5, 2]
    q, k, v = (x.detach() for x in inputs(sum(lengths), 2, 2))
    before = PackedDocuments(lengths)(0, q, k, v)
    for x in (k, v):
        x[9] = 100.0  # the fifth token of row 1
    after = PackedDocuments(lengths)(0, q, k, v)
    changed = (before != after).flatten(1).any(1).nonzero()[:, 0].tolist()
    assert changed == [9, 10, 11, 12, 13]


def test_empty_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        PackedDocuments([3, 0])


def test_pairs_lie_side_by_side() -> None:
    x = torch.arange(24).view(12, 2)
    together = attention.pairs_together(x, 6)
    assert together[:, 0].tolist() == [0, 6, 2, 8, 4, 10, 12, 18, 14, 20, 16, 22]
    assert attention.pairs_together(x, 6, 4)[:, 0].tolist() == [0, 4, 2, 6, 8, 10, 12, 16, 14, 18, 20, 22]


def test_split_and_rotate_equals_its_steps() -> None:
    columns = torch.randn(7, 8 * 6, generator=torch.Generator().manual_seed(1))
    turns = rotary_turns(torch.arange(7), torch.tensor([1.0, 0.1, 0.01]))
    seeds = torch.randn(7, 8, 6, generator=torch.Generator().manual_seed(2)).split([4, 2, 2], 1)
    grads = []
    for steps in (False, True):
        x = columns.clone().requires_grad_()
        if steps:
            q, k, v = x.view(7, 8, 6).split([4, 2, 2], 1)
            parts = (rotate(q, turns), rotate(k, turns), v)
        else:
            parts = attention.split_and_rotate(x, 4, 2, turns)
        torch.stack([(p * s).sum() for p, s in zip(parts, seeds, strict=True)]).sum().backward()
        grads.append((x.grad, torch.cat([p.detach() for p in parts], 1)))
    torch.testing.assert_close(grads[0], grads[1])
    first, second = columns.view(7, 8, 3, 2).unbind(-1)
    turned = torch.stack([first * turns.real - second * turns.imag, second * turns.real + first * turns.imag], -1)
    torch.testing.assert_close(grads[0][1][:, :6], turned.flatten(2)[:, :6])


def test_rotation_depends_on_distance_only() -> None:
    frequencies = 1.0 / 100.0 ** (torch.arange(0, 8, 2) / 8)
    q, k = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def product(i: int, j: int) -> float:
        turned = [rotate(x, rotary_turns(torch.tensor([p]), frequencies)) for x, p in ((q, i), (k, j))]
        return float((turned[0] * turned[1]).sum())

    assert product(3, 1) == pytest.approx(product(12, 10), abs=1e-4)
    assert product(3, 1) != pytest.approx(product(3, 2), abs=1e-4)
    assert product(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-5)


def expanded(x: torch.Tensor, lengths: list[int], prefixes: list[Prefix]) -> tuple[torch.Tensor, list[int], list[int]]:
    """Every row whole, with its own copy of what it goes on from; the lengths; where each own token then stands."""
    starts = [sum(lengths[:row]) for row in range(len(lengths))]
    tokens, places = [], []
    for start, length, prefix in zip(starts, lengths, prefixes, strict=True):
        tokens += range(starts[prefix.row], starts[prefix.row] + prefix.tokens)
        places += range(len(tokens), len(tokens) + length)
        tokens += range(start, start + length)
    return x[tokens], [p.tokens + n for p, n in zip(prefixes, lengths, strict=True)], places


SHARED = {
    "a pair": ([30, 9], [(0, 0), (0, 21)]),
    "whole rows": ([12, 5, 1], [(0, 0), (0, 12), (0, 12)]),
    "two prompts": ([90, 30, 28, 70, 9, 11, 7], [(0, 0), (0, 80), (0, 79), (0, 0), (3, 66), (3, 20), (0, 0)]),
    "a long one": ([200, 3, 90], [(0, 0), (0, 150), (0, 130)]),
    "none": ([7, 5], [(0, 0), (0, 0)]),
}


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("form", ["matrices", "small pieces", "kernel", "compiled"])
@pytest.mark.parametrize("case", SHARED)
def test_rows_that_go_on_from_one_equal_whole_rows(
    case: str, form: str, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "kernel":
        monkeypatch.setattr(attention, "MATRIX_LENGTH", 0)
    if form == "small pieces":
        monkeypatch.setattr(attention, "CACHED_NUMBERS", 1000)
        monkeypatch.setattr(attention, "QUERY_BLOCK", 16)
    size = 16 if form == "compiled" else 8
    if form == "compiled":
        monkeypatch.setattr(attention, "COMPILED_WORK", 0)
    lengths, prefixes = SHARED[case][0], [Prefix(*prefix) for prefix in SHARED[case][1]]
    ours, plain = inputs(sum(lengths), heads, kv_heads, size), inputs(sum(lengths), heads, kv_heads, size)
    packed = PackedDocuments(lengths, prefixes=prefixes)
    got = packed(0, *ours)
    whole, whole_lengths, places = expanded(torch.arange(sum(lengths)), lengths, prefixes)
    wanted = attention_reference(*(x[whole] for x in plain), whole_lengths)[places]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert packed.positions_N.tolist() == PackedDocuments(whole_lengths).positions_N[places].tolist()
    same_gradients(got, wanted, ours, plain, atol=1e-5)


def test_compiled_attention_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows longer than a block of keys, heads of 64 columns that share a key head, scores far above and below zero."""
    monkeypatch.setattr(attention, "COMPILED_WORK", 0)
    lengths, prefixes = [450, 60, 193], [Prefix(), Prefix(0, 210), Prefix()]
    ours, plain = inputs(sum(lengths), 4, 2, 64), inputs(sum(lengths), 4, 2, 64)
    for q, *_ in (ours, plain):
        q.data *= 8
    got = PackedDocuments(lengths, prefixes=prefixes)(0, *ours)
    whole, whole_lengths, places = expanded(torch.arange(sum(lengths)), lengths, prefixes)
    wanted = attention_reference(*(x[whole] for x in plain), whole_lengths)[places]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    same_gradients(got, wanted, ours, plain, atol=2e-5)


def test_compiled_attention_has_the_same_bits_on_any_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "COMPILED_WORK", 0)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            ours = inputs(263, 4, 2, 16)
            PackedDocuments([100, 63, 100])(0, *ours).square().sum().backward()
            found.append([x.grad for x in ours])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_compiled_attention_hides_no_broken_number(which: int, broken: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "COMPILED_WORK", 0)
    tensors = inputs(60, 2, 2, 16)
    tensors[which].data[30, 0, 3] = broken
    out = PackedDocuments([60])(0, *tensors)
    assert not out[30, 0].isfinite().all() and out[:30].isfinite().all() and out[:, 1].isfinite().all()


@pytest.mark.parametrize("prefix", [(0, 8), (1, 2), (2, 1)])
def test_a_prefix_stands_in_an_earlier_whole_row(prefix: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="row 2 goes on from"):
        PackedDocuments([7, 5, 5], prefixes=[Prefix(), Prefix(0, 3), Prefix(*prefix)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no accelerator")
@pytest.mark.parametrize("lengths", [[5, 130, 64, 1, 300], [7, 7, 7]])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_rows_side_by_side_on_a_gpu_are_the_reference(lengths, kv_heads):
    """bfloat16 against float32 of the same numbers: values and gradients."""
    generator = torch.Generator().manual_seed(0)
    n, size = sum(lengths), 32
    q, k, v = (torch.randn(n, heads, size, generator=generator).bfloat16() for heads in (4, kv_heads, kv_heads))
    weight = torch.randn(n, 4, size, generator=generator)
    found = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        inputs = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        out = attention_reference(*inputs, lengths) if device == "cpu" else PackedDocuments(lengths, device)(0, *inputs)
        (out.float() * weight.to(device)).sum().backward()
        found.append([x.detach().float().cpu() for x in (out, *(i.grad for i in inputs))])
    for wanted, got in zip(*found, strict=True):
        assert float((got - wanted).norm() / wanted.norm()) < 2e-2
