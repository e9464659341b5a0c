"""An adapter that brings a head of scores: PEFT reads ours and we read PEFT's, values and gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from prairie.errors import AdapterError
from prairie.models.config import ModelConfig
from prairie.models.lora import AdapterRows, LoRA, LoRAConfig
from prairie.models.transformer import Transformer
from prairie.models.weights import load_model, save_model
from prairie.ops.attention import PackedDocuments

peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")

CONFIG = ModelConfig(50, 32, 2, 4, 2, 48)
LENGTHS = [9, 4, 7]
TOKENS = torch.randint(50, (20,), generator=torch.Generator().manual_seed(0))
LABELS = ("bad", "so-so", "good")


def moved(model: Transformer, labels: tuple[str, ...] = LABELS) -> LoRA:
    lora = LoRA.create(model, LoRAConfig(rank=4, alpha=12.0), seed=2, labels=labels)
    with torch.no_grad():
        for b in lora.b.values():
            b.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    return lora


def scores(model: Transformer, lora: LoRA) -> torch.Tensor:
    adapters = [AdapterRows(lora)]
    return model.scores(model(TOKENS, PackedDocuments(LENGTHS), adapters), LENGTHS, adapters)


def peer_scores(peer: Any) -> torch.Tensor:
    return torch.cat([peer(row[None]).logits for row in TOKENS.split(LENGTHS)])


def peer_on(folder: Path) -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)


@pytest.fixture
def base(tmp_path: Path) -> Transformer:
    save_model(Transformer(CONFIG).init_weights(1), tmp_path / "base")
    return load_model(tmp_path / "base")


def test_peft_reads_ours_with_its_head(tmp_path: Path, base: Transformer) -> None:
    lora = moved(base)
    lora.save(tmp_path / "adapter")
    peer = peft.PeftModel.from_pretrained(peer_on(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(scores(base, lora), peer_scores(peer), rtol=1e-4, atol=1e-5)
        again = LoRA.load(tmp_path / "adapter")
        assert again.labels == LABELS and again.hash == lora.hash
        assert torch.equal(scores(base, again), scores(base, lora))


def test_we_read_pefts_with_its_head_and_learn_as_it_does(tmp_path: Path, base: Transformer) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False
    )
    peer = peft.get_peft_model(peer_on(tmp_path / "base"), config).eval()
    peer.save_pretrained(tmp_path / "adapter")
    lora = LoRA.load(tmp_path / "adapter").requires_grad_(True)
    assert lora.labels == ("LABEL_0", "LABEL_1", "LABEL_2") and lora.score is not None
    base.requires_grad_(False)
    targets = torch.tensor([2, 0, 1])
    for found in (scores(base, lora), theirs := peer_scores(peer)):
        F.cross_entropy(found, targets).backward()
    torch.testing.assert_close(scores(base, lora), theirs, rtol=1e-4, atol=1e-5)
    named = dict(peer.named_parameters())
    torch.testing.assert_close(
        lora.score.grad, named["base_model.model.score.modules_to_save.default.weight"].grad, rtol=1e-4, atol=1e-6
    )
    for path in lora.paths:
        for letter, mine in zip("AB", lora.pair(path), strict=True):
            their = named[f"base_model.model.{path}.lora_{letter}.default.weight"].grad
            torch.testing.assert_close(mine.grad, their, rtol=1e-4, atol=1e-6)


def test_a_head_that_is_there_goes_on_and_another_base_is_refused(base: Transformer) -> None:
    scoring = base.with_scores(LABELS, seed=4)
    assert torch.equal(moved(scoring).score, scoring.task.out)
    below = moved(base)
    assert torch.equal(LoRA.create(base, LoRAConfig(rank=2), parent=below, labels=LABELS).score, below.score)
    with pytest.raises(AdapterError, match="head of its own"):
        below.merge_into(base)
    wider = Transformer(ModelConfig(50, 48, 2, 4, 2, 48)).init_weights(0)
    with pytest.raises(AdapterError, match="stands on base"):
        below.require_base(wider)


@pytest.mark.parametrize("named", [["lm_head"], ["score", "embed_tokens"], "score"])
def test_other_saved_modules_are_refused(tmp_path: Path, base: Transformer, named: Any) -> None:
    moved(base).save(tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**raw, "modules_to_save": named}))
    with pytest.raises(AdapterError, match="sets modules_to_save"):
        LoRA.load(tmp_path)


def test_a_head_that_the_settings_do_not_name_is_refused(tmp_path: Path, base: Transformer) -> None:
    moved(base).save(tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**raw, "modules_to_save": None}))
    with pytest.raises(AdapterError, match="does not hold what its settings name"):
        LoRA.load(tmp_path)
