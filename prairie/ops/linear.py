"""Products with weights: the low-rank delta of LoRA (arXiv 2106.09685).

Not here: which parts of a model carry an adapter (`models.lora`), the vocabulary's head (`ops.loss`).

Legend: N tokens, I input columns, O output columns, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lora_delta(x_NI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """(N, O): scale * x A^T B^T, in the dtype of x."""
    return (x_NI @ a_RI.T.to(x_NI.dtype)) @ b_OR.T.to(x_NI.dtype) * scale


def add_lora(y_NO: Tensor, x_NI: Tensor, a_RI: Tensor, b_OR: Tensor, rows: slice | None) -> Tensor:
    """y + x A^T B^T for all N tokens, or for the tokens `rows` only; B already holds the scale.

    May write into `y_NO`, which must be the caller's own fresh output.
    """
    a_RI, b_OR = a_RI.to(y_NO.dtype), b_OR.to(y_NO.dtype)
    if rows is None:
        return torch.addmm(y_NO, x_NI.to(y_NO.dtype) @ a_RI.T, b_OR.T)
    y_NO[rows].addmm_(x_NI[rows].to(y_NO.dtype) @ a_RI.T, b_OR.T)
    return y_NO
