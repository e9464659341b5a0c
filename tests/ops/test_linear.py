"""The changes of several adapters as one operator, against one after the other: values and gradients."""

from __future__ import annotations

import pytest
import torch

from prairie.ops.linear import LowRank, adapt, adapt_rows


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("x_learns", [True, False])
@pytest.mark.parametrize(
    "rows", [[slice(None)], [slice(0, 4), slice(4, 9)], [slice(2, 5)], [slice(0, 6), slice(0, 6), slice(6, 9)]]
)
def test_changes_at_once_are_changes_in_turn(rows: list[slice], x_learns: bool) -> None:
    results = []
    for together in (True, False):
        x, w = normal(9, 5, seed=1).requires_grad_(x_learns), normal(7, 5, seed=2)
        changes = [
            (LowRank(normal(3, 5, seed=10 + i).requires_grad_(), normal(7, 3, seed=20 + i).requires_grad_()), part)
            for i, part in enumerate(rows)
        ]
        y = x @ w.T
        if together:
            y = adapt_rows(y, x, changes)
        else:
            for change, part in changes:
                y = adapt(y, x, change, part)
        (y * normal(9, 7, seed=3)).sum().backward()
        learners = [t for change, _ in changes for t in (change.a_RI, change.b_OR)]
        results.append([y.detach(), *([x.grad] if x_learns else []), *(t.grad for t in learners)])
    for ours, plain in zip(*results, strict=True):
        assert ours is not None and plain is not None
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
