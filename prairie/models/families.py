"""Families are data: what a `config.json` says as a `ModelConfig`, which weight has which name, and both back.

One Transformer serves every family of the table; code elsewhere never tests a family's name.
transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`; both are read, the first is
written because both versions read it. Not here: tensors (`weights`), arithmetic (`transformer`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from prairie.errors import ModelError
from prairie.models.config import ModelConfig, RopeScaling
from prairie.ops.attention import pairs_apart, pairs_together

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Family:
    """How one family's `config.json` differs from Llama's."""

    architecture: str
    qkv_bias: bool | None = False
    """None: `attention_bias` of the config says so, for q, k, v and o."""
    mlp_bias: bool | None = False
    """None: `mlp_bias` of the config says so."""
    qk_norm: bool = False
    windowed: bool = False
    """`sliding_window` is in force whenever it is set; otherwise only with `use_sliding_window`."""
    defaults: Mapping[str, Any] | None = None
    """Values that transformers assumes for this family when its config leaves them out."""


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", qkv_bias=None, mlp_bias=None),
    "mistral": Family("MistralForCausalLM", windowed=True, defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qkv_bias=None, qk_norm=True, defaults={"head_dim": 128}),
}


class Weight(NamedTuple):
    """One tensor of the file: its name there, the parameter that holds it, which of that parameter's rows it is."""

    name: str
    parameter: str
    rows: slice
    shape: tuple[int, ...]
    paired: int = 0
    """Above 0: the parameter keeps rotary pairs side by side (`ops.attention.pairs_together`) in heads of this size."""

    def put(self, tensor: Tensor, parameter: Tensor) -> None:
        """Writes the file's tensor into its rows of the parameter."""
        parameter[self.rows] = pairs_together(tensor, self.paired) if self.paired else tensor

    def take(self, parameter: Tensor) -> Tensor:
        """The file's tensor out of its parameter, or out of anything shaped like that."""
        rows = parameter[self.rows]
        return pairs_apart(rows, self.paired) if self.paired else rows


class Part(NamedTuple):
    """One linear layer of the file, as rows of a fused weight."""

    name: str
    """Path inside a layer, as Hugging Face writes it: `self_attn.q_proj`."""
    outputs: int
    inputs: int
    paired: int = 0
    """As in `Weight`."""


def fused_parts(config: ModelConfig) -> dict[str, tuple[Part, ...]]:
    """The linear layers of one block by the fused weight that holds them, in row order."""
    c = config
    return {
        "qkv": (
            Part("self_attn.q_proj", c.q_dim, c.dim, c.head_dim),
            Part("self_attn.k_proj", c.kv_dim, c.dim, c.head_dim),
            Part("self_attn.v_proj", c.kv_dim, c.dim),
        ),
        "o": (Part("self_attn.o_proj", c.dim, c.q_dim),),
        "gate_up": (Part("mlp.gate_proj", c.ffn_dim, c.dim), Part("mlp.up_proj", c.ffn_dim, c.dim)),
        "down": (Part("mlp.down_proj", c.dim, c.ffn_dim),),
    }


def weight_table(config: ModelConfig) -> list[Weight]:
    """Every tensor that a folder of this config holds, and where it lives in a `Transformer`."""
    c = config
    table = [Weight("model.embed_tokens.weight", "embed", slice(0, c.vocab_size), (c.vocab_size, c.dim))]
    biased = {"qkv": c.qkv_bias, "o": c.o_bias, "gate_up": c.mlp_bias, "down": c.mlp_bias}
    vectors = [
        ("input_layernorm.weight", "attention_norm", c.dim),
        ("post_attention_layernorm.weight", "mlp_norm", c.dim),
    ]
    if c.qk_norm:
        vectors += [
            ("self_attn.q_norm.weight", "q_norm", c.head_dim),
            ("self_attn.k_norm.weight", "k_norm", c.head_dim),
        ]
    for layer in range(c.layers):
        path, home = f"model.layers.{layer}.", f"layers.{layer}."
        for group, parts in fused_parts(c).items():
            start = 0
            for part in parts:
                rows = slice(start, start + part.outputs)
                table.append(
                    Weight(f"{path}{part.name}.weight", home + group, rows, (part.outputs, part.inputs), part.paired)
                )
                if biased[group]:
                    table.append(
                        Weight(f"{path}{part.name}.bias", f"{home}{group}_bias", rows, (part.outputs,), part.paired)
                    )
                start += part.outputs
        for name, parameter, size in vectors:
            paired = c.head_dim if parameter in ("q_norm", "k_norm") else 0
            table.append(Weight(path + name, home + parameter, slice(0, size), (size,), paired))
    table.append(Weight("model.norm.weight", "norm", slice(0, c.dim), (c.dim,)))
    if c.labels:
        table.append(Weight("score.weight", "score", slice(0, len(c.labels)), (len(c.labels), c.dim)))
    elif not c.tie_embeddings:
        table.append(Weight("lm_head.weight", "head", slice(0, c.vocab_size), (c.vocab_size, c.dim)))
    return table


