"""Frozen weights in fewer bits: bfloat16, 8 and 4 bits for serving, and the 4-bit normal floats of QLoRA (arXiv
2305.14314).

A `PackedWeight` stands where a weight stands; `ops.linear.linear` takes either. Its numbers never change: what learns
is an adapter beside it, and the gradient that passes through is exactly that of the dense weight, which is made anew
for the backward pass instead of being kept.
Not here: which weights of a model are packed, and what that costs in its answers (`models.quantized`).

Legend: N tokens, I input columns, O output rows, G columns of a group, S groups of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prairie.ops.threads import share_out
from prairie.ops.weight_forms import BFLOAT16, INT4, INT8, PANEL

Bits = Literal["bf16", "int8", "int4", "nf4"]
GROUPS = {"int4": 32, "nf4": 64}
"""Columns that share a scale in the 4-bit forms."""
IN_PANELS = {"bf16": BFLOAT16, "int8": INT8, "int4": INT4}
"""Forms that `ops.products` multiplies with."""
KERNEL_BLOCK = 32
LINE = 64
"""Bytes that memory is read by."""
ROWS_EACH = 96
"""Rows of a weight in panels that a thread takes at once."""
FEW_ROWS = 8
"""Up to so many tokens, torch's kernel for 8 bits is faster than a product with the dense weight (docs/log.md)."""


