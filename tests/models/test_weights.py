"""Weights in and out: what is written is read back, and damage is refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prairie.errors import ModelError
from prairie.models import weights
from prairie.models.config import ModelConfig
from prairie.models.transformer import Transformer
from prairie.models.weights import hash_of, load_model, named_state, read_manifest, save_model, weights_hash

CONFIG = ModelConfig(50, 32, 2, 4, 2, 48, bos_id=1, eos_id=(2, 3))
FILE = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(Transformer(CONFIG).init_weights(1), tmp_path, template_hash="t")
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / FILE)
    change(state)
    save_file(state, folder / FILE)


def reconfigure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_saved_is_loaded(folder: Path) -> None:
    model = load_model(folder)
    again = Transformer(CONFIG).init_weights(1)
    assert model.config == CONFIG
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    manifest = read_manifest(folder)
    assert manifest["kind"] == "model" and manifest["template_hash"] == "t"
    assert manifest["weights_hash"] == hash_of(model) == weights_hash(load_file(folder / FILE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = load_model(folder, dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert hash_of(model) == read_manifest(folder)["weights_hash"], (
        "a model computed in another dtype is the same model"
    )
    other = tmp_path / "other"
    save_model(model, other)
    assert json.loads((other / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert {p.dtype for p in load_model(other).parameters()} == {dtype}


def test_a_frozen_base_is_hashed_once_until_it_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    hashed = weights._hash_of
    monkeypatch.setattr(weights, "_hash_of", lambda named: made.append(hashed(named)) or made[-1])
    model = load_model(folder).requires_grad_(False)
    made.clear()
    assert hash_of(model) == hash_of(model) and len(made) == 1
    with torch.no_grad():
        model.norm[0] += 1
    assert hash_of(model) == hash_of(model) and len(made) == 2
    model.norm = torch.nn.Parameter(model.norm + 1, requires_grad=False)
    assert hash_of(model) == hash_of(model) and len(made) == 3
    model.requires_grad_(True)
    assert hash_of(model) == hash_of(model) and len(made) == 5
    assert len(set(made)) == 3


def test_hash_follows_every_kind_of_change(folder: Path) -> None:
    model = load_model(folder)
    hashes = {hash_of(model)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    hashes.add(hash_of(model))
    with torch.no_grad():
        model.norm[0] += 1
    hashes.add(hash_of(model))
    state = named_state(model)
    hashes.add(weights_hash({**state, "model.norm.weight": state["model.norm.weight"].to(torch.bfloat16)}))
    hashes.add(weights_hash({("x" + n if n == "model.norm.weight" else n): t for n, t in state.items()}))
    assert len(hashes) == 5


def test_shards(folder: Path) -> None:
    state = load_file(folder / FILE)
    (folder / FILE).unlink()
    names = sorted(state)
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: state[n] for n in names if weight_map[n] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert hash_of(load_model(folder)) == weights_hash(state)

    index.write_text(json.dumps({"weight_map": weight_map | {names[0]: "../elsewhere.safetensors"}}))
    with pytest.raises(ModelError, match="outside its folder"):
        load_model(folder)
    index.write_text(json.dumps({"weight_map": weight_map | {names[0]: "model-1.safetensors"}}))
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(folder)
    index.write_text(json.dumps({"weight_map": weight_map | {names[0]: 7}}))
    with pytest.raises(ModelError, match="outside its folder"):
        load_model(folder)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ModelError, match="every file that the index names"):
        load_model(folder)


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (drop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda s: s.update(extra=torch.ones(1)), "unknown extra"),
        (lambda s: s.update({"model.norm.weight": torch.ones(31)}), r"got \(31,\), wanted \(32,\)"),
        (lambda s: s.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)}), "unsupported dtype"),
        (lambda s: s.update({"model.norm.weight": torch.zeros(32)}), "not those its prairie.json names"),
        (lambda s: s.update({"lm_head.weight": torch.zeros(50, 32)}), "lm_head.weight is tied"),
    ],
)
def test_contradictions_are_refused(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], sentence: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(ModelError, match=sentence) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_tied_copy_of_the_embedding_is_accepted(folder: Path) -> None:
    rewrite(folder, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}))
    assert hash_of(load_model(folder)) == read_manifest(folder)["weights_hash"]


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_cut_files_are_refused(folder: Path, keep: float) -> None:
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ModelError, match="damaged or cut short") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_any_flipped_byte_is_refused(folder: Path) -> None:
    data = (folder / FILE).read_bytes()
    for place in (0, 7, 9, 60, len(data) // 2, len(data) - 1):
        (folder / FILE).write_bytes(data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :])
        with pytest.raises(ModelError):
            load_model(folder)


def test_a_pickle_is_never_opened(folder: Path) -> None:
    (folder / FILE).rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="never opened"):
        load_model(folder)
    (folder / "pytorch_model.bin").rename(folder / FILE)
    torch.save({"a": torch.ones(1)}, folder / FILE)
    with pytest.raises(ModelError, match="damaged"):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "LlamaForCausalLM, MistralForCausalLM"),
        ({"architectures": None, "model_type": "mamba"}, "'mamba'"),
        ({"hidden_act": "relu2"}, "wanted one of silu"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "got proportional"),
        ({"rope_scaling": {"rope_type": "yarn"}, "clip_qkv": 8.0}, "clip_qkv"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 64}, "does not fit config.json"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2"),
        ({"num_hidden_layers": 1}, "unknown model.layers.1"),
        ({"num_hidden_layers": 4000}, "got 20 tensors, wanted 4000 layers"),
        ({"num_hidden_layers": 10**9}, "1 to 4096 layers"),
        ({"num_attention_heads": 10**7, "head_dim": 10**7}, "beyond belief"),
        ({"num_key_value_heads": 3}, "multiple of kv_heads"),
        ({"head_dim": 7}, "an even one"),
        ({"partial_rotary_factor": 0.5}, "part of each head"),
        ({"use_sliding_window": True, "sliding_window": 16}, "sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"layer_types": ["full_attention"]}, "got 1 of full_attention, wanted 2"),
    ],
)
def test_configs_that_we_would_get_wrong_are_refused(folder: Path, changes: dict[str, object], sentence: str) -> None:
    reconfigure(folder, **changes)
    with pytest.raises(ModelError, match=sentence):
        load_model(folder)


def test_missing_and_unreadable_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="no JSON object"):
        load_model(tmp_path)


def test_parameters_are_counted() -> None:
    for config in (
        CONFIG,
        ModelConfig(9, 8, 1, 2, 1, 12, tie_embeddings=False, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm="head"),
    ):
        assert config.parameters() == sum(p.numel() for p in Transformer(config).parameters())
    assert CONFIG.flops_per_token(0) == 6 * (CONFIG.parameters() - 5 * 32)
