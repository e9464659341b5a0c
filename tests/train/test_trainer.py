"""The loop against a naive one, and its promises: same bits, nothing that is not finite, stops that can be resumed."""

import json
import math
import os
import shutil
import signal
import threading

import numpy as np
import pytest
import torch
from tiny_runs import (
    TRAINERS,
    VOCAB,
    full_trainer,
    lora_dpo_trainer,
    quiet_runtime,
    tiny_config,
    tiny_dataset,
    tiny_model,
)

from prairie.data.loader import Loader, TokenDataset
from prairie.errors import AdapterError, BusyError, CheckpointError, StorageFullError, TrainingError
from prairie.models.lora import AdapterRows, LoRA, LoRAConfig
from prairie.models.weights import hash_of, load_model, save_model
from prairie.runtime import Progress
from prairie.train import trainer as trainer_module
from prairie.train.objectives.causal_lm import CausalLM, held_out_loss
from prairie.train.objectives.dpo import held_out_preferences, reference_logprobs
from prairie.train.trainer import TrainConfig, Trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.parameters.items()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Listener(Progress):
    """Keeps what is said."""

    def __init__(self):
        super().__init__(quiet=True)
        self.said = []

    def say(self, text):
        self.said.append(text)


def test_the_loop_is_the_naive_loop(tmp_path):
    """Twelve steps of plain torch: whole logits, mean cross entropy of the step, clip_grad_norm_, plain AdamW."""
    config = tiny_config(clip_norm=0.5)
    trainer = full_trainer(tmp_path, config)
    trainer.fit()
    model, dataset = tiny_model(), tiny_dataset()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    loader = Loader(dataset, tokens_per_batch=64, seed=0)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
    from prairie.ops.attention import PackedDocuments

    for step in range(12):
        rows = [row for batch in loader.next_step(2) for row in batch.rows]
        losses = []
        for row in rows:
            ids, mask = dataset.row(row)
            tokens = torch.tensor(ids.astype(np.int64))
            logps = model.logits(model(tokens, PackedDocuments([len(tokens)]))).log_softmax(-1)
            losses += [-logps[i - 1, tokens[i]] for i in range(1, len(tokens)) if mask[i]]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        factor = (step + 1) / 2 if step < 2 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 10))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * factor
        optimizer.step()
    for (name, ours), theirs in zip(trainer.parameters.items(), model.parameters(), strict=True):
        moved = (theirs - start[name]).detach().norm()
        assert float((ours - theirs).detach().norm() / moved) < 1e-3, name


def test_it_learns_and_says_so(tmp_path):
    seen = []
    trainer = full_trainer(
        tmp_path, tiny_config(steps=60, log_every=10, eval_every=20),
        evaluate=lambda: seen.append(1) or held_out_loss(trainer.model, tiny_dataset(10, seed=9)),
    )  # fmt: skip
    before = held_out_loss(trainer.model, tiny_dataset(10, seed=9))["loss"]
    figures = trainer.fit()
    assert figures["loss_last"] < 0.6 * figures["loss_first"]
    assert figures["evaluation"]["loss"] < before
    assert figures["steps"] == 60 and figures["resumed"] == 0
    assert {
        "tokens",
        "supervised_tokens",
        "seconds",
        "tokens_per_s",
        "gflops",
        "peak_rss_mb",
        "epoch",
    } <= figures.keys()
    lines = lines_of(tmp_path)
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "evaluation" in line]
    assert [line["step"] for line in training] == [10, 20, 30, 40, 50, 60]
    assert [line["step"] for line in evaluations] == [20, 40, 60] and len(seen) == 3
    keys = {"loss", "lr", "grad_norm", "tokens", "supervised_tokens", "tokens_per_s", "gflops", "epoch", "seconds"}
    assert all(keys <= line.keys() for line in training)
    assert training[-1]["tokens"] == figures["tokens"] > training[-1]["supervised_tokens"] > 0


def test_preferences_are_learned_by_an_adapter_alone(tmp_path):
    trainer = lora_dpo_trainer(tmp_path, tiny_config(steps=40, log_every=10))
    base = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    held_out = tiny_dataset(20, seed=7, group=2)
    reference = reference_logprobs(trainer.model, held_out)
    figures = trainer.fit()
    assert figures["accuracy"] > 0.9 and figures["margin"] > 0.3
    assert {"logps_chosen", "logps_rejected", "length_chosen", "length_rejected", "preference_loss"} <= figures.keys()
    assert all(torch.equal(p, base[name]) for name, p in trainer.model.named_parameters())
    assert all(p.grad is None for p in trainer.model.parameters())
    judged = held_out_preferences(
        trainer.model, held_out, trainer.adapters, reference_logps=reference, config=trainer.objective.config
    )
    assert judged["accuracy"] > 0.8 and judged["margin"] > 0.1


