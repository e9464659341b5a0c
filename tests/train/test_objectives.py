"""The losses against naive loops and against trl."""

import math
from collections import defaultdict
from dataclasses import replace
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import VOCAB, labelled, moved_adapter, tiny_dataset, tiny_model

from prairie.data.loader import TokenDataset, batch_of
from prairie.errors import ModelError, TrainingError
from prairie.models.lora import AdapterRows, LoRA, LoRAConfig
from prairie.models.weights import load_model, save_model
from prairie.ops.attention import PackedDocuments
from prairie.train.objective import every_batch, length_baseline
from prairie.train.objectives.causal_lm import CausalLM, held_out_loss
from prairie.train.objectives.classification import Classification
from prairie.train.objectives.dpo import DPO, DPOConfig, held_out_preferences, preference_loss, reference_logprobs
from prairie.train.objectives.masked_lm import MaskedLM
from prairie.train.objectives.reward import LABELS, Reward
from prairie.train.objectives.seq2seq import Seq2Seq
from prairie.train.trainer import accumulate_gradients


def naive_logps(model, dataset, row, adapters=()):
    """log p of each supervised token of one row alone, with whole logits."""
    ids, mask = dataset.row(row)
    tokens = torch.tensor(ids.astype(np.int64))
    hidden = model(tokens, PackedDocuments([len(tokens)]), adapters)
    logps = model.logits(hidden).log_softmax(-1)
    return torch.stack([logps[i - 1, tokens[i]] for i in range(1, len(tokens)) if mask[i]])


def gradients_of(model, objective, dataset, split, adapters=(), parameters=None):
    parameters = list(parameters or model.parameters())
    for parameter in parameters:
        parameter.grad = None
    sums = accumulate_gradients(model, objective, [batch_of(dataset, rows) for rows in split], adapters)
    return [p.grad.clone() for p in parameters], float(sums.loss) / sums.count


def relative(a, b):
    return max(float((x - y).norm() / y.norm().clamp_min(1e-12)) for x, y in zip(a, b, strict=True))


def test_causal_lm_is_the_naive_sum():
    model, dataset = tiny_model(), tiny_dataset(7)
    batch = batch_of(dataset, [3, 0, 6])
    naive = -sum(naive_logps(model, dataset, row).sum().detach() for row in batch.rows)
    loss, figures = CausalLM().loss(model, batch)
    assert float(loss.detach()) == pytest.approx(float(naive), rel=1e-5) and figures == {}
    assert CausalLM().count(batch) == sum(len(naive_logps(model, dataset, row)) for row in batch.rows)


def test_a_step_without_a_supervised_token_is_refused():
    ids = np.arange(6, dtype=np.uint32)
    dataset = TokenDataset(ids, np.zeros(6, bool), np.array([0, 6], dtype=np.int64))
    with pytest.raises(TrainingError, match="nothing to learn from"):
        accumulate_gradients(tiny_model(), CausalLM(), [batch_of(dataset, [0])])


NAIVE = {
    "sigmoid": (DPOConfig(beta=0.3), lambda h, hn, nll: -F.logsigmoid(0.3 * h)),
    "smoothed": (
        DPOConfig(beta=0.3, label_smoothing=0.2),
        lambda h, hn, nll: -0.8 * F.logsigmoid(0.3 * h) - 0.2 * F.logsigmoid(-0.3 * h),
    ),
    "ipo": (DPOConfig(loss="ipo", beta=0.3), lambda h, hn, nll: (hn - 1 / 0.6) ** 2),
    "rpo": (DPOConfig(beta=0.3, sft_weight=0.5), lambda h, hn, nll: -F.logsigmoid(0.3 * h) + 0.5 * nll),
}


