"""Adapters trained in the same steps end where they would end alone; each can go on by itself."""

import signal
import threading
from pathlib import Path

import pytest
import torch
from test_prefixes import shared_prompts
from tiny_runs import quiet_runtime, tiny_config, tiny_dataset, tiny_model

from prairie.data.loader import Loader, batch_of
from prairie.errors import TrainingError
from prairie.models.lora import AdapterRows, LoRA, LoRAConfig
from prairie.models.transformer import Transformer
from prairie.ops.attention import PackedDocuments
from prairie.train import together
from prairie.train.objectives.causal_lm import CausalLM
from prairie.train.objectives.dpo import DPO, DPOConfig, reference_logprobs
from prairie.train.together import Part, fit_together, gradients_together
from prairie.train.trainer import Trainer, accumulate_gradients

PLANS = {  # name: (steps, micro-batches, lr, rank)
    "one": (9, 2, 1e-2, 4),
    "two": (6, 1, 3e-3, 2),
    "preferences": (8, 2, 1e-2, 4),
}


def trainers_of(folder: Path, model: Transformer, **changes) -> dict[str, Trainer]:
    """Three runs on one base: two on next tokens, one of preferences, of different lengths, rates and ranks."""
    made = {}
    for seed, (name, (steps, micro_batches, lr, rank)) in enumerate(PLANS.items()):
        config = tiny_config(
            steps=steps, micro_batches=micro_batches, lr=lr, seed=seed, tokens_per_batch=128, **changes
        )
        dataset = shared_prompts(seed=seed) if name == "preferences" else tiny_dataset(20 + seed, seed=seed)
        objective = CausalLM()
        if name == "preferences":
            objective = DPO(DPOConfig(), reference_logprobs(model, dataset))
        adapter = LoRA.create(model, LoRAConfig(rank=rank), seed=seed)
        loader = Loader(dataset, tokens_per_batch=128, seed=seed)
        made[name] = Trainer(
            model, objective, loader, config, runtime=quiet_runtime(), folder=folder / name, adapter=adapter, title=name
        )
    return made


def weights(trainers: dict[str, Trainer]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {k: p.detach().clone() for k, p in t.parameters.items()} for name, t in trainers.items()}


def farthest(one, other) -> float:
    """The largest difference between two sets of weights, relative to each tensor's norm."""
    return max(
        float((value - other[name][key]).norm() / value.norm().clamp_min(1e-12))
        for name, named in one.items()
        for key, value in named.items()
    )


def fit_to_step_four(trainers: dict[str, Trainer]) -> None:
    """Trains together until a SIGTERM in the fourth step."""
    listener = list(trainers.values())[-1]
    tell = listener.tell

    def stop_at_four(bar):
        tell(bar)
        if listener.state.step == 4:
            signal.raise_signal(signal.SIGTERM)

    listener.tell = stop_at_four
    with pytest.raises(SystemExit) as left:
        fit_together(list(trainers.values()))
    assert left.value.code == 0


@pytest.mark.parametrize("pass_tokens", [4096, 300, 1])
def test_gradients_together_are_those_of_each_alone(pass_tokens, monkeypatch):
    """However many adapters go through the base at once."""
    monkeypatch.setattr(together, "PASS_TOKENS", pass_tokens)
    model = tiny_model().requires_grad_(False)
    parts = []
    for seed in range(3):
        dataset = shared_prompts(seed=seed)
        adapter = LoRA.create(model, LoRAConfig(rank=4), seed=seed)
        with torch.no_grad():
            for path in adapter.paths:
                adapter.pair(path)[1].normal_(0, 0.2, generator=torch.Generator().manual_seed(seed))
        objective = DPO(DPOConfig(), reference_logprobs(tiny_model(seed=9), dataset)) if seed else CausalLM()
        batches = [batch_of(dataset, range(4 * i, 4 * i + 4)) for i in range(seed + 1)]
        parts.append(Part(objective, adapter, batches))
    found = gradients_together(model, parts)
    got = [[p.grad.clone() for p in part.adapter.parameters()] for part in parts]
    for part, sums, grads in zip(parts, found, got, strict=True):
        part.adapter.zero_grad()
        alone = accumulate_gradients(model, part.objective, part.batches, [AdapterRows(part.adapter)])
        assert float(sums.loss) == pytest.approx(float(alone.loss), rel=1e-5) and sums.count == alone.count
        assert {k: float(v) for k, v in sums.figures.items()} == pytest.approx(
            {k: float(v) for k, v in alone.figures.items()}, rel=1e-4, abs=1e-4
        )
        worst = max(
            float((a - p.grad).norm() / p.grad.norm()) for a, p in zip(grads, part.adapter.parameters(), strict=True)
        )
        assert worst < 1e-5
    assert all(p.grad is None for p in model.parameters())


