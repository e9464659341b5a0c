"""Families are data: what a `config.json` says as a `ModelConfig`, which weight has which name, and both back.

One Transformer serves every family of the table; code elsewhere never tests a family's name. A row says three things:
which keys of `config.json` set which fields (`keys`, `fixed`, `read` for what takes a rule), what transformers assumes
when a key is absent (`defaults`), and where the files keep the weights (`names`).
transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`; both are read, the first is
written because both versions read it. Not here: tensors (`weights`), arithmetic (`transformer`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from prairie.errors import ModelError
from prairie.models.config import MOST_LAYERS, HeadConfig, ModelConfig, RopeScaling
from prairie.ops.attention import pairs_together

if TYPE_CHECKING:
    from torch import Tensor

# ---- where files keep their weights


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

    def take(self, parameter: Tensor) -> Tensor:
        """The file's tensor out of its parameter, or out of anything shaped like that."""
        ours = self._rows(parameter)
        ours = ours if self.order is None else ours[self.order.places_O]
        return ours.T if self.transposed else ours

    def _rows(self, parameter: Tensor) -> Tensor:
        return (parameter.flatten(0, 1) if parameter.ndim == 3 else parameter)[self.rows]


def fused_parts(config: ModelConfig) -> list[dict[str, tuple[Part, ...]]]:
    """The linear layers of each block by the fused weight that holds them, in row order. Experts are not among them."""
    c, names = config, names_of(config)
    q, k, v = _head_orders(c)
    fused = len(names.qkv) == 1
    qkv = _joined_order(c, names.qkv_by_head) if fused else None
    up = "gate_up" if c.gated else "up"
    blocks = []
    for layer in range(c.layers):
        path = names.layer.format(layer).removeprefix(names.prefix if is_bare(c) else "")

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
        if c.encoder is not None:
            q_name, *kv_names = names.cross_qkv
            groups["cross_q"] = (part(q_name, c.q_dim, c.dim),)
            groups["cross_kv"] = tuple(part(name, c.kv_dim, c.encoder.dim) for name in kv_names)
            groups["cross_o"] = (part(names.cross_o, c.dim, c.q_dim),)
        if not c.has_experts(layer):
            up_names = names.up if c.gated or not names.plain_up else names.plain_up
            outputs = c.ffn_dim * (1 + c.gated) // len(up_names)
            groups[up] = tuple(part(name, outputs, c.dim) for name in up_names)
            groups["down"] = (part(names.down, c.dim, c.ffn_dim),)
        blocks.append(groups)
    return blocks


def weight_table(config: ModelConfig) -> list[Weight]:
    """Every tensor that a folder of this config holds, and where it lives in a `Transformer`."""
    c, names, is_stack = config, names_of(config), is_encoder_stack(config)
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
    biased |= {"cross_q": c.qkv_bias, "cross_kv": c.qkv_bias, "cross_o": c.o_bias}
    if not is_stack:
        add(f"{names.embed}.weight", "embed", c.vocab_size, c.dim)
    if c.positions == "learned":
        add(f"{names.positions}.weight", "positions", c.max_context + c.position_offset, c.dim)
    if c.segments:
        add(f"{names.segments}.weight", "segments", c.segments, c.dim)
    if c.positions == "relative":
        add(f"{names.layer.format(0)}{names.relative}.weight", "relative_bias", c.relative_buckets, c.heads)
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
        for parameter in block_norms(c, layer):
            add_norm(path + getattr(names, parameter), home + parameter, c.dim)
        if c.qk_norm:
            whole = c.qk_norm == "width"
            add_norm(path + names.q_norm, f"{home}q_norm", c.q_dim if whole else c.head_dim, q_order)
            add_norm(path + names.k_norm, f"{home}k_norm", c.kv_dim if whole else c.head_dim, k_order)
    if c.final_norm:
        add_norm(names.norm, "norm", c.dim)
    if not c.tie_embeddings:
        add(f"{names.head}.weight", "head", c.vocab_size, c.dim)
    if c.logit_bias:
        shape = (1, c.vocab_size) if c.encoder is not None else (c.vocab_size,)
        table.append(Weight(names.logit_bias, "logit_bias", slice(0, shape[0]), shape))
    if c.head is not None:
        row = FAMILIES[c.family].head_row(c.head.kind)
        if c.head.dense:
            add(f"{row.dense}.weight", "task.dense", c.dim, c.dim)
            if c.head.dense_bias:
                add(f"{row.dense}.bias", "task.dense_bias", c.dim)
        if c.head.norm:
            add_norm(row.norm, "task.norm", c.dim)
        if c.head.labels:
            add(f"{row.out}.weight", "task.out", len(c.head.labels), c.dim)
            if c.head.bias:
                add(f"{row.out}.bias", "task.out_bias", len(c.head.labels))
    if c.encoder is not None:
        table += [weight._replace(parameter=f"encoder.{weight.parameter}") for weight in weight_table(c.encoder)]
    if is_bare(c):
        table = [weight._replace(name=weight.name.removeprefix(names.prefix)) for weight in table]
    return table


