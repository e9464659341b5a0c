"""The products of the compiled step against torch's, in every form and at sizes that fill no tile."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prairie.ops import weight_forms
from prairie.ops.addresses import exp_f32
from prairie.ops.packed import IN_PANELS, PackedWeight, in_panels, lay_in_panels
from prairie.ops.products import products

FORMS = {
    "rows": weight_forms.FLOAT32, "bf16": weight_forms.BFLOAT16, "int8": weight_forms.INT8,
    "panels": weight_forms.PANELS, "int4": weight_forms.INT4,
}  # fmt: skip


@pytest.mark.parametrize("adds", [0, 1])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("outputs", "inputs"), [(50, 64), (7, 8), (24, 72), (1, 40), (48, 520)])
def test_products(form, outputs, inputs, adds):
    generator = torch.Generator().manual_seed(0)
    dense_OI = torch.randn(outputs, inputs, generator=generator)
    numbers, scales = in_panels(dense_OI) if form == "panels" else dense_OI, torch.empty(0)
    if form in IN_PANELS:
        packed = PackedWeight(dense_OI, form)
        lay_in_panels([packed])
        numbers, dense_OI, scales = packed.numbers, packed.dense(), packed.scales
    middle = outputs // 32 * 16  # a panel is one piece
    for tokens in (*range(1, 10), 53):
        x_NI = torch.randn(tokens, inputs, generator=generator)
        y_NO = torch.full((tokens + 1, outputs), 3.0)
        call = products.ctypes
        for low, high in ((0, middle), (middle, outputs)):
            call(
                FORMS[form], numbers.data_ptr(), inputs, scales.data_ptr(), x_NI.data_ptr(), inputs, y_NO.data_ptr(),
                outputs, inputs, low, high, tokens, adds,
            )  # fmt: skip
        # Four bits come as 256 + n, so a sum is by so much less exact: 4e-5 of its spread (docs/log.md).
        atol = 1e-4 * (1 if form != "int4" else inputs**0.5)
        torch.testing.assert_close(y_NO[:-1], x_NI @ dense_OI.T + 3.0 * adds, atol=atol, rtol=1e-4)
        assert (y_NO[-1] == 3.0).all(), "written behind the last row"


def test_compiling_leaves_the_streams_of_the_program_alone():
    """numba's way to colour messages swaps sys.stdout, in the thread that compiles."""
    from numba.core import errors

    assert type(errors.termcolor()).__name__ == "NOPColorScheme"


def test_exp():
    from numba import njit

    @njit
    def all_of(x, out):
        for i in range(len(x)):
            out[i] = exp_f32(x[i])

    x = np.concatenate([np.linspace(-86, 87, 20001), [0.0]]).astype(np.float32)
    out = np.empty_like(x)
    all_of(x, out)
    assert np.abs(out / np.exp(x.astype(np.float64)) - 1).max() < 1e-5
    assert np.abs(out / np.exp(x.astype(np.float64)) - 1)[np.abs(x) < 20].max() < 2e-6
    assert out[-1] == 1.0
