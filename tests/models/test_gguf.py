"""GGUF files, read by llama.cpp: the same tokens, the same logits, the same greedy answers."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import CASES as FAMILY_CASES
from test_families import GEMMA, folder_of, root, tokens_of  # noqa: F401 - a fixture
from test_families import tokenizer as small_tokenizer

from prairie.data.chat_template import ChatTemplate
from prairie.data.gguf_vocabulary import PRE_TOKENIZERS, add_vocabulary, closest_pre_tokenizer, without_generation_marks
from prairie.data.tokenizer import Tokenizer
from prairie.engine.language_model import LanguageModel
from prairie.errors import ModelError
from prairie.models.config import ModelConfig, RopeScaling
from prairie.models.gguf import ARCHITECTURES, add_model, architecture_of
from prairie.models.transformer import Transformer
from prairie.models.weights import load_model
from prairie.ops.attention import PackedDocuments

gguf = pytest.importorskip("gguf")

CHECKOUT = Path(__file__).parents[2]
STORIES = CHECKOUT.parent / "shared" / "data" / "models" / "stories260K-hf"
STORIES_TEXTS = ["Once upon a time", " Lily had 3 cats.", "你好"]
TEXTS = [
    "the horses of the prairie run",
    "草原上的马跑得很快",
    "我有三十二匹马，and 12 dogs.",
    "grass\n\ngrows  12 feet",
]


@functools.cache
def python_of_llama() -> str | None:
    """A Python that has llama_cpp: this one, the one that PRAIRIE_LLAMA_PYTHON names, or that of `make peers`."""
    if importlib.util.find_spec("llama_cpp"):
        return sys.executable
    named = os.environ.get("PRAIRIE_LLAMA_PYTHON") or CHECKOUT / ".peers" / "llama" / "bin" / "python"
    return str(named) if Path(named).exists() else None


def ask_llama(*jobs: dict[str, Any]) -> list[dict[str, Any]]:
    python = python_of_llama()
    if python is None:
        pytest.skip("no llama-cpp-python: `make peers` builds it, or PRAIRIE_LLAMA_PYTHON names a Python that has it")
    script = Path(__file__).with_name("llama_cpp_reads.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, script], input=json.dumps(jobs, default=str), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def write(path: Path, model: Transformer, tokenizer: Tokenizer, template: ChatTemplate, dtype: str = "f32") -> Any:
    writer = gguf.GGUFWriter(path, architecture_of(model.config).name)
    kept = add_model(writer, model, dtype, "test")
    fidelity = add_vocabulary(writer, tokenizer, template, model.config.vocab_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept, fidelity


def logits_of(model: Transformer, row: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(torch.tensor(row), PackedDocuments([len(row)])))


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the real model in ../shared/data/models")
def test_the_real_model_tells_the_same_story(tmp_path: Path) -> None:
    ours = LanguageModel.load(STORIES)
    prompts = [ours.engine.prompt_ids(text) for text in STORIES_TEXTS]
    jobs = []
    for dtype in ("f32", "f16", "bf16", "q8_0", "q4_0"):
        kept, _ = write(tmp_path / f"{dtype}.gguf", ours.model, ours.tokenizer, ours.template, dtype)
        assert bool(kept) == (dtype in ("q8_0", "q4_0"))
        jobs.append({"path": tmp_path / f"{dtype}.gguf", "texts": STORIES_TEXTS, "rows": prompts[:1],
                     "prompts": prompts, "steps": 64})  # fmt: skip
    full, *rounded = ask_llama(*jobs)
    greedy = [a.token_ids for a in ours.generate_text(STORIES_TEXTS, max_tokens=64, temperature=0, ignore_eos=True)]
    assert full["texts"] == [ours.tokenizer.encode(text) for text in STORIES_TEXTS]
    assert full["prompts"] == greedy and all(len(ids) == 64 for ids in greedy)
    assert full["marks"] == [1, 2]
    wanted = logits_of(ours.model, prompts[0])
    torch.testing.assert_close(torch.tensor(full["rows"][0]), wanted, rtol=1e-4, atol=1e-3)
    sizes = {path.stem: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes["q4_0"] < sizes["q8_0"] < sizes["f16"] < sizes["f32"]
    for other, tolerance in zip(rounded, (0.02, 0.15, 0.3, 6.0), strict=True):
        assert (torch.tensor(other["rows"][0]) - wanted).abs().max() < tolerance


def our_model(tokenizer: Tokenizer, **changes: Any) -> Transformer:
    config = ModelConfig(tokenizer.vocab_size + 3, 64, 2, 4, 2, 96, max_context=128, eos_id=0, **changes)
    return Transformer(config).init_weights(1)


def test_our_own_tokenizer_and_chinese_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train_bpe(TEXTS * 5, 400)
    template = ChatTemplate.builtin("chatml", tokenizer)
    model = our_model(tokenizer)
    _, fidelity = write(tmp_path / "own.gguf", model, tokenizer, template)
    assert fidelity.same > 0.8 * fidelity.of
    ours = LanguageModel(model, tokenizer, template)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    talk = template.encode_prompt(ours_of("草原上有几匹马？"))
    (found,) = ask_llama(
        {"path": tmp_path / "own.gguf", "texts": TEXTS, "prompts": [*prompts, talk], "steps": 64, "context": 160}
    )
    assert found["texts"] == prompts
    greedy = ours.generate_text(TEXTS, max_tokens=64, temperature=0, ignore_eos=True)
    said = ours.generate("草原上有几匹马？", max_tokens=64, temperature=0, ignore_eos=True)
    assert found["prompts"] == [*(a.token_ids for a in greedy), said.token_ids]
    assert "generation %" not in found["template"] and "<|im_start|>" in found["template"]


def ours_of(text: str) -> Any:
    from prairie.data.records import Message

    return [Message("user", text)]


OWN_GEMMA = {**GEMMA, "query_pre_attn_scalar": 16}
EVERY_FOURTH = {"no_rope_layer_interval": 4, "num_hidden_layers": 4, "tie_word_embeddings": True}
FAMILY_CASES["llama, gguf"] = ("Llama", {"attention_bias": True, "mlp_bias": True})
FAMILY_CASES["gemma2, gguf"] = ("Gemma2", {**OWN_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0})
FAMILY_CASES["gemma3, gguf"] = ("Gemma3Text", {**OWN_GEMMA, "num_hidden_layers": 7})
FAMILY_CASES["smollm3, gguf"] = ("SmolLM3", EVERY_FOURTH)
CASES = [
    "llama, gguf", "gemma2, gguf", "gemma3, gguf", "smollm3, gguf",
    "llama, rope llama3", "llama, rope linear", "mistral", "qwen2", "qwen3", "olmo2",
    "granite", "gpt2", "mixtral", "qwen3-moe",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_architecture_computes_what_we_do(tmp_path: Path, case: str, root: Path) -> None:  # noqa: F811
    model = load_model(folder_of(case, root))
    tokenizer = small_tokenizer()
    write(tmp_path / "m.gguf", model, tokenizer, ChatTemplate.builtin("chatml", tokenizer))
    row = tokens_of([33]).tolist()
    (found,) = ask_llama({"path": tmp_path / "m.gguf", "rows": [row], "context": 64})
    torch.testing.assert_close(torch.tensor(found["rows"][0]), logits_of(model, row), rtol=1e-3, atol=5e-3)


def test_what_llama_cpp_would_compute_otherwise_is_refused(root: Path) -> None:  # noqa: F811
    for case, sentence in {
        "mistral, windows": "sliding windows of 8 tokens",
        "gpt-neox": "got gpt_neox, wanted one of llama, mistral",
        "llama, rope yarn": "rope scaling yarn",
        "llama with every bias": "got the activation gelu",
        "gemma2": "attention scale",
        "qwen3-moe, some dense": "without experts",
        "smollm3": "without positions",
    }.items():
        with pytest.raises(ModelError, match=sentence) as caught:
            architecture_of(load_model(folder_of(case, root)).config)
        assert "\n" not in str(caught.value)
    assert set(ARCHITECTURES) >= {"llama", "mistral", "qwen2", "qwen3"}
    architecture_of(ModelConfig(9, 8, 1, 2, 1, 12, rope_scaling=RopeScaling("linear", 2.0)))


@pytest.mark.parametrize("name", ["gpt-2", "qwen2", "starcoder"])
def test_a_pre_tokenizer_that_llama_cpp_knows_is_named(name: str) -> None:
    tokenizer = Tokenizer.train_bpe(TEXTS * 5 + ["It's 12,345 things;\n\n  and more.", "we'll see 2024"] * 5, 420)
    spec = tokenizer.spec
    steps = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
             for pattern in PRE_TOKENIZERS[name]]  # fmt: skip
    spec["pre_tokenizer"]["pretokenizers"] = [*steps, spec["pre_tokenizer"]["pretokenizers"][-1]]
    found = closest_pre_tokenizer(Tokenizer(spec, tokenizer.config))
    assert found.same == found.of


def test_generation_marks_become_comments() -> None:
    text = "{%- if a -%}{%- generation -%}{{ x }}{% endgeneration %}\n{%- endif -%}"
    assert without_generation_marks(text) == "{%- if a -%}{#- -#}{{ x }}{# #}\n{%- endif -%}"
