"""The optimiser against torch's plain one with torch's own clipping; schedules by their shapes."""

from itertools import pairwise

import pytest
import torch
from tiny_runs import tiny_config, tiny_model

from prairie.errors import CheckpointError, TrainingError
from prairie.train.optim import AdamW, schedule_factor


def rates(schedule, steps=100, warmup_steps=10, min_ratio=0.1):
    return [
        schedule_factor(s, steps=steps, warmup_steps=warmup_steps, schedule=schedule, min_ratio=min_ratio)
        for s in range(steps)
    ]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_schedules_rise_then_never_rise_again(schedule):
    values = rates(schedule)
    assert values[0] == pytest.approx(0.1) and values[9] == 1.0 and values[10] == pytest.approx(1.0)
    assert all(a >= b for a, b in pairwise(values[10:]))
    last = {"cosine": 0.1, "linear": 0.11, "constant": 1.0, "wsd": 0.15}[schedule]
    assert values[-1] == pytest.approx(last, abs=0.01)
    assert rates(schedule, steps=1, warmup_steps=1) == [1.0] and rates(schedule, steps=1, warmup_steps=0) == [1.0]


def test_wsd_stays_up_for_four_fifths():
    values = rates("wsd", steps=100, warmup_steps=0)
    assert values[79] == 1.0 and values[82] < 1.0
    assert rates("cosine", steps=100, warmup_steps=0)[50] == pytest.approx(0.55)


def test_adamw_with_clipping_is_torchs():
    """Ten steps of large gradients: fused and clipped by a host number = plain AdamW and clip_grad_norm_."""
    ours, theirs = tiny_model(), tiny_model()
    optimizer = AdamW(dict(ours.named_parameters()), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3)
    matrices = [p for p in theirs.parameters() if p.ndim > 1]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    plain = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-8, foreach=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for step in range(10):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator) * (0.001 if step % 2 else 1.0)
            b.grad = a.grad.clone()
        norm = optimizer.gradient_norm()
        value = float(norm.norm)
        assert value == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)), rel=1e-5)
        norm.clip(value, 1.0)
        optimizer.step(1e-2)
        plain.step()
        assert all(p.grad is None for p in ours.parameters())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_step_is_seen_by_whoever_watches_versions():
    """Hashes and fused adapters are kept as long as the versions of weights stand: the fused kernel must not hide."""
    model = tiny_model()
    before = [p._version for p in model.parameters()]
    optimizer = AdamW(dict(model.named_parameters()), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-3)
    assert all(p._version > v for p, v in zip(model.parameters(), before, strict=True))


def test_state_goes_through_names():
    def stepped(model, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step(1e-2)

    def fresh(model):
        return AdamW(dict(model.named_parameters()), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

    one, other = tiny_model(), tiny_model()
    first, second = fresh(one), fresh(other)
    assert not any(value.any() for value in first.tensors().values())
    stepped(one, first, 0)
    with torch.no_grad():
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            b.copy_(a)
    second.load({name: value.clone() for name, value in first.tensors().items()})
    stepped(one, first, 1)
    stepped(other, second, 1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="does not fit"):
        first.load({**first.tensors(), "first/nobody": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="does not fit"):
        first.load({**first.tensors(), "first/embed": torch.zeros(3, 3)})
    with pytest.raises(CheckpointError, match="missing"):
        first.load({"step": torch.zeros(())})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.0), ("lr", -1e-3), ("lr", float("nan")), ("lr", float("inf")), ("steps", 0), ("tokens_per_batch", 0),
        ("micro_batches", 0), ("warmup_steps", 13), ("warmup_steps", -1), ("schedule", "step"), ("min_lr_ratio", 1.5),
        ("weight_decay", -0.1), ("betas", (0.9, 1.0)), ("clip_norm", 0.0), ("log_every", 0), ("save_every_s", -1.0),
        ("eval_every", -1), ("keep", 0), ("eps", 0.0),
    ],
)  # fmt: skip
def test_settings_are_refused_in_one_sentence(name, value):
    with pytest.raises(TrainingError) as caught:
        tiny_config(**{name: value})
    text = str(caught.value)
    assert name in text and "wanted" in text and "\n" not in text and caught.value.param == name
