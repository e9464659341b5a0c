"""What a Transformer is made of, as one frozen value. Not here: how a `config.json` says it (`families`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prairie.errors import ModelError


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for a longer context; `kind` is "linear" or "llama3"."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_context: int = 8192


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
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    family: str = "llama"
    bos_id: int | None = None
    eos_id: int | tuple[int, ...] | None = None
    pad_id: int | None = None
    labels: tuple[str, ...] = ()
    """Names of the scores that the model ends in instead of a vocabulary: classes, or one reward."""

    def __post_init__(self) -> None:
        if self.head_dim == 0:
            if self.heads < 1 or self.dim % self.heads:
                raise ModelError(
                    "the model's width is no multiple of its heads", got=f"dim {self.dim}, heads {self.heads}"
                )
            object.__setattr__(self, "head_dim", self.dim // self.heads)
        for name in ("vocab_size", "dim", "layers", "heads", "kv_heads", "ffn_dim", "head_dim", "max_context"):
            value: Any = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(f"{name} of a model must be a whole number above 0", got=repr(value))
        if self.heads % self.kv_heads:
            raise ModelError(
                "query heads cannot share key heads evenly",
                got=f"heads {self.heads}, kv_heads {self.kv_heads}",
                wanted="heads to be a multiple of kv_heads",
            )
        if self.head_dim % 2:
            raise ModelError(
                "rotary positions turn pairs of columns", got=f"head_dim {self.head_dim}", wanted="an even one"
            )

    @property
    def q_dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def qkv_dim(self) -> int:
        return self.q_dim + 2 * self.kv_dim

    def parameters(self) -> int:
        """Numbers in all weights; tied embeddings count once."""
        attention = self.qkv_dim * self.dim + self.dim * self.q_dim
        attention += self.qkv_dim * self.qkv_bias + self.dim * self.o_bias + 2 * self.head_dim * self.qk_norm
        mlp = 3 * self.dim * self.ffn_dim + (2 * self.ffn_dim + self.dim) * self.mlp_bias
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings or self.labels else 2)
        return self.layers * (attention + mlp + 2 * self.dim) + embeddings + self.dim + len(self.labels) * self.dim

    def flops_per_token(self, context: int) -> float:
        """Training operations (forward and backward) per token in rows of `context` tokens.

        6 per weight that multiplies, plus causal attention (PaLM's formula, arXiv 2204.02311, halved by the mask).
        """
        matrices = self.layers * (self.qkv_dim * self.dim + self.dim * self.q_dim + 3 * self.dim * self.ffn_dim)
        matrices += (0 if self.labels else self.vocab_size) * self.dim
        return 6.0 * matrices + 6.0 * self.layers * self.q_dim * context
