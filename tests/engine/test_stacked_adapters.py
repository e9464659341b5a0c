"""Adapters on adapters, on embeddings and on the head: the engine answers a batch as the naive loop does."""

from dataclasses import replace

import naive
import pytest
import torch

from prairie.data.records import Message
from prairie.engine.language_model import LanguageModel
from prairie.errors import AdapterError
from prairie.models.lora import LoRA, LoRAConfig
from prairie.models.weights import save_model


def changed(lora):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.3
    return lora.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def adapters():
    """By name: one of the head and the embedding, one with DoRA, and one that stands on that."""
    model = naive.model()
    ends = changed(LoRA.create(model, LoRAConfig(rank=3, targets=("lm_head", "embed_tokens", "v_proj")), 1))
    dora = changed(LoRA.create(model, LoRAConfig(rank=3, dora=True), 2))
    stack = changed(LoRA.create(model, LoRAConfig(rank=2, targets=("q_proj", "down_proj", "lm_head")), 3, dora))
    return {"ends": ends, "dora": dora, "stack": stack, "none": None}


def test_one_batch_of_all(adapters):
    engine = naive.engine(step_tokens=40)
    for lora in adapters.values():
        if lora is not None:
            engine.add_adapter(lora.hash, lora)
    prompts = naive.prompts()[:12]
    names = [list(adapters)[i % 4] for i in range(12)]
    requests = [
        naive.request(f"{i}", ids, adapters[name].hash if adapters[name] else None, max_tokens=8)
        for i, (ids, name) in enumerate(zip(prompts, names, strict=True))
    ]
    found = [completion.token_ids for completion in engine.generate(requests)]
    assert found == [naive.greedy(ids, 8, adapters[name]) for ids, name in zip(prompts, names, strict=True)]
    apart = [naive.greedy(prompts[0], 8, lora) for lora in adapters.values()]
    assert len({tuple(ids) for ids in apart}) == 4, "the adapters answer alike, so nothing is shown"


def test_a_stack_from_its_folder(adapters, tmp_path):
    facts = {"template_hash": naive.template().hash, "tokenizer_hash": naive.tokenizer().hash}
    save_model(naive.model(), tmp_path / "base", **facts)
    naive.tokenizer().save(tmp_path / "base")
    naive.template().save(tmp_path / "base")
    adapters["stack"].save(tmp_path / "stack", **facts)
    model = LanguageModel.load(tmp_path / "base", adapter=tmp_path / "stack")
    assert model.adapter_hash == adapters["stack"].hash
    ids = naive.prompts()[3]
    torch.testing.assert_close(model.logits([ids])[0], naive.logits_of(ids, adapters["stack"]), atol=1e-4, rtol=1e-4)
    changed_head = naive.logits_of(ids, adapters["stack"]) - naive.logits_of(ids, adapters["dora"])
    assert changed_head.abs().max() > 0.1
    rows = [Message("user", "run"), Message("assistant", "grass")]
    scored = model.logprobs(rows)
    rendered = model.template.encode(rows)
    logprobs = naive.logits_of(rendered.ids, adapters["stack"]).log_softmax(-1)
    wanted = [float(logprobs[i - 1, rendered.ids[i]]) for i, said in enumerate(rendered.mask) if said]
    assert scored == pytest.approx(wanted, abs=1e-4)
    other = replace(naive.model().config, ffn_dim=64)
    save_model(type(naive.model())(other).init_weights(0), tmp_path / "other")
    naive.tokenizer().save(tmp_path / "other")
    naive.template().save(tmp_path / "other")
    with pytest.raises(AdapterError, match="stands on base"):
        LanguageModel.load(tmp_path / "other", adapter=tmp_path / "stack")