def read_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The meaning of a `config.json`. ModelError for an unknown family or a setting that we would get wrong."""
    key, family = _family_of(raw, where)
    values = {**(family.defaults or {}), **{name: value for name, value in raw.items() if value is not None}}

    def number(name: str) -> int:
        value = values.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ModelError(f"{where} has no usable {name}", got=repr(value), wanted="a whole number")
        return value

    heads, dim, max_context = number("num_attention_heads"), number("hidden_size"), number("max_position_embeddings")
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"{where} asks for an activation that no family here has", got=repr(activation), wanted="silu")
    window = (
        raw["sliding_window"] if "sliding_window" in raw else values.get("sliding_window")
    )  # an explicit null counts
    if window and (family.windowed or values.get("use_sliding_window")) and window < max_context:
        raise ModelError(
            f"{where} asks for sliding window attention, which is not supported",
            got=f"sliding_window {window} under a context of {max_context}",
            wanted="sliding_window null, or not below max_position_embeddings",
            mend=f"set max_position_embeddings to {window} to use the model inside its window",
        )
    if values.get("layer_types") and set(values["layer_types"]) != {"full_attention"}:
        raise ModelError(
            f"{where} mixes kinds of attention", got=sorted(set(values["layer_types"])), wanted="full_attention"
        )
    attention_bias = bool(values.get("attention_bias", False))
    theta, scaling = _rope_of(values, max_context, where)
    eos = values.get("eos_token_id")
    return ModelConfig(
        vocab_size=number("vocab_size"),
        dim=dim,
        layers=number("num_hidden_layers"),
        heads=heads,
        kv_heads=number("num_key_value_heads") if "num_key_value_heads" in values else heads,
        head_dim=number("head_dim") if "head_dim" in values else 0,
        ffn_dim=number("intermediate_size"),
        max_context=max_context,
        norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias if family.qkv_bias is None else False,
        mlp_bias=bool(values.get("mlp_bias", False)) if family.mlp_bias is None else family.mlp_bias,
        qk_norm=family.qk_norm,
        family=key,
        bos_id=values.get("bos_token_id"),
        eos_id=tuple(eos) if isinstance(eos, list) else eos,
        pad_id=values.get("pad_token_id"),
        labels=_labels_of(values) if _scores_architecture(family) in (raw.get("architectures") or []) else (),
    )


def write_config(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` that `read_config` and transformers (4 and 5) read back to the same model."""
    c, family = config, FAMILIES[config.family]
    raw: dict[str, Any] = {
        "architectures": [_scores_architecture(family) if c.labels else family.architecture],
        "model_type": c.family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "intermediate_size": c.ffn_dim,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_context,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": c.tie_embeddings,
        "attention_dropout": 0.0,
        "bos_token_id": c.bos_id,
        "eos_token_id": list(c.eos_id) if isinstance(c.eos_id, tuple) else c.eos_id,
        "pad_token_id": c.pad_id,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if c.rope_scaling:
        s = c.rope_scaling
        raw["rope_scaling"] = {"rope_type": s.kind, "factor": s.factor}
        if s.kind == "llama3":
            raw["rope_scaling"] |= {
                "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_max_context,
            }
    if family.qkv_bias is None:
        raw["attention_bias"] = c.qkv_bias
    if family.mlp_bias is None:
        raw["mlp_bias"] = c.mlp_bias
    if family.windowed:
        raw["sliding_window"] = None
    if c.labels:
        raw["id2label"] = {str(number): name for number, name in enumerate(c.labels)}
        raw["label2id"] = {name: number for number, name in enumerate(c.labels)}
    return raw


def _scores_architecture(family: Family) -> str:
    """Hugging Face's name for the family's body under a head of scores."""
    return family.architecture.replace("ForCausalLM", "ForSequenceClassification")


def _labels_of(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in `id2label`, in the order of their numbers; two when it says nothing, as transformers has it."""
    named = values.get("id2label") or {str(n): f"LABEL_{n}" for n in range(int(values.get("num_labels") or 2))}
    return tuple(str(named[number]) for number in sorted(named, key=int))


def _family_of(raw: Mapping[str, Any], where: str) -> tuple[str, Family]:
    names = raw.get("architectures") or []
    for key, family in FAMILIES.items():
        known = {family.architecture, _scores_architecture(family)}
        if known & set(names) or (not names and raw.get("model_type") == key):
            return key, family
    raise ModelError(
        f"{where} is of a family that is not known here",
        got=", ".join(names) or repr(raw.get("model_type")),
        wanted="one of " + ", ".join(family.architecture for family in FAMILIES.values()),
    )


def _rope_of(values: Mapping[str, Any], max_context: int, where: str) -> tuple[float, RopeScaling | None]:
    """rope_theta and the scaling; a kind of scaling that we cannot compute is refused, never ignored."""
    spec: Mapping[str, Any] = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = float(spec.get("rope_theta", values.get("rope_theta", 10000.0)))
    kind = spec.get("rope_type", spec.get("type", "default"))
    if float(spec.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))) != 1.0:
        raise ModelError(f"{where} turns only part of each head", wanted="partial_rotary_factor 1.0")
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise ModelError(
            f"{where} scales rotary positions in an unknown way", got=kind, wanted="default, linear or llama3"
        )
    try:
        scaling = RopeScaling(kind, float(spec["factor"]))
        if kind == "llama3":
            scaling = RopeScaling(
                kind,
                float(spec["factor"]),
                float(spec["low_freq_factor"]),
                float(spec["high_freq_factor"]),
                int(spec.get("original_max_position_embeddings", max_context)),
            )
    except KeyError as missing:
        raise ModelError(f"rope_scaling of {where} lacks {missing}", got=dict(spec)) from None
    return theta, scaling
