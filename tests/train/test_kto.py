"""KTO against trl and a naive loop, and its reference point; weights of rows in every objective that takes them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import (
    judged,
    moved_adapter,
    quiet_runtime,
    tiny_config,
    tiny_dataset,
    tiny_learner,
    tiny_model,
    weighted,
)

from prairie.data.chat_template import ChatTemplate
from prairie.data.loader import Loader, TokenDataset, batch_of
from prairie.data.records import Chat, Message
from prairie.data.tokenizer import Tokenizer
from prairie.errors import DataError, TrainingError
from prairie.models.lora import AdapterRows
from prairie.ops.attention import PackedDocuments
from prairie.train.objective import held_out_figures
from prairie.train.objectives.dpo import reference_logprobs
from prairie.train.objectives.kto import KTO, KTOConfig, judged_loss
from prairie.train.objectives.masked_lm import MaskedLM
from prairie.train.trainer import Trainer, accumulate_gradients

CONFIG = KTOConfig(beta=0.3, desirable_weight=1.3, undesirable_weight=0.8)


@pytest.mark.parametrize("shift", [0.5, -0.5])
def test_loss_and_gradient_are_trls(shift):
    """trl's own `_compute_loss` and `_compute_kl_logps` on the same log-probabilities; the reference point above zero
    and, with the other shift, held at zero."""
    trainer = pytest.importorskip("trl.trainer.kto_trainer", reason="trl is not installed")
    generator = torch.Generator().manual_seed(0)
    rows, length = 6, 9

    def drawn(seed=0):
        return -torch.rand(rows, length, generator=generator) * 3

    tables = {"own": drawn().requires_grad_(), "mismatched": drawn()}
    reference = {"own": drawn(), "mismatched": tables["mismatched"] - shift * torch.rand(rows, 1, generator=generator)}
    lengths = torch.randint(1, length, (2, rows), generator=generator)
    masks = dict(zip(tables, (torch.arange(length) < lengths[..., None]).long(), strict=True))
    label = torch.tensor([True, False, True, True, False, False])

    def model_of(tables):
        """What trl asks of a model; the first token says which table it is asked for."""

        def model(input_ids, **kwargs):
            which = "own" if input_ids[0, 0] == 0 else "mismatched"
            return SimpleNamespace(
                log_probs=tables[which] * masks[which], entropy=torch.zeros(rows, length),
                mean_logits=torch.zeros(rows, length),
            )  # fmt: skip

        model.training = True
        return model

    ids = {name: torch.full((rows, length + 1), number) for number, name in enumerate(tables)}
    whole = {name: torch.cat([torch.zeros(rows, 1, dtype=torch.long), mask], 1) for name, mask in masks.items()}
    inputs = {
        "input_ids": ids["own"], "attention_mask": torch.ones_like(ids["own"]), "completion_mask": whole["own"],
        "KL_input_ids": ids["mismatched"], "KL_attention_mask": torch.ones_like(ids["own"]),
        "KL_completion_mask": whole["mismatched"], "label": label,
        "ref_logps": (reference["own"] * masks["own"]).sum(1),
        "ref_KL_logps": (reference["mismatched"] * masks["mismatched"]).sum(1),
    }  # fmt: skip
    names = ("kl", "entropy", "num_tokens", "logits/chosen", "logits/rejected", "rewards/chosen", "logps/chosen",
             "rewards/rejected", "logps/rejected", "rewards/margins")  # fmt: skip
    metrics = {"train": {name: [] for name in names}}
    fake = SimpleNamespace(
        model=model_of(tables), loss_type="kto", beta=0.3, desirable_weight=1.3, undesirable_weight=0.8,
        calculate_KL=True, precompute_ref_logps=True, aux_loss_enabled=False, _metrics=metrics,
        _total_train_tokens=0, _tp_size=1,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
    )  # fmt: skip
    fake._compute_kl_logps = lambda model, batch: trainer.KTOTrainer._compute_kl_logps(fake, model, batch)
    theirs = trainer.KTOTrainer._compute_loss(fake, fake.model, inputs, False)
    (gradient,) = torch.autograd.grad(theirs, tables["own"])

    logps = {name: (table * masks[name]).sum(1) for name, table in tables.items()}
    foreign = logps["mismatched"] - inputs["ref_KL_logps"]
    step = KTO(CONFIG, torch.zeros(1)).knowing([float(foreign.sum()), float(rows)])
    assert step.reference_point == pytest.approx(metrics["train"]["kl"][0], rel=1e-5)
    assert (step.reference_point > 0) == (shift > 0)
    ratios, ones = logps["own"] - inputs["ref_logps"], torch.ones(rows)
    loss, figures = judged_loss(ratios, logps["own"], label, lengths[0].float(), ones, step.reference_point, CONFIG)
    (ours,) = torch.autograd.grad(loss / rows, tables["own"])
    assert float(loss) / rows == pytest.approx(float(theirs), rel=1e-6)
    assert torch.allclose(ours, gradient, rtol=1e-5, atol=1e-8) and float(gradient.abs().max()) > 0
    assert float(figures["reward_liked"]) / 3 == pytest.approx(metrics["train"]["rewards/chosen"][0], rel=1e-5)
    assert float(figures["reward_disliked"]) / 3 == pytest.approx(metrics["train"]["rewards/rejected"][0], rel=1e-5)


def naive_logp(model, dataset, row, adapters=()):
    """log p of the supervised tokens of one row alone, with whole logits."""
    ids, mask = dataset.row(row)
    tokens = torch.tensor(ids.astype(np.int64))
    logps = model.logits(model(tokens, PackedDocuments([len(tokens)]), adapters)).log_softmax(-1)
    return torch.stack([logps[i - 1, tokens[i]] for i in range(1, len(tokens)) if mask[i]]).sum()


@pytest.mark.parametrize("adapted", [False, True])
def test_it_is_the_naive_loop(adapted):
    """Row by row, the formula written out, rows with weights, two micro-batches; a whole model, and an adapter."""
    model, reference = tiny_model(), tiny_model(seed=5)
    dataset, rows = weighted(judged(tiny_dataset(6, group=2))), [4, 5, 0, 1, 6, 7, 8, 9]
    adapters = [AdapterRows(moved_adapter(model))] if adapted else []
    learners = list(adapters[0].lora.parameters() if adapted else model.parameters())
    with torch.no_grad():
        base = {row: naive_logp(reference, dataset, row) for row in rows}
        foreign = [(naive_logp(model, dataset, row, adapters) - base[row], row // 2) for row in rows[1::2]]
    weights = {row // 2: float(dataset.weights[row // 2]) for row in rows}
    z = max(0.0, sum(float(ratio) * weights[a] for ratio, a in foreign) / sum(weights.values()))
    total = torch.zeros(())
    for row in rows[::2]:
        ratio = naive_logp(model, dataset, row, adapters) - base[row]
        liked = dataset.targets[row] == 1
        value = 1.3 * torch.sigmoid(0.3 * (ratio - z)) if liked else 0.8 * torch.sigmoid(0.3 * (z - ratio))
        total = total + weights[row // 2] * ((1.3 if liked else 0.8) - value)
    wanted = torch.autograd.grad(total / sum(weights.values()), learners, allow_unused=True)
    for parameter in learners:
        parameter.grad = None
    objective = KTO(CONFIG, reference_logprobs(reference, dataset))
    batches = [batch_of(dataset, part) for part in (rows[:6], rows[6:])]
    sums = accumulate_gradients(model, objective, batches, adapters)
    assert float(sums.figures["reference_point"]) / sums.count == pytest.approx(z, rel=1e-4)
    assert float(sums.loss) / sums.count == pytest.approx(float(total.detach()) / sum(weights.values()), rel=1e-5)
    for parameter, gradient in zip(learners, wanted, strict=True):
        if gradient is not None:
            assert float((parameter.grad - gradient).norm() / gradient.norm().clamp_min(1e-12)) < 1e-4


def test_a_batch_alone_has_no_loss():
    model, dataset = tiny_model(), judged(tiny_dataset(4, group=2))
    objective = KTO(KTOConfig(), reference_logprobs(model, dataset))
    with pytest.raises(TrainingError, match="loss of a batch is not defined before its step is known"):
        objective.loss(model, batch_of(dataset, [0, 1]))


def test_what_cannot_be_is_refused():
    model, dataset = tiny_model(), tiny_dataset(4, group=2)
    for config in ({"beta": 0.0}, {"desirable_weight": -1.0}, {"undesirable_weight": 0.0}):
        with pytest.raises(TrainingError, match=f"{next(iter(config))} is not positive"):
            KTOConfig(**config)
    with pytest.raises(TrainingError, match="KTO needs answers with a label"):
        KTO(KTOConfig(), torch.zeros(8), 0.0).loss(model, batch_of(dataset, [0, 1]))
    with pytest.raises(TrainingError, match="of another dataset"):
        KTO(KTOConfig(), torch.zeros(4), 0.0).loss(model, batch_of(judged(dataset), [6, 7]))
    with pytest.raises(TrainingError, match="learns without weights"):
        masked = MaskedLM(mask_id=1, vocab_size=64)
        masked.loss(model, batch_of(weighted(tiny_dataset(4)), [0, 1]), [])


@pytest.mark.parametrize("kind", ["causal_lm", "dpo", "reward", "kto"])
def test_a_row_of_weight_two_is_the_row_twice(kind):
    learner = tiny_learner(kind, rows=4)
    data, group = learner.dataset, learner.objective.group
    twice = TokenDataset(
        data.ids, data.mask, data.offsets, group=group, targets=data.targets, weights=np.array([2.0, 1, 1, 1])
    )
    rows = list(range(4 * group))
    wanted, loss = learner.gradients([batch_of(data, rows[:group]), batch_of(data, rows)])
    got, weighted_loss = learner.gradients([batch_of(twice, rows[group:]), batch_of(twice, rows[:group])])
    assert weighted_loss == pytest.approx(loss, rel=1e-5)
    for a, b in zip(got, wanted, strict=True):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-9
    figures = held_out_figures(learner.objective, learner.model, twice, learner.adapters)
    assert figures["loss"] == pytest.approx(loss, rel=1e-5)


def test_it_teaches_what_was_liked(tmp_path):
    """Rewards of liked and disliked answers part; the run's figures are those of its last steps."""
    model, dataset = tiny_model(), judged(tiny_dataset(16, group=2))
    objective = KTO(KTOConfig(beta=0.2), reference_logprobs(model, dataset))
    config = tiny_config(steps=24, tokens_per_batch=192, lr=3e-3)
    loader = Loader(dataset, tokens_per_batch=192, seed=config.seed)
    before = held_out_figures(objective, model, dataset)
    Trainer(model, objective, loader, config, runtime=quiet_runtime(), folder=tmp_path).fit()
    after = held_out_figures(objective, model, dataset)
    assert before["margin"] == pytest.approx(0, abs=1e-4) and after["margin"] > 0.2
    assert after["loss"] < before["loss"] and after["accuracy"] > 0.8


