"""Weights as a GGUF file, which llama.cpp and its kin read: names, layouts and numbers of each architecture.

llama.cpp has one program for each architecture. A family is written where that program does the same arithmetic, which
`tests/models/test_gguf.py` shows by the tokens it gives; a config that it would compute otherwise is refused.
Not here: the tokenizer's part of the file (the data room), reading GGUF.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from prairie.errors import ModelError
from prairie.models.config import ModelConfig
from prairie.models.names import Weight
from prairie.models.rope import rope_frequencies
from prairie.models.transformer import Transformer
from prairie.models.weights import hash_of

if TYPE_CHECKING:
    from gguf import GGUFWriter

GGUF_DTYPES = {
    "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"
}  # fmt: skip
"""What `--dtype` may be, and gguf's name for a file of mostly that. Vectors stay float32 in each, and in a file of four
bits embedding and head have eight, as beside our own blocks of four (`quantized.HEAD`)."""
BLOCK = {"q8_0": 32, "q4_0": 32}
"""Columns that share a scale."""
VOCABULARIES = ("token_embd.weight", "output.weight")
F16_LARGEST = 65504.0


@dataclass(frozen=True)
class Architecture:
    """One program of llama.cpp."""

    name: str
    pairs_together: bool = False
    """It turns columns that lie side by side; otherwise column i with i + half a head, as Hugging Face does."""
    activation: str = "silu"
    fits: Callable[[ModelConfig], str] = lambda c: _no_windows(c)
    """Empty, or what of a config it would compute otherwise."""


def _no_windows(c: ModelConfig) -> str:
    return f"sliding windows of {max(c.windows)} tokens" if c.windows else ""


def _alternating(period: int) -> Callable[[ModelConfig], str]:
    """Gemma's: all but every `period`-th layer see a window, and scores are scaled by the size of a head."""

    def fits(c: ModelConfig) -> str:
        window = max(c.windows, default=0)
        if any(width != (window if (i + 1) % period else 0) for i, width in enumerate(c.windows or [0] * c.layers)):
            return "windows in other layers than the family's own"
        if c.attention_scale and abs(c.attention_scale - c.head_dim**-0.5) > 1e-9:
            return f"an attention scale of {c.attention_scale:.4g} with heads of {c.head_dim}"
        return ""

    return fits


def _every_fourth_without_positions(c: ModelConfig) -> str:
    wanted = tuple(i for i in range(c.layers) if (i + 1) % 4 == 0)
    return _no_windows(c) or ("" if c.nope_layers == wanted else f"layers {c.nope_layers} without positions")


def _experts_sum_to_one(c: ModelConfig) -> str:
    if c.dense_layers:
        return f"layers {c.dense_layers} without experts"
    return _no_windows(c) or ("" if c.expert_weights_sum_to_one else "experts whose weights do not sum to one")


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", pairs_together=True),
    "mistral": Architecture("llama", pairs_together=True),
    "mixtral": Architecture("llama", pairs_together=True, fits=_experts_sum_to_one),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe", fits=_experts_sum_to_one),
    "gemma2": Architecture("gemma2", activation="gelu_tanh", fits=_alternating(2)),
    "gemma3_text": Architecture("gemma3", activation="gelu_tanh", fits=_alternating(6)),
    "olmo2": Architecture("olmo2"),
    "smollm3": Architecture("smollm3", pairs_together=True, fits=_every_fourth_without_positions),
    "granite": Architecture("granite", pairs_together=True),
    "gpt2": Architecture("gpt2", activation="gelu_tanh"),
}
"""By the families of `families.FAMILIES`."""


def architecture_of(config: ModelConfig) -> Architecture:
    """ModelError, in one sentence, for a family or a config that llama.cpp does not compute as we do."""
    found = ARCHITECTURES.get(config.family)
    if found is None:
        raise ModelError(
            "this family cannot be written as GGUF", got=config.family, wanted="one of " + ", ".join(ARCHITECTURES)
        )
    scaling = config.rope_scaling
    reason = found.fits(config)
    if not reason and scaling is not None and scaling.kind not in ("linear", "llama3"):
        reason = f"rope scaling {scaling.kind}"
    if not reason and config.activation != found.activation:
        reason = f"the activation {config.activation}"
    if not reason and config.labels:
        reason = "a head of scores"
    if reason:
        raise ModelError(f"llama.cpp computes {found.name} otherwise than this model", got=reason)
    return found