@pytest.mark.parametrize("kind", NAIVE)
def test_dpo_is_the_naive_loop(kind):
    """Row by row, whole logits, the formula written out: loss and gradient."""
    config, formula = NAIVE[kind]
    model, reference, dataset = tiny_model(), tiny_model(seed=5), tiny_dataset(6, group=2)
    rows = [4, 5, 0, 1, 8, 9]
    total = torch.zeros(())
    with torch.no_grad():
        base = {row: naive_logps(reference, dataset, row).sum() for row in rows}
    for chosen, rejected in zip(rows[::2], rows[1::2], strict=True):
        c, r = naive_logps(model, dataset, chosen), naive_logps(model, dataset, rejected)
        ratio_c, ratio_r = c.sum() - base[chosen], r.sum() - base[rejected]
        total = total + formula(ratio_c - ratio_r, ratio_c / len(c) - ratio_r / len(r), -c.mean())
    (total / 3).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    objective = DPO(config, reference_logprobs(reference, dataset))
    got, loss = gradients_of(model, objective, dataset, [rows[:2], rows[2:]])
    assert loss == pytest.approx(float(total.detach()) / 3, rel=1e-5)
    assert relative(got, wanted) < 1e-4


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_dpo_is_trls(loss):
    """trl's own `_compute_loss` on the same log-probabilities."""
    trainer_module = pytest.importorskip("trl.trainer.dpo_trainer", reason="trl is not installed")
    generator = torch.Generator().manual_seed(0)
    pairs, length = 5, 9
    per_token = -torch.rand(2 * pairs, length, generator=generator) * 3
    reference = -torch.rand(2 * pairs, length, generator=generator) * 3
    lengths = torch.randint(1, length, (2 * pairs,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()
    mask_with_prompt = torch.cat([torch.zeros(2 * pairs, 1, dtype=torch.long), mask], 1)
    filler = torch.zeros_like(per_token)
    outputs = SimpleNamespace(
        log_probs=per_token * mask, entropy=filler, mean_logits=filler, is_top1=filler.bool(), log_sum_sq_probs=filler
    )
    metrics = {"train": {key: [] for key in _TRL_METRICS}}
    fake = SimpleNamespace(
        model=SimpleNamespace(training=True), loss_types=[loss], loss_weights=[1.0], beta=0.3, label_smoothing=0.0,
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False,
        aux_loss_enabled=False, _metrics=metrics, _total_train_tokens=0, _tp_size=1,
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
    )  # fmt: skip
    reference_rows = (reference * mask).sum(1)
    inputs = {
        "input_ids": torch.zeros(2 * pairs, length + 1, dtype=torch.long), "completion_mask": mask_with_prompt,
        "attention_mask": torch.ones(2 * pairs, length + 1, dtype=torch.long),
        "ref_chosen_logps": reference_rows[:pairs], "ref_rejected_logps": reference_rows[pairs:],
    }  # fmt: skip
    theirs = trainer_module.DPOTrainer._compute_loss(fake, lambda **kwargs: outputs, inputs, False)
    ours_order = torch.arange(2 * pairs).reshape(2, pairs).T.reshape(-1)  # chosen, rejected, chosen, ...
    rows, refs = (per_token * mask).sum(1)[ours_order], reference_rows[ours_order]
    ours, figures = preference_loss(rows, refs, mask.sum(1).float()[ours_order], DPOConfig(loss=loss, beta=0.3))
    assert float(ours) / pairs == pytest.approx(float(theirs), rel=1e-6)
    same = {"accuracy": "rewards/accuracies", "margin": "rewards/margins", "logps_chosen": "logps/chosen"}
    for name, key in same.items():
        assert float(figures[name]) / pairs == pytest.approx(metrics["train"][key][0], rel=1e-5)


_TRL_METRICS = [
    "entropy", "num_tokens", "logits/chosen", "logits/rejected", "mean_token_accuracy", "rewards/chosen",
    "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
]  # fmt: skip


def test_reference_logprobs_are_the_naive_ones_however_batched():
    model, dataset = tiny_model(), tiny_dataset(9, group=2)
    naive = torch.stack([naive_logps(model, dataset, row).sum() for row in range(18)]).detach()
    for tokens_per_batch in (16, 100, 10_000):
        got = reference_logprobs(model, dataset, tokens_per_batch=tokens_per_batch)
        assert got.dtype == torch.float32 and not got.requires_grad
        torch.testing.assert_close(got, naive, rtol=1e-5, atol=1e-4)
    assert torch.equal(reference_logprobs(model, dataset), reference_logprobs(model, dataset))
    adapter = moved_adapter(model)
    assert not torch.allclose(reference_logprobs(model, dataset, [AdapterRows(adapter)]), naive, atol=1e-2)
    assert torch.equal(reference_logprobs(model, dataset), reference_logprobs(model, dataset, ()))


def test_a_fresh_adapter_stands_at_log_2():
    """The reference is the base, the policy is the base plus nothing: no margin yet."""
    model, dataset = tiny_model(), tiny_dataset(5, group=2)
    adapters = [AdapterRows(LoRA.create(model, LoRAConfig(rank=2)))]
    objective = DPO(DPOConfig(), reference_logprobs(model, dataset))
    loss, figures = objective.loss(model, batch_of(dataset, list(range(10))), adapters)
    assert float(loss.detach()) / 5 == pytest.approx(math.log(2), abs=1e-5)
    assert abs(float(figures["margin"])) < 1e-4


def test_a_reference_in_the_dtype_of_the_training_cancels_its_rounding():
    model, dataset = tiny_model(), tiny_dataset(20, group=2)
    policy = reference_logprobs(model, dataset, dtype=torch.bfloat16, tokens_per_batch=100)
    same, exact = (reference_logprobs(model, dataset, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert float((policy - same).abs().mean()) < 0.2 * float((policy - exact).abs().mean())
    assert 0 < float((policy - exact).abs().max()) < 1.0


def test_held_out_figures_are_the_objectives_own():
    model, reference, dataset = tiny_model(), tiny_model(seed=5), tiny_dataset(9, group=2)
    config = DPOConfig(beta=0.2, sft_weight=0.1)
    logps = reference_logprobs(reference, dataset)
    loss, sums = DPO(config, logps).loss(model, batch_of(dataset, list(range(18))))
    figures = held_out_preferences(model, dataset, reference_logps=logps, config=config, tokens_per_batch=60)
    assert figures["loss"] == pytest.approx(float(loss.detach()) / 9, rel=1e-5) and figures["pairs"] == 9
    for name, value in sums.items():
        assert figures[name] == pytest.approx(float(value) / 9, rel=1e-4, abs=1e-4)
    alone = [float(naive_logps(model, dataset, row).sum().detach()) for row in range(18)]
    assert figures["accuracy_by_likelihood"] == pytest.approx(np.mean(np.array(alone[::2]) > np.array(alone[1::2])))
    assert figures["length_chosen"] == pytest.approx(np.mean([dataset.row(2 * i)[1].sum() for i in range(9)]))


class ByteTable:
    """A stand-in for a tokenizer whose token i is i % 3 + 1 bytes long, the last one special."""

    vocab_size = VOCAB - 1
    special_tokens = MappingProxyType({"<end>": VOCAB - 2})

    def token_bytes(self, token_id):
        return b"x" * (token_id % 3 + 1)


def test_held_out_loss_and_bits_per_byte():
    model, dataset = tiny_model(), tiny_dataset(9)
    model.train()
    logps = torch.cat([naive_logps(model, dataset, row) for row in range(9)]).detach()
    figures = held_out_loss(model, dataset, tokenizer=ByteTable(), tokens_per_batch=50)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert figures["loss"] == pytest.approx(float(-logps.mean()), rel=1e-5)
    assert figures["supervised_tokens"] == len(logps)
    supervised = dataset.ids[dataset.mask]
    sizes = [0 if i >= VOCAB - 2 else i % 3 + 1 for i in supervised.tolist()]
    assert figures["bits_per_byte"] == pytest.approx(float(-logps.sum()) / math.log(2) / sum(sizes), rel=1e-5)
    assert "bits_per_byte" not in held_out_loss(model, dataset)


@pytest.mark.parametrize("group", [1, 2])
def test_every_batch_gives_each_row_once_and_keeps_groups(group):
    dataset = tiny_dataset(13, group=group)
    batches = list(every_batch(dataset, 70))
    rows = [row for batch in batches for row in batch.rows]
    assert sorted(rows) == list(range(13 * group))
    assert all(row + 1 == rows[i + 1] for i, row in enumerate(rows) if group == 2 and i % 2 == 0)
    assert all(len(b.tokens_N) <= 70 or len(b.rows) == group for b in batches)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"loss": "hinge"}, "unknown"),
        ({"beta": 0.0}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "ipo"),
        ({"sft_weight": -1.0}, "sft_weight"),
    ],
)
def test_dpo_settings_are_checked(settings, word):
    with pytest.raises(TrainingError, match=word):
        DPOConfig(**settings)


