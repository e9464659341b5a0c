"""The chunked losses against their plain forms, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prairie.ops import loss as ops


def inputs(supervised: str, requires: str = "hw") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(37, 16, generator=generator).requires_grad_("h" in requires)
    weight = torch.randn(53, 16, generator=generator).requires_grad_("w" in requires)
    labels = torch.randint(53, (37,), generator=generator)
    if supervised == "some":
        labels[torch.rand(37, generator=generator) < 0.5] = -100
    if supervised == "none":
        labels[:] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk", [None, 1, 8, 1000])
@pytest.mark.parametrize("requires", ["hw", "h", "w", ""])
@pytest.mark.parametrize("supervised", ["all", "some", "none"])
@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_logprobs"])
def test_equals_plain_form(op: str, supervised: str, requires: str, chunk: int | None) -> None:
    ours, plain = inputs(supervised, requires), inputs(supervised, requires)
    got = getattr(ops, op)(*ours, chunk=chunk)
    wanted = getattr(ops, f"{op}_reference")(*plain)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)
    if requires:
        # A weight per token, as DPO has, and a scale after the sum, as the division by the step's count is.
        each = torch.linspace(-1, 2, got.numel()).view(got.shape) if got.ndim else torch.tensor(0.25)
        (got * each).sum().backward()
        (wanted * each).sum().backward()
    for a, b in zip(ours[:2], plain[:2], strict=True):
        assert (a.grad is None) == (not a.requires_grad)
        if a.requires_grad and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cap", [3.0, 0.5])
@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_logprobs"])
def test_capped_logits_equal_plain_form(op: str, cap: float) -> None:
    ours, plain = inputs("some"), inputs("some")
    got = getattr(ops, op)(*ours, chunk=8, softcap=cap)
    wanted = getattr(ops, f"{op}_reference")(*plain, softcap=cap)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)
    each = torch.linspace(-1, 2, got.numel()).view(got.shape) if got.ndim else torch.tensor(0.25)
    (got * each).sum().backward()
    (wanted * each).sum().backward()
    for a, b in zip(ours[:2], plain[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_certain_and_impossible_labels_stay_exact(scale: float) -> None:
    """Softmax of such logits is 0 or 1 in float32, the loss is not."""
    ours, plain = inputs("all"), inputs("all")
    for hidden, _, _ in (ours, plain):
        hidden.data *= scale
    got, wanted = ops.linear_cross_entropy(*ours, chunk=8), ops.linear_cross_entropy_reference(*plain)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)
    got.backward()
    wanted.backward()
    torch.testing.assert_close(ours[0].grad, plain[0].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [-200.0, 60.0, 75.0, 200.0])
@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_logprobs"])
def test_logits_far_from_zero(op: str, shift: float) -> None:
    """All logits of a token moved by one number: its probabilities are the same, its e^logit are not."""
    ours, plain = inputs("some"), inputs("some")
    for hidden, weight, _ in (ours, plain):
        hidden.data[:, 0], weight.data[:, 0] = 1.0, shift
    got, wanted = getattr(ops, op)(*ours, chunk=8).sum(), getattr(ops, f"{op}_reference")(*plain).sum()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-3)
    got.backward()
    wanted.backward()
    torch.testing.assert_close(ours[1].grad, plain[1].grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_logprobs"])
def test_a_broken_number_is_not_hidden(op: str) -> None:
    for broken in (float("nan"), float("inf")):
        hidden, weight, labels = inputs("all")
        weight.data[3, 3] = broken
        assert not getattr(ops, op)(hidden, weight, labels).sum().isfinite()


@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_logprobs"])
def test_a_gradient_can_be_taken_once(op: str) -> None:
    found = getattr(ops, op)(*inputs("some")).sum()
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already taken"):
        found.backward()


def test_logprobs_make_their_logits_again_where_they_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, again = inputs("some"), inputs("some")
    (ops.linear_logprobs(*kept, chunk=8) * torch.arange(37)).sum().backward()
    monkeypatch.setattr(ops, "KEPT_NUMBERS", 0)
    (ops.linear_logprobs(*again, chunk=8) * torch.arange(37)).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(kept[:2], again[:2], strict=True))


def test_sum_over_rows_does_not_depend_on_the_split() -> None:
    hidden, weight, labels = inputs("some", "")
    whole = ops.linear_cross_entropy(hidden, weight, labels)
    halves = sum(ops.linear_cross_entropy(hidden[p], weight, labels[p]) for p in (slice(0, 11), slice(11, None)))
    assert float(whole) == pytest.approx(float(halves), rel=1e-6)


@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_logprobs"])
def test_under_autocast_stays_close_and_in_float32(op: str) -> None:
    ours, plain = inputs("some"), inputs("some")
    with torch.autocast("cpu", torch.bfloat16):
        got = getattr(ops, op)(*ours)
    got.sum().backward()
    wanted = getattr(ops, f"{op}_reference")(*plain)
    wanted.sum().backward()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.15)
    for a, b in zip(ours[:2], plain[:2], strict=True):
        assert a.grad is not None and a.grad.dtype == torch.float32
        torch.testing.assert_close(a.grad, b.grad, rtol=0.1, atol=0.1)