def test_each_core_takes_passes_of_its_own_and_what_is_left_goes_on_all(monkeypatch):
    """Three parts on two cores: each of two on one, the last on both; the gradients of one core, and the same bits."""
    model = tiny_model().requires_grad_(False)
    parts = []
    for seed in range(3):
        adapter, dataset = LoRA.create(model, LoRAConfig(rank=4), seed=seed), tiny_dataset(8, seed=seed)
        parts.append(Part(CausalLM(), adapter, [batch_of(dataset, range((8, 6, 1)[seed]))]))
    seen: list[tuple[bool, int]] = []
    losses = together._losses

    def watched(*args):
        seen.append((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))
        return losses(*args)

    def gradients() -> list[torch.Tensor]:
        gradients_together(model, parts)
        found = [p.grad.clone() for part in parts for p in part.adapter.parameters()]
        for part in parts:
            part.adapter.zero_grad()
        return found

    monkeypatch.setattr(together, "_losses", watched)
    monkeypatch.setattr(together, "CORE_TOKENS", 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gradients()
        assert seen == [(True, 1)]
        torch.set_num_threads(2)
        two, again = gradients(), gradients()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen[1:] == 2 * [(False, 1), (False, 1), (True, 2)]
    assert all(torch.equal(a, b) for a, b in zip(two, again, strict=True))
    assert max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(two, one, strict=True)) < 1e-5


def test_a_frozen_base_keeps_nothing_below_the_first_adapter():
    """No gradient of a base weight is made, and the layers under the lowest adapted one leave no graph."""
    model, dataset = tiny_model().requires_grad_(False), tiny_dataset(6)
    adapter = LoRA.create(model, LoRAConfig(rank=2, targets=("down_proj",)))
    kept: list[bool] = []
    attend = PackedDocuments.__call__

    def watched(self, *args, **more):
        out = attend(self, *args, **more)
        kept.append(out.requires_grad)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedDocuments, "__call__", watched)
        accumulate_gradients(model, CausalLM(), [batch_of(dataset, range(6))], [AdapterRows(adapter)])
    assert kept == [False, True]  # the first layer's attention stands below the first adapter
    assert all(p.grad is None for p in model.parameters()) and all(p.grad is not None for p in adapter.parameters())


@pytest.mark.parametrize("with_adapter", [False, True])
def test_recomputed_layers_give_the_same_bits_and_keep_less(with_adapter):
    """Activation checkpointing, with a prompt that rows share and dropout in the adapter."""
    model, dataset = tiny_model(), shared_prompts()
    adapters = []
    if with_adapter:
        adapters = [AdapterRows(LoRA.create(model.requires_grad_(False), LoRAConfig(rank=2, dropout=0.2)))]
    learner = adapters[0].lora if adapters else model
    learner.train()
    found = []
    for model.recomputes in (False, True):
        kept: list[int] = []
        learner.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            accumulate_gradients(model, CausalLM(), [batch_of(dataset, range(18))], adapters, draw="a step")
        found.append(([p.grad.clone() for p in learner.parameters()], sum(kept)))
    (plain, plain_kept), (recomputed, kept_less) = found
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert kept_less < 0.5 * plain_kept


def test_runs_together_end_where_they_end_alone(tmp_path):
    """Within 1e-4 of each tensor's norm after 6 to 9 steps of Adam; a run that ends earlier leaves the others be."""
    alone = trainers_of(tmp_path / "alone", tiny_model())
    wanted = {name: trainer.fit() for name, trainer in alone.items()}
    shared = trainers_of(tmp_path / "together", tiny_model())
    figures = dict(zip(shared, fit_together(list(shared.values())), strict=True))
    assert farthest(weights(shared), weights(alone)) < 1e-4
    for name, (steps, *_) in PLANS.items():
        assert figures[name]["steps"] == steps and figures[name]["tokens"] == wanted[name]["tokens"]
        assert figures[name]["loss_last"] == pytest.approx(wanted[name]["loss_last"], rel=1e-4)


def test_a_run_begun_together_goes_on_alone_and_together(tmp_path):
    """Stopped after some steps, with one run saved a step further: the same bits together, the same end alone."""
    whole = trainers_of(tmp_path / "whole", tiny_model(), save_every=1)
    fit_together(list(whole.values()))

    stopped = trainers_of(tmp_path / "stopped", tiny_model(), save_every=1)
    fit_to_step_four(stopped)
    # One of them was killed between two saves: it lacks the last step, the others go back to the one before.
    last = stopped["two"].checkpoints
    assert last.steps()[-1] == 4
    for path in last.path(4).iterdir():
        path.unlink()
    last.path(4).rmdir()
    resumed = trainers_of(tmp_path / "stopped", tiny_model(), save_every=1)
    fit_together(list(resumed.values()))
    assert farthest(weights(resumed), weights(whole)) == 0.0

    again = trainers_of(tmp_path / "alone again", tiny_model(), save_every=1)
    fit_to_step_four(again)
    finished = trainers_of(tmp_path / "alone again", tiny_model(), save_every=1)
    for trainer in finished.values():
        trainer.fit()
    assert farthest(weights(finished), weights(whole)) < 1e-4


def test_runs_that_cannot_share_a_base_are_refused(tmp_path):
    one, other = (list(trainers_of(tmp_path / name, tiny_model()).values()) for name in ("a", "b"))
    with pytest.raises(TrainingError, match="one base"):
        fit_together([one[0], other[0]])
    with pytest.raises(TrainingError, match="an adapter each"):
        fit_together([one[0], one[0]])
    one[1].folder = one[0].folder
    with pytest.raises(TrainingError, match="folder of its own"):
        fit_together(one)
