"""Folders that are damaged or lie, as they would come from outside: each is refused in one sentence, quickly, and
nothing of them is executed."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import prairie
from prairie.data.chat_template import ChatTemplate
from prairie.data.tokenizer import Tokenizer
from prairie.engine.language_model import LanguageModel
from prairie.errors import PrairieError
from prairie.models.config import ModelConfig
from prairie.models.lora import LoRA, LoRAConfig
from prairie.models.transformer import Transformer
from prairie.models.weights import save_model

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
QUICKLY_S = 5.0


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter that stands on another adapter, as they are made."""
    root = tmp_path_factory.mktemp("sound")
    tokenizer = Tokenizer.train_bpe(["a small text of few words"] * 3, 300)
    template = ChatTemplate.builtin("chatml", tokenizer)
    config = ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, 48, max_context=64)
    model = Transformer(config).init_weights(1)
    facts = {"tokenizer_hash": tokenizer.hash, "template_hash": template.hash}
    save_model(model, root / "base", **facts)
    tokenizer.save(root / "base")
    template.save(root / "base")
    below = LoRA.create(model, LoRAConfig(rank=2), 1)
    LoRA.create(model, LoRAConfig(rank=2), 2, below).save(root / "adapter", base_artifact="base", **facts)
    LanguageModel.load(root / "base", adapter=root / "adapter")
    return root


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "there")


def refused(folder: Path, sentence: str, adapter: bool = False) -> None:
    """By every way in: the library's loader, and the name of a folder."""
    for load in (
        lambda: LanguageModel.load(folder / "base", adapter=folder / "adapter" if adapter else None),
        lambda: prairie.load(folder / ("adapter" if adapter else "base")),
    ):
        began = time.process_time()
        with pytest.raises(PrairieError, match=sentence) as caught:
            load()
        assert time.process_time() - began < QUICKLY_S
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600, str(caught.value)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_raw(path: Path, header: bytes, body: bytes, size: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if size is None else size) + header + body)


def change_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    header, body = header_of(path)
    change(header)
    write_raw(path, json.dumps(header).encode(), body)


PLACES = [("base", WEIGHTS, False), ("adapter", ADAPTER, True), ("adapter/parent", ADAPTER, True)]
everywhere = pytest.mark.parametrize(("where", "file", "adapter"), PLACES, ids=["base", "adapter", "parent"])


@everywhere
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.1, 0.5, 0.999])
def test_cut_short(folder: Path, where: str, file: str, adapter: bool, share: float) -> None:
    path = folder / where / file
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(folder, "is damaged or cut short", adapter)


