"""Families are data: what a `config.json` says as a `ModelConfig`, which weight has which name, and both back.

One Transformer serves every family of the table; code elsewhere never tests a family's name. A row says three things:
which keys of `config.json` set which fields (`keys`, `fixed`, `read` for what takes a rule), what transformers assumes
when a key is absent (`defaults`), and where the files keep the weights (`names`).
transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`; both are read, the first is
written because both versions read it. Not here: tensors (`weights`), arithmetic (`transformer`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from prairie.errors import ModelError
from prairie.models.config import ModelConfig, RopeScaling
from prairie.ops.attention import pairs_together

if TYPE_CHECKING:
    from torch import Tensor

# ---- where files keep their weights


@dataclass(frozen=True)
class Names:
    """Paths of modules in a family's files; `.weight` and `.bias` follow. Llama's, unless a row says otherwise."""

    embed: str = "model.embed_tokens"
    positions: str = "model.embed_positions"
    embed_norm: str = "model.embed_norm"
    layer: str = "model.layers.{}."
    """Goes before the names of a layer's parts."""
    norm: str = "model.norm"
    head: str = "lm_head"
    scores: str = "score"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """One name: the file holds all three in one tensor."""
    qkv_by_head: bool = False
    """That one tensor lists q, k and v of the first head, then of the second, ..."""
    o: str = "self_attn.o_proj"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """One name: the file holds gate and up in one tensor, or there is no gate."""
    down: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    attention_out_norm: str = "post_attention_layernorm"
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
    """Ends of names that hold no weight."""


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
            ours.T[first:last, places] = tensor.to(ours.dtype)
        elif self.order is None:
            ours[first:last] = tensor
        else:
            ours[self.order.places_O[first:last]] = tensor.to(ours.dtype)

    def take(self, parameter: Tensor) -> Tensor:
        """The file's tensor out of its parameter, or out of anything shaped like that."""
        ours = self._rows(parameter)
        ours = ours if self.order is None else ours[self.order.places_O]
        return ours.T if self.transposed else ours

    def _rows(self, parameter: Tensor) -> Tensor:
        return (parameter.flatten(0, 1) if parameter.ndim == 3 else parameter)[self.rows]


def fused_parts(config: ModelConfig) -> list[dict[str, tuple[Part, ...]]]:
    """The linear layers of each block by the fused weight that holds them, in row order. Experts are not among them."""
    c, names = config, FAMILIES[config.family].names
    q, k, v = _head_orders(c)
    fused = len(names.qkv) == 1
    qkv = _joined_order(c, names.qkv_by_head) if fused else None
    up = "gate_up" if c.gated else "up"
    blocks = []
    for layer in range(c.layers):
        path = names.layer.format(layer)

        def part(name: str, outputs: int, inputs: int, order: Order | None = None, path: str = path) -> Part:
            return Part(path + name, outputs, inputs, order, names.transposed)

        groups: dict[str, tuple[Part, ...]] = {
            "qkv": (part(names.qkv[0], c.qkv_dim, c.dim, qkv),)
            if fused
            else (
                part(names.qkv[0], c.q_dim, c.dim, q),
                part(names.qkv[1], c.kv_dim, c.dim, k),
                part(names.qkv[2], c.kv_dim, c.dim, v),
            ),
            "o": (part(names.o, c.dim, c.q_dim),),
        }
        if not c.has_experts(layer):
            outputs = c.ffn_dim * (1 + c.gated) // len(names.up)
            groups[up] = tuple(part(name, outputs, c.dim) for name in names.up)
            groups["down"] = (part(names.down, c.dim, c.ffn_dim),)
        blocks.append(groups)
    return blocks