def test_an_evaluation_sees_the_adapter_as_it_is_now(tmp_path):
    """What serving keeps of an adapter must not outlive a training step."""
    found = []

    def evaluate():
        model, adapters = trainer.model, trainer.adapters
        fresh = LoRA.create(model, trainer.adapter.config)
        fresh.load_state_dict(trainer.adapter.state_dict())
        data = tiny_dataset(5, group=2)
        now, copied = (reference_logprobs(model, data, rows).sum() for rows in (adapters, [AdapterRows(fresh.eval())]))
        found.append((float(now), float(copied)))
        return {}

    trainer = lora_dpo_trainer(tmp_path, tiny_config(steps=6, eval_every=2), evaluate=evaluate)
    trainer.fit()
    assert all(now == copied for now, copied in found) and len({now for now, _ in found}) == 3


def test_trained_weights_have_another_hash(tmp_path):
    """A model that was loaded and trained must not go by the name of its file."""
    save_model(tiny_model(), tmp_path / "model")
    model = load_model(tmp_path / "model")
    before = hash_of(model)
    trainer = full_trainer(tmp_path / "run", tiny_config(steps=2), model=model)
    trainer.fit()
    assert hash_of(trainer.model) != before


@pytest.mark.parametrize("kind", TRAINERS)
def test_same_bits_twice_and_wherever_checkpoints_fall(kind, tmp_path):
    """Other saving, logging and evaluating (that draws random numbers): the same weights to the bit."""
    results = []
    variants = [
        {},
        {"save_every": 0},
        {"save_every": 5, "keep": 1, "log_every": 1},
        {"save_every": 0, "save_every_s": 0.0, "eval_every": 3},
    ]
    for index, changes in enumerate(variants):
        evaluate = (lambda: {"drawn": float(torch.rand(()) + np.random.rand())}) if index == 3 else None
        trainer = TRAINERS[kind](tmp_path / str(index), tiny_config(**changes), evaluate=evaluate)
        for parameter in trainer.parameters.values() if index == 1 else ():
            parameter.grad = torch.ones_like(parameter)  # what somebody left there is not learned from
        trainer.fit()
        results.append(weights(trainer))
    assert all(same_bits(result, results[0]) for result in results)
    other = TRAINERS[kind](tmp_path / "other", tiny_config(seed=1))
    other.fit()
    assert not same_bits(weights(other), results[0])


