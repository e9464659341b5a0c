"""DoRA, ranks by layer, embeddings and head, each against PEFT both ways; and adapters that stand on adapters."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import folder_of, root, tokens_of  # noqa: F401 - a fixture

from prairie.errors import AdapterError
from prairie.models.config import ModelConfig
from prairie.models.lora import AdapterRows, LoRA, LoRAConfig
from prairie.models.transformer import Transformer
from prairie.models.weights import load_model, read_manifest, save_model
from prairie.ops.attention import PackedDocuments

PLAIN = ModelConfig(50, 32, 2, 4, 2, 48, tie_embeddings=False)
BIASED = replace(PLAIN, qkv_bias=True, family="qwen2")
LENGTHS = [9, 4, 9]
TOKENS = torch.randint(50, (22,), generator=torch.Generator().manual_seed(0))
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"dora": True},
    "dora of some": {"dora": True, "rslora": True, "targets": ("q_proj", "down_proj", "up_proj")},
    "patterns": {"ranks": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6}, "alphas": {"v_proj": 3.0}},
    "embeddings": {"targets": ("embed_tokens", "v_proj")},
    "head": {"targets": ("lm_head", "o_proj")},
    "all of it": {
        "dora": True, "rslora": True, "ranks": {"lm_head": 3},
        "targets": ("embed_tokens", "lm_head", "q_proj", "v_proj", "gate_proj"),
    },
}  # fmt: skip
each_kind = pytest.mark.parametrize("kind", KINDS)


def base(seed: int = 1, config: ModelConfig = PLAIN) -> Transformer:
    model = Transformer(config).init_weights(seed)
    with torch.no_grad():
        for layer in model.layers:
            if layer.qkv_bias is not None:
                layer.qkv_bias.normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))
    return model


def trained(model: Transformer, seed: int = 0, parent: LoRA | None = None, **changes: Any) -> LoRA:
    """An adapter whose tensors are not those it was made with, as if it had been trained."""
    lora = LoRA.create(model, LoRAConfig(**{"rank": 4, "alpha": 12.0, **changes}), seed, parent)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter += torch.empty_like(parameter).normal_(0, 0.1, generator=generator)
    return lora


def logits(model: Transformer, *adapters: AdapterRows) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(TOKENS, PackedDocuments(LENGTHS), adapters), adapters)


def peer_logits(peer: Any) -> torch.Tensor:
    return torch.cat([peer(row[None]).logits[0] for row in TOKENS.split(LENGTHS)])


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [PLAIN, BIASED], ids=["llama", "qwen2"])
@each_kind
def test_peft_reads_ours_and_we_read_pefts(tmp_path: Path, kind: str, config: ModelConfig) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = base(config=config)
    save_model(model, tmp_path / "base")
    lora = trained(model, **KINDS[kind])
    lora.save(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peer = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    ours = logits(model, AdapterRows(lora))
    assert (ours - logits(model)).abs().max() > 0.05
    with torch.no_grad():
        close(ours, peer_logits(peer))

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM", use_dora=lora.config.dora,
        use_rslora=lora.config.rslora, rank_pattern=dict(lora.config.ranks), alpha_pattern=dict(lora.config.alphas),
        target_modules=lora.config.targets if isinstance(lora.config.targets, str) else list(lora.config.targets),
    )  # fmt: skip
    peer = peft.get_peft_model(theirs, settings).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "magnitude" in name:
                parameter *= 1.2
        peer.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
        read = LoRA.load(tmp_path / "theirs")
        read.require_base(model)
        close(logits(model, AdapterRows(read)), peer_logits(peer))


FAMILIES_OF_ADAPTERS = [
    "mistral, windows", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "smollm3", "granite", "gpt2",
    "gpt2, untied", "gpt-neox", "mixtral", "qwen3-moe, some dense",
]  # fmt: skip


@pytest.mark.parametrize("case", FAMILIES_OF_ADAPTERS)
def test_every_family_carries_adapters_as_in_peft(tmp_path: Path, case: str, root: Path) -> None:  # noqa: F811
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model, row = load_model(folder_of(case, root)), tokens_of([17])
    ends = [part.name.rsplit(".", 1)[-1] for g in ("embed", "head") for part in model.linear(None, g).parts]
    blocks = sorted({part.name.rsplit(".", 1)[-1] for at in model.linears() if at.layer == 0 for part in at.parts})
    lora = trained(model, dora=True, targets=(*blocks, *ends))
    lora.save(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder_of(case, root))
    peer = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()

    def ours(adapter: LoRA) -> torch.Tensor:
        adapters = [AdapterRows(adapter)]
        return model.logits(model(row, PackedDocuments([len(row)]), adapters), adapters)

    with torch.no_grad():
        close(ours(lora), peer(row[None], use_cache=False).logits[0])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder_of(case, root))
    modules = blocks if model.config.experts else "all-linear"  # experts carry no adapters here
    settings = peft.LoraConfig(r=3, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM")
    peer = peft.get_peft_model(theirs, settings).eval()
    peer.save_pretrained(tmp_path / "theirs")
    read = LoRA.load(tmp_path / "theirs")
    read.require_base(model)
    with torch.no_grad():
        close(ours(read), peer(row[None], use_cache=False).logits[0])


@each_kind
def test_gradients_equal_pefts(tmp_path: Path, kind: str) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = base(config=BIASED).requires_grad_(False)
    save_model(model, tmp_path / "base")
    lora = trained(model, **KINDS[kind])
    lora.save(tmp_path / "adapter")
    adapters = [AdapterRows(lora)]
    hidden = model(TOKENS, PackedDocuments(LENGTHS), adapters)
    (model.cross_entropy(hidden, TOKENS, adapters) / len(TOKENS)).backward()
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peer = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter", is_trainable=True).eval()
    torch.nn.functional.cross_entropy(peer_logits(peer), TOKENS).backward()
    wanted = {n.replace(".default", ""): p.grad for n, p in peer.named_parameters() if p.requires_grad}
    assert len(wanted) == len(list(lora.parameters()))
    for path in lora.paths:
        letters = "embedding_A", "embedding_B", "magnitude_vector.weight"
        names = letters if path in lora.embedded else ("A.weight", "B.weight", "magnitude_vector.weight")
        for name, ours in zip(names, lora._pair(path)[:3], strict=True):
            if ours is not None:
                torch.testing.assert_close(
                    ours.grad, wanted[f"base_model.model.{path}.lora_{name}"], rtol=1e-3, atol=1e-6
                )


@each_kind
def test_a_fresh_adapter_changes_nothing(kind: str) -> None:
    model = base(config=BIASED)
    lora = LoRA.create(model, LoRAConfig(rank=4, **KINDS[kind]))
    close(logits(model, AdapterRows(lora)), logits(model))


@each_kind
def test_many_adapters_of_a_kind_at_once(kind: str) -> None:
    model = base(config=BIASED)
    one, two = trained(model, 1, **KINDS[kind]), trained(model, 2, **KINDS[kind])
    rows = [slice(0, 9), slice(9, 13), slice(13, 22)]
    mixed = logits(model, AdapterRows(one, rows[0]), AdapterRows(two, rows[2]))
    close(mixed[rows[0]], logits(model, AdapterRows(one))[rows[0]])
    close(mixed[rows[1]], logits(model)[rows[1]])
    close(mixed[rows[2]], logits(model, AdapterRows(two))[rows[2]])
    hidden = model(TOKENS, PackedDocuments(LENGTHS), [AdapterRows(one, rows[0])])
    hidden.square().sum().backward()  # through rows, gains and embeddings
    if "lm_head" in KINDS[kind].get("targets", ()):
        with pytest.raises(AdapterError, match="one at a time"):
            model.logprobs(hidden, TOKENS, [AdapterRows(one, rows[0]), AdapterRows(two, rows[2])])


@each_kind
def test_merged_it_answers_the_same(kind: str) -> None:
    model = base(config=BIASED)
    lora = trained(model, 1, **KINDS[kind])
    stacked = trained(model, 2, parent=lora, **KINDS[kind])
    wanted = logits(model, AdapterRows(stacked))
    assert stacked.merge_into(model) < 1e-5
    close(logits(model), wanted)
    assert model.merged == (lora.hash, stacked.hash)


def test_merging_that_changes_answers_is_refused() -> None:
    model = base()
    lora = trained(model)
    rounded = base().to(torch.bfloat16)
    lora.base_hash = None
    with pytest.raises(AdapterError, match="merging poet would change its answers"):
        lora.merge_into(rounded, "poet", tolerance=1e-5)
    tied = Transformer(replace(PLAIN, tie_embeddings=True)).init_weights(1)
    with pytest.raises(AdapterError, match="one tensor in this base"):
        trained(tied, targets=("lm_head",)).merge_into(tied)


@pytest.mark.parametrize("below", ["patterns", "dora", "all of it"])
@pytest.mark.parametrize("above", ["patterns", "dora"])
def test_a_stack_goes_out_and_comes_back(tmp_path: Path, below: str, above: str) -> None:
    model = base(config=BIASED)
    save_model(model, tmp_path / "base")
    sft = trained(model, 1, **KINDS[below])
    fresh = LoRA.create(model, LoRAConfig(rank=4, **KINDS[above]), 2, sft)
    close(logits(model, AdapterRows(fresh)), logits(model, AdapterRows(sft)))
    dpo = trained(model, 2, sft, **KINDS[above])
    names = [name for name, p in dpo.named_parameters() if p.requires_grad]
    assert len(names) == len(list(dpo.parameters())) and not any(p.requires_grad for p in sft.parameters())
    wanted = logits(model, AdapterRows(dpo))
    assert (wanted - logits(model, AdapterRows(sft))).abs().max() > 0.05
    written = dpo.save(tmp_path / "dpo", template_hash="t")
    loaded, again = load_model(tmp_path / "base"), LoRA.load(tmp_path / "dpo")
    again.require_base(loaded)
    assert again.hash == written and [p.hash for p in again.parents] == [sft.hash]
    assert read_manifest(tmp_path / "dpo")["parents"] == [sft.hash]
    assert read_manifest(tmp_path / "dpo" / "parent")["template_hash"] == "t"
    close(logits(loaded, AdapterRows(again)), wanted)
    with pytest.raises(AdapterError, match="stands on base"):
        again.require_base(base(9, BIASED))


def test_peft_adds_the_adapters_of_a_stack(tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = base()
    save_model(model, tmp_path / "base")
    dpo = trained(model, 2, trained(model, 1))
    dpo.save(tmp_path / "dpo")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peer = peft.PeftModel.from_pretrained(peer, tmp_path / "dpo" / "parent", "sft")
    peer.load_adapter(tmp_path / "dpo", "dpo")
    peer.base_model.set_adapter(["sft", "dpo"])
    with torch.no_grad():
        close(logits(model, AdapterRows(dpo)), peer_logits(peer.eval()))


def test_another_parent_is_refused(tmp_path: Path) -> None:
    model = base()
    trained(model, 2, trained(model, 1)).save(tmp_path / "dpo")
    trained(model, 3).save(tmp_path / "other")
    shutil.move(tmp_path / "dpo" / "parent", tmp_path / "own")
    with pytest.raises(AdapterError, match="stands on another adapter, which is not there"):
        LoRA.load(tmp_path / "dpo")
    shutil.copytree(tmp_path / "other", tmp_path / "dpo" / "parent")
    with pytest.raises(AdapterError, match="trained on another parent") as caught:
        LoRA.load(tmp_path / "dpo")
    assert "\n" not in str(caught.value)
    # The same tensors with another scale are another adapter.
    shutil.rmtree(tmp_path / "dpo" / "parent")
    shutil.copytree(tmp_path / "own", tmp_path / "dpo" / "parent")
    LoRA.load(tmp_path / "dpo")
    path = tmp_path / "dpo" / "parent" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 1.0}))
    with pytest.raises(AdapterError, match="not those its"):
        LoRA.load(tmp_path / "dpo")


def test_two_stacks_with_one_top_are_two_adapters() -> None:
    model = base()
    one, two = (LoRA.create(model, LoRAConfig(rank=2), 5, trained(model, seed)) for seed in (1, 2))
    assert one.weights_hash == two.weights_hash and one.hash != two.hash


def test_a_base_remembers_what_was_merged(tmp_path: Path) -> None:
    model = base()
    first = trained(model, 1)
    first.merge_into(model)
    save_model(model, tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    second = trained(merged, 2)
    assert merged.merged == second.merged == (first.hash,)
    second.save(tmp_path / "second")
    assert read_manifest(tmp_path / "second")["merged"] == [first.hash]
    with pytest.raises(AdapterError, match="got a base with 0 merged adapters, wanted one with 1"):
        LoRA.load(tmp_path / "second").require_base(base())
