"""Families are data: one row of a table each, decoders first, then encoders, then encoder-decoders.

One Transformer serves every row; code elsewhere never tests a family's name. A row says three things: which keys of
`config.json` set which fields (`keys`, `fixed`, `read` for what takes a rule), what transformers assumes when a key is
absent (`defaults`), and where the files keep the weights (`names`). How to add one: docs/models.md.
Not here: what a row is made of (`family`), reading `config.json` by it (`config_file`), tensors (`weight_table`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from prairie.errors import ModelError
from prairie.models.config import HeadConfig, ModelConfig
from prairie.models.family import (
    ACTIVATION,
    BIASES,
    CAP,
    KEYS,
    Family,
    HeadRow,
    Key,
    Windows,
    activation_named,
    whole,
)
from prairie.models.names import Names

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
    activation = activation_named(values.get("classifier_activation", "gelu"))
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
    mlp = {"gated": bool(gate), "activation": "gelu_tanh" if gate and name == "gelu" else activation_named(name)}
    scaled = values.get("scale_decoder_outputs", values.get("tie_word_embeddings", True))
    return {
        **mlp,
        "logit_scale": fields["dim"] ** -0.5 if scaled else 1.0,
        "encoder": _encoder_like(fields | mlp, layers=whole(values["num_layers"])),
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
    own = {name: whole(values[key]) for name, key in sizes.items()}
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
        lambda words: tuple(whole(word) for [word] in words),
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
