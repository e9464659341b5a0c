"""Adapters against PEFT, on one base side by side, and refused on another base."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prairie.errors import AdapterError
from prairie.models.config import ModelConfig
from prairie.models.lora import AdapterRows, LoRA, LoRAConfig
from prairie.models.transformer import Transformer
from prairie.models.weights import hash_of, load_model, save_model
from prairie.ops.attention import PackedDocuments

CONFIG = ModelConfig(50, 32, 2, 4, 2, 48)
LENGTHS = [9, 4, 9]
TOKENS = torch.randint(50, (22,), generator=torch.Generator().manual_seed(0))
TARGETS: list[Any] = ["all-linear", ("q_proj", "v_proj"), ("v_proj",), ("o_proj", "up_proj", "down_proj")]


def base(seed: int = 1) -> Transformer:
    return Transformer(CONFIG).init_weights(seed)


def trained(model: Transformer, seed: int = 0, **changes: Any) -> LoRA:
    """An adapter whose B is not zero, as if it had been trained."""
    lora = LoRA.create(model, LoRAConfig(**{"rank": 4, "alpha": 12.0, **changes}), seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for b in lora.b.values():
            b.normal_(0, 0.1, generator=generator)
    return lora


def logits(model: Transformer, *adapters: AdapterRows) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(TOKENS, PackedDocuments(LENGTHS), adapters))


def peer_logits(peer: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([peer(row[None]).logits[0] for row in TOKENS.split(LENGTHS)])


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_fresh_adapter_changes_nothing_and_is_seeded() -> None:
    model = base()
    lora = LoRA.create(model, seed=3)
    assert torch.equal(logits(model, AdapterRows(lora)), logits(model))
    assert LoRA.create(model, seed=3).weights_hash == lora.weights_hash != LoRA.create(model, seed=4).weights_hash
    assert len(lora.paths) == 14


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
def test_peft_reads_ours(tmp_path: Path, targets: Any, rslora: bool) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = base()
    save_model(model, tmp_path / "base")
    lora = trained(model, targets=targets, rslora=rslora)
    lora.save(tmp_path / "adapter")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peer = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
    ours = logits(model, AdapterRows(lora))
    close(ours, peer_logits(peer))
    assert (ours - logits(model)).abs().max() > 0.01


@pytest.mark.parametrize("targets", TARGETS)
def test_we_read_pefts(tmp_path: Path, targets: Any) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = base()
    save_model(model, tmp_path / "base")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    modules = targets if isinstance(targets, str) else list(targets)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM")
    peer = peft.get_peft_model(peer, config).eval()
    peer.save_pretrained(tmp_path / "adapter")
    lora = LoRA.load(tmp_path / "adapter")
    assert lora.base_hash is None
    lora.require_base(model)
    close(logits(model, AdapterRows(lora)), peer_logits(peer))


def test_gradients_equal_pefts(tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = base().requires_grad_(False)
    save_model(model, tmp_path / "base")
    lora = trained(model)
    lora.save(tmp_path / "adapter")
    hidden = model(TOKENS, PackedDocuments(LENGTHS), [AdapterRows(lora)])
    torch.nn.functional.cross_entropy(model.logits(hidden), TOKENS).backward()
    assert all(p.grad is None for p in model.parameters())
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peer = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter", is_trainable=True).eval()
    theirs = torch.cat([peer(row[None]).logits[0] for row in TOKENS.split(LENGTHS)])
    torch.nn.functional.cross_entropy(theirs, TOKENS).backward()
    wanted = {n.replace(".default", ""): p.grad for n, p in peer.named_parameters() if p.requires_grad}
    assert len(wanted) == 28
    for path in lora.paths:
        for letter, ours in zip("AB", lora.pair(path), strict=True):
            torch.testing.assert_close(
                ours.grad, wanted[f"base_model.model.{path}.lora_{letter}.weight"], rtol=1e-3, atol=1e-6
            )


def test_many_adapters_on_one_base_at_once() -> None:
    model = base()
    before = hash_of(model)
    one, two = trained(model, 1), trained(model, 2, targets=("q_proj", "down_proj"), rank=2)
    rows = [slice(0, 9), slice(9, 13), slice(13, 22)]
    mixed = logits(model, AdapterRows(one, rows[0]), AdapterRows(two, rows[2]))
    close(mixed[rows[0]], logits(model, AdapterRows(one))[rows[0]])
    close(mixed[rows[1]], logits(model)[rows[1]])
    close(mixed[rows[2]], logits(model, AdapterRows(two))[rows[2]])
    assert hash_of(model) == before


def test_gradients_through_rows_equal_those_of_the_rows_alone() -> None:
    model = base().requires_grad_(False)
    lora = trained(model)
    model(TOKENS, PackedDocuments(LENGTHS), [AdapterRows(lora, slice(9, 13))])[9:13].sum().backward()
    some = {name: p.grad.clone() for name, p in lora.named_parameters() if p.grad is not None}
    lora.zero_grad()
    model(TOKENS[9:13], PackedDocuments([4]), [AdapterRows(lora)]).sum().backward()
    for name, p in lora.named_parameters():
        torch.testing.assert_close(some[name], p.grad, rtol=1e-4, atol=1e-5)


def test_a_served_adapter_follows_changes_of_its_weights() -> None:
    model = base()
    lora = trained(model).requires_grad_(False)
    seen = [logits(model, AdapterRows(lora))]
    with torch.no_grad():
        for b in lora.b.values():
            b.mul_(2)
    seen.append(logits(model, AdapterRows(lora)))
    lora.requires_grad_(True)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=0.1, fused=True)
    for _ in range(2):  # evaluated while it trains, and served again afterwards
        model(TOKENS, PackedDocuments(LENGTHS), [AdapterRows(lora)]).square().sum().backward()
        optimizer.step()
        seen.append(logits(model, AdapterRows(lora)))
    close(logits(model, AdapterRows(lora.requires_grad_(False))), seen[-1])
    for before, after in pairwise(seen):
        assert (after - before).abs().max() > 0.01


def test_merging_gives_equal_logits_and_another_base(tmp_path: Path) -> None:
    model = base()
    save_model(model, tmp_path / "base")
    lora = trained(model)
    lora.save(tmp_path / "adapter")
    wanted = logits(model, AdapterRows(lora))
    loaded = load_model(tmp_path / "base")
    adapter = LoRA.load(tmp_path / "adapter")
    assert adapter.merge_into(loaded) < 1e-5
    close(logits(loaded), wanted)
    assert loaded.merged == (adapter.hash,)
    with pytest.raises(AdapterError, match="stands on base"):
        adapter.merge_into(loaded)


def test_another_base_is_refused(tmp_path: Path) -> None:
    model, other = base(1), base(2)
    trained(model).save(tmp_path)
    lora = LoRA.load(tmp_path)
    lora.require_base(model, "poet")
    assert lora.base_hash == hash_of(model)
    sentence = f"poet stands on base {hash_of(model)[:12]}, this base is {hash_of(other)[:12]}"
    with pytest.raises(AdapterError, match=sentence):
        lora.require_base(other, "poet")
    with torch.no_grad():
        model.norm[0] += 0.1
    with pytest.raises(AdapterError, match="stands on base"):
        lora.merge_into(model)


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    model = base()
    lora = trained(model, targets=("k_proj", "gate_proj"), dropout=0.1)
    written = lora.save(tmp_path, template_hash="t")
    again = LoRA.load(tmp_path)
    stated = json.loads((tmp_path / "prairie.json").read_text())
    assert written == lora.hash == again.hash == stated["adapter_hash"]
    assert lora.weights_hash == again.weights_hash == stated["weights_hash"]
    assert again.config.dropout == 0.1 and again.config.scale_of("x") == lora.config.scale_of("x")
    assert torch.equal(logits(model, AdapterRows(lora.eval())), logits(model, AdapterRows(again.eval())))


def test_dropout_is_only_for_training() -> None:
    model = base()
    lora = trained(model, dropout=0.5)
    torch.manual_seed(0)
    hidden = [model(TOKENS, PackedDocuments(LENGTHS), [AdapterRows(lora.train())]) for _ in range(2)]
    assert not torch.equal(*hidden)
    assert torch.equal(logits(model, AdapterRows(lora)), logits(model, AdapterRows(lora.eval())))


def test_a_foreign_adapter_must_fit(tmp_path: Path) -> None:
    lora = trained(base())
    lora.base_hash = None
    wider = Transformer(ModelConfig(50, 32, 2, 4, 4, 48)).init_weights(1)
    with pytest.raises(AdapterError, match=r"does not fit model\.layers\.0\.self_attn\.k_proj"):
        lora.require_base(wider)
    shallow = Transformer(ModelConfig(50, 32, 1, 4, 2, 48)).init_weights(1)
    with pytest.raises(AdapterError, match=r"model\.layers\.1.*does not have"):
        lora.require_base(shallow)


def test_damaged_adapters_are_refused(tmp_path: Path) -> None:
    model, config_path, file = base(), tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    trained(model).save(tmp_path)
    raw, state = json.loads(config_path.read_text()), load_file(file)

    def refused(sentence: str) -> None:
        with pytest.raises(AdapterError, match=sentence) as caught:
            LoRA.load(tmp_path)
        assert "\n" not in str(caught.value)

    for changes, sentence in (
        ({"peft_type": "IA3"}, "no LoRA"),
        ({"use_dora": True}, "wanted one of"),
        ({"use_qalora": True}, "use_qalora"),
        ({"lora_alpha": 7}, "settings .* are not those"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "another rank"),
        ({"rank_pattern": {"q_proj": "x"}}, "usable r"),
        ({"r": 5}, "another rank"),
        ({"r": None}, "usable r"),
    ):
        config_path.write_text(json.dumps(raw | changes))
        refused(sentence)
    config_path.write_text(json.dumps(raw))
    name = sorted(state)[0]
    for changed, sentence in (
        ({n: t for n, t in state.items() if n != name}, "half of its pair"),
        ({**state, "other": torch.ones(1)}, "no part of a LoRA"),
        ({**state, name: state[name] + 1}, "not those its prairie.json names"),
        ({}, "empty"),
    ):
        save_file(changed, file)
        refused(sentence)
    save_file(state, file)
    file.write_bytes(file.read_bytes()[:-7])
    refused("cut short")
    file.unlink()
    refused("does not exist")
    config_path.unlink()
    refused("does not exist")


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(AdapterError, match="got c_attn"):
        LoRA.create(base(), LoRAConfig(targets=("c_attn",)))
    with pytest.raises(AdapterError, match="rank above 0"):
        LoRA.create(base(), LoRAConfig(rank=0))
