"""What stands behind the last layer in place of next-token logits: masked-token, row and token scores, pooled vectors.

Not here: which kind a folder holds and what its weights are called (`families`), losses (train).

Legend: N tokens of all rows, B rows, D width, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prairie.models.config import ModelConfig
from prairie.ops.elementwise import ACTIVATIONS, layer_norm, rms_norm


class Head(nn.Module):
    """hidden -> pool -> dense -> activation -> norm -> out; each step only where `config.head` has it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.head is not None
        self.config, self.norm_eps = config.head, config.norm_eps
        self.layer_norm = config.norm == "layer"
        head, D, C = config.head, config.dim, len(config.head.labels)

        def parameter(wanted: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(*shape)) if wanted else None

        self.dense, self.dense_bias = parameter(head.dense, D, D), parameter(head.dense and head.dense_bias, D)
        self.norm, self.norm_bias = parameter(head.norm, D), parameter(head.norm and config.norm_bias, D)
        self.out, self.out_bias = parameter(C > 0, C, D), parameter(C > 0 and head.bias, C)

    def forward(self, hidden_ND: Tensor, lengths: Sequence[int]) -> Tensor:
        """(B, C) scores of rows, (N, C) of tokens, or vectors instead of scores where there are no labels."""
        x = pool_rows(hidden_ND, lengths, self.config.pool) if self.config.pool else hidden_ND
        if self.dense is not None:
            x = F.linear(x, self.dense, self.dense_bias)
        if self.config.activation:
            x = ACTIVATIONS[self.config.activation](x)
        if self.norm is not None:
            if self.layer_norm:
                x = layer_norm(x, self.norm, self.norm_bias, self.norm_eps)
            else:
                x = rms_norm(x, self.norm, self.norm_eps)
        return x if self.out is None else F.linear(x, self.out, self.out_bias)


def pool_rows(hidden_ND: Tensor, lengths: Sequence[int], kind: str) -> Tensor:
    """(B, D) one vector for each row: a token of it, or the mean or maximum of all."""
    if kind in ("mean", "max"):
        rows = hidden_ND.split(list(lengths))
        return torch.stack([row.mean(0) if kind == "mean" else row.amax(0) for row in rows])
    lengths_B = torch.tensor(lengths, device=hidden_ND.device)
    ends_B = lengths_B.cumsum(0)
    return hidden_ND[ends_B - 1 if kind == "last" else ends_B - lengths_B]
