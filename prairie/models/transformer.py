"""The Transformer: one definition for training and serving and for every family of the table.

It works on flat tokens and knows neither rows nor caches: an `Attend` object does positions and attention. Adapters
stand outside; their deltas are added to the outputs of the linear layers they name. Weights that read the same input
are fused (q, k, v; gate, up); the names on disk stay Hugging Face's (`families.weight_table`).
What differs between families is a field of `ModelConfig`, and a weight that a family does not have is None.
Not here: losses (`ops.loss`), rotary frequencies (`rope`), files (`weights`).

Legend: N tokens of all rows, D width, H query heads, K key/value heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prairie.errors import AdapterError, ModelError
from prairie.models.config import ModelConfig
from prairie.models.config_file import with_head
from prairie.models.heads import Head, pool_rows
from prairie.models.names import Part, Weight
from prairie.models.rope import alike, depends_on_length, rope_frequencies, rope_magnitudes
from prairie.models.weight_table import block_norms, fused_parts, names_of, weight_table
from prairie.ops.attention import Attend, Sight, rotary_turns, rotate, split_and_rotate
from prairie.ops.cross_attention import Memory
from prairie.ops.elementwise import ACTIVATIONS, gated, layer_norm, rms_norm, softcap
from prairie.ops.experts import mix_experts, route
from prairie.ops.linear import adapted_linear, linear
from prairie.ops.loss import IGNORED, linear_cross_entropy, linear_logprobs
from prairie.ops.packed import PackedWeight, dense, embedding
from prairie.ops.relative import RelativeBias

if TYPE_CHECKING:
    from prairie.models.lora import AdapterRows
    from prairie.models.quantized import Quantization
    from prairie.models.weights import Hashed

NORMS = ("attention_norm", "attention_out_norm", "cross_norm", "cross_out_norm", "mlp_norm", "mlp_out_norm")
HEAD = "lm_head"
"""The path of the head as adapters name it: transformers' module, whatever older files call its weight."""
RESIDUAL = ("o", "cross_o", "down", "experts_down")
"""Weights whose products are added to the residual stream."""