def test_dpo_refuses_what_are_not_pairs_or_another_datasets_reference():
    model, dataset = tiny_model(), tiny_dataset(4, group=2)
    objective = DPO(DPOConfig(), torch.zeros(8))
    for rows in ([1, 2], [0, 3], [0, 1, 2]):
        with pytest.raises(TrainingError, match="pairs"):
            objective.loss(model, batch_of(dataset, rows))
    with pytest.raises(TrainingError, match="another dataset"):
        DPO(DPOConfig(), torch.zeros(6)).loss(model, batch_of(dataset, [6, 7]))
    with pytest.raises(TrainingError, match="not finite"):
        DPO(DPOConfig(), torch.tensor([0.0, float("nan")]))


# --- scores of rows ---------------------------------------------------------------------------------------------------


def theirs(model, tmp_path):
    """The same weights in transformers' own class for them."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    save_model(model, tmp_path)
    return transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)


def padded(dataset, rows, pad=0):
    """ids_RT and mask_RT of rows, padded on the right."""
    ids = [torch.tensor(dataset.row(row)[0].astype(np.int64)) for row in rows]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad), mask


@pytest.mark.parametrize("tied", [True, False])
def test_classification_is_transformers(tied, tmp_path):
    """Loss, and the gradient of every weight, of LlamaForSequenceClassification on the padded rows; and the folder."""
    model = tiny_model(pad_id=0, tie_embeddings=tied).with_scores(("red", "green", "blue"), seed=2)
    dataset = labelled(tiny_dataset(8))
    dataset.ids[dataset.ids == 0] = 5  # 0 pads in their model
    other = theirs(model, tmp_path)
    assert type(other).__name__ == "LlamaForSequenceClassification" and other.config.id2label[2] == "blue"
    ids, mask = padded(dataset, range(8))
    found = other(input_ids=ids, attention_mask=mask, labels=torch.from_numpy(dataset.targets))
    found.loss.backward()
    batch = batch_of(dataset, range(8))
    got, loss = gradients_of(model, Classification(), dataset, [[3, 1, 0], [2, 4, 5, 6, 7]])
    assert loss == pytest.approx(float(found.loss.detach()), rel=1e-5)
    names = {w.name: w for w in model.table}
    ours = dict(zip(dict(model.named_parameters()), got, strict=True))
    for name, parameter in other.named_parameters():
        mine = names[name].take(ours[names[name].parameter])
        assert float((mine - parameter.grad).norm() / parameter.grad.norm()) < 1e-4, name
    _, figures = Classification().loss(model, batch)
    assert float(figures["accuracy"]) == float((found.logits.argmax(1) == torch.from_numpy(dataset.targets)).sum())
    again = load_model(tmp_path)
    assert again.config.labels == ("red", "green", "blue") and torch.equal(again.task.out, model.task.out)
    with pytest.raises(ModelError, match="gives scores, not text"):
        again.logits(torch.zeros(1, 32))
    with pytest.raises(ModelError, match="gives no scores"):
        Classification().loss(tiny_model(), batch)
    with pytest.raises(TrainingError, match="rows with a label"):
        Classification().loss(model, batch_of(tiny_dataset(8), [0]))


def test_reward_is_trls(tmp_path):
    """trl's own RewardTrainer.compute_loss on transformers' model with the same weights."""
    rewards = pytest.importorskip("trl.trainer.reward_trainer", reason="trl is not installed")
    model = tiny_model(pad_id=0).with_scores(LABELS, seed=2)
    dataset = tiny_dataset(5, group=2)
    dataset.ids[dataset.ids == 0] = 5
    other = theirs(model, tmp_path)
    ids, mask = padded(dataset, [0, 2, 4, 6, 8, 1, 3, 5, 7, 9])  # theirs: all chosen, then all rejected
    fake = SimpleNamespace(
        args=SimpleNamespace(center_rewards_coefficient=None), _metrics={"train": defaultdict(list)},
        model=SimpleNamespace(training=True), _total_train_tokens=0, state=SimpleNamespace(num_input_tokens_seen=0),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False, _tp_size=1,
    )  # fmt: skip
    loss = rewards.RewardTrainer.compute_loss(fake, other, {"input_ids": ids, "attention_mask": mask})
    loss.backward()
    got, mine = gradients_of(model, Reward(), dataset, [[4, 5, 0, 1], [8, 9, 2, 3, 6, 7]])
    assert mine == pytest.approx(float(loss.detach()), rel=1e-5)
    score = got[list(dict(model.named_parameters())).index("task.out")]
    assert float((score - other.score.weight.grad).norm() / score.norm()) < 1e-4
    _, figures = Reward().loss(model, batch_of(dataset, range(10)))
    assert float(figures["accuracy"]) / 5 == pytest.approx(fake._metrics["train"]["accuracy"][0])
    assert float(figures["margin"]) / 5 == pytest.approx(fake._metrics["train"]["margin"][0], rel=1e-4)
    with pytest.raises(TrainingError, match="pairs"):
        Reward().loss(model, batch_of(dataset, [1, 0]))


# --- masked tokens ----------------------------------------------------------------------------------------------------


def test_masked_lm_is_transformers_loss_on_the_same_holes():
    """ForMaskedLMLoss over whole logits, with a label at each hole and -100 elsewhere."""
    loss_of = pytest.importorskip(
        "transformers.loss.loss_utils", reason="transformers is not installed"
    ).ForMaskedLMLoss
    model, dataset = tiny_model(), tiny_dataset(9)
    objective = MaskedLM(mask_id=1, vocab_size=VOCAB, special=(0, 1), share=0.3)
    batch = batch_of(dataset, [3, 0, 6, 8], epoch=2)
    holes = objective.with_holes(batch)
    logits = model.logits(model(holes.tokens_N, PackedDocuments(batch.lengths)))
    wanted = loss_of(logits, holes.labels_N, vocab_size=VOCAB)
    loss, _ = objective.loss(model, batch)
    assert objective.count(batch) == holes.supervised > 4
    assert float(loss.detach()) / objective.count(batch) == pytest.approx(float(wanted.detach()), rel=1e-5)


def same_gradients(model, other, got):
    """The gradients of our model under their names are those of transformers' model."""
    ours = dict(zip(dict(model.named_parameters()), got, strict=True))
    named = {weight.name: weight for weight in model.table}
    checked = 0
    for name, parameter in other.named_parameters():
        weight = named.get(name)
        if weight is None or parameter.grad is None:
            continue
        mine = weight.take(ours[weight.parameter])
        assert float((mine - parameter.grad).norm() / parameter.grad.norm().clamp_min(1e-6)) < 1e-3, name
        checked += 1
    assert checked > 10