def block_norms(config: ModelConfig, layer: int) -> tuple[str, ...]:
    """The norms of a block over the model's width, by the parameter that holds each."""
    cross = config.encoder is not None
    before = ("attention_norm", *["cross_norm"] * cross, "mlp_norm")
    after = ("attention_out_norm", *["cross_out_norm"] * cross, "mlp_out_norm")
    norms = {"input": before, "output": after, "sum": after, "both": before + after}[config.norm_at]
    return norms if layer or config.first_norm else tuple(name for name in norms if name != "attention_norm")


def is_encoder_stack(config: ModelConfig) -> bool:
    """Whether it is the encoder of an encoder-decoder, which embeds for it."""
    return config.kind == "encoder" and FAMILIES[config.family].encoder_names is not None


def is_bare(config: ModelConfig) -> bool:
    """Whether files of this config leave out the prefix of names."""
    own_head = config.head is not None and config.head.kind != "pool"
    return config.kind == "encoder" and not own_head and not is_encoder_stack(config)


def names_of(config: ModelConfig) -> Names:
    """Where files of this config keep their weights."""
    family = FAMILIES[config.family]
    return family.encoder_names if is_encoder_stack(config) and family.encoder_names is not None else family.names


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


class HeadRow(NamedTuple):
    """A head that a family may have instead of next-token logits, and where files keep its weights."""

    architecture: str
    head: HeadConfig
    """Without labels, which `config.json` names. The activation "own" is that of the model's MLPs."""
    dense: str = ""
    norm: str = ""
    out: str = ""
    read: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    """Further fields of the head, from the values of `config.json`."""
    write: Callable[[HeadConfig], dict[str, Any]] | None = None
    """Further keys of `config.json`."""