def add_model(writer: GGUFWriter, model: Transformer, dtype: str, name: str) -> list[str]:
    """Adds all numbers and tensors to an open file; `dtype` is a key of `GGUF_DTYPES`.

    Returns the tensors that stayed float16 because their rows do not fill blocks of 32.
    ModelError for what llama.cpp would compute otherwise.
    """
    gguf = gguf_library()
    architecture = architecture_of(model.config)
    _add_numbers(writer, gguf, model.config)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[GGUF_DTYPES[dtype]])
    if dtype in BLOCK:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string("prairie.weights_hash", hash_of(model))
    kept = []
    for at, tensor in _tensors(gguf, model, architecture):
        kind = dtype if tensor.ndim > 1 else "f32"
        if kind == "q4_0" and at in VOCABULARIES:
            kind = "q8_0"
        if tensor.shape[-1] % BLOCK.get(kind, 1):
            kind = "f16"
            kept.append(at)
        if kind == "f16" and tensor.abs().max() > F16_LARGEST:
            raise ModelError(f"{at} has numbers that f16 cannot hold", got=f"{float(tensor.abs().max()):.3g}",
                             wanted=f"at most {F16_LARGEST:.0f}", mend="use --dtype bf16 or f32")  # fmt: skip
        quantized = gguf.GGMLQuantizationType[kind.upper()]
        writer.add_tensor(at, gguf.quants.quantize(tensor.float().numpy(), quantized), raw_dtype=quantized)
    return kept


def gguf_library() -> ModuleType:
    """The `gguf` package. ModelError when it is not installed."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise ModelError("GGUF files need the package gguf", mend="pip install 'prairie[gguf]'") from None
    return gguf


def _add_numbers(writer: GGUFWriter, gguf: Any, c: ModelConfig) -> None:
    writer.add_context_length(c.max_context)
    writer.add_embedding_length(c.dim)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(c.ffn_dim)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_vocab_size(c.vocab_size)
    (writer.add_layer_norm_rms_eps if c.norm == "rms" else writer.add_layer_norm_eps)(c.norm_eps)
    if c.positions == "rotary":
        writer.add_rope_dimension_count(c.rotary_dim)
        writer.add_rope_freq_base(c.rope_theta)
    if c.rope_scaling is not None and c.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c.rope_scaling.factor)
    if c.windows:
        writer.add_sliding_window(max(c.windows))
    if c.window_rope_theta:
        writer.add_rope_freq_base_swa(c.window_rope_theta)
    if c.attention_softcap:
        writer.add_attn_logit_softcapping(c.attention_softcap)
    if c.logit_softcap:
        writer.add_final_logit_softcapping(c.logit_softcap)
    if c.experts:
        writer.add_expert_count(c.experts)
        writer.add_expert_used_count(c.experts_per_token)
        writer.add_expert_feed_forward_length(c.expert_ffn_dim)
    if c.residual_scale != 1.0 or c.logit_scale != 1.0:  # Granite's four; Gemma's embedding scale is its program's own
        writer.add_embedding_scale(c.embed_scale)
        writer.add_residual_scale(c.residual_scale)
        writer.add_attention_scale(c.attention_scale or c.head_dim**-0.5)
        writer.add_logit_scale(1 / c.logit_scale)


def _tensors(gguf: Any, model: Transformer, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Each tensor under llama.cpp's name, as (outputs, inputs)."""
    c = model.config
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture.name)
    names = gguf.get_tensor_name_map(arch, c.layers)
    parameters = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    for weight in model.table:
        if parameters[weight.parameter].ndim == 3:
            continue
        found = names.get_name(weight.name, (".weight", ".bias"))
        if found is None:
            raise ModelError(
                f"llama.cpp has no name for a tensor of this model in {architecture.name}", got=weight.name
            )
        yield found, _laid_out(weight, parameters[weight.parameter], c, architecture)
    for layer in range(c.layers):
        if c.has_experts(layer):
            gate, up = parameters[f"layers.{layer}.experts_gate_up"].chunk(2, 1)
            yield f"blk.{layer}.ffn_gate_exps.weight", gate.contiguous()
            yield f"blk.{layer}.ffn_up_exps.weight", up.contiguous()
            yield f"blk.{layer}.ffn_down_exps.weight", parameters[f"layers.{layer}.experts_down"]
    if c.rope_scaling is not None and c.rope_scaling.kind == "llama3":
        # What each frequency is divided by: the rule itself is then no matter to the reader.
        yield "rope_freqs.weight", rope_frequencies(replace(c, rope_scaling=None)) / rope_frequencies(c)


def _laid_out(weight: Weight, parameter: Tensor, c: ModelConfig, architecture: Architecture) -> Tensor:
    order = None if architecture.pairs_together else weight.order
    tensor = weight._replace(order=order, transposed=False).take(parameter).contiguous()
    is_norm = weight.name.endswith("norm.weight")
    return tensor + 1 if c.norm_offset and is_norm else tensor