def test_masked_lm_of_a_bert_is_transformers(tmp_path):
    """Their BertForMaskedLM, our encoder loaded from its folder: the loss on the same holes and every gradient."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(**shape, intermediate_size=48, max_position_embeddings=64, pad_token_id=0)
    torch.manual_seed(0)
    other = transformers.BertForMaskedLM(config).eval()
    other.save_pretrained(tmp_path)
    model, dataset = load_model(tmp_path), tiny_dataset(9)
    objective = MaskedLM(mask_id=1, vocab_size=VOCAB, special=(0, 1), share=0.3)
    holes = objective.with_holes(batch_of(dataset, [3, 0, 6, 8]))
    pad = {name: torch.nn.utils.rnn.pad_sequence(rows.split(holes.lengths), batch_first=True, padding_value=value)
           for name, rows, value in (("input_ids", holes.tokens_N, 0), ("labels", holes.labels_N, -100))}  # fmt: skip
    seen = torch.nn.utils.rnn.pad_sequence([torch.ones(n) for n in holes.lengths], batch_first=True)
    found = other(**pad, attention_mask=seen)
    found.loss.backward()
    got, loss = gradients_of(model, objective, dataset, [[3, 0], [6, 8]])
    assert loss == pytest.approx(float(found.loss.detach()), rel=1e-5)
    same_gradients(model, other, got)
    with pytest.raises(ModelError, match="gives scores"):
        MaskedLM(mask_id=1, vocab_size=VOCAB).loss(model.with_head("classify", ("a", "b")), holes)
    with pytest.raises(TrainingError, match="does not predict next tokens: got an encoder, mlm"):
        CausalLM().loss(model, holes)  # it would see what it is asked for


def test_seq2seq_is_transformers(tmp_path):
    """Their T5ForConditionalGeneration on padded rows, our model loaded from its folder: loss and every gradient."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=0,
        decoder_start_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    other = transformers.T5ForConditionalGeneration(config).eval()
    other.save_pretrained(tmp_path)
    model, dataset = load_model(tmp_path), tiny_dataset(5, group=2)
    dataset.ids[dataset.ids == 0] = 5
    reads, seen = padded(dataset, [0, 2, 4, 6, 8])
    answers, real = padded(dataset, [1, 3, 5, 7, 9])
    found = other(input_ids=reads, attention_mask=seen, labels=answers.masked_fill(real == 0, -100))
    found.loss.backward()
    got, loss = gradients_of(model, Seq2Seq(), dataset, [[4, 5, 0, 1], [8, 9, 2, 3, 6, 7]])
    assert loss == pytest.approx(float(found.loss.detach()), rel=1e-5)
    same_gradients(model, other, got)
    alone, _ = gradients_of(model, Seq2Seq(), dataset, [[row, row + 1] for row in range(0, 10, 2)])
    assert relative(alone, got) < 1e-5