def test_rows_of_judged_answers():
    """Each answer, and behind its own prompt one to another prompt; a mismatched answer that is too long is cut."""
    words = Tokenizer.train_bpe(["one two three four five six seven", "yes", "no", "maybe"] * 9, 300)
    template = ChatTemplate.builtin("chatml", words)

    def said(prompt, answer, label, weight=1.0):
        turns = (Message("user", prompt), Message("assistant", answer))
        return Chat(turns, "votes", {} if label is None else {"label": label}, (), weight)

    records = [
        said("one", "yes", True), said("one", "no", False, 0.25), said("two", "maybe " * 40, True),
        said("three", "no", None), said("four", "no", False),
    ]  # fmt: skip
    dataset = TokenDataset.from_judged(records, template, 60)
    texts = [words.decode(dataset.row(row)[0][dataset.row(row)[1]].tolist()).split() for row in range(6)]
    assert [row[0] for row in texts] == ["yes", "maybe", "no", "maybe", "no", "yes"]
    assert dataset.targets.tolist() == [1, 1, 0, 0, 0, 0] and dataset.weights.tolist() == [1, 0.25, 1]
    assert dataset.figures["weighted_rows"] == 1 and dataset.figures["longest_row"] <= 60
    reasons = [fault["reason"] for fault in dataset.figures["refused"]]
    assert len(reasons) == 2 and "tokens, more than the 60 allowed" in reasons[0] and "`label`" in reasons[1]
    prompts = [dataset.row(row)[0][: int(np.argmax(dataset.row(row)[1]))].tolist() for row in range(6)]
    assert prompts[0::2] == prompts[1::2]
    with pytest.raises(DataError, match="need two prompts or more"):
        TokenDataset.from_judged(records[:2], template, 60)


def test_weights_are_kept_and_part_of_the_data(tmp_path):
    plain, heavy = tiny_dataset(4), weighted(tiny_dataset(4))
    heavy.save(tmp_path)
    loaded = TokenDataset.load(tmp_path, verify=True)
    assert loaded.weights.tolist() == heavy.weights.tolist() and loaded.fingerprint == heavy.fingerprint
    assert heavy.fingerprint != plain.fingerprint
    with pytest.raises(DataError, match="the weights do not fit"):
        TokenDataset(plain.ids, plain.mask, plain.offsets, weights=np.array([1.0, 0, 1, 1]))
