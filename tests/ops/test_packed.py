"""Packed weights against the plain formula, and against the dense weight that they stand for."""

from __future__ import annotations

import pytest
import torch

from prairie.ops.linear import linear
from prairie.ops.packed import FEW_ROWS, GROUPS, IN_PANELS, PackedWeight, is_bfloat16, lay_in_panels, nf4_levels

BITS = ["int8", "int4", "nf4"]


def weight(outputs: int = 48, inputs: int = 160, seed: int = 0) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.1


def test_the_levels_are_those_of_the_paper() -> None:
    published = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                 -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
                 1.0]  # fmt: skip
    assert nf4_levels() == pytest.approx(published, abs=1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("inputs", [160, 128, 3])
def test_every_number_is_the_nearest_that_can_be_kept(bits: str, inputs: int) -> None:
    w = weight(inputs=inputs)
    packed = PackedWeight(w, bits)
    dense = packed.dense()
    assert dense.shape == w.shape and dense.dtype == w.dtype
    for row, kept in zip(w, dense, strict=True):
        group = GROUPS.get(bits, inputs)
        for start in range(0, inputs, group):
            part, its = row[start : start + group], kept[start : start + group]
            if bits == "int8":
                values = torch.arange(-127, 128) * row.abs().max() / 127
            elif bits == "nf4":
                values = torch.tensor(nf4_levels()) * part.abs().max()
            else:
                padded = torch.nn.functional.pad(part, (0, group - len(part)))
                values = padded.min() + torch.arange(16) * (padded.max() - padded.min()) / 15
            nearest = (part[:, None] - values).abs().min(1).values
            torch.testing.assert_close((part - its).abs(), nearest, atol=2e-3 * float(w.abs().max()), rtol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 40])
def test_a_product_is_that_of_the_dense_weight(bits: str, rows: int) -> None:
    packed, x, bias = PackedWeight(weight(64), bits), torch.randn(rows, 160), torch.randn(64)
    found, wanted = linear(x, packed, bias), torch.nn.functional.linear(x, packed.dense(), bias)
    # The kernel for few rows and 8 bits computes in bfloat16.
    tolerance = 2e-2 if bits == "int8" and rows <= FEW_ROWS else 1e-5
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_those_of_the_dense_weight(bits: str) -> None:
    packed = PackedWeight(weight(), bits)
    x = torch.randn(5, 160, requires_grad=True)
    again = x.detach().clone().requires_grad_(True)
    linear(x, packed).square().sum().backward()
    torch.nn.functional.linear(again, packed.dense()).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad, atol=1e-5, rtol=1e-5)


def test_bytes() -> None:
    w = weight(64, 1024)
    sizes = {bits: PackedWeight(w, bits).nbytes / w.numel() for bits in BITS}
    assert sizes["int8"] < 1.01 and sizes["int4"] < 0.63 and sizes["nf4"] < 0.57


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_of_zeros_stays_zero(bits: str) -> None:
    assert PackedWeight(torch.zeros(4, 70), bits).dense().abs().max() == 0


@pytest.mark.parametrize("inputs", [40, 172])
def test_columns_that_do_not_fill_torchs_kernel_do_not_reach_it(inputs: int) -> None:
    """With 172 columns and 8 rows that kernel reads beyond the weight and the process dies."""
    packed, x = PackedWeight(weight(64, inputs), "int8"), torch.randn(FEW_ROWS, inputs)
    torch.testing.assert_close(packed.product(x), x @ packed.dense().T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", IN_PANELS)
def test_weights_in_panels_are_the_same(bits: str) -> None:
    weights = [PackedWeight(torch.randn(rows, 64), bits) for rows in (3, 21, 32)]
    before = [weight.dense().clone() for weight in weights]
    lay_in_panels(weights)
    places = [weight.numbers.data_ptr() for weight in weights]
    assert places == sorted(places) and not any(place % 64 for place in places)
    for weight, dense in zip(weights, before, strict=True):
        assert torch.equal(weight.dense(), dense)
        for rows in (1, 40):
            x = torch.randn(rows, 64)
            torch.testing.assert_close(linear(x, weight), x @ dense.T, atol=1e-5 if bits != "int4" else 1e-3, rtol=1e-5)
            x.requires_grad_(True)
            torch.testing.assert_close(linear(x, weight), x @ dense.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", ["bf16", "int8", "int4"])
def test_rows_are_those_of_the_dense_weight(bits: str) -> None:
    """As an embedding reads them, before and after they are laid in panels; the last panel is not full."""
    packed, places = PackedWeight(weight(45), bits), torch.tensor([44, 0, 7, 8, 17, 7])
    wanted = packed.dense()[places]
    assert torch.equal(packed.rows(places), wanted)
    lay_in_panels([packed])
    assert torch.equal(packed.rows(places), wanted)


def test_whether_bfloat16_holds_every_number() -> None:
    held = weight(600, 40).bfloat16().float()
    assert is_bfloat16(held) and torch.equal(PackedWeight(held, "bf16").dense(), held)
    held[599, 39] = 1 + 2**-8
    assert not is_bfloat16(held)