def weight_table(config: ModelConfig) -> list[Weight]:
    """Every tensor that a folder of this config holds, and where it lives in a `Transformer`."""
    c, names = config, FAMILIES[config.family].names
    table: list[Weight] = []

    def add(name: str, parameter: str, *shape: int, start: int = 0, order: Order | None = None) -> None:
        table.append(Weight(name, parameter, slice(start, start + shape[0]), shape, order))

    def add_norm(path: str, parameter: str, size: int, order: Order | None = None) -> None:
        add(f"{path}.weight", parameter, size, order=order)
        if c.norm_bias:
            add(f"{path}.bias", f"{parameter}_bias", size, order=order)

    def add_part(part: Part, parameter: str, start: int, biased: bool) -> None:
        rows = slice(start, start + part.outputs)
        shape = (part.inputs, part.outputs) if part.transposed else (part.outputs, part.inputs)
        table.append(Weight(f"{part.name}.weight", parameter, rows, shape, part.order, part.transposed))
        if biased:
            table.append(Weight(f"{part.name}.bias", f"{parameter}_bias", rows, (part.outputs,), part.order))

    biased = {"qkv": c.qkv_bias, "o": c.o_bias, "gate_up": c.mlp_bias, "up": c.mlp_bias, "down": c.mlp_bias}
    add(f"{names.embed}.weight", "embed", c.vocab_size, c.dim)
    if c.positions == "learned":
        add(f"{names.positions}.weight", "positions", c.max_context, c.dim)
    if c.embed_norm:
        add_norm(names.embed_norm, "embed_norm", c.dim)
    q_order, k_order, _ = _norm_orders(c)
    for layer, groups in enumerate(fused_parts(c)):
        path, home = names.layer.format(layer), f"layers.{layer}."
        for group, parts in groups.items():
            start = 0
            for part in parts:
                add_part(part, home + group, start, biased[group])
                start += part.outputs
        if c.has_experts(layer):
            add(f"{path}{names.router}.weight", f"{home}router", c.experts, c.dim)
            size = c.expert_ffn_dim
            for expert in range(c.experts):
                of = path + names.expert.format(expert)
                for half, name in enumerate(names.expert_up):
                    start = (2 * expert + half) * size
                    add(f"{of}{name}.weight", f"{home}experts_gate_up", size, c.dim, start=start)
                add(f"{of}{names.expert_down}.weight", f"{home}experts_down", c.dim, size, start=expert * c.dim)
        for parameter in block_norms(c):
            add_norm(path + getattr(names, parameter), home + parameter, c.dim)
        if c.qk_norm:
            whole = c.qk_norm == "width"
            add_norm(path + names.q_norm, f"{home}q_norm", c.q_dim if whole else c.head_dim, q_order)
            add_norm(path + names.k_norm, f"{home}k_norm", c.kv_dim if whole else c.head_dim, k_order)
    if c.final_norm:
        add_norm(names.norm, "norm", c.dim)
    if c.labels:
        add(f"{names.scores}.weight", "score", len(c.labels), c.dim)
    elif not c.tie_embeddings:
        add(f"{names.head}.weight", "head", c.vocab_size, c.dim)
    return table


def block_norms(config: ModelConfig) -> tuple[str, ...]:
    """The norms of a block over the model's width, by the parameter that holds each."""
    before, after = ("attention_norm", "mlp_norm"), ("attention_out_norm", "mlp_out_norm")
    return {"input": before, "output": after, "sum": after, "both": before + after}[config.norm_at]


def _head_orders(c: ModelConfig) -> tuple[Order | None, Order | None, None]:
    """Of q, k and v: rotary pairs lie side by side in ours (`ops.attention.pairs_together`)."""
    if c.positions != "rotary":
        return None, None, None
    q, k = (
        Order.of(pairs_together(torch.arange(size, device="cpu"), c.head_dim, c.rotary_dim))
        for size in (c.q_dim, c.kv_dim)
    )
    return q, k, None


def _norm_orders(c: ModelConfig) -> tuple[Order | None, Order | None, None]:
    """Of the norms of queries and keys, which have the length of one head or of all."""
    if c.qk_norm != "head" or c.positions != "rotary":
        return _head_orders(c)
    head = Order.of(pairs_together(torch.arange(c.head_dim, device="cpu"), c.head_dim, c.rotary_dim))
    return head, head, None


def _joined_order(c: ModelConfig, by_head: bool) -> Order | None:
    """Of the one tensor that holds q, k and v."""
    rows = torch.arange(c.qkv_dim, device="cpu")
    if by_head:
        rows = rows.view(c.heads, 3, c.head_dim).transpose(0, 1).flatten()
    if c.positions == "rotary":
        turning, still = rows.split([c.q_dim + c.kv_dim, c.kv_dim])
        rows = torch.cat([pairs_together(turning, c.head_dim, c.rotary_dim), still])
    return Order.of(rows) if by_head or c.positions == "rotary" else None


# ---- what config.json says


