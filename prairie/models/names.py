"""Where files keep a model's weights: the names of a family's modules, and tensors as rows of our fused parameters.

Not here: which tensors a model of some config has (`weight_table`), reading and writing them (`weights`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Names:
    """Paths of modules in a family's files; `.weight` and `.bias` follow. Llama's, unless a row says otherwise."""

    embed: str = "model.embed_tokens"
    positions: str = "model.embed_positions"
    segments: str = ""
    relative: str = ""
    """Of distances (T5), inside the first layer."""
    embed_norm: str = "model.embed_norm"
    layer: str = "model.layers.{}."
    """Goes before the names of a layer's parts."""
    norm: str = "model.norm"
    head: str = "lm_head"
    logit_bias: str = "lm_head.bias"
    """The whole name."""
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """One name: the file holds all three in one tensor."""
    qkv_by_head: bool = False
    """That one tensor lists q, k and v of the first head, then of the second, ..."""
    o: str = "self_attn.o_proj"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """One name: the file holds gate and up in one tensor, or there is no gate."""
    plain_up: tuple[str, ...] = ()
    """Where an MLP without a gate is called otherwise."""
    down: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    attention_out_norm: str = "post_attention_layernorm"
    cross_qkv: tuple[str, str, str] = ("encoder_attn.q_proj", "encoder_attn.k_proj", "encoder_attn.v_proj")
    cross_o: str = "encoder_attn.out_proj"
    cross_norm: str = "encoder_attn_layer_norm"
    cross_out_norm: str = "encoder_attn_layer_norm"
    mlp_norm: str = "post_attention_layernorm"
    mlp_out_norm: str = "post_feedforward_layernorm"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    router: str = "mlp.gate"
    expert: str = "mlp.experts.{}."
    """Goes before `expert_up` and `expert_down`."""
    expert_up: tuple[str, str] = ("gate_proj", "up_proj")
    expert_down: str = "down_proj"
    transposed: bool = False
    """Linear layers of a block are stored as (inputs, outputs): GPT-2's Conv1D."""
    prefix: str = ""
    """Begins every name except the head's; files of the bare model leave it out."""
    unused: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Ends of names that hold no weight, or one of a head that this model does not have."""
    copies: tuple[tuple[str, str], ...] = ()
    """Names under which a file may hold a second time what another name holds."""
    older: tuple[tuple[str, str], ...] = ()
    """Ends of names as older files have them, and as newer ones do."""


class Order(NamedTuple):
    """How the rows of a file's tensor are ordered in the parameter that holds them."""

    sources_O: Tensor
    """Ours[i] is the file's row sources[i]."""
    places_O: Tensor
    """The file's row i is ours[places[i]]."""

    @classmethod
    def of(cls, sources_O: Tensor) -> Order:
        return cls(sources_O, sources_O.argsort())


class Part(NamedTuple):
    """One linear layer of the file, as rows of a fused weight."""

    name: str
    """Its path, as Hugging Face writes it: `model.layers.0.self_attn.q_proj`."""
    outputs: int
    inputs: int
    order: Order | None = None
    transposed: bool = False
    """The file's weight is (inputs, outputs)."""

    def to_ours(self, x_O: Tensor) -> Tensor:
        """Reorders the first dimension, the file's outputs, into the order of the fused weight."""
        return x_O if self.order is None else x_O[self.order.sources_O]

    def to_files(self, x_O: Tensor) -> Tensor:
        """The inverse of `to_ours`."""
        return x_O if self.order is None else x_O[self.order.places_O]


class Weight(NamedTuple):
    """One tensor of the file: its name there, the parameter that holds it, which of that parameter's rows it is.

    Rows of a parameter with three dimensions, as experts have, are those of its matrices one behind the other.
    """

    name: str
    parameter: str
    rows: slice
    shape: tuple[int, ...]
    """In the file."""
    order: Order | None = None
    transposed: bool = False

    def put(self, tensor: Tensor, parameter: Tensor, first: int = 0) -> None:
        """Writes the file's rows `first` and following into the parameter."""
        ours, last = self._rows(parameter), first + len(tensor)
        if self.transposed:
            places = slice(None) if self.order is None else self.order.places_O
            ours.T[first:last, places] = tensor if self.order is None else tensor.to(ours.dtype)
        elif self.order is None:
            ours[first:last] = tensor
        else:
            ours[self.order.places_O[first:last]] = tensor.to(ours.dtype)

    def room(self, parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The part of the parameter that lies in memory as the tensor lies in a file, to be read straight into; None
        where it must be turned round or converted, or is not in this machine's own memory."""
        ours = self._rows(parameter)
        straight = self.order is None and not self.transposed and ours.dtype == dtype and ours.is_contiguous()
        return ours if straight and ours.device.type == "cpu" and ours.numel() and hasattr(os, "preadv") else None

    def take(self, parameter: Tensor) -> Tensor:
        """The file's tensor out of its parameter, or out of anything shaped like that."""
        ours = self._rows(parameter)
        ours = ours if self.order is None else ours[self.order.places_O]
        return ours.T if self.transposed else ours

    def _rows(self, parameter: Tensor) -> Tensor:
        return (parameter.flatten(0, 1) if parameter.ndim == 3 else parameter)[self.rows]