def waves(positions_N: Tensor, dim: int) -> Tensor:
    """(N, D) float32 positions that are not learned (arXiv 1706.03762): sines, then cosines (Marian's order)."""
    rates = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=positions_N.device) / dim)
    angles = positions_N[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()[:, : dim // 2]], 1).float()


class Block(nn.Module):
    """The weights of one layer, None where its family has none; the arithmetic is in `Transformer.forward`, where it
    can be read in one go."""

    qkv: nn.Parameter
    o: nn.Parameter
    cross_q: nn.Parameter
    cross_kv: nn.Parameter
    cross_o: nn.Parameter
    up: nn.Parameter
    gate_up: nn.Parameter
    down: nn.Parameter
    router: nn.Parameter
    experts_gate_up: nn.Parameter
    experts_down: nn.Parameter

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        c = config

        def add(name: str, *shape: int, bias: bool = False) -> None:
            self.register_parameter(name, nn.Parameter(torch.empty(*shape)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(shape[0])) if bias else None)

        norms = block_norms(c, layer)
        for name in NORMS:
            if name in norms:
                add(name, c.dim, bias=c.norm_bias)
            else:
                self.register_parameter(name, None)
        add("qkv", c.qkv_dim, c.dim, bias=c.qkv_bias)
        if c.qk_norm:
            whole = c.qk_norm == "width"
            add("q_norm", c.q_dim if whole else c.head_dim, bias=c.norm_bias)
            add("k_norm", c.kv_dim if whole else c.head_dim, bias=c.norm_bias)
        add("o", c.dim, c.q_dim, bias=c.o_bias)
        if c.encoder is not None:
            add("cross_q", c.q_dim, c.dim, bias=c.qkv_bias)
            add("cross_kv", 2 * c.kv_dim, c.encoder.dim, bias=c.qkv_bias)
            add("cross_o", c.dim, c.q_dim, bias=c.o_bias)
        self.has_experts = c.has_experts(layer)
        if self.has_experts:
            add("router", c.experts, c.dim)
            add("experts_gate_up", c.experts, 2 * c.expert_ffn_dim, c.dim)
            add("experts_down", c.experts, c.dim, c.expert_ffn_dim)
        else:
            add("gate_up" if c.gated else "up", (1 + c.gated) * c.ffn_dim, c.dim, bias=c.mlp_bias)
            add("down", c.dim, c.ffn_dim, bias=c.mlp_bias)

    def forward(self, compute: Callable[..., Tensor], *given: Any) -> Tensor:
        """`compute(*given)`, as a call of this module: who keeps the weights elsewhere between its uses (FSDP2) fetches
        them before such a call and takes them away behind it."""
        return compute(*given)


class FusedLinear(NamedTuple):
    """A linear layer and where it stands: what an adapter changes. `layer` None: the embedding or the head."""

    layer: int | None
    group: str
    parts: tuple[Part, ...]
    weight: Tensor | PackedWeight
    """(O, I); of the embedding (I, O), a row a token."""
    bias: Tensor | None = None

    def dense(self) -> Tensor:
        """(O, I) the weight itself, however it is kept."""
        weight = dense(self.weight)
        return weight.T if self.group == "embed" else weight

    def rows(self) -> Iterator[tuple[Part, slice]]:
        """Each part with its rows of the weight."""
        start = 0
        for part in self.parts:
            yield part, slice(start, start + part.outputs)
            start += part.outputs


class Transformer(nn.Module):
    """A decoder, an encoder, or a decoder over an encoder. Parameters are not set until `init_weights` or
    `weights.load_model`."""

    embed: nn.Parameter | PackedWeight
    head: nn.Parameter | PackedWeight | None

    def __init__(self, config: ModelConfig, *, owns_embeddings: bool = True) -> None:
        """Without embeddings of its own it is the encoder of another Transformer, which embeds for it."""
        super().__init__()
        c = self.config = config

        def table(wanted: bool, rows: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(rows, c.dim)) if wanted else None

        def norm(wanted: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(c.dim)) if wanted else None

        self.register_parameter("embed", table(owns_embeddings, c.vocab_size))
        self.positions = table(c.positions == "learned", c.max_context + c.position_offset)
        self.segments = table(c.segments > 0, c.segments)
        relative = c.positions == "relative"
        self.relative_bias = nn.Parameter(torch.empty(c.relative_buckets, c.heads)) if relative else None
        self.embed_norm, self.embed_norm_bias = norm(c.embed_norm), norm(c.embed_norm and c.norm_bias)
        self.layers = nn.ModuleList(Block(c, layer) for layer in range(c.layers))
        self.norm, self.norm_bias = norm(c.final_norm), norm(c.final_norm and c.norm_bias)
        self.encoder = Transformer(c.encoder, owns_embeddings=False) if c.encoder is not None else None
        self.register_parameter("head", table(not c.tie_embeddings, c.vocab_size))
        bias_shape = (1, c.vocab_size) if c.encoder is not None else (c.vocab_size,)
        self.logit_bias = nn.Parameter(torch.empty(bias_shape)) if c.logit_bias else None
        self.task = Head(c) if c.head is not None else None
        """The head of an encoder, or of a decoder that scores instead of writing."""
        self.parts: list[dict[str, tuple[Part, ...]]] = fused_parts(c)
        self.table: list[Weight] = weight_table(c)
        self.sights = [Sight(c.causal, c.window(layer), c.attention_softcap) for layer in range(c.layers)]
        self.query_scale = c.attention_scale * math.sqrt(c.head_dim) if c.attention_scale else 1.0
        """What queries are multiplied with, as an `Attend` divides products by sqrt(head_dim)."""
        self.ropes = [self._rope_of(layer) for layer in range(c.layers)]
        self.frequencies = {rope: rope_frequencies(c, window=rope == "window") for rope in set(self.ropes) if rope}
        self.merged: tuple[str, ...] = ()
        """Hashes of the adapters that were merged into these weights, in their order."""
        self.quantization: Quantization | None = None
        """How the blocks' matrices were packed (`models.quantized`), and what that changed; None: they were not."""
        self.recomputes = False
        """In training: keep only what goes into each layer and compute the layer again for its gradient (activation
        checkpointing, arXiv 1604.06174). The same bits, a third more time, far less memory."""
        self.loaded_hashes: tuple[str, str] | None = None
        """Set by `load_model`: hash of the file's weights, and of the same weights in the dtype they were loaded to."""
        self.hashed: Hashed | None = None
        """What `weights.hash_of` has found."""

    def init_weights(self, seed: int | torch.Generator = 0) -> Transformer:
        """Sets every parameter by a seed: normal, std 1/sqrt(inputs), less where a layer adds to the residual (GPT-2).

        The usual fixed 0.02 is that std at a width of 2,500; narrow models learn far more slowly from it (docs/log.md).
        """
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        residual_share = 1 / math.sqrt(2 * self.config.layers)
        neutral = 0.0 if self.config.norm_offset else 1.0
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                kind = name.rsplit(".", 1)[-1]
                if kind.endswith("_bias") and kind != "relative_bias":
                    parameter.fill_(0.0)
                elif parameter.ndim == 1:
                    parameter.fill_(neutral)
                else:
                    std = (residual_share if kind in RESIDUAL else 1.0) / math.sqrt(parameter.shape[-1])
                    parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
        return self

    # ---- from hidden states to the vocabulary

    @property
    def packed(self) -> str | None:
        """In what form matrices are kept, if some are packed; such a model can be answered with and not be changed."""
        return next((module.bits for module in self.modules() if isinstance(module, PackedWeight)), None)

    @property
    def head_weight(self) -> Tensor | PackedWeight:
        """(V, D) the matrix that turns hidden states into logits: the embedding when tied. Logits and losses are asked
        of the methods below, which know what else belongs to them. Raises ModelError for a model of scores."""
        self._refuse_logits_of_scores()
        return self.embed if self.head is None else self.head

    def _refuse_logits_of_scores(self) -> None:
        if self.config.labels:
            raise ModelError(
                "this model gives scores, not text", got=", ".join(self.config.labels), wanted="a language model"
            )

    def logits(self, hidden_ND: Tensor, adapters: Sequence[AdapterRows] = ()) -> Tensor:
        """(N, V): of the next token, or with the head "mlm" of the token itself. The rows of `adapters` are those of
        `hidden_ND`. ModelError for a model without such a head."""
        hidden_ND = self._unembedded(hidden_ND)
        logits_NV = self._linear(hidden_ND, None, "head", adapters)
        if self.logit_bias is not None:
            logits_NV = logits_NV + self.logit_bias
        return softcap(logits_NV, self.config.logit_softcap) if self.config.logit_softcap else logits_NV

    def cross_entropy(self, hidden_ND: Tensor, labels_N: Tensor, adapters: Sequence[AdapterRows] = ()) -> Tensor:
        """SUM over supervised tokens of -log p(label), a float32 scalar; see `ops.loss.linear_cross_entropy`."""
        if self.logit_bias is not None:
            return -self.logprobs(hidden_ND, labels_N, adapters).sum()
        hidden_ND = self._unembedded(hidden_ND)
        return linear_cross_entropy(hidden_ND, self._head(adapters), labels_N, softcap=self.config.logit_softcap)

    def logprobs(self, hidden_ND: Tensor, labels_N: Tensor, adapters: Sequence[AdapterRows] = ()) -> Tensor:
        """(N,) float32 log p(label) of every token, 0 where it is not supervised."""
        if self.logit_bias is None:
            hidden_ND = self._unembedded(hidden_ND)
            return linear_logprobs(hidden_ND, self._head(adapters), labels_N, softcap=self.config.logit_softcap)
        places_S = (labels_N != IGNORED).nonzero()[:, 0]
        hidden_SD = self._unembedded(hidden_ND.index_select(0, places_S))
        logprobs_SV = F.linear(hidden_SD, self._head(adapters), self.logit_bias.flatten()).float().log_softmax(-1)
        picked_S = logprobs_SV.gather(1, labels_N[places_S, None])[:, 0]
        return picked_S.new_zeros(len(labels_N)).index_copy(0, places_S, picked_S)

    def scores(self, hidden_ND: Tensor, lengths: Sequence[int], adapters: Sequence[AdapterRows] = ()) -> Tensor:
        """What the head makes of the rows: "classify" (B, labels), "tag" (N, labels), "pool" vectors (B, D). An adapter
        that brings a head is asked in place of the model's.

        ModelError for a model without such a head, AdapterError where one of several adapters brings one.
        """
        heads = [adapter.lora.score for adapter in adapters if adapter.lora.score is not None]
        if heads:
            if len(adapters) > 1:
                raise AdapterError("adapters with heads of scores are asked one at a time", got=len(adapters))
            return F.linear(pool_rows(hidden_ND, lengths, "last"), heads[0].to(hidden_ND.dtype))
        if self.task is None or self.config.head is None or self.config.head.kind == "mlm":
            raise ModelError(
                "this model gives no scores",
                got="no head" if self.config.head is None else f"the head {self.config.head.kind}",
                wanted="a head that classifies rows, tags tokens or pools",
            )
        scores: Tensor = self.task(hidden_ND, lengths)
        return scores

    def _unembedded(self, hidden_ND: Tensor) -> Tensor:
        """Hidden states as the matrix of the vocabulary wants them."""
        c = self.config
        if c.writes:
            return hidden_ND
        self._refuse_logits_of_scores()
        if self.task is None or c.head is None or c.head.kind != "mlm":
            raise ModelError(
                "this model gives no logits of tokens",
                got=f"an {c.kind}" if c.head is None else f"the head {c.head.kind}",
                wanted="a model that writes, or the head of a masked language model",
            )
        hidden_ND = self.task(hidden_ND, ())
        return hidden_ND

    def _head(self, adapters: Sequence[AdapterRows]) -> Tensor:
        """The head as the adapters change it. Without a gradient where none is asked for: it would be as large as the
        vocabulary. Raises AdapterError when one of several adapters changes the head."""
        at = self.linear(None, "head")
        if any(adapter.lora.touches(at) for adapter in adapters):
            if len(adapters) > 1 or adapters[0].rows is not None:
                raise AdapterError("adapters of the head learn one at a time", got=f"{len(adapters)} at once")
            return adapters[0].lora.weight_under(at)
        weight = dense(self.head_weight)
        return weight if torch.is_grad_enabled() else weight.detach()

    def with_scores(self, labels: Sequence[str], seed: int = 0) -> Transformer:
        """`with_head` of the kind that classifies rows; one label makes it a reward model."""
        return self.with_head("classify", labels, seed)

    def with_head(self, kind: str, labels: Sequence[str] = (), seed: int = 0) -> Transformer:
        """The same body, its parameters shared, under a head of a kind that its family has ("classify", "tag", "mlm").

        A part that both heads have (BERT's pooler) is kept, others and the scores are fresh: normal, std 1/sqrt(width).
        """
        with torch.device("meta"):
            other = Transformer(with_head(self.config, kind, labels))
        mine, prefix = dict(self.named_parameters()), names_of(self.config).prefix
        files = {weight.parameter: weight.name.removeprefix(prefix) for weight in self.table}
        same = {weight.parameter: weight.name.removeprefix(prefix) for weight in other.table}
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in list(other.named_parameters()):
            owner, _, last = name.rpartition(".")
            kept = mine.get(name) if files.get(name) == same[name] and not name.startswith("task.out") else None
            setattr(other.get_submodule(owner), last, self._fresh(parameter, last, generator) if kept is None else kept)
        return other

    def _fresh(self, like: Tensor, name: str, generator: torch.Generator) -> nn.Parameter:
        """A parameter of a new head."""
        if like.ndim == 1:
            value = torch.full(like.shape, 0.0 if name.endswith("bias") else 1.0)
        else:
            value = torch.empty(like.shape).normal_(generator=generator) / math.sqrt(like.shape[-1])
        return nn.Parameter(value.to(self.embed.device, self.embed.dtype))

    # ---- what can carry an adapter

    def linear(self, layer: int | None, group: str) -> FusedLinear:
        """A fused linear layer, the embedding ("embed", a product with one-hot tokens) or the head ("head")."""
        if layer is None:
            vocabulary, width = self.embed.shape
            if group == "embed":
                path = self.table[0].name.removesuffix(".weight")
                return FusedLinear(None, group, (Part(path, width, vocabulary),), self.embed)
            return FusedLinear(None, group, (Part(HEAD, vocabulary, width),), self.head_weight)
        block = self.layers[layer]
        weight, bias = getattr(block, group), getattr(block, f"{group}_bias")
        return FusedLinear(layer, group, self.parts[layer][group], weight, bias)

    def linears(self) -> Iterator[FusedLinear]:
        """Everything that can carry an adapter. Experts cannot."""
        if self.encoder is None:  # an encoder-decoder's embedding is its encoder's too, which no adapter reaches
            yield self.linear(None, "embed")
        for layer, groups in enumerate(self.parts):
            for group in groups:
                yield self.linear(layer, group)
        if self.config.writes:
            yield self.linear(None, "head")

    # ---- from tokens to hidden states

    @property
    def prefixes_stand_alone(self) -> bool:
        """Whether a token's hidden state depends on nothing behind it, not even on how much there is."""
        return self.config.kind == "decoder" and not depends_on_length(self.config)

    def forward(
        self,
        tokens_N: Tensor,
        attend: Attend,
        adapters: Sequence[AdapterRows] = (),
        *,
        segments_N: Tensor | None = None,
        memory: Memory | None = None,
        wanted_W: Tensor | None = None,
    ) -> Tensor:
        """hidden_ND after the last layer and norm, of flat tokens whose context `attend` knows; with `wanted_W`, places
        in rising order, hidden_WD of those only: the last layer computes no other behind its attention.

        `segments_N`: to which text of a pair each token belongs (None: all to the first). An encoder-decoder needs
        `memory`, what its `encode` made of the rows that are to be answered.
        """
        if (memory is None) != (self.encoder is None):
            raise ModelError("a decoder over an encoder needs what the encoder read, and no other model can use it")
        if wanted_W is not None and memory is not None:
            raise ModelError("a decoder over an encoder gives the hidden states of all tokens", got="some wanted")
        x_ND = embedding(tokens_N, self.embed)
        for adapter in adapters:
            x_ND = adapter.lora.add_to_embedding(x_ND, tokens_N, self.linear(None, "embed"), adapter.rows)
        return self._through_layers(x_ND, attend, adapters, segments_N, memory, wanted_W)

    def encode(self, tokens_M: Tensor, attend: Attend) -> Tensor:
        """hidden_MD of the encoder of an encoder-decoder, for a `Memory`. ModelError for a model of another kind."""
        if self.encoder is None:
            raise ModelError("only an encoder-decoder encodes apart from what it writes", got=self.config.kind)
        hidden_MD: Tensor = self.encoder._through_layers(embedding(tokens_M, self.embed), attend)
        return hidden_MD

    def _through_layers(
        self,
        x_ND: Tensor,
        attend: Attend,
        adapters: Sequence[AdapterRows] = (),
        segments_N: Tensor | None = None,
        memory: Memory | None = None,
        wanted_W: Tensor | None = None,
    ) -> Tensor:
        c = self.config
        turns = {rope: self._turns(rope, attend) for rope in self.frequencies}
        bias = () if self.relative_bias is None else (RelativeBias(self.relative_bias, c.relative_distance, c.causal),)
        x_ND = self._placed(x_ND, attend.positions_N, segments_N)
        recomputes = self.recomputes and torch.is_grad_enabled()
        layer = partial(checkpoint, self._layer, use_reentrant=False) if recomputes else self._layer
        for index in range(c.layers):
            given = (x_ND, index, attend, turns, bias, adapters, memory, wanted_W if index + 1 == c.layers else None)
            x_ND = self.layers[index](layer, *given)
        x_ND = self._normed(x_ND, self, "norm")
        return x_ND if c.logit_scale == 1.0 else x_ND * c.logit_scale

    def _layer(
        self,
        x_ND: Tensor,
        index: int,
        attend: Attend,
        turns: dict[str, Tensor],
        bias: Sequence[RelativeBias],
        adapters: Sequence[AdapterRows],
        memory: Memory | None,
        wanted_W: Tensor | None,
    ) -> Tensor:
        """The residual stream after one layer, of all tokens or of those that are wanted."""
        c, block = self.config, self.layers[index]
        assert isinstance(block, Block)
        y_ND = self._normed(x_ND, block, "attention_norm")
        qkv = self._linear(y_ND, index, "qkv", adapters)
        q_NHD, k_NKD, v_NKD = self._heads(qkv, block, turns.get(self.ropes[index]))
        o_NHD = attend(index, q_NHD, k_NKD, v_NKD, self.sights[index], *bias)
        if wanted_W is not None:
            x_ND, o_NHD = x_ND.index_select(0, wanted_W), o_NHD.index_select(0, wanted_W)
            adapters = [adapter._replace(rows=_within(adapter.rows, wanted_W)) for adapter in adapters]
        a_ND = self._linear(o_NHD.flatten(1), index, "o", adapters)
        if c.parallel_residual:
            return x_ND + (a_ND + self._mlp(self._normed(x_ND, block, "mlp_norm"), block, index, adapters))
        x_ND = self._added(x_ND, a_ND, block, "attention_out_norm")
        if memory is not None:
            y_ND = self._normed(x_ND, block, "cross_norm")
            a_ND = self._looked(y_ND, index, memory, adapters)
            x_ND = self._added(x_ND, a_ND, block, "cross_out_norm")
        y_ND = self._normed(x_ND, block, "mlp_norm")
        return self._added(x_ND, self._mlp(y_ND, block, index, adapters), block, "mlp_out_norm")

    def _placed(self, x_ND: Tensor, positions_N: Tensor, segments_N: Tensor | None) -> Tensor:
        """Embeddings of tokens with what says where they stand, as the first layer reads them."""
        c = self.config
        if c.embed_scale != 1.0:  # rounded to the dtype of x, as the families that scale were trained
            x_ND = x_ND * torch.tensor(c.embed_scale, dtype=x_ND.dtype)
        if self.segments is not None:
            x_ND = x_ND + (self.segments[0] if segments_N is None else F.embedding(segments_N, self.segments))
        if self.positions is not None:
            x_ND = x_ND + F.embedding(positions_N + c.position_offset, self.positions)
        if c.positions == "sinusoidal":
            x_ND = x_ND + waves(positions_N, c.dim).to(x_ND.dtype)
        return self._normed(x_ND, self, "embed_norm")

    def _looked(self, y_ND: Tensor, index: int, memory: Memory, adapters: Sequence[AdapterRows]) -> Tensor:
        """What each token takes from the encoder's hidden states."""
        c = self.config
        if any(adapter.rows is not None for adapter in adapters):
            raise AdapterError("an adapter of an encoder-decoder serves all rows of a batch", got="some of them")

        def keys_and_values(hidden_MD: Tensor) -> tuple[Tensor, Tensor]:
            kv = self._linear(hidden_MD, index, "cross_kv", adapters)
            k_MKD, v_MKD = kv.view(len(kv), 2, c.kv_heads, c.head_dim).unbind(1)
            return k_MKD, v_MKD

        q_NHD = self._linear(y_ND, index, "cross_q", adapters).view(len(y_ND), c.heads, c.head_dim)
        o_NHD = memory(index, q_NHD * self.query_scale, keys_and_values)
        return self._linear(o_NHD.flatten(1), index, "cross_o", adapters)

    def _heads(self, qkv: Tensor, block: Block, turns: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q_NHD and k_NKD at their positions, normed before if the family does so, and v_NKD."""
        c = self.config
        if not c.qk_norm and turns is not None:
            q_NHD, k_NKD, v_NKD = split_and_rotate(qkv, c.heads, c.kv_heads, turns)
        else:
            q, k, v = qkv.split([c.q_dim, c.kv_dim, c.kv_dim], 1)
            if c.qk_norm == "width":
                q, k = self._normed(q, block, "q_norm"), self._normed(k, block, "k_norm")
            q_NHD, k_NKD, v_NKD = (x.view(len(x), -1, c.head_dim) for x in (q, k, v))
            if c.qk_norm == "head":
                q_NHD, k_NKD = self._normed(q_NHD, block, "q_norm"), self._normed(k_NKD, block, "k_norm")
            if turns is not None:
                q_NHD, k_NKD = rotate(q_NHD, turns), rotate(k_NKD, turns)
        return q_NHD if self.query_scale == 1.0 else q_NHD * self.query_scale, k_NKD, v_NKD

    def _mlp(self, y_ND: Tensor, block: Block, index: int, adapters: Sequence[AdapterRows]) -> Tensor:
        c = self.config
        if block.has_experts:
            chosen = route(F.linear(y_ND, block.router), c.experts_per_token, c.expert_weights_sum_to_one)
            return mix_experts(y_ND, *chosen, block.experts_gate_up, block.experts_down, c.activation)
        if c.gated:
            inner = gated(self._linear(y_ND, index, "gate_up", adapters), c.activation)
        else:
            inner = ACTIVATIONS[c.activation](self._linear(y_ND, index, "up", adapters))
        return self._linear(inner, index, "down", adapters)

    def _added(self, x_ND: Tensor, y_ND: Tensor, block: Block, norm: str) -> Tensor:
        """The residual stream with what a layer adds; `norm` is of the addition, or of the sum."""
        c = self.config
        if c.norm_at == "sum":
            return self._normed(x_ND + y_ND, block, norm)
        y_ND = self._normed(y_ND, block, norm)
        return x_ND + (y_ND if c.residual_scale == 1.0 else y_ND * c.residual_scale)

    def _normed(self, x: Tensor, owner: nn.Module, name: str) -> Tensor:
        """x through the norm of this name; x itself where the family has none."""
        c, weight = self.config, getattr(owner, name)
        if weight is None:
            return x
        if c.norm == "layer":
            return layer_norm(x, weight, getattr(owner, f"{name}_bias"), c.norm_eps)
        return rms_norm(x, weight + 1.0 if c.norm_offset else weight, c.norm_eps)

    def _linear(self, x_NI: Tensor, layer: int | None, group: str, adapters: Sequence[AdapterRows]) -> Tensor:
        """One fused linear layer, as the adapters that name it change it."""
        at = self.linear(layer, group)
        if adapters and torch.is_grad_enabled():  # in training all at once, where all only add something
            added = [(adapter.rows or slice(None), adapter.lora.additions(at)) for adapter in adapters]
            plain = [(rows, its) for rows, its in added if its is not None]
            if len(plain) == len(added):
                return adapted_linear(x_NI, at.weight, at.bias, [(rows, its) for rows, its in plain if its])
        y_NO = linear(x_NI, at.weight, at.bias)
        for adapter in adapters:
            y_NO = adapter.lora.add_to(y_NO, x_NI, at, adapter.rows)
        return y_NO

    # ---- positions

    def _rope_of(self, layer: int) -> str:
        """Which frequencies a layer turns by; none if it does not."""
        c = self.config
        if c.positions != "rotary" or layer in c.nope_layers:
            return ""
        return "window" if c.window_rope_theta and c.window(layer) else "all"

    def _turns(self, rope: str, attend: Attend) -> Tensor:
        """(N, 1, D/2) the rotation of each token."""
        c, device = self.config, attend.positions_N.device
        window = rope == "window"
        frequencies = self.frequencies[rope]
        if depends_on_length(c) and not window:
            lengths, of_N = attend.row_lengths_N.unique(return_inverse=True)
            rows = [rope_frequencies(c, alike(c, length)) for length in lengths.tolist()]
            frequencies = torch.stack(rows)[of_N.cpu(), None]
        magnitudes = rope_magnitudes(c, window)
        magnitudes = magnitudes if magnitudes is None else magnitudes.to(device)
        return rotary_turns(attend.positions_N, frequencies.to(device), magnitudes)


def _within(rows: slice | None, wanted_W: Tensor) -> slice | None:
    """Where the wanted tokens among `rows` stand among the wanted ones."""
    if rows is None:
        return None
    ends = torch.searchsorted(wanted_W, torch.tensor([rows.start, rows.stop], device=wanted_W.device))
    return slice(*ends.tolist())
