"""Norm, gate and rotation against their plain forms, values and gradients, in torch and as compiled loops."""

from __future__ import annotations

import pytest
import torch

from prairie.ops import threads
from prairie.ops.attention import rotary_turns, split_and_rotate
from prairie.ops.elementwise import rms_norm, rms_norm_reference, swiglu, swiglu_reference
from prairie.ops.linear import LowRank, adapt


@pytest.fixture(params=["torch", "compiled"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which form the operators take."""
    monkeypatch.setattr(threads, "COMPILED_NUMBERS", 0 if request.param == "compiled" else 1 << 62)
    return str(request.param)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("requires", ["xw", "x", "w", ""])
@pytest.mark.parametrize("shape", [(13, 16), (5, 3, 16), (70, 16)])
def test_rms_norm_equals_plain_form(form: str, shape: tuple[int, ...], requires: str) -> None:
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


def test_rms_norm_of_zeros_is_zero(form: str) -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    rms_norm(x, torch.ones(4), 1e-5).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_swiglu_equals_plain_form(form: str) -> None:
    results = []
    for op in (swiglu, swiglu_reference):
        x = normal(39, 22).mul_(8).requires_grad_()
        y = op(x)
        (y * normal(39, 11, seed=2)).sum().backward()
        results.append((y.detach(), x.grad))
        with torch.no_grad():
            torch.testing.assert_close(op(x), y)
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_heads_are_split_and_turned(form: str, kv_heads: int) -> None:
    """The plain form: each pair of columns times cosine and sine, by autograd."""
    N, heads, size = 37, 2, 6
    turns = rotary_turns(torch.arange(N), torch.tensor([1.0, 0.1, 0.01]))
    results = []
    for plain in (False, True):
        qkv = normal(N, (heads + 2 * kv_heads) * size).requires_grad_()
        if plain:
            parts = qkv.view(N, -1, size).split([heads, kv_heads, kv_heads], 1)
            q, k = (torch.stack([x[..., 0::2] * turns.real - x[..., 1::2] * turns.imag,
                                 x[..., 0::2] * turns.imag + x[..., 1::2] * turns.real], -1).flatten(2)
                    for x in parts[:2])  # fmt: skip
            found = q, k, parts[2]
        else:
            found = split_and_rotate(qkv, heads, kv_heads, turns)
        sum((x * normal(*x.shape, seed=i)).sum() for i, x in enumerate(found)).backward()
        results.append([*(x.detach() for x in found), qkv.grad])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_compiled_loops_have_the_same_bits_on_any_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "COMPILED_NUMBERS", 0)
    found, before = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            x, w = normal(263, 32).requires_grad_(), normal(32, seed=1).requires_grad_()
            swiglu(rms_norm(x, w, 1e-5)).square().sum().backward()
            found.append([x.grad, w.grad])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_no_broken_number_is_hidden(form: str, broken: float) -> None:
    x = normal(5, 8)
    x[2, 1] = broken
    x.requires_grad_()
    y = rms_norm(swiglu(x), torch.ones(4), 1e-5)
    y.sum().backward()
    assert x.grad is not None and not x.grad[2].isfinite().all()
    assert y[:2].isfinite().all() and x.grad[3:].isfinite().all()


@pytest.mark.parametrize("rows", [None, slice(2, 5)])
def test_an_adapter_adds_the_delta_to_its_rows(rows: slice | None) -> None:
    y, x, a, b = normal(7, 6), normal(7, 5, seed=1), normal(3, 5, seed=2), normal(6, 3, seed=3)
    wanted = y.clone()
    part = rows or slice(None)
    wanted[part] += 0.5 * (x[part] @ (b @ a).T)
    torch.testing.assert_close(adapt(y.clone(), x, LowRank(a, b * 0.5), rows), wanted)