@everywhere
def test_flipped_bits(folder: Path, where: str, file: str, adapter: bool) -> None:
    path = folder / where / file
    data = path.read_bytes()
    for place in [0, 7, 8, 12, 100, len(data) // 3, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        refused(folder, ".", adapter)
    path.write_bytes(data)
    LanguageModel.load(folder / "base", adapter=folder / "adapter")


@everywhere
def test_headers_that_lie(folder: Path, where: str, file: str, adapter: bool) -> None:
    path = folder / where / file
    whole = path.read_bytes()
    header, body = header_of(path)
    name = sorted(header)[-1]

    def lie(**facts: Any) -> None:
        path.write_bytes(whole)
        change_header(path, lambda header: header[name].update(facts))
        refused(folder, ".", adapter)

    lie(shape=[1 << 40, 1 << 20])
    lie(shape=[-1, 4])
    lie(data_offsets=[0, 1 << 60])
    lie(data_offsets=[8, 4])
    lie(dtype="F65")
    lie(dtype="I64")
    lie(shape=[1], data_offsets=[0, 4])
    for size in (1 << 62, len(whole), 0):
        write_raw(path, json.dumps(header).encode(), body, size)
        refused(folder, "is damaged or cut short", adapter)
    for junk in (b"", b"{", b"[]", b"\xff" * 64, b'{"a": 1}', b"[" * 50_000):
        write_raw(path, junk, body)
        refused(folder, ".", adapter)


@everywhere
def test_other_shapes_and_names(folder: Path, where: str, file: str, adapter: bool) -> None:
    path = folder / where / file
    state = load_file(path)
    name = sorted(state)[0]
    for changed in (
        {**state, name: state[name][:-1].contiguous()},
        {**state, name: state[name].T.contiguous()},
        {**state, name: state[name][None].contiguous()},
        {**state, name: state[name].flatten()},
        {n: t for n, t in state.items() if n != name},
        {**state, "what.weight": torch.ones(2)},
        {n.replace("layers.0", "layers.7"): t for n, t in state.items()},
        {**state, name: torch.full_like(state[name], float("nan"))},
        {},
    ):
        save_file(changed, path)
        refused(folder, ".", adapter)


def test_shards(folder: Path) -> None:
    base = folder / "base"
    state = load_file(base / WEIGHTS)
    (base / WEIGHTS).unlink()
    names = sorted(state)
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    index = base / "model.safetensors.index.json"

    def shard(**changes: Any) -> None:
        for file in ("model-0.safetensors", "model-1.safetensors"):
            save_file({n: state[n] for n in names if weight_map[n] == file}, base / file)
        index.write_text(json.dumps({"weight_map": weight_map | changes}))

    shard()
    LanguageModel.load(base)
    (base / "model-1.safetensors").unlink()
    refused(folder, "does not exist: wanted every file that the index names")
    shard(**{names[0]: "../adapter/adapter_model.safetensors"})
    refused(folder, "outside its folder")
    shard(**{names[0]: "model-1.safetensors"})
    refused(folder, "cannot be read|lacks")
    shard(**{names[0]: 7})
    refused(folder, ".")
    shard()
    (base / "model-1.safetensors").write_bytes((base / "model-1.safetensors").read_bytes()[:-5])
    refused(folder, "cut short")
    for text in ("", "{", "[]", '{"weight_map": []}', '{"weight_map": {}}'):
        index.write_text(text)
        refused(folder, ".")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 64}, {"hidden_size": 1 << 40}, {"num_hidden_layers": 1}, {"num_hidden_layers": 1 << 40},
        {"num_attention_heads": 3}, {"num_attention_heads": 0}, {"num_key_value_heads": 4}, {"vocab_size": 10},
        {"vocab_size": -1}, {"intermediate_size": 49}, {"head_dim": 16}, {"tie_word_embeddings": False},
        {"hidden_size": "32"}, {"hidden_size": None}, {"max_position_embeddings": 0}, {"rms_norm_eps": "x"},
        {"architectures": ["Nothing"]},
        {"rope_scaling": {"rope_type": "new", "factor": 2.0}}, {"rope_scaling": {"rope_type": "linear"}},
        {"architectures": ["Qwen2ForCausalLM"]}, {"quantization_config": {"bits": 4}},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_contradicts_the_weights(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(folder, ".")


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 3}, {"r": "2"}, {"r": 0}, {"lora_alpha": None}, {"lora_alpha": 5}, {"use_dora": True},
        {"use_rslora": True}, {"rank_pattern": {"(": 2}},
        {"rank_pattern": {"(a+)+b": 2}}, {"rank_pattern": []}, {"rank_pattern": {"q_proj": 4}},
        {"peft_type": "IA3"}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"target_parameters": ["x"]},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("where", ["adapter", "adapter/parent"])
def test_an_adapters_settings_that_contradict_it(folder: Path, where: str, changes: dict[str, Any]) -> None:
    path = folder / where / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if changes == {"rank_pattern": []}:  # PEFT's way to say none
        LanguageModel.load(folder / "base", adapter=folder / "adapter")
        return
    refused(folder, ".", adapter=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '{"a": NaN', "[" * 50_000])
@pytest.mark.parametrize(
    ("file", "adapter"),
    [
        ("base/config.json", False), ("base/tokenizer.json", False), ("base/tokenizer_config.json", False),
        ("base/prairie.json", False), ("adapter/adapter_config.json", True), ("adapter/prairie.json", True),
    ],
)  # fmt: skip
def test_json_that_is_none(folder: Path, file: str, adapter: bool, text: str) -> None:
    (folder / file).write_text(text)
    refused(folder, ".", adapter)


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return Path.touch, (self.proof,)


@everywhere
def test_a_pickle_is_never_opened(folder: Path, tmp_path: Path, where: str, file: str, adapter: bool) -> None:
    proof, path = tmp_path / "it was executed", folder / where / file
    trap = pickle.dumps({"model.norm.weight": Trap(proof)})
    path.write_bytes(trap)
    refused(folder, "is damaged or cut short", adapter)
    with zipfile.ZipFile(path, "w") as archive:  # as torch.save writes it
        archive.writestr("archive/data.pkl", trap)
    refused(folder, "is damaged or cut short", adapter)
    path.rename(path.with_name("pytorch_model.bin" if where == "base" else "adapter_model.bin"))
    refused(folder, "never opened" if where == "base" else "does not exist", adapter)
    assert not proof.exists()
    pickle.loads(trap)
    assert proof.exists(), "the trap itself does not work"


def test_folders_where_files_should_be(folder: Path) -> None:
    for file, adapter in (("base/model.safetensors", False), (f"adapter/{ADAPTER}", True), ("base/config.json", False)):
        path = folder / file
        moved = path.rename(path.with_name("moved"))
        path.mkdir()
        refused(folder, ".", adapter)
        path.rmdir()
        moved.rename(path)
