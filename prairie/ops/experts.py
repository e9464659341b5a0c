"""A mixture of experts (arXiv 1701.06538): each token goes to the few MLPs that a router picks for it.

No token is dropped and no expert has a limit, so an answer never depends on who else is in the batch.
Not here: a loss that balances the experts.

Legend: N tokens, D width, E experts, T experts of a token, F width inside an expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prairie.ops.elementwise import gated


def route(logits_NE: Tensor, top: int, sum_to_one: bool) -> tuple[Tensor, Tensor]:
    """weights_NT (float32) and experts_NT: the `top` likeliest experts of each token and their softmax over all
    experts, stretched to sum to one if asked."""
    weights_NT, experts_NT = logits_NE.float().softmax(-1).topk(top, -1)
    if sum_to_one:
        weights_NT = weights_NT / weights_NT.sum(-1, keepdim=True)
    return weights_NT, experts_NT


def mix_experts(
    x_ND: Tensor, weights_NT: Tensor, experts_NT: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, activation: str
) -> Tensor:
    """(N, D): the weighted sum of each token's experts. `gate_up_EFD` holds gate and up, so its F is twice that of
    `down_EDF`. Tokens are sorted by expert, so each expert in use is one product of matrices."""
    top = experts_NT.shape[1]
    order_M = experts_NT.flatten().argsort(stable=True)
    tokens_M = order_M // top
    counts = torch.bincount(experts_NT.flatten(), minlength=len(gate_up_EFD)).tolist()
    outs = []
    for expert, (part_MD, count) in enumerate(zip(x_ND.index_select(0, tokens_M).split(counts), counts, strict=True)):
        if count:
            inner_MF = gated(F.linear(part_MD, gate_up_EFD[expert]), activation)
            outs.append(F.linear(inner_MF, down_EDF[expert]))
    y_MD = torch.cat(outs) * weights_NT.flatten()[order_M, None].to(x_ND.dtype)
    return torch.zeros_like(x_ND).index_add(0, tokens_M, y_MD.to(x_ND.dtype))


def mix_experts_reference(
    x_ND: Tensor, weights_NT: Tensor, experts_NT: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, activation: str
) -> Tensor:
    """The plain form of `mix_experts`: every expert computes every token."""
    share_NE = x_ND.new_zeros(len(x_ND), len(gate_up_EFD)).scatter(1, experts_NT, weights_NT.to(x_ND.dtype))
    every_END = torch.stack(
        [F.linear(gated(F.linear(x_ND, w), activation), d) for w, d in zip(gate_up_EFD, down_EDF, strict=True)]
    )
    return torch.einsum("ne,end->nd", share_NE, every_END)
