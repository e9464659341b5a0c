"""FSDP2: ranks that keep a part of the model each make the run of one process that keeps all of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_ranks import PROCESSES, ended, free_port
from tiny_runs import full_trainer, quiet_runtime, run_to_the_end, tiny_config, tiny_model

from prairie.errors import TrainingError
from prairie.models.lora import LoRA, LoRAConfig

pytestmark = pytest.mark.long
MOST = 1e-5
CONFIG = tiny_config(steps=12, log_every=1, save_every=4, keep=9, micro_batches=3, lr=3e-3, eps=1e-3, clip_norm=0.5)
SHARDED = tiny_config(**{**CONFIG.__dict__, "shard": True})
KINDS = ("sft", "dpo", "masked_lm")


def beginning(of: Path, folder: Path) -> Path:
    """A folder that holds another run's checkpoint of step 4."""
    shutil.copytree(of / "checkpoints" / "step-000000004", folder / "checkpoints" / "step-000000004")
    return folder


def whole_runs(folder: Path, rank: int, ranks: int, port: int) -> None:
    """One of the processes: some runs from their start, and one that goes on with what an unsharded run has begun."""
    for kind in KINDS:
        run_to_the_end(kind, folder / f"{kind}-{ranks}", SHARDED, None, rank, ranks, port)
    more = tiny_config(**{**SHARDED.__dict__, "activation_checkpointing": True})
    run_to_the_end("sft", folder / f"resumed-{ranks}", more, None, rank, ranks, port)
    keeps = tiny_config(**{**SHARDED.__dict__, "eval_every": 2, "keep_best": True})
    trainer = full_trainer(folder / f"kept-{ranks}", keeps, runtime=quiet_runtime(rank=rank, world_size=ranks))
    scores = iter([1.0, 3.0, 2.0, 2.5, 2.0, 1.0])
    seen: list[float] = []

    def evaluate() -> dict[str, float]:
        seen.append(float(trainer.model.embed.detach().double().sum()))  # only rank 0 is asked, and its model is whole
        return {"score": next(scores)}

    trainer.evaluate = evaluate
    figures = trainer.fit()
    held = sum(p.to_local().numel() for p in trainer.model.parameters())
    moments = sum(t.numel() for name, t in trainer.optimizer.tensors().items() if name != "step")
    (folder / f"held-{ranks}-{rank}.json").write_text(json.dumps([held, moments, figures["trained_parameters"]]))
    with trainer.whole_model():
        found = float(trainer.model.embed.detach().double().sum())
    if rank == 0:
        (folder / f"kept-{ranks}" / "sums.json").write_text(json.dumps([found, seen]))


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_sharded_is_unsharded(ranks, tmp_path):
    """Losses, gradient norms (clipped), weights; three micro-batches for two ranks; a checkpoint of either way is one
    of the other; each rank holds its part only, of weights and moments."""
    for kind in KINDS:
        run_to_the_end(kind, tmp_path / kind, CONFIG)
    beginning(tmp_path / "sft", tmp_path / f"resumed-{ranks}")
    port = free_port()
    processes = [PROCESSES.Process(target=whole_runs, args=(tmp_path, rank, ranks, port)) for rank in range(ranks)]
    for process in processes:
        process.start()
    assert ended(processes) == [0] * ranks
    run_to_the_end("sft", beginning(tmp_path / f"sft-{ranks}", tmp_path / "back"), CONFIG)
    for kind, run in [*((kind, f"{kind}-{ranks}") for kind in KINDS), ("sft", f"resumed-{ranks}"), ("sft", "back")]:
        same_run(tmp_path / kind, tmp_path / run)
    kept, seen = json.loads((tmp_path / f"kept-{ranks}" / "sums.json").read_text())
    assert len(seen) == 6 and kept == seen[1] and len(set(seen)) == 6, "the weights of the second evaluation"
    whole = sum(p.numel() for p in tiny_model().parameters())
    told = [json.loads((tmp_path / f"held-{ranks}-{rank}.json").read_text()) for rank in range(ranks)]
    assert sum(held for held, _, _ in told) == whole and max(held for held, _, _ in told) < 1.05 * whole / ranks
    assert all((moments, trained) == (2 * held, whole) for held, moments, trained in told)


def same_run(one: Path, other: Path) -> None:
    mine, theirs = (load_file(run / "final.safetensors") for run in (one, other))
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        torch.testing.assert_close(theirs[name], weight, rtol=MOST, atol=MOST, msg=lambda m, n=name: f"{n}: {m}")
    for mine, theirs in zip(lines_of(one, 4), lines_of(other, 4), strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=MOST)
        assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-4)
        assert [theirs[name] for name in ("step", "tokens", "lr")] == [mine[name] for name in ("step", "tokens", "lr")]


def lines_of(run: Path, after: int) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"] > after]


@pytest.mark.parametrize("case", ["adapter", "muon"])
def test_what_is_not_sharded_is_refused(case, tmp_path):
    model = tiny_model()
    more = {"adapter": LoRA.create(model, LoRAConfig(rank=4), seed=1)} if case == "adapter" else {}
    config = tiny_config(shard=True, optimizer="muon" if case == "muon" else "adamw")
    with pytest.raises(TrainingError, match="`shard` is for whole models" if case == "adapter" else "got muon"):
        full_trainer(tmp_path, config, model=model, **more)
