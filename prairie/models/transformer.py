"""The decoder: one definition for training and serving and for every family of the table.

It works on flat tokens and knows neither rows nor caches: an `Attend` object does positions and attention. Adapters
stand outside; their deltas are added to the outputs of the linear layers they name. Weights that read the same input
are fused (q, k, v; gate, up); the names on disk stay Hugging Face's (`families.weight_table`).
Not here: losses (`ops.loss`), files (`weights`).

Legend: N tokens of all rows, D width, H query heads, K key/value heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prairie.errors import ModelError
from prairie.models.config import ModelConfig
from prairie.models.families import Part, Weight, fused_parts, weight_table
from prairie.ops.attention import Attend, rotary_turns, rotate, split_and_rotate
from prairie.ops.elementwise import rms_norm, swiglu

if TYPE_CHECKING:
    from prairie.models.lora import AdapterRows


def rope_frequencies(config: ModelConfig) -> Tensor:
    """(D/2,) turns per token in radians, scaled as the config says ("llama3": Llama 3.1's rule, arXiv 2407.21783)."""
    with torch.device("cpu"):  # also under "meta", where this would import torch's compiler and hold nothing
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (scaling.original_max_context / wavelengths - low) / (high - low)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


class Block(nn.Module):
    """The weights of one layer; the arithmetic is in `Transformer.forward`, where it can be read in one go."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape))

        self.attention_norm = parameter(c.dim)
        self.qkv = parameter(c.qkv_dim, c.dim)
        self.qkv_bias = parameter(c.qkv_dim) if c.qkv_bias else None
        self.q_norm = parameter(c.head_dim) if c.qk_norm else None
        self.k_norm = parameter(c.head_dim) if c.qk_norm else None
        self.o = parameter(c.dim, c.q_dim)
        self.o_bias = parameter(c.dim) if c.o_bias else None
        self.mlp_norm = parameter(c.dim)
        self.gate_up = parameter(2 * c.ffn_dim, c.dim)
        self.gate_up_bias = parameter(2 * c.ffn_dim) if c.mlp_bias else None
        self.down = parameter(c.dim, c.ffn_dim)
        self.down_bias = parameter(c.dim) if c.mlp_bias else None


class Transformer(nn.Module):
    """A decoder that ends in a vocabulary, or (`config.labels`) in scores of a whole row.

    Parameters are not set until `init_weights` or `weights.load_model`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.Parameter(torch.empty(config.dim))
        untied = not config.tie_embeddings and not config.labels
        self.head = nn.Parameter(torch.empty(config.vocab_size, config.dim)) if untied else None
        self.score = nn.Parameter(torch.empty(len(config.labels), config.dim)) if config.labels else None
        self.parts: dict[str, tuple[Part, ...]] = fused_parts(config)
        self.table: list[Weight] = weight_table(config)
        self.frequencies = rope_frequencies(config)
        self.loaded_hashes: tuple[str, str] | None = None
        """Set by `load_model`: hash of the file's weights, and of the same weights in the dtype they were loaded to."""

    def init_weights(self, seed: int | torch.Generator = 0) -> Transformer:
        """Sets every parameter by a seed: normal, std 1/sqrt(inputs), less where a layer adds to the residual (GPT-2).

        The usual fixed 0.02 is that std at a width of 2,500; narrow models learn far more slowly from it (docs/log.md).
        """
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        residual_share = 1 / math.sqrt(2 * self.config.layers)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                kind = name.rsplit(".", 1)[-1]
                if parameter.ndim == 1:
                    parameter.fill_(0.0 if kind.endswith("bias") else 1.0)
                else:
                    std = (residual_share if kind in ("o", "down") else 1.0) / math.sqrt(parameter.shape[1])
                    parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
        return self

    @property
    def head_weight(self) -> Tensor:
        """(V, D) the matrix that turns hidden states into logits: the embedding when tied. Raises ModelError for a
        model of scores."""
        if self.score is not None:
            raise ModelError(
                "this model gives scores, not text", got=", ".join(self.config.labels), wanted="a language model"
            )
        return self.embed if self.head is None else self.head

    def scores(self, hidden_RD: Tensor) -> Tensor:
        """(R, L) float32 scores of rows, from the hidden state of each row's last token (where Hugging Face's
        sequence classifiers of decoders look). Raises ModelError for a model without such a head."""
        if self.score is None:
            raise ModelError(
                "this model has no head of scores", mend="train it with objective reward or classification"
            )
        return F.linear(hidden_RD, self.score).float()

    def with_scores(self, labels: Sequence[str], seed: int = 0) -> Transformer:
        """The same body, its parameters shared, under a fresh head of scores (normal, std 1/sqrt(width))."""
        with torch.device("meta"):
            scored = Transformer(replace(self.config, labels=tuple(labels)))
        mine = dict(self.named_parameters())
        fresh = torch.empty(len(labels), self.config.dim).normal_(generator=torch.Generator().manual_seed(seed))
        mine["score"] = nn.Parameter((fresh / math.sqrt(self.config.dim)).to(self.embed))
        for name, _ in list(scored.named_parameters()):
            owner, _, last = name.rpartition(".")
            setattr(scored.get_submodule(owner), last, mine[name])
        return scored

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """(N, V)."""
        return F.linear(hidden_ND, self.head_weight)

    def forward(self, tokens_N: Tensor, attend: Attend, adapters: Sequence[AdapterRows] = ()) -> Tensor:
        """hidden_ND after the final norm, of flat tokens whose context `attend` knows."""
        c = self.config
        turns = rotary_turns(attend.positions_N, self.frequencies.to(tokens_N.device))
        x_ND = F.embedding(tokens_N, self.embed)
        for index, block in enumerate(self.layers):
            assert isinstance(block, Block)
            y_ND = rms_norm(x_ND, block.attention_norm, c.norm_eps)
            qkv = self._linear(y_ND, block.qkv, block.qkv_bias, index, "qkv", adapters)
            o_NHD = attend(index, *self._heads(qkv, block, turns))
            x_ND = x_ND + self._linear(o_NHD.flatten(1), block.o, block.o_bias, index, "o", adapters)
            y_ND = rms_norm(x_ND, block.mlp_norm, c.norm_eps)
            gate_up = self._linear(y_ND, block.gate_up, block.gate_up_bias, index, "gate_up", adapters)
            x_ND = x_ND + self._linear(swiglu(gate_up), block.down, block.down_bias, index, "down", adapters)
        return rms_norm(x_ND, self.norm, c.norm_eps)

    def _heads(self, qkv: Tensor, block: Block, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q_NHD and k_NKD at their positions, normed before if the family does so, and v_NKD."""
        c = self.config
        if block.q_norm is None or block.k_norm is None:
            return split_and_rotate(qkv, c.heads, c.kv_heads, turns)
        q_NHD, k_NKD, v_NKD = qkv.view(len(qkv), -1, c.head_dim).split([c.heads, c.kv_heads, c.kv_heads], 1)
        q_NHD, k_NKD = rms_norm(q_NHD, block.q_norm, c.norm_eps), rms_norm(k_NKD, block.k_norm, c.norm_eps)
        return rotate(q_NHD, turns), rotate(k_NKD, turns), v_NKD

    def _linear(
        self,
        x_NI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        layer: int,
        group: str,
        adapters: Sequence[AdapterRows],
    ) -> Tensor:
        """One fused linear layer with the deltas of the adapters that name it."""
        y_NO = F.linear(x_NI, weight_OI, bias_O)
        for adapter in adapters:
            y_NO = adapter.lora.add_to(y_NO, x_NI, layer, group, self.parts[group], adapter.rows)
        return y_NO
