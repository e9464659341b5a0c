"""A linear layer with adapters as one operator, against its plain form: values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prairie.ops.linear import Addition, adapted_linear, adapted_linear_reference
from prairie.ops.packed import PackedWeight

TOKENS, INPUTS, OUTPUTS = 9, 5, 12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fused_pair(seed: int) -> list[Addition]:
    """An adapter of two of three fused layers, the second with rows in another order and a rank of its own."""
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    return [
        Addition(normal(3, INPUTS, seed=seed), normal(4, 3, seed=seed + 1), slice(0, 4), 0.5),
        Addition(normal(2, INPUTS, seed=seed + 2), normal(4, 2, seed=seed + 3), slice(8, 12), 2.0, order),
    ]


def values_and_gradients(form, x_learns: bool, weight_learns: bool, rows: list[slice]) -> list[Tensor]:
    x, bias = normal(TOKENS, INPUTS, seed=1).requires_grad_(x_learns), normal(OUTPUTS, seed=4)
    weight = normal(OUTPUTS, INPUTS, seed=2).requires_grad_(weight_learns)
    additions = [(part, fused_pair(10 * i + 10)) for i, part in enumerate(rows)]
    learners = [t.requires_grad_() for _, pieces in additions for piece in pieces for t in (piece.a_RI, piece.b_OR)]
    learners += [t for t in (x, weight) if t.requires_grad]
    y = form(x, weight, bias, additions)
    return [y.detach(), *torch.autograd.grad((y * normal(TOKENS, OUTPUTS, seed=3)).sum(), learners)]


@pytest.mark.parametrize("x_learns", [True, False])
@pytest.mark.parametrize("weight_learns", [True, False])
@pytest.mark.parametrize(
    "rows", [[slice(None)], [slice(0, 4), slice(4, 9)], [slice(2, 5)], [slice(0, 6), slice(0, 6), slice(6, 9)]]
)
def test_one_operator_is_the_plain_form(rows: list[slice], weight_learns: bool, x_learns: bool) -> None:
    ours = values_and_gradients(adapted_linear, x_learns, weight_learns, rows)
    plain = values_and_gradients(adapted_linear_reference, x_learns, weight_learns, rows)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_over_a_weight_of_few_bits_it_adds_to_the_weight_that_is_computed_with() -> None:
    x, packed = normal(TOKENS, INPUTS, seed=1).requires_grad_(), PackedWeight(normal(OUTPUTS, INPUTS, seed=2), "int8")
    additions = [(slice(0, 6), fused_pair(10))]
    found = [
        (y.detach(), *torch.autograd.grad(y.square().sum(), x))
        for y in (
            adapted_linear(x, packed, None, additions),
            adapted_linear_reference(x, packed.dense(), None, additions),
        )
    ]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