class Key(NamedTuple):
    """What one key of `config.json` sets, where it is more than a value taken as it is."""

    fields: tuple[str, ...]
    read: Callable[[Any], Any]
    write: Callable[[Any], Any]


class Windows(NamedTuple):
    """Which layers of a family see only a window of `sliding_window` tokens."""

    layers: Callable[[Mapping[str, Any], int], bool]
    """By the values of `config.json`, where it has no `layer_types`."""
    switch: str | None = None
    """The key that must be true for windows to be in force."""
    types: bool = True
    """`layer_types` is written, too."""


@dataclass(frozen=True)
class Family:
    """One row of the table. The defaults are Llama's."""

    architecture: str
    keys: Mapping[str, str | Key] = field(default_factory=dict)
    """Keys of `config.json` to fields of `ModelConfig`, besides `KEYS`; an empty field takes a key out of those."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields that are so in every model of the family."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values that transformers assumes for this family when its config leaves them out, besides `DEFAULTS`."""
    names: Names = Names()
    windows: Windows | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Keys that only this family writes so, by the usual name of each."""
    partial_rotary: bool = False
    """`partial_rotary_factor` is in force."""
    read: Callable[[Mapping[str, Any], dict[str, Any]], dict[str, Any]] | None = None
    """Further fields, from the values of `config.json` and the fields so far."""
    write: Callable[[ModelConfig], dict[str, Any]] | None = None
    """Further keys of `config.json`."""

    @property
    def scores_architecture(self) -> str:
        """Hugging Face's name for the family's body under a head of scores."""
        body = self.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        return f"{body}ForSequenceClassification"

    def all_keys(self) -> dict[str, str | Key]:
        return {name: key for name, key in {**KEYS, **self.keys}.items() if key}


ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
"""What `config.json` calls an activation, and what `ops.elementwise` does; the first name of each is written."""


def _activation(name: Any) -> str:
    if name not in ACTIVATION_NAMES:
        raise ModelError(
            "the config asks for an activation that is not computed here",
            got=repr(name),
            wanted="one of " + ", ".join(ACTIVATION_NAMES),
        )
    return ACTIVATION_NAMES[name]


ACTIVATION = Key(
    ("activation",), _activation, lambda ours: next(name for name, value in ACTIVATION_NAMES.items() if value == ours)
)
BIASES = Key(("qkv_bias", "o_bias"), bool, bool)
ALL_BIASES = Key(("qkv_bias", "o_bias", "mlp_bias"), bool, bool)
CAP = {
    "attn_logit_softcapping": Key(("attention_softcap",), float, lambda cap: cap or None),
    "final_logit_softcapping": Key(("logit_softcap",), float, lambda cap: cap or None),
    "query_pre_attn_scalar": Key(
        ("attention_scale",), lambda size: float(size) ** -0.5, lambda scale: _whole_if_it_is(scale**-2)
    ),
}
KEYS: dict[str, str | Key] = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "ffn_dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "hidden_act": ACTIVATION,
    "max_position_embeddings": "max_context",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0}
ONLY: dict[str, Any] = {
    "use_bidirectional_attention": False,
    "clip_qkv": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "output_router_logits": False,
    "router_jitter_noise": 0.0,
    "quantization_config": None,
}
"""Settings that change the arithmetic, with the only value that is computed here."""

GEMMA = {"norm_offset": True, "activation": "gelu_tanh"}
GEMMA_DEFAULTS = {
    "head_dim": 256,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
GEMMA_NAMES = Names(mlp_norm="pre_feedforward_layernorm")


def _every_but(count: int) -> Callable[[Mapping[str, Any], int], bool]:
    """All layers but every `count`-th."""
    return lambda values, layer: (layer + 1) % values.get("sliding_window_pattern", count) != 0


def _all_layers(_: Mapping[str, Any], __: int) -> bool:
    return True


def _width_root(_: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    return {"embed_scale": fields["dim"] ** 0.5}


def _nope_layers(values: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    return {"nope_layers": tuple(i for i in range(fields["layers"]) if not _turns_here(values, i))}


def _turns_here(values: Mapping[str, Any], layer: int) -> bool:
    if "no_rope_layers" in values:
        return bool(values["no_rope_layers"][layer])
    return (layer + 1) % values.get("no_rope_layer_interval", 4) != 0


def _four_widths(values: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    return {"ffn_dim": fields.get("ffn_dim", 4 * fields["dim"])}


def _experts_as_wide(_: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    return {"expert_ffn_dim": fields["ffn_dim"]}


def _dense_layers(values: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    dense, step = values.get("mlp_only_layers", ()), values.get("decoder_sparse_step", 1)
    return {"dense_layers": tuple(i for i in range(fields["layers"]) if i in dense or (i + 1) % step)}


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", keys={"attention_bias": BIASES, "mlp_bias": "mlp_bias"}),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        windows=Windows(_all_layers, types=False),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        fixed={"qkv_bias": True},
        defaults={"sliding_window": 4096},
        windows=Windows(lambda values, layer: layer >= values.get("max_window_layers", 28), "use_sliding_window"),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        keys={"attention_bias": BIASES},
        fixed={"qk_norm": "head"},
        defaults={"head_dim": 128, "sliding_window": 4096},
        windows=Windows(lambda values, layer: layer >= values.get("max_window_layers", 28), "use_sliding_window"),
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        keys={"hidden_act": "", "attention_bias": BIASES},
        fixed=GEMMA,
        defaults=GEMMA_DEFAULTS,
        read=_width_root,
        write=lambda c: {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        keys={"hidden_act": "", "hidden_activation": ACTIVATION, "attention_bias": BIASES, **CAP},
        fixed={**GEMMA, "norm_at": "both"},
        defaults={**GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        names=GEMMA_NAMES,
        windows=Windows(_every_but(2)),
        read=_width_root,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        keys={"hidden_act": "", "hidden_activation": ACTIVATION, "attention_bias": BIASES, **CAP},
        fixed={**GEMMA, "norm_at": "both", "qk_norm": "head"},
        defaults={**GEMMA_DEFAULTS, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
        names=GEMMA_NAMES,
        windows=Windows(_every_but(6)),
        read=_width_root,
        write=lambda c: {"rope_local_base_freq": c.window_rope_theta},
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        names=Names(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",)),
        windows=Windows(_all_layers, types=False),
        partial_rotary=True,
        write=lambda c: {
            "original_max_position_embeddings": c.rope_scaling.original_max_context if c.rope_scaling else c.max_context
        },
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        keys={"attention_bias": BIASES},
        fixed={"norm_at": "output", "qk_norm": "width"},
        defaults={"rms_norm_eps": 1e-5},
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        keys={"attention_bias": BIASES, "mlp_bias": "mlp_bias"},
        defaults={"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2e6},
        windows=Windows(lambda values, layer: not _turns_here(values, layer), "use_sliding_window"),
        read=_nope_layers,
        write=lambda c: {"no_rope_layers": [int(layer not in c.nope_layers) for layer in range(c.layers)]},
    ),
    "granite": Family(
        "GraniteForCausalLM",
        keys={
            "attention_bias": BIASES,
            "mlp_bias": "mlp_bias",
            "embedding_multiplier": "embed_scale",
            "attention_multiplier": "attention_scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": Key(("logit_scale",), lambda share: 1 / float(share), lambda scale: 1 / scale),
        },
        defaults={"attention_multiplier": 1.0},
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        keys={
            **dict.fromkeys(KEYS, ""),
            "vocab_size": "vocab_size",
            "n_embd": "dim",
            "n_inner": "ffn_dim",
            "n_layer": "layers",
            "n_head": "heads",
            "n_positions": "max_context",
            "activation_function": ACTIVATION,
            "layer_norm_epsilon": "norm_eps",
            "tie_word_embeddings": "tie_embeddings",
        },
        fixed={
            "norm": "layer",
            "norm_bias": True,
            "positions": "learned",
            "gated": False,
            "qkv_bias": True,
            "o_bias": True,
            "mlp_bias": True,
        },
        defaults={"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        names=Names(
            prefix="transformer.",
            embed="transformer.wte",
            positions="transformer.wpe",
            layer="transformer.h.{}.",
            norm="transformer.ln_f",
            qkv=("attn.c_attn",),
            o="attn.c_proj",
            up=("mlp.c_fc",),
            down="mlp.c_proj",
            attention_norm="ln_1",
            mlp_norm="ln_2",
            transposed=True,
            unused=(".attn.bias", ".attn.masked_bias"),
        ),
        read=_four_widths,
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        keys={
            "num_key_value_heads": "",
            "head_dim": "",
            "rms_norm_eps": "",
            "layer_norm_eps": "norm_eps",
            "attention_bias": BIASES,
            "use_parallel_residual": "parallel_residual",
        },
        fixed={"norm": "layer", "norm_bias": True, "gated": False, "mlp_bias": True},
        defaults={
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "attention_bias": True,
            "use_parallel_residual": True,
            "partial_rotary_factor": 0.25,
        },
        names=Names(
            prefix="gpt_neox.",
            embed="gpt_neox.embed_in",
            layer="gpt_neox.layers.{}.",
            norm="gpt_neox.final_layer_norm",
            head="embed_out",
            qkv=("attention.query_key_value",),
            qkv_by_head=True,
            o="attention.dense",
            up=("mlp.dense_h_to_4h",),
            down="mlp.dense_4h_to_h",
            unused=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
        ),
        aliases={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
        partial_rotary=True,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        keys={"num_local_experts": "experts", "num_experts_per_tok": "experts_per_token"},
        fixed={"expert_weights_sum_to_one": True},
        defaults={
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        names=Names(
            router="block_sparse_moe.gate",
            expert="block_sparse_moe.experts.{}.",
            expert_up=("w1", "w3"),
            expert_down="w2",
        ),
        windows=Windows(_all_layers, types=False),
        read=_experts_as_wide,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        keys={
            "attention_bias": BIASES,
            "num_experts": "experts",
            "num_experts_per_tok": "experts_per_token",
            "moe_intermediate_size": "expert_ffn_dim",
            "norm_topk_prob": "expert_weights_sum_to_one",
        },
        fixed={"qk_norm": "head"},
        defaults={
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        windows=Windows(_all_layers, "use_sliding_window", types=False),
        aliases={"num_experts": "num_local_experts"},
        read=_dense_layers,
        write=lambda c: {
            "num_experts": c.experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(c.dense_layers),
        },
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        keys={
            "attention_bias": BIASES,
            "num_experts": "experts",
            "num_experts_per_tok": "experts_per_token",
            "norm_topk_prob": "expert_weights_sum_to_one",
        },
        fixed={"qk_norm": "width"},
        defaults={"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8},
        read=_experts_as_wide,
    ),
}


def read_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The meaning of a `config.json`. ModelError for an unknown family or a setting that we would get wrong."""
    name, family = _family_of(raw, where)
    given = {usual: raw[own] for usual, own in family.aliases.items() if own in raw}
    values = {**DEFAULTS, **family.defaults, **raw, **given}
    values = {key: value for key, value in values.items() if value is not None}  # an explicit null undoes a default
    for key, only in ONLY.items():
        if values.get(key, only) != only:
            raise ModelError(f"{where} sets {key}, which is not computed here", got=values[key], wanted=only)
    fields: dict[str, Any] = {**family.fixed, "family": name}
    for key, meaning in family.all_keys().items():
        if key not in values:
            continue
        try:
            if isinstance(meaning, Key):
                fields |= dict.fromkeys(meaning.fields, meaning.read(values[key]))
            else:
                fields[meaning] = _KINDS[ModelConfig.__annotations__[meaning]](values[key])
        except (TypeError, ValueError):
            raise ModelError(f"{where} has no usable {key}", got=repr(values[key])) from None
    fields.setdefault("kv_heads", fields.get("heads"))
    own = {meaning: key for key, meaning in family.all_keys().items() if isinstance(meaning, str)}
    for needed in ("vocab_size", "dim", "layers", "heads", "max_context"):
        if needed not in fields:
            raise ModelError(f"{where} has no usable {own[needed]}", got="None", wanted="a whole number")
    if family.read is not None:
        fields |= family.read(values, fields)
    if "ffn_dim" not in fields:
        raise ModelError(f"{where} has no usable {own['ffn_dim']}", got="None", wanted="a whole number")
    fields["windows"] = _windows_of(family, values, fields["layers"], where)
    if fields.get("positions", "rotary") == "rotary":
        fields |= _rope_of(family, values, fields, where)
    eos = values.get("eos_token_id")
    return ModelConfig(
        **fields,
        bos_id=values.get("bos_token_id"),
        eos_id=tuple(eos) if isinstance(eos, list) else eos,
        pad_id=values.get("pad_token_id"),
        labels=_labels_of(values) if family.scores_architecture in (raw.get("architectures") or []) else (),
    )


