"""config.json as well-known models publish it (the keys that matter): read as transformers reads it, and as large."""

from __future__ import annotations

from typing import Any

import pytest

from prairie.errors import ModelError
from prairie.models.config_file import read_config, write_config
from prairie.models.families import FAMILIES

LONG_FACTORS = [1.0 + 0.5 * i for i in range(48)]
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama-3.1-8B": (
        8_030_261_248,
        {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
            "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096,
            "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192, "rope_type": "llama3"},
            "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256,
        },
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        {
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
            "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
        },
    ),
    "Qwen2.5-7B with its yarn": (
        7_615_616_512,
        {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 3584,
            "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
            "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
            "use_sliding_window": False, "vocab_size": 152064,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        },
    ),
    "gemma-2-2b": (
        2_614_341_888,
        {
            "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attention_bias": False,
            "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
            "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216,
            "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26,
            "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
        },
    ),
    "gemma-3-1b": (
        999_885_952,
        {
            "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attention_bias": False,
            "attn_logit_softcapping": None, "bos_token_id": 2, "eos_token_id": 1, "final_logit_softcapping": None,
            "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
            "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26,
            "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
            "sliding_window_pattern": 6, "vocab_size": 262144,
        },
    ),
    "Phi-4-mini": (
        3_836_021_760,
        {
            "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False, "bos_token_id": 199999,
            "eos_token_id": 199999, "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192,
            "max_position_embeddings": 131072, "num_attention_heads": 24, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "original_max_position_embeddings": 4096, "pad_token_id": 199999,
            "partial_rotary_factor": 0.75, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 262144,
            "rope_scaling": {"long_factor": LONG_FACTORS, "short_factor": [1.0] * 48, "type": "longrope"},
            "tie_word_embeddings": True, "vocab_size": 200064,
        },
    ),
    "Phi-3-mini-4k": (
        3_821_079_552,
        {
            "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_act": "silu", "hidden_size": 3072,
            "intermediate_size": 8192, "max_position_embeddings": 4096, "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
            "pad_token_id": 32000, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
            "sliding_window": 2047, "tie_word_embeddings": False, "vocab_size": 32064, "eos_token_id": 32000,
            "bos_token_id": 1,
        },
    ),
    "SmolLM3-3B": (
        3_075_098_624,
        {
            "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "attention_bias": False,
            "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11008, "max_position_embeddings": 65536,
            "mlp_bias": False, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
            "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "rms_norm_eps": 1e-06,
            "layer_types": ["full_attention"] * 36, "rope_theta": 5000000.0, "sliding_window": None,
            "use_sliding_window": False, "vocab_size": 128256, "bos_token_id": None, "eos_token_id": 128012,
            "pad_token_id": 128004,
        },
    ),
    "granite-3.1-2b": (
        2_533_531_648,
        {
            "architectures": ["GraniteForCausalLM"], "model_type": "granite", "attention_bias": False,
            "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "hidden_act": "silu", "hidden_size": 2048,
            "intermediate_size": 8192, "logits_scaling": 8.0, "max_position_embeddings": 131072, "mlp_bias": False,
            "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "residual_multiplier": 0.22,
            "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 5000000.0, "tie_word_embeddings": True,
            "vocab_size": 49155, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
        },
    ),
    "gpt2": (
        124_439_808,
        {
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
            "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256,
            "layer_norm_epsilon": 1e-05, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
            "n_positions": 1024, "resid_pdrop": 0.1, "vocab_size": 50257,
        },
    ),
    "pythia-70m": (
        70_426_624,
        {
            "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "bos_token_id": 0, "eos_token_id": 0,
            "hidden_act": "gelu", "hidden_size": 512, "intermediate_size": 2048, "layer_norm_eps": 1e-05,
            "max_position_embeddings": 2048, "num_attention_heads": 8, "num_hidden_layers": 6,
            "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "use_parallel_residual": True,
            "vocab_size": 50304,
        },
    ),
    "Mixtral-8x7B": (
        46_702_792_704,
        {
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu",
            "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
            "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000,
        },
    ),
    "Qwen3-30B-A3B": (
        30_532_122_624,
        {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
            "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
            "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
            "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
            "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
            "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
            "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
        },
    ),
    "OLMoE-1B-7B": (
        6_919_161_856,
        {
            "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "attention_bias": False, "clip_qkv": None,
            "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 1024,
            "max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64,
            "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
            "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
            "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "vocab_size": 50304,
        },
    ),
    "OLMo-2-7B": (
        7_298_617_344,
        {
            "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False,
            "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
            "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 32, "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 500000, "tie_word_embeddings": False, "vocab_size": 100352,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_as_transformers_reads_them(name: str) -> None:
    size, raw = PUBLISHED[name]
    ours = read_config(raw)
    assert ours.parameters() == size
    assert read_config(write_config(ours)) == ours
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, type(transformers.AutoConfig.for_model(raw["model_type"])).__name__)
    theirs = kind(**{key: value for key, value in raw.items() if key != "model_type"}).to_dict()
    theirs |= {mark: raw.get(mark) for mark in ("bos_token_id", "eos_token_id", "pad_token_id")}
    assert read_config({**theirs, "architectures": raw["architectures"]}) == ours


JUNK: list[Any] = ["x", "", -1, 0, 0.5, float("nan"), float("inf"), 10**12, True, [], ["x"], {}, {"a": 1}, {"type": {}}]


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_value_of_a_config_makes_it_stumble(name: str) -> None:
    """Each key in turn is missing, null or junk: a config is read, or refused in one sentence."""
    _, raw = PUBLISHED[name]
    refused = 0
    nested = raw.get("rope_scaling") or {}
    changed = [{k: v for k, v in raw.items() if k != key} for key in raw]
    changed += [raw | {key: junk} for key in raw for junk in (None, *JUNK)]
    changed += [raw | {"rope_scaling": nested | {key: junk}} for key in nested for junk in (None, *JUNK)]
    for config in changed:
        try:
            read_config(config)
        except ModelError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50


def test_an_unknown_family_is_refused_with_the_list_of_those_that_are_known() -> None:
    with pytest.raises(ModelError) as caught:
        read_config({"architectures": ["RwkvForCausalLM"], "hidden_size": 8})
    assert "RwkvForCausalLM" in str(caught.value)
    assert all(family.architecture in str(caught.value) for family in FAMILIES.values())
