"""Attention that looks both ways, over another row, and by learned distances: each against a plain form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prairie.ops import cross_attention
from prairie.ops.attention import PackedDocuments, Sight
from prairie.ops.cross_attention import Memory
from prairie.ops.relative import RelativeBias, distance_buckets

LENGTHS = [5, 17, 1, 9]


def heads(count: int, lengths: list[int], seed: int, wants_grad: bool = True) -> Tensor:
    x = torch.randn(sum(lengths), count, 8, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_(wants_grad)


def plain(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, added_HTS: Tensor | float = 0.0) -> Tensor:
    """Softmax written out, one row."""
    groups = q_THD.shape[1] // k_SKD.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k_SKD, v_SKD))
    scores_HTS = torch.einsum("thd,shd->hts", q_THD, k) / q_THD.shape[-1] ** 0.5 + added_HTS
    return torch.einsum("hts,shd->thd", scores_HTS.softmax(-1), v)


def same_with_gradients(ours: Tensor, wanted: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9))
    for mine, theirs in zip(
        torch.autograd.grad((ours * weight).sum(), inputs), torch.autograd.grad((wanted * weight).sum(), inputs),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sources", [[3, 1, 12, 7], [6, 6, 6, 6]])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("row_work", [0, 1 << 40])
def test_rows_look_at_other_rows(
    sources: list[int], kv_heads: int, row_work: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, and padded."""
    monkeypatch.setattr(cross_attention, "ROW_WORK", row_work)
    q_NHD = heads(4, LENGTHS, 1)
    k_MKD, v_MKD = heads(kv_heads, sources, 2), heads(kv_heads, sources, 3)
    memory = Memory(torch.zeros(sum(sources), 1), sources, LENGTHS)
    assert memory.one_by_one == (row_work == 0 and len(set(sources)) > 1)
    rows = zip(q_NHD.split(LENGTHS), k_MKD.split(sources), v_MKD.split(sources), strict=True)
    wanted = torch.cat([plain(*row) for row in rows])
    same_with_gradients(memory(0, q_NHD, lambda hidden: (k_MKD, v_MKD)), wanted, [q_NHD, k_MKD, v_MKD])


def test_what_is_kept_is_projected_once() -> None:
    projected: list[int] = []

    def project(hidden_MW: Tensor) -> tuple[Tensor, Tensor]:
        projected.append(len(hidden_MW))
        return heads(2, [3, 5], 2, False), heads(2, [3, 5], 3, False)

    memory = Memory(torch.zeros(8, 4), [3, 5], [1, 1], keep=True)
    q_NHD = heads(2, [1, 1], 1, False)
    first, second = memory(0, q_NHD, project), memory(0, q_NHD, project)
    torch.testing.assert_close(first, second)
    memory(1, q_NHD, project)
    assert projected == [8, 8]


@pytest.mark.parametrize("causal", [True, False])
def test_distances_are_those_of_transformers(causal: bool) -> None:
    t5 = pytest.importorskip("transformers").models.t5.modeling_t5.T5Attention
    distances = torch.arange(-300, 301)
    theirs = t5._relative_position_bucket(distances, bidirectional=not causal, num_buckets=32, max_distance=128)
    assert torch.equal(distance_buckets(distances, 32, 128, causal), theirs)


@pytest.mark.parametrize("lengths", [LENGTHS, [7, 7]])
@pytest.mark.parametrize("causal", [True, False])
def test_learned_distances_are_added(causal: bool, lengths: list[int]) -> None:
    q_NHD, k_NKD, v_NKD = heads(4, lengths, 1), heads(4, lengths, 2), heads(4, lengths, 3)
    table_RH = torch.randn(8, 4, generator=torch.Generator().manual_seed(4)).requires_grad_()
    ours = PackedDocuments(lengths)(0, q_NHD, k_NKD, v_NKD, Sight(causal), RelativeBias(table_RH, 6, causal))
    rows = []
    for q, k, v in zip(q_NHD.split(lengths), k_NKD.split(lengths), v_NKD.split(lengths), strict=True):
        places_T = torch.arange(len(q))
        buckets_TT = distance_buckets(places_T - places_T[:, None], 8, 6, causal)
        unseen_TT = torch.ones(len(q), len(q)).triu(1).bool() & causal
        added_HTT = F.embedding(buckets_TT, table_RH).permute(2, 0, 1).masked_fill(unseen_TT, float("-inf"))
        rows.append(plain(q, k, v, added_HTT))
    same_with_gradients(ours, torch.cat(rows), [q_NHD, k_NKD, v_NKD, table_RH])
