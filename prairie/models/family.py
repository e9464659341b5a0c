"""What a row of the table of families is made of, and what most families have in common.

Not here: the rows (`families`), reading and writing `config.json` by them (`config_file`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from prairie.errors import ModelError
from prairie.models.config import HeadConfig, ModelConfig
from prairie.models.names import Names


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
    names: Names = field(default_factory=Names)
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


def whole(value: Any) -> int:
    """The value. ValueError unless it is a whole number."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError
    return value


def _whole_if_near(value: float) -> float:
    return round(value) if abs(value - round(value)) < 1e-6 * value else value


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


def activation_named(name: Any) -> str:
    """Ours of an activation in `config.json`. ModelError for one that is not computed."""
    if name not in ACTIVATION_NAMES:
        raise ModelError(
            "the config asks for an activation that is not computed here",
            got=repr(name),
            wanted="one of " + ", ".join(ACTIVATION_NAMES),
        )
    return ACTIVATION_NAMES[name]


ACTIVATION = Key(
    ("activation",),
    activation_named,
    lambda ours: next(name for name, value in ACTIVATION_NAMES.items() if value == ours),
)
BIASES = Key(("qkv_bias", "o_bias"), bool, bool)
CAP = {
    "attn_logit_softcapping": Key(("attention_softcap",), float, lambda cap: cap or None),
    "final_logit_softcapping": Key(("logit_softcap",), float, lambda cap: cap or None),
    "query_pre_attn_scalar": Key(
        ("attention_scale",), lambda size: float(size) ** -0.5, lambda scale: _whole_if_near(scale**-2)
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