def test_holes_are_berts_and_depend_on_seed_row_and_epoch_alone():
    """15% of the ordinary tokens; 80% of them masked, 10% drawn, 10% kept; no special token chosen or drawn."""
    ids = np.random.default_rng(0).integers(0, VOCAB, 20_000).astype(np.uint32)
    offsets = np.arange(0, 20_001, 100)
    dataset = TokenDataset(ids, np.arange(20_000) % 100 > 0, offsets)
    objective = MaskedLM(mask_id=1, vocab_size=VOCAB, special=(0, 1, 2))
    batch = batch_of(dataset, range(200))
    holes = objective.with_holes(batch)
    chosen = holes.labels_N != -100
    before, after = batch.tokens_N[chosen], holes.tokens_N[chosen]
    ordinary = int((batch.tokens_N > 2).sum())
    assert torch.equal(before, holes.labels_N[chosen]) and torch.equal(batch.tokens_N[~chosen], holes.tokens_N[~chosen])
    assert int(chosen.sum()) == objective.count(batch) == pytest.approx(0.15 * ordinary, rel=0.03)
    assert int(before.min()) > 2 and int(after[after != 1].min()) > 2
    share = float((after == 1).float().mean()), float(((after != 1) & (after != before)).float().mean())
    assert share[0] == pytest.approx(0.8, abs=0.025) and share[1] == pytest.approx(0.1, abs=0.02)
    # The same holes in another batch, at another place; others in another epoch and with another seed.
    alone = objective.with_holes(batch_of(dataset, [7, 150]))
    assert torch.equal(alone.tokens_N[100:], holes.tokens_N[15_000:15_100])
    for other, epoch in ((objective, 1), (replace(objective, seed=1), 0)):
        moved = other.with_holes(batch_of(dataset, [150], epoch=epoch))
        assert not torch.equal(moved.tokens_N, alone.tokens_N[100:])
    short = objective.with_holes(batch_of(TokenDataset(np.array([0, 9], np.uint32), np.array([False, True]),
                                                       np.array([0, 2])), [0]))  # fmt: skip
    assert short.labels_N.tolist() == [-100, 9], "a row of one ordinary token still has a hole"
    for bad in ({"mask_id": VOCAB}, {"share": 0.0}, {"masked": 0.8, "drawn": 0.3}):
        with pytest.raises(TrainingError):
            MaskedLM(**{"mask_id": 1, "vocab_size": VOCAB, **bad})


def test_a_length_baseline_is_what_counting_alone_would_get():
    dataset = tiny_dataset(30, group=2)
    lengths = np.array([dataset.row(row)[1].sum() for row in range(60)])
    longer = np.mean(np.where(lengths[::2] == lengths[1::2], 0.5, lengths[::2] > lengths[1::2]))
    assert length_baseline(dataset) == pytest.approx(max(longer, 1 - longer)) and 0.5 <= length_baseline(dataset) < 1