@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_twice_with_the_same_threads(threads, tmp_path):
    """Wide enough for kernels to share the work among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for index in range(2):
            model = tiny_model(vocab_size=2000, dim=128, layers=1, ffn_dim=384)
            trainer = full_trainer(
                tmp_path / str(index),
                tiny_config(steps=2, micro_batches=1, tokens_per_batch=256, save_every=0),
                model=model,
            )
            trainer.fit()
            results.append(weights(trainer))
        assert same_bits(*results)
    finally:
        torch.set_num_threads(before)


class Killed(BaseException):
    """The process ends here."""


def stop_after(trainer, steps):
    """Makes the trainer die in the middle of the step after `steps`."""
    real = trainer.optimizer.step

    def step(lr):
        if trainer.state.step == steps:
            raise Killed
        real(lr)

    trainer.optimizer.step = step


@pytest.mark.parametrize("kind", TRAINERS)
def test_resumed_is_undisturbed(kind, tmp_path):
    """Dies in three places, between checkpoints and log lines; weights and the story told are as if it never had."""
    config = tiny_config(log_every=3, save_every=2, eval_every=4)
    calm = TRAINERS[kind](tmp_path / "calm", config, evaluate=lambda: {"x": 1.0})
    calm_figures = calm.fit()
    for steps in (3, 4, 9):
        trainer = TRAINERS[kind](tmp_path / "run", config, evaluate=lambda: {"x": 1.0})
        stop_after(trainer, steps)
        with pytest.raises(Killed):
            trainer.fit()
    runtime = quiet_runtime(progress=Listener())
    last = TRAINERS[kind](tmp_path / "run", config, evaluate=lambda: {"x": 1.0}, runtime=runtime)
    figures = last.fit()
    assert same_bits(weights(last), weights(calm))
    assert [s for s in runtime.progress.said if "goes on from step 8 of 12" in s] and figures["resumed"] == 3
    timing = ("seconds", "tokens_per_s", "gflops", "peak_rss_mb", "resumed")

    def story(lines):
        return [{k: v for k, v in line.items() if k not in timing} for line in lines]

    assert story(lines_of(tmp_path / "run")) == story(lines_of(tmp_path / "calm"))
    assert story([figures]) == story([calm_figures])
    again = TRAINERS[kind](tmp_path / "run", config, evaluate=lambda: pytest.fail("evaluated twice"))
    assert story([again.fit()]) == story([calm_figures]) and same_bits(weights(again), weights(calm))


def test_resumed_from_the_one_before_a_damaged_one(tmp_path):
    calm = full_trainer(tmp_path / "calm")
    calm.fit()
    trainer = full_trainer(tmp_path / "run")
    stop_after(trainer, 9)
    with pytest.raises(Killed):
        trainer.fit()
    newest = trainer.checkpoints.path(8) / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    runtime = quiet_runtime(progress=Listener())
    last = full_trainer(tmp_path / "run", runtime=runtime)
    last.fit()
    assert same_bits(weights(last), weights(calm))
    assert [bool("damaged" in s) for s in runtime.progress.said] == [True, False]


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(kind, number, tmp_path):
    calm = TRAINERS[kind](tmp_path / "calm", tiny_config())
    calm.fit()
    runtime = quiet_runtime(progress=Listener())
    trainer = TRAINERS[kind](tmp_path / "run", tiny_config(save_every=0), runtime=runtime)
    real, before = trainer.optimizer.step, signal.getsignal(number)

    def step(lr):
        if trainer.state.step == 6:
            os.kill(os.getpid(), number)
        real(lr)

    trainer.optimizer.step = step
    with pytest.raises(SystemExit) as caught:
        trainer.fit()
    assert caught.value.code == (0 if number == signal.SIGTERM else 130)
    assert signal.getsignal(number) is before
    assert trainer.checkpoints.steps() == [7]
    assert "after step 7 of 12" in runtime.progress.said[-1] and str(tmp_path / "run") in runtime.progress.said[-1]
    last = TRAINERS[kind](tmp_path / "run", tiny_config(save_every=0))
    last.fit()
    assert same_bits(weights(last), weights(calm))


def test_a_stop_at_an_evaluation_does_it_after_the_resume(tmp_path):
    calls = []

    def evaluate():
        calls.append(trainer.state.step)
        return {}

    def build():
        return full_trainer(tmp_path, tiny_config(eval_every=5), evaluate=evaluate)

    trainer = build()
    real = trainer.optimizer.step
    trainer.optimizer.step = lambda lr: (real(lr), trainer.state.step == 4 and os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        trainer.fit()
    assert calls == []
    trainer = build()
    trainer.fit()
    assert calls == [5, 10, 12]


def test_fit_works_in_a_thread(tmp_path):
    """Signals belong to the main thread; elsewhere they are left alone."""
    done = []
    thread = threading.Thread(target=lambda: done.append(full_trainer(tmp_path, tiny_config(steps=2)).fit()))
    thread.start()
    thread.join()
    assert done[0]["steps"] == 2


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_not_finite_is_named_saved_and_never_applied(kind, what, tmp_path, monkeypatch):
    trainer = TRAINERS[kind](tmp_path, tiny_config(save_every=3))
    real = trainer.objective.loss
    group = trainer.objective.group

    def loss(model, batch, adapters):
        value, figures = real(model, batch, adapters)
        if trainer.state.step == 4 and 2 in batch.rows:
            spoilt = value * (float("nan") if what == "loss" else 1.0)
            if what == "gradient" and spoilt.requires_grad:
                spoilt.register_hook(lambda grad: grad * float("inf"))
            return spoilt, figures
        return value, figures

    poisoned = type("Poisoned", (), {"loss": staticmethod(loss)})()
    for name in ("name", "group", "settings", "count"):
        setattr(poisoned, name, getattr(trainer.objective, name))
    trainer.objective = poisoned
    # Row 2 must be in step 5, wherever the loader's order has it.
    real_next = trainer.loader.next_step

    def next_step(count, *ranks):
        batches = real_next(count, *ranks)
        if trainer.state.step == 4:
            batches[0] = trainer.loader.dataset.batch([0, 1, 2, 3][: 2 * group])
            batches[1] = trainer.loader.dataset.batch([2, 3] if group == 2 else [2])
        return batches

    monkeypatch.setattr(trainer.loader, "next_step", next_step)
    with pytest.raises(TrainingError) as caught:
        trainer.fit()
    text = str(caught.value)
    assert f"{what} of step 5 is not finite" in text and "\n" not in text
    saved = [json.loads(line) for line in (tmp_path / "bad-step-000005.jsonl").read_text().splitlines()]
    assert {entry["row"] for entry in saved} >= {2}
    assert all(len(entry["token_ids"]) == len(entry["label_ids"]) for entry in saved)
    ids, _ = trainer.loader.dataset.row(2)
    assert next(entry for entry in saved if entry["row"] == 2)["token_ids"] == ids.tolist()
    if what == "loss":
        assert next(entry for entry in saved if entry["row"] == 2)["loss_alone"] == "nan"
        assert ("rows 2, 3" if group == 2 else "rows 2:") in text
    assert all(bool(torch.isfinite(p).all()) for p in trainer.parameters.values())
    assert trainer.checkpoints.steps() == [3]
    # The run that is given sound rows goes on from the last checkpoint as if nothing had been.
    calm = TRAINERS[kind](tmp_path.with_name("calm"), tiny_config())
    calm.fit()
    mended = TRAINERS[kind](tmp_path, tiny_config())
    mended.fit()
    assert same_bits(weights(mended), weights(calm))
    shutil.rmtree(tmp_path.with_name("calm"))


def test_a_full_disk_at_a_checkpoint_leaves_the_one_before(tmp_path, monkeypatch):
    trainer = full_trainer(tmp_path, tiny_config(save_every=4))
    real = os.fsync

    def fsync(descriptor):
        if trainer.state.step == 8:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(StorageFullError):
            trainer.fit()
    assert trainer.checkpoints.steps() == [4]
    calm = full_trainer(tmp_path / "calm")
    calm.fit()
    again = full_trainer(tmp_path)
    assert again.fit()["resumed"] == 1 and same_bits(weights(again), weights(calm))


def test_another_run_is_refused_by_name(tmp_path):
    trainer = full_trainer(tmp_path)
    stop_after(trainer, 5)
    with pytest.raises(Killed):
        trainer.fit()
    with pytest.raises(CheckpointError, match=r"config\.lr 0\.02") as caught:
        full_trainer(tmp_path, tiny_config(lr=2e-2)).fit()
    assert "wanted 0.01" in str(caught.value) and "remove" in str(caught.value)
    with pytest.raises(CheckpointError, match="starting weights"):
        full_trainer(tmp_path, model=tiny_model(seed=4)).fit()
    with pytest.raises(CheckpointError, match=r"objective dpo"):
        lora_dpo_trainer(tmp_path).fit()
    with pytest.raises(CheckpointError, match="data"):
        loader = Loader(tiny_dataset(seed=3), tokens_per_batch=64, seed=0)
        Trainer(tiny_model(), CausalLM(), loader, tiny_config(), runtime=quiet_runtime(), folder=tmp_path).fit()
    with pytest.raises(CheckpointError, match="dtype bfloat16"):
        full_trainer(tmp_path, runtime=quiet_runtime(dtype="bfloat16")).fit()
    assert full_trainer(tmp_path, tiny_config(log_every=1, save_every=0, keep=5)).fit()["resumed"] == 1


def test_the_same_object_does_not_train_twice_from_moved_weights(tmp_path):
    trainer = full_trainer(tmp_path, tiny_config(save_every=0))
    stop_after(trainer, 5)
    with pytest.raises(Killed):
        trainer.fit()
    with pytest.raises(CheckpointError, match="already been trained"):
        trainer.fit()


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    refused = []

    def evaluate():
        try:
            full_trainer(tmp_path).fit()
        except BusyError as error:
            refused.append(str(error))
        return {}

    full_trainer(tmp_path, evaluate=evaluate).fit()
    assert len(refused) == 1 and str(os.getpid()) in refused[0]


def one_row(length, token=1):
    mask = np.ones(length, bool)
    mask[0] = False
    return TokenDataset(np.full(length, token, np.uint32), mask, np.array([0, length], np.int64))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("long", "tokens_per_batch 20, wanted at least 30"),
        ("context", "70 tokens, wanted at most 64"),
        ("vocabulary", f"token id {VOCAB}, wanted below {VOCAB}"),
        ("pairs", "single rows"),
        ("loader", "another tokens_per_batch"),
        ("dtype", "float16"),
        ("ranks", "micro_batches 1 for 2 ranks, wanted at least 2"),
        ("rank", "none of the ranks"),
        ("bare", "2 of 41 rows have no supervised token: got rows 3, 40"),
        ("lr high", "moves each weight by more than it is: got lr 20, wanted"),
        ("lr low", "is lost in the rounding of float32: got lr 1e-12"),
        ("muon", "a step of it replaces the matrices: got 5.0"),
        ("best", "a best checkpoint needs evaluations"),
        ("weights", "float32"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(case, words, tmp_path):
    model, runtime, tokens_per_batch, made_for, dataset = tiny_model(), quiet_runtime(), 64, 64, tiny_dataset()
    adapter = None
    if case == "long":
        dataset, tokens_per_batch, made_for = one_row(30), 20, 20
    elif case == "context":
        dataset, tokens_per_batch, made_for = one_row(70), 100, 100
    elif case == "vocabulary":
        dataset = one_row(5, token=VOCAB)
    elif case == "pairs":
        dataset = tiny_dataset(group=2)
    elif case == "loader":
        made_for = 32
    elif case == "dtype":
        runtime = quiet_runtime(dtype="float16")
    elif case == "ranks":
        adapter, runtime = LoRA.create(model, LoRAConfig(rank=2, dropout=0.1)), quiet_runtime(world_size=2)
    elif case == "rank":
        runtime = quiet_runtime(rank=1)
    elif case == "weights":
        model = model.to(torch.bfloat16)
    elif case == "bare":
        mask = np.append(dataset.mask, [True, False, False])  # a row's first token is predicted by nothing
        mask[dataset.offsets[3] : dataset.offsets[4]] = False
        ids, offsets = np.append(dataset.ids, [1, 2, 3]).astype(np.uint32), [*dataset.offsets, len(mask)]
        dataset = TokenDataset(ids, mask, np.array(offsets))
    changes = {
        "lr high": {"lr": 20.0}, "lr low": {"lr": 1e-12}, "muon": {"optimizer": "muon", "muon_lr": 5.0},
        "best": {"keep_best": True},
    }  # fmt: skip
    settings = {"steps": 1, "tokens_per_batch": tokens_per_batch, "lr": 1e-3}
    config = TrainConfig(**{**settings, **changes.get(case, {})})
    loader = Loader(dataset, tokens_per_batch=made_for, seed=0)
    with pytest.raises(TrainingError) as caught:
        Trainer(model, CausalLM(), loader, config, runtime=runtime, folder=tmp_path, adapter=adapter)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapter_of_another_base_is_not_trained_here(tmp_path):
    adapter = LoRA.create(tiny_model(seed=5))
    loader = Loader(tiny_dataset(), tokens_per_batch=64, seed=0)
    with pytest.raises(AdapterError, match="stands on base"):
        Trainer(
            tiny_model(), CausalLM(), loader, tiny_config(), runtime=quiet_runtime(), folder=tmp_path, adapter=adapter
        )


@pytest.mark.parametrize("kind", TRAINERS)
def test_bfloat16_learns_about_the_same_with_float32_masters(kind, tmp_path):
    exact = TRAINERS[kind](tmp_path / "a", tiny_config(steps=8))
    rough = TRAINERS[kind](tmp_path / "b", tiny_config(steps=8), runtime=quiet_runtime(dtype="bfloat16"))
    one, other = exact.fit(), rough.fit()
    assert all(p.dtype == torch.float32 for p in rough.parameters.values())
    assert other["loss_last"] == pytest.approx(one["loss_last"], rel=0.05)
    assert other["loss_last"] != one["loss_last"]


def test_one_look_at_the_device_a_step(tmp_path, monkeypatch):
    """Each `.item()`, `float(tensor)` or `.tolist()` waits for the device; labels are counted on the CPU before."""
    trainer = full_trainer(tmp_path, tiny_config(steps=3, save_every=0))
    looks = []
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: looks.append(self.shape) or real(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("an extra look at the device"))
    trainer.fit()
    assert looks == [(2,)] * 3


def test_slow_saving_makes_saves_rarer(tmp_path):
    trainer = full_trainer(tmp_path, tiny_config(save_every_s=20.0))
    now = trainer_module.time.monotonic
    for cost_s, wait_s in ((0.1, 20), (10.0, 200)):
        before = now()
        trainer._plan_save(cost_s=cost_s)
        assert before + wait_s <= trainer._save_due_s <= now() + wait_s
    assert full_trainer(tmp_path, tiny_config(save_every_s=None))._save_due_s == math.inf


def test_a_signal_that_comes_while_the_ranks_meet_is_for_the_next_step(tmp_path):
    trainer = full_trainer(tmp_path, tiny_config(save_every=0))
    real, sent = trainer.ranks.most, []

    def most(values):
        answer = real(values)
        if trainer.state.step == 4 and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return answer

    trainer.ranks.most = most
    with pytest.raises(SystemExit):
        trainer.fit()
    assert trainer.checkpoints.steps() == [5], "the step after the signal is saved, and the last"
