"""A mixture of experts against its plain form, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prairie.ops.experts import mix_experts, mix_experts_reference, route


def inputs(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    shapes = [(count, 8), (6, 2 * 5, 8), (6, 8, 5)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("sum_to_one", [True, False])
@pytest.mark.parametrize("top", [1, 2, 6])
@pytest.mark.parametrize("count", [1, 40])
def test_equals_every_expert_computing_every_token(count: int, top: int, sum_to_one: bool) -> None:
    logits = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    logits[:, 4] = -30.0  # an expert that hardly any token goes to
    results = []
    for op in (mix_experts, mix_experts_reference):
        x, gate_up, down = inputs(count)
        router = logits.clone().requires_grad_()
        y = op(x, *route(router, top, sum_to_one), gate_up, down, "silu")
        (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
        results.append((y.detach(), x.grad, router.grad, gate_up.grad, down.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_weights_are_those_of_the_likeliest() -> None:
    weights, experts = route(torch.tensor([[0.0, 2.0, 1.0]]), 2, sum_to_one=False)
    assert experts.tolist() == [[1, 2]]
    softmax = torch.tensor([0.0, 2.0, 1.0]).softmax(0)
    torch.testing.assert_close(weights[0], softmax[[1, 2]])
    weights, _ = route(torch.tensor([[0.0, 2.0, 1.0]]), 2, sum_to_one=True)
    torch.testing.assert_close(weights[0], softmax[[1, 2]] / softmax[[1, 2]].sum())
