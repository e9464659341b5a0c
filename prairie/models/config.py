"""What a Transformer is made of, as one frozen value. Not here: how a `config.json` says it (`families`).

Every difference between two families that changes the arithmetic is a field; the defaults are Llama's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from prairie.errors import ModelError
from prairie.ops.elementwise import ACTIVATIONS

MOST = 1 << 24
"""No size of a model is above this; a config that says so is damaged."""
MOST_LAYERS = 1 << 12
"""Nor has one so many layers."""
NormKind = Literal["rms", "layer"]
NormAt = Literal["input", "output", "both", "sum"]
QKNorm = Literal["", "head", "width"]
Positions = Literal["rotary", "learned", "sinusoidal", "relative", "none"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for a longer context; the rules are in `rope`."""

    kind: str
    """linear, dynamic, llama3, yarn or longrope"""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_context: int = 8192
    """The context before the stretch; linear does not need it."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    magnitude: float = 1.0
    """Turned queries and keys are this much longer (yarn, longrope)."""
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class HeadConfig:
    """What stands behind the last layer in place of next-token logits: hidden -> dense -> activation -> norm -> out.

    "mlm" gives logits of masked tokens, "classify" scores of a row, "tag" scores of each token, "pool" a row's vector.
    """

    kind: Literal["mlm", "classify", "tag", "pool"]
    labels: tuple[str, ...] = ()
    """Names of the scores, in order; of "classify" and "tag"."""
    pool: Literal["", "cls", "mean", "last"] = ""
    """Which token of a row is read, the first or the last, or the mean of all."""
    dense: bool = False
    """There is a (width, width) matrix before the output."""
    dense_bias: bool = True
    activation: str = ""
    """Behind the dense matrix: a key of `ops.elementwise.ACTIVATIONS`."""
    norm: bool = False
    bias: bool = True
    """Scores have biases."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes in numbers, not bytes. `family` is a key of `families.FAMILIES`; it decides only how files are written."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn_dim: int
    head_dim: int = 0
    """0 means dim / heads."""
    max_context: int = 2048
    """Tokens that a row may have, the stretch of `rope_scaling` included."""
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QKNorm = ""
    """Queries and keys are normed: each head by itself (Qwen3), or all heads of a token together (OLMo-2)."""
    family: str = "llama"
    bos_id: int | None = None
    eos_id: int | tuple[int, ...] | None = None
    pad_id: int | None = None

    # ---- norms
    norm: NormKind = "rms"
    norm_bias: bool = False
    norm_offset: bool = False
    """The weight is stored as its distance from 1 (Gemma)."""
    norm_at: NormAt = "input"
    """Of attention and MLP: their inputs (Llama), their outputs (OLMo-2), both (Gemma 2), or the residual sum after
    them (the first Transformer, BERT)."""
    embed_norm: bool = False
    first_norm: bool = True
    """The first layer has a norm before its attention."""
    final_norm: bool = True

    # ---- positions
    positions: Positions = "rotary"
    position_offset: int = 0
    """The learned vector of the first token is that of this number (RoBERTa, BART)."""
    relative_buckets: int = 0
    """Distances are told apart by so many learned numbers for each head (T5), those beyond `relative_distance` not."""
    relative_distance: int = 0
    segments: int = 0
    """Learned vectors that say to which text of a pair a token belongs."""
    rotary_dim: int = 0
    """Columns of a head that turn, the first ones; 0 means all of `head_dim`."""
    nope_layers: tuple[int, ...] = ()
    """Layers without positions."""
    window_rope_theta: float = 0.0
    """Above 0: layers with a window turn by this theta, unscaled (Gemma 3)."""

    # ---- attention
    causal: bool = True
    windows: tuple[int, ...] = ()
    """For each layer how many tokens one sees, itself included; 0 means all. Empty: no layer has a window."""
    attention_scale: float = 0.0
    """What products of queries and keys are multiplied with; 0 means 1 / sqrt(head_dim)."""
    attention_softcap: float = 0.0
    """Above 0: scores are cap * tanh(scores / cap) (Gemma 2)."""

    # ---- MLP
    gated: bool = True
    activation: str = "silu"
    """A key of `ops.elementwise.ACTIVATIONS`."""
    experts: int = 0
    """Above 0: that many MLPs, of which a router picks `experts_per_token` (mixture of experts)."""
    experts_per_token: int = 0
    expert_ffn_dim: int = 0
    expert_weights_sum_to_one: bool = False
    dense_layers: tuple[int, ...] = ()
    """Layers that have a plain MLP of `ffn_dim` all the same."""

    # ---- sums
    parallel_residual: bool = False
    """Attention and MLP read the same input (NeoX)."""
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0

    # ---- what it is for
    head: HeadConfig | None = None
    """None: logits of the next token, or for an encoder the hidden states alone."""
    logit_bias: bool = False
    encoder: ModelConfig | None = None
    """The stack whose hidden states this one looks at, in every layer, besides its own row."""
    start_id: int | None = None
    """The token before the first that an encoder-decoder writes."""
    first_id: int | None = None
    """The first token that it writes, whatever its logits say."""
    never_ids: tuple[int, ...] = ()
    """Tokens that it never writes."""

    def __post_init__(self) -> None:
        if self.head_dim == 0:
            if self.heads < 1 or self.dim % self.heads:
                raise ModelError(
                    "the model's width is no multiple of its heads", got=f"dim {self.dim}, heads {self.heads}"
                )
            object.__setattr__(self, "head_dim", self.dim // self.heads)
        if self.rotary_dim == 0:
            object.__setattr__(self, "rotary_dim", self.head_dim)
        if not any(self.windows):
            object.__setattr__(self, "windows", ())
        sizes = ["vocab_size", "dim", "layers", "heads", "kv_heads", "ffn_dim", "head_dim", "max_context"]
        if self.experts:
            sizes += ["experts", "experts_per_token", "expert_ffn_dim"]
        for name in sizes:
            value: Any = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(f"{name} of a model must be a whole number above 0", got=repr(value))
            most = MOST_LAYERS if name == "layers" else MOST
            if value > most:
                raise ModelError(f"{name} of a model is beyond belief", got=value, wanted=f"at most {most}")
        if self.q_dim > MOST:
            raise ModelError("the heads of a model are beyond belief", got=self.q_dim, wanted=f"at most {MOST} columns")
        for name, number in self._positive_numbers():
            if not 0 < number < math.inf:
                raise ModelError(f"{name} of a model must be a number above 0", got=number)
        for name, kinds in (("norm", NormKind), ("norm_at", NormAt), ("qk_norm", QKNorm), ("positions", Positions)):
            if getattr(self, name) not in get_args(kinds):
                raise ModelError(
                    f"{name} of a model is of no known kind", got=repr(getattr(self, name)), wanted=get_args(kinds)
                )
        if self.heads % self.kv_heads:
            raise ModelError(
                "query heads cannot share key heads evenly",
                got=f"heads {self.heads}, kv_heads {self.kv_heads}",
                wanted="heads to be a multiple of kv_heads",
            )
        if self.positions == "rotary" and (self.rotary_dim % 2 or self.head_dim % 2):
            raise ModelError(
                "rotary positions turn pairs of columns",
                got=f"head_dim {self.head_dim}, of which {self.rotary_dim} turn",
                wanted="an even one",
            )
        factors = self.rope_scaling.short_factors + self.rope_scaling.long_factors if self.rope_scaling else ()
        if factors and len(factors) != self.rotary_dim:
            raise ModelError(
                "rotary positions are not stretched pair by pair",
                got=f"{len(factors)} factors, short and long",
                wanted=f"{self.rotary_dim}, as columns turn",
            )
        if not 0 < self.rotary_dim <= self.head_dim:
            raise ModelError("more columns turn than a head has", got=self.rotary_dim, wanted=self.head_dim)
        if self.windows and (len(self.windows) != self.layers or min(self.windows) < 0):
            raise ModelError("not every layer has its window", got=len(self.windows), wanted=f"{self.layers} layers")
        if self.activation not in ACTIVATIONS:
            raise ModelError(
                "the activation is not known here", got=self.activation, wanted="one of " + ", ".join(ACTIVATIONS)
            )
        if self.experts_per_token > self.experts:
            raise ModelError(
                "a token cannot have more experts than there are",
                got=self.experts_per_token,
                wanted=f"at most {self.experts}",
            )

    def _positive_numbers(self) -> list[tuple[str, float]]:
        names = ("norm_eps", "rope_theta", "embed_scale", "residual_scale", "logit_scale")
        named = [(name, getattr(self, name)) for name in names]
        if s := self.rope_scaling:
            named += [("the scale of rope", s.factor), ("the original context", s.original_max_context)]
            named += [("a factor of rope", factor) for factor in (*s.short_factors, *s.long_factors, s.magnitude)]
            named += [("a span of rope", s.high_freq_factor - s.low_freq_factor), ("beta_slow", s.beta_slow)]
        return named

    @property
    def kind(self) -> Literal["decoder", "encoder", "encoder_decoder"]:
        if self.encoder is not None:
            return "encoder_decoder"
        return "decoder" if self.causal else "encoder"

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the scores that the model ends in instead of a vocabulary: classes, or one reward."""
        return () if self.head is None else self.head.labels

    @property
    def writes(self) -> bool:
        """Whether it has logits of a next token: a decoder or encoder-decoder without another head."""
        return self.kind != "encoder" and self.head is None

    @property
    def q_dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def qkv_dim(self) -> int:
        return self.q_dim + 2 * self.kv_dim

    def window(self, layer: int) -> int:
        """Tokens that one of this layer sees, itself included; 0 means all."""
        return self.windows[layer] if self.windows else 0

    def has_experts(self, layer: int) -> bool:
        return self.experts > 0 and layer not in self.dense_layers

    def parameters(self) -> int:
        """Numbers in all weights; tied embeddings count once."""
        vectors = 1 + self.norm_bias  # of one norm, in widths
        norms = {"input": 2, "output": 2, "both": 4, "sum": 2}[self.norm_at]
        total = self.layers * (self._attention_matrices() + norms * vectors * self.dim)
        total += self.layers * self._attention_biases()
        qk_norms = {"": 0, "head": 2 * self.head_dim, "width": self.q_dim + self.kv_dim}[self.qk_norm]
        total += self.layers * qk_norms * vectors
        for layer in range(self.layers):
            if self.has_experts(layer):
                total += self.experts * (self._mlp_matrices(self.expert_ffn_dim) + self.dim)
            else:
                biases = (1 + self.gated) * self.ffn_dim + self.dim
                total += self._mlp_matrices(self.ffn_dim) + biases * self.mlp_bias
        total += (self.embed_norm + self.final_norm - (not self.first_norm)) * vectors * self.dim
        total += (self.max_context + self.position_offset) * self.dim * (self.positions == "learned")
        total += self.segments * self.dim + self.relative_buckets * self.heads + self.vocab_size * self.logit_bias
        if self.encoder is not None:
            total += self.layers * (self._attention_matrices() + vectors * self.dim + self._attention_biases())
            total += self.encoder.parameters() - self.encoder.vocab_size * self.encoder.dim  # embeddings are shared
        if self.head is not None:
            total += self._head_parameters(self.head, vectors)
        return total + self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)

    def flops_per_token(self, context: int) -> float:
        """Training operations (forward and backward) per token in rows of `context` tokens.

        6 per weight that multiplies, plus causal attention (PaLM's formula, arXiv 2204.02311, halved by the mask); of
        experts only those that a token is sent to.
        """
        matrices = self.layers * self._attention_matrices()
        matrices += (0 if self.labels else self.vocab_size) * self.dim
        for layer in range(self.layers):
            if self.has_experts(layer):
                matrices += self.experts_per_token * self._mlp_matrices(self.expert_ffn_dim) + self.experts * self.dim
            else:
                matrices += self._mlp_matrices(self.ffn_dim)
        seen = sum(min(context, self.window(layer) or context) for layer in range(self.layers))
        return 6.0 * matrices + 6.0 * self.q_dim * seen * (1 if self.causal else 2)

    def _attention_matrices(self) -> int:
        return self.qkv_dim * self.dim + self.dim * self.q_dim

    def _attention_biases(self) -> int:
        return self.qkv_dim * self.qkv_bias + self.dim * self.o_bias

    def _head_parameters(self, head: HeadConfig, norm_vectors: int) -> int:
        dense = head.dense * self.dim * (self.dim + head.dense_bias)
        return dense + head.norm * norm_vectors * self.dim + len(head.labels) * (self.dim + head.bias)

    def _mlp_matrices(self, ffn_dim: int) -> int:
        return (2 + self.gated) * self.dim * ffn_dim