def write_config(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` that `read_config` and transformers (4 and 5) read back to the same model."""
    c, family = config, FAMILIES[config.family]
    architecture = family.scores_architecture if c.labels else family.architecture
    raw: dict[str, Any] = {"architectures": [architecture], "model_type": c.family}
    for key, meaning in family.all_keys().items():
        if isinstance(meaning, Key):
            raw[key] = meaning.write(getattr(c, meaning.fields[0]))
        else:
            raw[key] = getattr(c, meaning)
    raw |= {
        "attention_dropout": 0.0,
        "bos_token_id": c.bos_id,
        "eos_token_id": list(c.eos_id) if isinstance(c.eos_id, tuple) else c.eos_id,
        "pad_token_id": c.pad_id,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if c.positions == "rotary":
        raw |= _written_rope(c, family)
    if family.windows is not None:
        raw["sliding_window"] = max(c.windows, default=0) or None
        if family.windows.types:
            raw["layer_types"] = ["sliding_attention" if c.window(i) else "full_attention" for i in range(c.layers)]
        if family.windows.switch:
            raw[family.windows.switch] = bool(c.windows)
    if c.labels:
        raw["id2label"] = {str(number): name for number, name in enumerate(c.labels)}
        raw["label2id"] = {name: number for number, name in enumerate(c.labels)}
    if family.write is not None:
        raw |= family.write(c)
    for usual, own in family.aliases.items():
        if usual in raw:
            raw[own] = raw[usual]
    return raw


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError
    return value


_KINDS: dict[str, Callable[[Any], Any]] = {"int": _whole, "float": float, "bool": bool}
"""Readers by the annotation of a field of `ModelConfig`."""


def _whole_if_it_is(value: float) -> float:
    return round(value) if abs(value - round(value)) < 1e-6 * value else value


def _family_of(raw: Mapping[str, Any], where: str) -> tuple[str, Family]:
    names = raw.get("architectures") or []
    for key, family in FAMILIES.items():
        known = {family.architecture, family.scores_architecture}
        if known & set(names) or (not names and raw.get("model_type") == key):
            return key, family
    raise ModelError(
        f"{where} is of a family that is not known here",
        got=", ".join(names) or repr(raw.get("model_type")),
        wanted="one of " + ", ".join(family.architecture for family in FAMILIES.values()),
    )


def _labels_of(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in `id2label`, in the order of their numbers; two when it says nothing, as transformers has it."""
    named = values.get("id2label") or {str(n): f"LABEL_{n}" for n in range(int(values.get("num_labels") or 2))}
    return tuple(str(named[number]) for number in sorted(named, key=int))


def _windows_of(family: Family, values: Mapping[str, Any], layers: int, where: str) -> tuple[int, ...]:
    """The window of each layer, 0 where there is none."""
    rule, types = family.windows, values.get("layer_types")
    if types is not None and (len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}):
        raise ModelError(
            f"{where} has layer_types that are not computed here",
            got=f"{len(types)} of {', '.join(sorted(set(types)))}",
            wanted=f"{layers} of full_attention, sliding_attention",
        )
    if rule is None:
        if "sliding_attention" in (types or ()) or (values.get("use_sliding_window") and values.get("sliding_window")):
            raise ModelError(f"{where} asks for sliding window attention, which this family does not have")
        return ()
    window = values.get("sliding_window")
    if not window or (rule.switch is not None and not values.get(rule.switch)):
        return ()
    if not rule.types and "full_attention" in (types or ()):
        raise ModelError(f"{where} mixes kinds of attention, which this family does not", got=", ".join(types or ()))
    if types is None:
        types = ["sliding_attention" if rule.layers(values, i) else "full_attention" for i in range(layers)]
    return tuple(_whole(window) if kind == "sliding_attention" else 0 for kind in types)


# ---- rotary positions

ROPE_KINDS = ("linear", "dynamic", "llama3", "yarn", "longrope")


def _rope_of(family: Family, values: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of rotary positions; a kind of scaling that we cannot compute is refused, never ignored."""
    spec: Mapping[str, Any] = values.get("rope_parameters") or values.get("rope_scaling") or {}
    found: dict[str, Any] = {}
    local = values.get("rope_local_base_freq")
    if "full_attention" in spec or "sliding_attention" in spec:  # transformers 5, where kinds of layers differ
        near = spec.get("sliding_attention") or {}
        if near.get("rope_type", "default") != "default":
            raise ModelError(
                f"{where} scales rotary positions inside a window", got=near["rope_type"], wanted="default"
            )
        local = near.get("rope_theta", local)
        spec = spec.get("full_attention") or {}
    if local is not None:
        found["window_rope_theta"] = float(local)
    found["rope_theta"] = float(spec.get("rope_theta") or values["rope_theta"])
    share = float(spec.get("partial_rotary_factor") or values.get("partial_rotary_factor", 1.0))
    if share != 1.0:
        if not family.partial_rotary:
            raise ModelError(f"{where} turns only part of each head", got=share, wanted="partial_rotary_factor 1.0")
        found["rotary_dim"] = int((fields.get("head_dim") or fields["dim"] // fields["heads"]) * share)
    kind = spec.get("rope_type", spec.get("type", "default"))
    if "short_factor" in spec:  # older files call it su or yarn
        kind = "longrope"
    if kind == "default":
        return found
    if kind not in ROPE_KINDS:
        raise ModelError(
            f"{where} scales rotary positions in an unknown way",
            got=kind,
            wanted=f"default, {', '.join(ROPE_KINDS)}",
        )
    try:
        scaling = _scaling_of(kind, spec, values, fields["max_context"])
    except KeyError as missing:
        raise ModelError(f"rope_scaling of {where} lacks {missing}", got=dict(spec)) from None
    found["rope_scaling"] = scaling
    if kind in ("dynamic", "yarn"):  # their max_position_embeddings may be the context before the stretch
        found["max_context"] = max(fields["max_context"], int(scaling.factor * scaling.original_max_context))
    return found


def _scaling_of(kind: str, spec: Mapping[str, Any], values: Mapping[str, Any], max_context: int) -> RopeScaling:
    """KeyError for a number that is missing."""
    given = values.get("original_max_position_embeddings") or spec.get("original_max_position_embeddings")
    original = int(given or max_context)
    match kind:
        case "linear":
            return RopeScaling(kind, float(spec["factor"]))
        case "dynamic":
            return RopeScaling(kind, float(spec["factor"]), original_max_context=max_context)
        case "llama3":
            low, high = float(spec["low_freq_factor"]), float(spec["high_freq_factor"])
            return RopeScaling(kind, float(spec["factor"]), low, high, original)
        case "yarn":
            factor = float(spec.get("factor") or max_context / original)
            return RopeScaling(
                kind,
                factor,
                original_max_context=original,
                beta_fast=float(spec.get("beta_fast") or 32),
                beta_slow=float(spec.get("beta_slow") or 1),
                truncate=bool(spec.get("truncate", True)),
                magnitude=_yarn_magnitude(spec, factor),
            )
        case _:
            factor = float(spec.get("factor") or max_context / original)
            magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
            return RopeScaling(
                kind,
                factor,
                original_max_context=original,
                magnitude=float(spec.get("attention_factor") or magnitude),
                short_factors=tuple(map(float, spec["short_factor"])),
                long_factors=tuple(map(float, spec["long_factor"])),
            )


def _yarn_magnitude(spec: Mapping[str, Any], factor: float) -> float:
    if spec.get("attention_factor") is not None:
        return float(spec["attention_factor"])

    def grown(share: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1.0

    if spec.get("mscale") and spec.get("mscale_all_dim"):
        return grown(spec["mscale"]) / grown(spec["mscale_all_dim"])
    return grown()


def _written_rope(c: ModelConfig, family: Family) -> dict[str, Any]:
    raw: dict[str, Any] = {"rope_theta": c.rope_theta, "rope_scaling": None}
    if family.partial_rotary:
        raw["partial_rotary_factor"] = c.rotary_dim / c.head_dim
    s = c.rope_scaling
    if s is None:
        return raw
    spec: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind not in ("linear", "dynamic"):
        spec["original_max_position_embeddings"] = s.original_max_context
    if s.kind == "dynamic":
        raw["max_position_embeddings"] = s.original_max_context
    if s.kind == "llama3":
        spec |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    if s.kind in ("yarn", "longrope"):
        spec["attention_factor"] = s.magnitude
    if s.kind == "yarn":
        spec |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
    if s.kind == "longrope":
        spec |= {"short_factor": list(s.short_factors), "long_factor": list(s.long_factors)}
    return {**raw, "rope_scaling": spec}
