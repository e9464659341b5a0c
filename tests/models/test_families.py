"""Every family of the table against transformers' own model: logits, gradients, the engine, and the way back."""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from prairie.data.chat_template import ChatTemplate
from prairie.data.tokenizer import Tokenizer
from prairie.engine.engine import Engine
from prairie.engine.request import SamplingParams
from prairie.models.config_file import read_config, write_config
from prairie.models.families import FAMILIES
from prairie.models.transformer import Transformer
from prairie.models.weights import hash_of, load_model, save_model
from prairie.ops.attention import PackedDocuments

transformers = pytest.importorskip("transformers")

LENGTHS = [7, 19, 1, 12, 19, 33]
VOCABULARY = 270
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 1000.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1000.0}
LONG = {
    "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 2.0, 4.0],
    "partial_rotary_factor": 0.75, "original_max_position_embeddings": 16, "rope_theta": 1000.0,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LONG_PHI = {"pad_token_id": 0, "rope_parameters": LONG, "original_max_position_embeddings": 16}
QUARTER = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 8, "pad_token_id": 0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama without groups": ("Llama", {"num_key_value_heads": 4}),
    "llama one kv head, wide heads": ("Llama", {"num_key_value_heads": 1, "head_dim": 16}),
    "llama with every bias": ("Llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama, rope llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, rope linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}),
    "llama, rope yarn": ("Llama", {"rope_parameters": YARN}),
    "llama, rope dynamic": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0},
            "max_position_embeddings": 16,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, windows": ("Mistral", {"sliding_window": 8, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {"head_dim": 16, "pad_token_id": 0}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2 without caps": (
        "Gemma2",
        {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 64},
    ),
    "gemma3": (
        "Gemma3Text",
        {
            **GEMMA,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "phi3": ("Phi3", {"pad_token_id": 0, "sliding_window": 9}),
    "phi4-mini, rope longrope": ("Phi3", LONG_PHI),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "smollm3, windows": ("SmolLM3", {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 7}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.3,
            "logits_scaling": 4.0,
            "attention_bias": True,
        },
    ),
    "gpt2": ("GPT2", GPT2),
    "gpt2, untied": ("GPT2", {**GPT2, "n_inner": 40, "tie_word_embeddings": False, "activation_function": "relu"}),
    "gpt-neox": ("GPTNeoX", {"rope_parameters": QUARTER}),
    "gpt-neox in series": ("GPTNeoX", {"use_parallel_residual": False, "attention_bias": False}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral, windows": ("Mixtral", {"num_local_experts": 3, "sliding_window": 5}),
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3-moe, some dense": ("Qwen3Moe", {**EXPERTS, "head_dim": 8, "mlp_only_layers": [1], "norm_topk_prob": False}),
    "olmoe": ("Olmoe", {**EXPERTS, "num_key_value_heads": 4}),
}  # fmt: skip
GRADIENTS = [
    "llama with every bias", "mistral, windows", "qwen2, windows", "qwen3", "gemma", "gemma2", "gemma3", "phi3",
    "phi4-mini, rope longrope", "olmo2", "smollm3", "granite", "gpt2", "gpt-neox", "gpt-neox in series", "mixtral",
    "qwen3-moe, some dense", "olmoe",
]  # fmt: skip


@functools.cache
def peer_of(case: str) -> Any:
    family, changes = CASES[case]
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    model = getattr(
        transformers, f"{family.removesuffix('Text')}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}"
    )
    made = model(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:  # biases of zero and norms of one would hide a mistake
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif parameter.abs().max() == 0:
                parameter.normal_(0.0, 0.2)
    return made


@functools.cache
def folder_of(case: str, root: Path) -> Path:
    folder = root / case.replace(",", "").replace(" ", "-")
    peer_of(case).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def tokens_of(lengths: list[int]) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (sum(lengths),), generator=torch.Generator().manual_seed(3))


def their_logits(case: str, row_T: torch.Tensor) -> torch.Tensor:
    """Of one row alone. A dynamic rope remembers the longest row it has seen, so it gets a short one first."""
    peer = peer_of(case)
    with torch.no_grad():
        peer(row_T[:1][None], use_cache=False)
        return peer(row_T[None], use_cache=False).logits[0]


def test_every_family_of_decoders_has_a_case() -> None:
    """Those that read in both directions are tested in test_encoders.py and test_encoder_decoders.py."""
    decoders = {name for name, family in FAMILIES.items() if not family.heads and family.encoder_names is None}
    assert {read_config(peer_of(case).config.to_dict() | {"architectures": peer_of(case).config.architectures}).family
            for case in CASES} == decoders  # fmt: skip


def test_every_family_stands_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs/models.md").read_text("utf-8")
    rows = set(re.findall(r"^\| `(\w+)` \| `([A-Z]\w+)` \|", page, re.MULTILINE))
    assert rows == {(name, row.architecture) for name, row in FAMILIES.items()}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, root: Path) -> None:
    """Rows of unlike length packed, beyond every window and every original context (1 to 33 tokens against 5 to 16)."""
    model = load_model(folder_of(case, root))
    tokens = tokens_of(LENGTHS)
    with torch.no_grad():
        ours = model.logits(model(tokens, PackedDocuments(LENGTHS)))
    theirs = torch.cat([their_logits(case, row) for row in tokens.split(LENGTHS)])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(set(theirs.argmax(-1).tolist())) > 10, "a model that always says the same proves little"
    assert model.config.parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("case", [case for case in CASES if "dynamic" not in case and "longrope" not in case])
def test_packed_rows_equal_a_padded_batch(case: str, root: Path) -> None:
    """transformers turns all rows of a batch by the longest where rope depends on the length; those are left out."""
    model = load_model(folder_of(case, root))
    rows = tokens_of(LENGTHS).split(LENGTHS)
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=3)
    seen = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    with torch.no_grad():
        ours = model.logits(model(torch.cat(rows), PackedDocuments(LENGTHS)))
        theirs = peer_of(case)(padded, attention_mask=seen, use_cache=False).logits[seen.bool()]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_equal_transformers(case: str, root: Path) -> None:
    """Of the mean cross entropy over the supervised tokens of all rows; row 3 and some tokens are not supervised."""
    peer, model = peer_of(case), load_model(folder_of(case, root))
    tokens = tokens_of(LENGTHS)
    labels = torch.cat([torch.cat([row[1:], torch.tensor([-100])]) for row in tokens.split(LENGTHS)])
    labels[27:39] = -100
    labels[2] = -100
    loss = model.cross_entropy(model(tokens, PackedDocuments(LENGTHS)), labels) / int((labels != -100).sum())
    loss.backward()
    peer.zero_grad()
    theirs = torch.cat([peer(row[None], use_cache=False).logits[0] for row in tokens.split(LENGTHS)])
    their_loss = F.cross_entropy(theirs, labels)
    their_loss.backward()
    assert loss.item() == pytest.approx(their_loss.item(), abs=1e-5)
    wanted = gradients_by_name(peer)
    parameters = dict(model.named_parameters())
    for weight in model.table:
        grad = parameters[weight.parameter].grad
        assert grad is not None
        torch.testing.assert_close(weight.take(grad), wanted[weight.name], rtol=1e-4, atol=1e-5)
    peer.zero_grad()