class Windows(NamedTuple):
    """Which layers of a family see only a window of tokens."""

    layers: Callable[[Mapping[str, Any], int], bool]
    """By the values of `config.json`, where it has no `layer_types`."""
    switch: str | None = None
    """The key that must be true for windows to be in force."""
    types: bool = True
    """`layer_types` is written, too."""
    key: str = "sliding_window"
    seen: Callable[[int], int] = lambda size: size
    """The value of the key to how many tokens one sees, itself included, in each direction in which it looks."""
    written: Callable[[int], int] = lambda window: window


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
    encoder_names: Names | None = None
    """Of the encoder, in a family of encoder-decoders."""
    heads: tuple[HeadRow, ...] = ()
    """Besides the score of a row that every decoder may have."""
    windows: Windows | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Keys that only this family writes so, by the usual name of each."""
    tied_by_file: bool = False
    """Embeddings are tied unless the file holds another matrix, whatever `config.json` says (T5)."""
    partial_rotary: bool = False
    """`partial_rotary_factor` is in force."""
    read: Callable[[Mapping[str, Any], dict[str, Any]], dict[str, Any]] | None = None
    """Further fields, from the values of `config.json` and the fields so far."""
    write: Callable[[ModelConfig], dict[str, Any]] | None = None
    """Further keys of `config.json`."""

    @property
    def all_heads(self) -> tuple[HeadRow, ...]:
        """Each with its architecture; a decoder's row of scores reads the last token (transformers' generic head)."""
        if self.heads or self.encoder_names is not None:
            return self.heads
        name = self.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        return (HeadRow(f"{name}ForSequenceClassification", LAST_TOKEN, out="score"),)

    def head_row(self, kind: str) -> HeadRow:
        """Raises ModelError if models of this family have no such head."""
        for row in self.all_heads:
            if row.head.kind == kind:
                return row
        raise ModelError(
            f"models like {self.architecture} have no head of that kind",
            got=kind,
            wanted="one of " + ", ".join(row.head.kind for row in self.all_heads) if self.all_heads else None,
        )

    def all_keys(self) -> dict[str, str | Key]:
        return {name: key for name, key in {**KEYS, **self.keys}.items() if key}


LAST_TOKEN = HeadConfig("classify", pool="last", bias=False)

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
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "normalize_before": False,
    "add_final_layer_norm": False,
    "share_encoder_decoder_embeddings": True,
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


READS_BOTH_WAYS = {
    "causal": False,
    "norm": "layer",
    "norm_bias": True,
    "norm_at": "sum",
    "embed_norm": True,
    "final_norm": False,
    "positions": "learned",
    "gated": False,
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
}
"""BERT's (arXiv 1810.04805)."""
MASKED = HeadConfig("mlm", dense=True, activation="own", norm=True)
TAGS = HeadConfig("tag")
FIRST_TOKEN = HeadConfig("classify", pool="cls", dense=True, activation="tanh")
POOLER = HeadConfig("pool", pool="cls", dense=True, activation="tanh")
BERT_KEYS: dict[str, str | Key] = {
    "num_key_value_heads": "",
    "head_dim": "",
    "rms_norm_eps": "",
    "layer_norm_eps": "norm_eps",
    "type_vocab_size": "segments",
}
BERT_DEFAULTS = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2, "tie_word_embeddings": True}
BERT_NAMES = Names(
    prefix="bert.",
    embed="bert.embeddings.word_embeddings",
    positions="bert.embeddings.position_embeddings",
    segments="bert.embeddings.token_type_embeddings",
    embed_norm="bert.embeddings.LayerNorm",
    layer="bert.encoder.layer.{}.",
    head="cls.predictions.decoder",
    logit_bias="cls.predictions.bias",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    o="attention.output.dense",
    attention_out_norm="attention.output.LayerNorm",
    up=("intermediate.dense",),
    down="output.dense",
    mlp_out_norm="output.LayerNorm",
    unused=("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias", "seq_relationship.weight",
            "seq_relationship.bias"),
    copies=(("cls.predictions.decoder.bias", "cls.predictions.bias"),),
    older=((".gamma", ".weight"), (".beta", ".bias")),
)  # fmt: skip