@cache
def nf4_levels() -> tuple[float, ...]:
    """The 16 values of NF4 in [-1, 1]: quantiles of a normal, 0 among them (arXiv 2305.14314, appendix E)."""
    end = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above = torch.special.ndtri(torch.linspace(end, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(end, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above])
    return tuple(sorted((levels / levels.max()).tolist()))


def bytes_a_number(bits: Bits) -> float:
    """What a number of a large matrix takes, its share of the scales included."""
    return {"bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2 * 2 / GROUPS["int4"], "nf4": 0.5 + 4 / GROUPS["nf4"]}[bits]


class PackedWeight(nn.Module):
    """An (O, I) weight as small numbers with scales. bf16: the upper half of each number, no scale. int8: one scale a
    row. int4: 16 even steps from the least to the largest number of each group of a row. nf4: 16 normal quantiles times
    the largest magnitude of the group."""

    numbers: Tensor
    scales: Tensor
    least: Tensor

    def __init__(self, weight_OI: Tensor, bits: Bits, exact: bool = False) -> None:
        """`exact`: all numbers are such as this form has, so that nothing is lost."""
        super().__init__()
        self.bits, self.shape, self.dtype, self.exact = bits, weight_OI.shape, weight_OI.dtype, exact
        pack = {"bf16": _pack_bf16, "int8": _pack_int8}.get(bits, _pack_4bit)
        numbers, scales, least = pack(weight_OI.detach().float(), bits)
        self.register_buffer("numbers", numbers)
        self.register_buffer("scales", scales)
        self.register_buffer("least", least)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def device(self) -> torch.device:
        return self.numbers.device

    def dense(self) -> Tensor:
        """(O, I) the weight that is computed with, in the dtype that it was packed from."""
        scales, least = self.scales, self.least  # before the numbers: those of panels come first, and bring their own
        packed = self.numbers
        if self.bits == "int4" and packed.ndim == 3:
            packed, scales, least = from_panels_of_nibbles(packed, self.shape[0])
        if self.bits in ("bf16", "int8"):
            numbers = self.numbers  # may be laid in panels meanwhile
            numbers_OI = from_panels(numbers, self.shape[0]) if numbers.ndim == 3 else numbers
            return (numbers_OI if self.bits == "bf16" else numbers_OI * self.scales[: len(numbers_OI), None]).to(
                self.dtype
            )
        codes_OI = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
        values = (
            torch.tensor(nf4_levels(), device=self.device)[codes_OI.long()] if self.bits == "nf4" else codes_OI.float()
        )
        values_OSG = values.unflatten(1, (-1, GROUPS[self.bits])) * scales[..., None].float()
        if self.bits == "int4":
            values_OSG = values_OSG + least[..., None].float()
        return values_OSG.flatten(1)[:, : self.shape[1]].to(self.dtype)

    def rows(self, places_N: Tensor) -> Tensor:
        """(N, I) these rows of the dense weight."""
        if self.numbers.ndim == 2 or self.bits not in ("bf16", "int8"):
            return self.dense()[places_N]
        inner = places_N % PANEL
        if self.bits == "int8":
            numbers_NI = self.numbers[places_N // PANEL, :, inner]
            return (numbers_NI * self.scales[places_N, None]).to(self.dtype)
        half = PANEL // 2  # rows r and r + 8 are the halves of a word
        return self.numbers[places_N // PANEL, :, inner % half * 2 + inner // half].to(self.dtype)

    def product(self, x_NI: Tensor) -> Tensor:
        """(N, O) x times the transposed weight, differentiable in x."""
        numbers = self.numbers
        if numbers.ndim == 3 and x_NI.dtype == torch.float32 and not x_NI.requires_grad:
            return self._product_of_panels(x_NI, numbers)
        few = numbers.ndim == 2 and len(x_NI) <= FEW_ROWS and not x_NI.requires_grad
        if self.bits == "int8" and few and self._fits_kernel():
            y_NO = torch._weight_int8pack_mm(x_NI.bfloat16(), numbers, self.scales.bfloat16())
            return y_NO.to(x_NI.dtype)
        out: Tensor = _FrozenProduct.apply(x_NI, self)
        return out

    def _product_of_panels(self, x_NI: Tensor, numbers: Tensor) -> Tensor:
        from prairie.ops.products import PRODUCT, products, shared_product  # compiled by now: panels are laid for them

        x_NI = x_NI.contiguous()
        rows, columns = self.shape
        y_NO = x_NI.new_empty(len(x_NI), rows)
        share_out(shared_product, PRODUCT, -(-rows // ROWS_EACH), {
            "products": int(products.address or 0), "kind": IN_PANELS[self.bits], "w": numbers.data_ptr(),
            "scales": self.scales.data_ptr(), "x": x_NI.data_ptr(), "y": y_NO.data_ptr(), "columns": columns,
            "rows": rows, "tokens": len(x_NI), "each": ROWS_EACH,
        })  # fmt: skip
        return y_NO

    def _fits_kernel(self) -> bool:
        """torch's kernel reads beyond a row whose columns do not fill its vectors (it crashes at 172 of them)."""
        whole = self.shape[0] % KERNEL_BLOCK == 0 and self.shape[1] % KERNEL_BLOCK == 0
        return whole and _has_int8_kernel(self.device)

    def extra_repr(self) -> str:
        return f"{self.bits}, {tuple(self.shape)}"


class _FrozenProduct(torch.autograd.Function):
    """Keeps neither x nor the dense weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight: PackedWeight) -> Tensor:
        ctx.weight, ctx.dtype = weight, x_NI.dtype
        return F.linear(x_NI, weight.dense())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dy_NO,) = grads
        return (dy_NO @ ctx.weight.dense().to(dy_NO.dtype)).to(ctx.dtype), None


def in_panels(numbers_OI: Tensor) -> Tensor:
    """(P, I, 16) the same numbers as `ops.products` reads them: panels of 16 rows, column by column, the last filled
    up with zeros. Of numbers of two bytes, rows r and r + 8 of a panel are the halves of a word."""
    numbers_PRI = F.pad(numbers_OI, (0, 0, 0, -len(numbers_OI) % PANEL)).unflatten(0, (-1, PANEL))
    if numbers_OI.itemsize == 2:
        return numbers_PRI.unflatten(1, (2, PANEL // 2)).permute(0, 3, 2, 1).flatten(2)
    return numbers_PRI.transpose(1, 2).contiguous()


def in_narrow_panels(numbers_OI: Tensor) -> Tensor:
    """(P, I / 2, 16) the same numbers in panels of 8 rows, where others have rows 8..16 of a column these of the next
    column. For weights of few rows (whole eights), which would be half empty panels."""
    return in_panels(numbers_OI.unflatten(1, (-1, 2)).unflatten(0, (-1, PANEL // 2)).movedim(3, 1).flatten(0, 2))


def from_panels(numbers_PIR: Tensor, rows: int) -> Tensor:
    """(O, I) the `rows` rows that `in_panels` laid out."""
    if numbers_PIR.itemsize == 2:
        numbers_PIR = numbers_PIR.unflatten(2, (PANEL // 2, 2)).transpose(2, 3).flatten(2)
    return numbers_PIR.transpose(1, 2).flatten(0, 1)[:rows]


def in_panels_of_nibbles(weight: PackedWeight) -> Tensor:
    """(P, S, 80) int32: an int4 weight as `ops.products` reads it, in panels of 16 rows, group by group. A group is a
    word for each row, its scale in the lower half and its least value in the upper, and eight words for each of rows
    0..8: byte k of word 8 q + r has column 4 q + k, of row r in the lower four bits and of row r + 8 in the upper."""
    empty = -weight.shape[0] % PANEL
    codes_OI = F.pad(torch.stack([weight.numbers & 15, weight.numbers >> 4], -1).flatten(1), (0, 0, 0, empty))
    codes = codes_OI.long().view(len(codes_OI) // PANEL, 2, 8, -1, 8, 4)  # panel, half, row, group, q, k
    places = 8 * torch.arange(4) + 4 * torch.arange(2).view(2, 1, 1, 1, 1)
    words_PSW = (codes << places).sum((1, 5)).permute(0, 2, 3, 1).flatten(2)
    scales, least = (F.pad(x, (0, 0, 0, empty)).view(torch.int16).long() for x in (weight.scales, weight.least))
    ends_PSR = ((scales & 0xFFFF) | (least << 16)).unflatten(0, (-1, PANEL)).transpose(1, 2)
    return torch.cat([ends_PSR, words_PSW], 2).to(torch.int32)


def from_panels_of_nibbles(numbers_PSW: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, scales and least values of the `rows` rows that `in_panels_of_nibbles` laid out."""
    ends_OS = numbers_PSW[..., :PANEL].transpose(1, 2).flatten(0, 1)[:rows]
    scales, least = (part.to(torch.int16).view(torch.half) for part in (ends_OS << 16 >> 16, ends_OS >> 16))
    words = numbers_PSW[..., PANEL:].unflatten(2, (8, 8))  # panel, group, q, row
    places = 8 * torch.arange(4) + 4 * torch.arange(2).view(2, 1)
    codes = (words[..., None, None] >> places.int()) & 15  # ..., half, k
    codes_OI = codes.permute(0, 4, 3, 1, 2, 5).flatten(0, 2).flatten(1)[:rows].to(torch.uint8)
    return codes_OI[:, 0::2] | (codes_OI[:, 1::2] << 4), scales, least


def in_one_piece(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors, one behind the other in one piece of memory, each at the beginning of a line. A piece that is
    large comes in large pages where the system has them, and reading it is a third faster (docs/log.md)."""
    sizes = [-(-tensor.nbytes // LINE) * LINE for tensor in tensors]
    room = np.zeros(sum(sizes) + LINE, dtype=np.uint8)  # torch's own memory comes in small pages
    start = -room.__array_interface__["data"][0] % LINE
    pieces = torch.from_numpy(room[start : start + sum(sizes)]).split(sizes)
    return [
        piece[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        for tensor, piece in zip(tensors, pieces, strict=True)
    ]


def lay_in_panels(weights: Sequence[PackedWeight]) -> None:
    """Has the numbers of these weights (`IN_PANELS`) lie in panels, together and in this order, those that do not yet.
    Each is complete at any time, for threads that compute with it."""
    weights = [weight for weight in weights if weight.numbers.ndim == 2]
    laid = [in_panels_of_nibbles(w) if w.bits == "int4" else in_panels(w.numbers) for w in weights]
    for weight, numbers in zip(weights, in_one_piece(laid), strict=True):
        weight.scales = (
            F.pad(weight.scales, (0, -len(weight.scales) % PANEL)) if weight.bits == "int8" else weight.scales
        )
        weight.numbers = numbers
        if weight.bits == "int4":  # they lie among the numbers now
            weight.scales = weight.least = torch.empty(0)


def is_bfloat16(weight_OI: Tensor) -> bool:
    """Whether every number of a float32 weight is one that bfloat16 has, too."""
    return not any(bool((part.view(torch.int32) & 0xFFFF).any()) for part in weight_OI.detach().split(256))


def embedding(tokens_N: Tensor, weight_VI: Tensor | PackedWeight) -> Tensor:
    """(N, I) the tokens' rows, however they are kept."""
    if isinstance(weight_VI, PackedWeight):
        return weight_VI.rows(tokens_N)
    return F.embedding(tokens_N, weight_VI)


def dense(weight_OI: Tensor | PackedWeight) -> Tensor:
    """(O, I) the weight itself, however it is kept."""
    return weight_OI.dense() if isinstance(weight_OI, PackedWeight) else weight_OI


def _pack_bf16(weight_OI: Tensor, bits: Bits) -> tuple[Tensor, Tensor, Tensor]:
    return weight_OI.bfloat16(), torch.empty(0), torch.empty(0)


def _pack_int8(weight_OI: Tensor, bits: Bits) -> tuple[Tensor, Tensor, Tensor]:
    scales_O = weight_OI.abs().amax(1).clamp_min(1e-12) / 127
    numbers = (weight_OI / scales_O[:, None]).round().to(torch.int8)
    return numbers, scales_O, torch.empty(0)


def _pack_4bit(weight_OI: Tensor, bits: Bits) -> tuple[Tensor, Tensor, Tensor]:
    """Two columns a byte. A row whose columns do not fill its last group is filled up with zeros."""
    padded = F.pad(weight_OI, (0, -weight_OI.shape[1] % GROUPS[bits]))
    groups_OSG = padded.unflatten(1, (-1, GROUPS[bits]))
    if bits == "int4":
        least_OS, most_OS = groups_OSG.amin(-1).half(), groups_OSG.amax(-1)
        scales_OS = ((most_OS - least_OS.float()) / 15).clamp_min(1e-7).half()
        codes = ((groups_OSG - least_OS[..., None].float()) / scales_OS[..., None].float()).round().clamp(0, 15)
    else:
        least_OS, scales_OS = torch.empty(0), groups_OSG.abs().amax(-1).clamp_min(1e-12)
        levels = torch.tensor(nf4_levels(), device=weight_OI.device)
        codes = torch.bucketize(groups_OSG / scales_OS[..., None], (levels[1:] + levels[:-1]) / 2)
    codes_OI = codes.to(torch.uint8).flatten(1)
    return codes_OI[:, 0::2] | (codes_OI[:, 1::2] << 4), scales_OS, least_OS


@cache
def _has_int8_kernel(device: torch.device) -> bool:
    """Whether torch's own operator, which may change or be missing, is there and right on this device."""
    generator = torch.Generator().manual_seed(0)
    x_NI, numbers = torch.randn(2, 64, generator=generator), torch.randint(-127, 128, (32, 64), generator=generator)
    scales_O = torch.rand(32, generator=generator) + 0.5
    try:
        found = torch._weight_int8pack_mm(
            x_NI.bfloat16().to(device), numbers.to(device, torch.int8), scales_O.bfloat16().to(device)
        )
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    wanted = x_NI @ (numbers * scales_O[:, None]).T
    return bool((found.cpu().float() - wanted).abs().max() < 0.02 * wanted.abs().max())