ONE_EACH = list({CASES[case][0]: case for case in CASES}.values())


@pytest.mark.parametrize("mode", ["autocast", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ONE_EACH)
def test_half_precision_stays_close(case: str, mode: str, root: Path) -> None:
    """Hidden states and gradients; experts are left out where rounding sends a token to another one."""
    model = load_model(folder_of(case, root))
    tokens = tokens_of(LENGTHS)

    def results() -> tuple[torch.Tensor, list[torch.Tensor]]:
        hidden = model(tokens, PackedDocuments(LENGTHS))
        model.cross_entropy(hidden, tokens).backward()
        grads = [p.grad.float().flatten() for p in model.parameters()]
        model.zero_grad()
        return hidden.detach().float(), grads

    wanted, wanted_grads = results()
    if mode != "autocast":
        model.to(getattr(torch, mode))
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        got, grads = results()
    alike = F.cosine_similarity(got, wanted, dim=1)
    assert alike.median() > 0.99
    if not model.config.experts:
        assert alike.min() > 0.9
        assert all(F.cosine_similarity(a, b, dim=0) > 0.9 for a, b in zip(grads, wanted_grads, strict=True))


def gradients_by_name(peer: Any) -> dict[str, torch.Tensor]:
    """Under the names of the file, where experts are apart."""
    found = {}
    for name, parameter in peer.named_parameters():
        if ".experts." not in name:
            name = "embed_out.weight" if peer.config.model_type == "gpt_neox" and name == "lm_head.weight" else name
            name = name if peer.config.model_type != "mixtral" else name.replace(".mlp.", ".block_sparse_moe.")
            found[name] = parameter.grad
            continue
        mixtral = peer.config.model_type == "mixtral"
        path = name.rsplit(".", 1)[0].replace(".mlp.", ".block_sparse_moe.") if mixtral else name.rsplit(".", 1)[0]
        gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        for expert, grad in enumerate(parameter.grad):
            if name.endswith("gate_up_proj"):
                found[f"{path}.{expert}.{gate}.weight"], found[f"{path}.{expert}.{up}.weight"] = grad.chunk(2)
            else:
                found[f"{path}.{expert}.{down}.weight"] = grad
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_we_write_transformers_loads(case: str, root: Path, tmp_path: Path) -> None:
    model = load_model(folder_of(case, root))
    save_model(model, tmp_path)
    assert load_model(tmp_path).config == model.config
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    row = tokens_of([33])
    with torch.no_grad():
        theirs = again.eval()(row[None], use_cache=False).logits[0]
    torch.testing.assert_close(theirs, their_logits(case, row), rtol=1e-5, atol=1e-5)
    assert read_config(again.config.to_dict()) == model.config
    assert read_config(write_config(model.config)) == model.config


def test_files_of_the_bare_model_are_read(root: Path, tmp_path: Path) -> None:
    """As gpt2 itself is published: no prefix, no head, and its causal masks among the weights."""
    whole = folder_of("gpt2", root)
    state = load_file(whole / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(bare, tmp_path / "model.safetensors")
    shutil.copy(whole / "config.json", tmp_path)
    assert hash_of(load_model(tmp_path)) == hash_of(load_model(whole))


@functools.cache
def tokenizer() -> Tokenizer:
    made = Tokenizer.train_bpe(["the horses of the prairie run", "grass grows 12 feet"] * 4, VOCABULARY)
    assert made.vocab_size <= VOCABULARY
    return made


@functools.cache
def template() -> ChatTemplate:
    return ChatTemplate.builtin("chatml", tokenizer())


@pytest.mark.long
@pytest.mark.parametrize("hot", [True, False], ids=["hot", "paged"])
@pytest.mark.parametrize("case", CASES)
def test_engine_equals_a_naive_loop(case: str, hot: bool, root: Path) -> None:
    """Prompts in chunks, prefixes shared, blocks of four: greedy tokens as whole forward passes give them."""
    model = load_model(folder_of(case, root)).requires_grad_(False).eval()
    engine = Engine(model, tokenizer(), template(), weights_hash="w", max_batch=4, step_tokens=8, block_size=4)
    engine.cache.hot.most = engine.cache.hot.most if hot else 0
    long = tokens_of([21]).tolist()
    prompts = [long, long[:9], [*long[:12], 5, 6], [7], long[:15]]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    requests = [engine.text_request(str(i), "x", params) for i in range(len(prompts))]
    for request, prompt in zip(requests, prompts, strict=True):
        object.__setattr__(request, "prompt_ids", prompt)
    answers = engine.generate(requests)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.token_ids == naive(model, prompt, 8)
    assert sum(answer.cached_tokens for answer in answers) > 0


def naive(model: Transformer, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            logits = model.logits(model(torch.tensor(ids), PackedDocuments([len(ids)])))
            ids.append(int(logits[-1, : tokenizer().vocab_size].argmax()))
    return ids[len(prompt) :]
