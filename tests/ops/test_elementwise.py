"""The norm and the gate against their plain forms, values and gradients."""

from __future__ import annotations

import pytest
import torch

from prairie.ops.elementwise import rms_norm, rms_norm_reference, swiglu, swiglu_reference
from prairie.ops.linear import LowRank, adapt


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("requires", ["xw", "x", "w", ""])
@pytest.mark.parametrize("shape", [(13, 16), (5, 3, 16)])
def test_rms_norm_equals_plain_form(shape: tuple[int, ...], requires: str) -> None:
    results = []
    for op in (rms_norm, rms_norm_reference):
        x, w = normal(*shape).mul_(3), normal(16, seed=1)
        x.requires_grad_("x" in requires)
        w.requires_grad_("w" in requires)
        y = op(x, w, 1e-3)
        if requires:
            (y * normal(*shape, seed=2)).sum().backward()
        results.append((y.detach(), x.grad, w.grad))
    for ours, plain in zip(*results, strict=True):
        assert (ours is None) == (plain is None)
        if ours is not None:
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_rms_norm_of_zeros_is_zero() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    rms_norm(x, torch.ones(4), 1e-5).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_swiglu_equals_plain_form() -> None:
    results = []
    for op in (swiglu, swiglu_reference):
        x = normal(9, 22).mul_(4).requires_grad_()
        y = op(x)
        (y * normal(9, 11, seed=2)).sum().backward()
        results.append((y.detach(), x.grad))
        with torch.no_grad():
            torch.testing.assert_close(op(x), y)
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [None, slice(2, 5)])
def test_an_adapter_adds_the_delta_to_its_rows(rows: slice | None) -> None:
    y, x, a, b = normal(7, 6), normal(7, 5, seed=1), normal(3, 5, seed=2), normal(6, 3, seed=3)
    wanted = y.clone()
    part = rows or slice(None)
    wanted[part] += 0.5 * (x[part] @ (b @ a).T)
    torch.testing.assert_close(adapt(y.clone(), x, LowRank(a, b * 0.5), rows), wanted)