def _after_padding(values: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """RoBERTa counts positions from the number behind that of the padding token."""
    offset = int(values.get("pad_token_id", 1)) + 1
    return {"position_offset": offset, "max_context": fields["max_context"] - offset}


def _pooled_as_said(values: Mapping[str, Any]) -> dict[str, Any]:
    return _modern_head(values) | {"pool": values.get("classifier_pooling", "cls")}


def _masked_modern_head(values: Mapping[str, Any]) -> dict[str, Any]:
    return _modern_head(values) | {"bias": bool(values.get("decoder_bias", True))}


def _modern_head(values: Mapping[str, Any]) -> dict[str, Any]:
    activation = _activation(values.get("classifier_activation", "gelu"))
    return {"activation": activation, "dense_bias": bool(values.get("classifier_bias", False))}


def _written_modern_head(head: HeadConfig) -> dict[str, Any]:
    pooling: dict[str, Any] = {"classifier_pooling": head.pool} if head.pool else {}
    pooling |= {"decoder_bias": head.bias} if head.kind == "mlm" else {}
    return pooling | {"classifier_activation": ACTIVATION.write(head.activation), "classifier_bias": head.dense_bias}


FAMILIES |= {
    "bert": Family(
        "BertModel",
        keys=BERT_KEYS,
        fixed=READS_BOTH_WAYS,
        defaults=BERT_DEFAULTS,
        names=BERT_NAMES,
        heads=(
            HeadRow("BertModel", POOLER, dense="bert.pooler.dense"),
            HeadRow(
                "BertForMaskedLM", MASKED, "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"
            ),
            HeadRow("BertForSequenceClassification", FIRST_TOKEN, dense="bert.pooler.dense", out="classifier"),
            HeadRow("BertForTokenClassification", TAGS, out="classifier"),
        ),
    ),
    "roberta": Family(
        "RobertaModel",
        keys=BERT_KEYS,
        fixed=READS_BOTH_WAYS,
        defaults={**BERT_DEFAULTS, "pad_token_id": 1},
        names=replace(
            BERT_NAMES,
            prefix="roberta.",
            **{
                name: getattr(BERT_NAMES, name).replace("bert.", "roberta.", 1)
                for name in ("embed", "positions", "segments", "embed_norm", "layer")
            },
            head="lm_head.decoder",
            logit_bias="lm_head.bias",
            copies=(("lm_head.decoder.bias", "lm_head.bias"),),
        ),
        heads=(
            HeadRow("RobertaModel", POOLER, dense="roberta.pooler.dense"),
            HeadRow("RobertaForMaskedLM", replace(MASKED, activation="gelu"), "lm_head.dense", "lm_head.layer_norm"),
            HeadRow(
                "RobertaForSequenceClassification", FIRST_TOKEN, dense="classifier.dense", out="classifier.out_proj"
            ),
            HeadRow("RobertaForTokenClassification", TAGS, out="classifier"),
        ),
        read=_after_padding,
        write=lambda c: {
            "max_position_embeddings": c.max_context + c.position_offset,
            "pad_token_id": c.position_offset - 1,
        },
    ),
    "distilbert": Family(
        "DistilBertModel",
        keys={
            **dict.fromkeys(KEYS, ""),
            "vocab_size": "vocab_size",
            "dim": "dim",
            "hidden_dim": "ffn_dim",
            "n_layers": "layers",
            "n_heads": "heads",
            "max_position_embeddings": "max_context",
            "activation": ACTIVATION,
            "tie_word_embeddings": "tie_embeddings",
        },
        fixed={**READS_BOTH_WAYS, "norm_eps": 1e-12},
        defaults={"activation": "gelu", "tie_word_embeddings": True},
        names=Names(
            prefix="distilbert.",
            embed="distilbert.embeddings.word_embeddings",
            positions="distilbert.embeddings.position_embeddings",
            embed_norm="distilbert.embeddings.LayerNorm",
            layer="distilbert.transformer.layer.{}.",
            head="vocab_projector",
            logit_bias="vocab_projector.bias",
            qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            o="attention.out_lin",
            attention_out_norm="sa_layer_norm",
            up=("ffn.lin1",),
            down="ffn.lin2",
            mlp_out_norm="output_layer_norm",
            unused=("embeddings.position_ids",),
        ),
        heads=(
            HeadRow("DistilBertForMaskedLM", MASKED, "vocab_transform", "vocab_layer_norm"),
            HeadRow(
                "DistilBertForSequenceClassification",
                replace(FIRST_TOKEN, activation="relu"),
                dense="pre_classifier",
                out="classifier",
            ),
            HeadRow("DistilBertForTokenClassification", TAGS, out="classifier"),
        ),
    ),
    "modernbert": Family(
        "ModernBertModel",
        keys={
            "num_key_value_heads": "",
            "head_dim": "",
            "rms_norm_eps": "",
            "hidden_act": "",
            "hidden_activation": ACTIVATION,
            "norm_eps": "norm_eps",
            "norm_bias": "norm_bias",
            "attention_bias": BIASES,
            "mlp_bias": "mlp_bias",
        },
        fixed={"causal": False, "norm": "layer", "embed_norm": True, "first_norm": False},
        defaults={
            "hidden_activation": "gelu",
            "norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "local_attention": 128,
            "rope_theta": 160000.0,
            "rope_local_base_freq": 10000.0,
        },
        names=Names(
            prefix="model.",
            embed="model.embeddings.tok_embeddings",
            embed_norm="model.embeddings.norm",
            norm="model.final_norm",
            head="decoder",
            logit_bias="decoder.bias",
            qkv=("attn.Wqkv",),
            o="attn.Wo",
            attention_norm="attn_norm",
            up=("mlp.Wi",),
            down="mlp.Wo",
            mlp_norm="mlp_norm",
        ),
        heads=(
            HeadRow(
                "ModernBertForMaskedLM",
                MASKED,
                "head.dense",
                "head.norm",
                read=_masked_modern_head,
                write=_written_modern_head,
            ),
            HeadRow(
                "ModernBertForSequenceClassification",
                HeadConfig("classify", dense=True, norm=True),
                "head.dense",
                "head.norm",
                "classifier",
                _pooled_as_said,
                _written_modern_head,
            ),
            HeadRow(
                "ModernBertForTokenClassification",
                HeadConfig("tag", dense=True, norm=True),
                "head.dense",
                "head.norm",
                "classifier",
                _modern_head,
                _written_modern_head,
            ),
        ),
        windows=Windows(
            lambda values, layer: layer % values.get("global_attn_every_n_layers", 3) != 0,
            key="local_attention",
            seen=lambda both_sides: both_sides // 2 + 1,
            written=lambda window: 2 * (window - 1),
        ),
        aliases={"rope_theta": "global_rope_theta", "rope_local_base_freq": "local_rope_theta"},
        write=lambda c: {
            "rope_local_base_freq": c.window_rope_theta,
            "cls_token_id": c.bos_id,
            "sep_token_id": c.eos_id,
        },
    ),
}


def _stack(layer: str, norm: str, first: int) -> dict[str, Any]:
    """T5's names of one stack; `first` is the number of its MLP among the parts of a layer."""
    return {
        "embed": "shared",
        "layer": layer,
        "norm": norm,
        "relative": "layer.0.SelfAttention.relative_attention_bias",
        "qkv": tuple(f"layer.0.SelfAttention.{name}" for name in "qkv"),
        "o": "layer.0.SelfAttention.o",
        "attention_norm": "layer.0.layer_norm",
        "up": (f"layer.{first}.DenseReluDense.wi_0", f"layer.{first}.DenseReluDense.wi_1"),
        "plain_up": (f"layer.{first}.DenseReluDense.wi",),
        "down": f"layer.{first}.DenseReluDense.wo",
        "mlp_norm": f"layer.{first}.layer_norm",
    }


def _bart_stack(stack: str) -> Names:
    return Names(
        prefix="model.",
        embed="model.shared",
        positions=f"model.{stack}.embed_positions",
        embed_norm=f"model.{stack}.layernorm_embedding",
        layer=f"model.{stack}.layers.{{}}.",
        logit_bias="final_logits_bias",
        o="self_attn.out_proj",
        attention_out_norm="self_attn_layer_norm",
        up=("fc1",),
        down="fc2",
        mlp_out_norm="final_layer_norm",
        unused=(".embed_positions.weight",),  # Marian's are waves, which are computed
        copies=tuple((f"model.{each}.embed_tokens.weight", "model.shared.weight") for each in ("encoder", "decoder")),
    )


def _encoder_like(fields: Mapping[str, Any], **other: Any) -> ModelConfig:
    """The encoder under a decoder of these fields: it differs in what it sees, and in its sizes."""
    own = ("tie_embeddings", "logit_bias", "logit_scale", "start_id", "first_id", "never_ids")
    return ModelConfig(
        **{**{name: value for name, value in fields.items() if name not in own}, "causal": False, **other}
    )


def _t5(values: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    *gate, name = str(values["feed_forward_proj"]).split("-")
    if gate not in ([], ["gated"]):
        raise ModelError("feed_forward_proj is not known here", got=values["feed_forward_proj"], wanted="[gated-]NAME")
    mlp = {"gated": bool(gate), "activation": "gelu_tanh" if gate and name == "gelu" else _activation(name)}
    scaled = values.get("scale_decoder_outputs", values.get("tie_word_embeddings", True))
    return {
        **mlp,
        "logit_scale": fields["dim"] ** -0.5 if scaled else 1.0,
        "encoder": _encoder_like(fields | mlp, layers=_whole(values["num_layers"])),
    }


def _written_t5(c: ModelConfig) -> dict[str, Any]:
    name = "gelu" if c.gated and c.activation == "gelu_tanh" else ACTIVATION.write(c.activation)
    return {
        "num_layers": c.encoder.layers if c.encoder is not None else c.layers,
        "feed_forward_proj": f"gated-{name}" if c.gated else name,
        "tie_word_embeddings": c.logit_scale != 1.0,  # by this transformers 4 knows whether to scale
        "scale_decoder_outputs": c.logit_scale != 1.0,
        "is_encoder_decoder": True,
    }


def _bart(values: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    scale = {"embed_scale": fields["dim"] ** 0.5 if values.get("scale_embedding") else 1.0}
    sizes = {"layers": "encoder_layers", "heads": "encoder_attention_heads", "ffn_dim": "encoder_ffn_dim"}
    own = {name: _whole(values[key]) for name, key in sizes.items()}
    return {**scale, "encoder": _encoder_like(fields | scale, kv_heads=own["heads"], **own)}


def _written_bart(c: ModelConfig) -> dict[str, Any]:
    e = c.encoder or c
    sizes = {"encoder_layers": e.layers, "encoder_attention_heads": e.heads, "encoder_ffn_dim": e.ffn_dim}
    return {**sizes, "scale_embedding": c.embed_scale != 1.0, "is_encoder_decoder": True}


BART_KEYS: dict[str, str | Key] = {
    **dict.fromkeys(KEYS, ""),
    "vocab_size": "vocab_size",
    "d_model": "dim",
    "decoder_ffn_dim": "ffn_dim",
    "decoder_layers": "layers",
    "decoder_attention_heads": "heads",
    "max_position_embeddings": "max_context",
    "activation_function": ACTIVATION,
    "decoder_start_token_id": "start_id",
    "forced_bos_token_id": "first_id",
    "bad_words_ids": Key(
        ("never_ids",),
        lambda words: tuple(_whole(word) for [word] in words),
        lambda ids: [[each] for each in ids] or None,
    ),
    "tie_word_embeddings": "tie_embeddings",
}
WRITING_RULES = ("decoder_start_token_id", "forced_bos_token_id", "bad_words_ids")
"""Keys that transformers 5 keeps in `generation_config.json` alone."""
BART = {**READS_BOTH_WAYS, "causal": True, "norm_eps": 1e-5, "logit_bias": True}
BART_SIZES = {
    **{f"{stack}_layers": 12 for stack in ("encoder", "decoder")},
    **{f"{stack}_attention_heads": 16 for stack in ("encoder", "decoder")},
    **{f"{stack}_ffn_dim": 4096 for stack in ("encoder", "decoder")},
}
BART_DEFAULTS = {"activation_function": "gelu", "tie_word_embeddings": True, **BART_SIZES}

FAMILIES |= {
    "t5": Family(
        "T5ForConditionalGeneration",
        keys={
            **dict.fromkeys(KEYS, ""),
            "vocab_size": "vocab_size",
            "d_model": "dim",
            "d_kv": "head_dim",
            "d_ff": "ffn_dim",
            "num_layers": "layers",
            "num_decoder_layers": "layers",
            "num_heads": "heads",
            "n_positions": "max_context",
            "layer_norm_epsilon": "norm_eps",
            "relative_attention_num_buckets": "relative_buckets",
            "relative_attention_max_distance": "relative_distance",
            "decoder_start_token_id": "start_id",
        },
        fixed={"positions": "relative", "attention_scale": 1.0},
        defaults={
            "n_positions": 512,
            "d_kv": 64,
            "layer_norm_epsilon": 1e-6,
            "feed_forward_proj": "relu",
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        },
        names=Names(
            **_stack("decoder.block.{}.", "decoder.final_layer_norm", 2),
            cross_qkv=("layer.1.EncDecAttention.q", "layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"),
            cross_o="layer.1.EncDecAttention.o",
            cross_norm="layer.1.layer_norm",
            unused=("EncDecAttention.relative_attention_bias.weight",),
            copies=tuple((f"{each}.embed_tokens.weight", "shared.weight") for each in ("encoder", "decoder")),
        ),
        encoder_names=Names(**_stack("encoder.block.{}.", "encoder.final_layer_norm", 1)),
        tied_by_file=True,
        read=_t5,
        write=_written_t5,
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        keys=BART_KEYS,
        fixed={**BART, "position_offset": 2},
        defaults={
            **BART_DEFAULTS,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
        },
        names=_bart_stack("decoder"),
        encoder_names=_bart_stack("encoder"),
        read=_bart,
        write=_written_bart,
    ),
    "marian": Family(
        "MarianMTModel",
        keys=BART_KEYS,
        fixed={**BART, "positions": "sinusoidal", "embed_norm": False},
        defaults={**BART_DEFAULTS, "pad_token_id": 58100, "eos_token_id": 0, "decoder_start_token_id": 58100},
        names=_bart_stack("decoder"),
        encoder_names=_bart_stack("encoder"),
        read=_bart,
        write=_written_bart,
    ),
}


def read_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The meaning of a `config.json`. ModelError for an unknown family, a setting that we would get wrong, or a value
    that is none."""
    try:
        return _read_config(raw, where)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise ModelError(f"{where} cannot be understood", got=f"{type(error).__name__}: {error}") from error


def _read_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
    name, family, head_row = _family_of(raw, where)
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
    if not 0 < fields["layers"] <= MOST_LAYERS:
        raise ModelError(
            f"{where} has no usable {own['layers']}", got=fields["layers"], wanted=f"1 to {MOST_LAYERS} layers"
        )
    if family.read is not None:
        fields |= family.read(values, fields)
    if head_row is not None:
        head = fields["head"] = _head_of(head_row, values, fields)
        masked = head.kind == "mlm"
        fields |= {"logit_bias": masked and head.bias, "tie_embeddings": not masked or fields["tie_embeddings"]}
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
    )


def write_config(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` that `read_config` and transformers (4 and 5) read back to the same model."""
    c, family = config, FAMILIES[config.family]
    row = None if c.head is None else family.head_row(c.head.kind)
    architecture = family.architecture if row is None else row.architecture
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
        window = max(c.windows, default=0)
        raw[family.windows.key] = family.windows.written(window) if window else None
        if family.windows.types:
            raw["layer_types"] = ["sliding_attention" if c.window(i) else "full_attention" for i in range(c.layers)]
        if family.windows.switch:
            raw[family.windows.switch] = bool(c.windows)
    if c.labels:
        raw["id2label"] = {str(number): name for number, name in enumerate(c.labels)}
        raw["label2id"] = {name: number for number, name in enumerate(c.labels)}
    if c.head is not None and row is not None and row.write is not None:
        raw |= row.write(c.head)
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


_KINDS: dict[str, Callable[[Any], Any]] = {"int": _whole, "int | None": _whole, "float": float, "bool": bool}
"""Readers by the annotation of a field of `ModelConfig`."""


def _whole_if_it_is(value: float) -> float:
    return round(value) if abs(value - round(value)) < 1e-6 * value else value


def _family_of(raw: Mapping[str, Any], where: str) -> tuple[str, Family, HeadRow | None]:
    """A family's name, its row, and the head that stands in for next-token logits."""
    names = raw.get("architectures") or []
    for key, family in FAMILIES.items():
        for row in family.all_heads:
            if row.architecture in names:
                return key, family, row
        if family.architecture in names or (not names and raw.get("model_type") == key):
            return key, family, None
    raise ModelError(
        f"{where} is of a family that is not known here",
        got=", ".join(names) or repr(raw.get("model_type")),
        wanted="one of " + ", ".join(family.architecture for family in FAMILIES.values()),
    )


def _head_of(row: HeadRow, values: Mapping[str, Any], fields: Mapping[str, Any]) -> HeadConfig:
    head = row.head if row.read is None else replace(row.head, **row.read(values))
    if head.activation == "own":
        head = replace(head, activation=fields["activation"])
    if not row.out:
        return head
    return replace(head, labels=_labels_of(values))


def _labels_of(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in `id2label`, in the order of their numbers; two when it says nothing, as transformers has it."""
    named = values.get("id2label") or {str(n): f"LABEL_{n}" for n in range(int(values.get("num_labels") or 2))}
    return tuple(str(named[number]) for number in sorted(named, key=int))


def with_head(config: ModelConfig, kind: str, labels: Sequence[str]) -> ModelConfig:
    """The same body under another head, as its family has it. Raises ModelError if it has none of that kind."""
    row = FAMILIES[config.family].head_row(kind)
    head = _head_of(row, {"id2label": dict(enumerate(labels))}, {"activation": config.activation})
    masked = kind == "mlm"
    tied = config.tie_embeddings or not masked
    return replace(config, head=head, logit_bias=masked and head.bias, tie_embeddings=tied)


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
    window = values.get(rule.key)
    if not window or (rule.switch is not None and not values.get(rule.switch)):
        return ()
    if not rule.types and "full_attention" in (types or ()):
        raise ModelError(f"{where} mixes kinds of attention, which this family does not", got=", ".join(types or ()))
    if types is None:
        types = ["sliding_attention" if rule.layers(values, i) else "full_attention" for i in range(layers)]
    window = rule.seen(_whole(window))
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


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
