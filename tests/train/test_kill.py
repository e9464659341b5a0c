"""Real processes, really killed: SIGKILL at random moments, and the final weights have the bits of a calm run."""

import json
import multiprocessing
import random
import time
from pathlib import Path

import pytest
from tiny_runs import RUNS, run_to_the_end, tiny_config

from prairie.train.trainer import TrainConfig

pytestmark = pytest.mark.long

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "prairie.train.trainer", "prairie.train.objectives.dpo"])


def start(kind: str, folder: Path, config: TrainConfig):
    process = PROCESSES.Process(target=run_to_the_end, args=(kind, folder, config))
    process.start()
    return process


def finish(kind: str, folder: Path, config: TrainConfig) -> bytes:
    process = start(kind, folder, config)
    process.join(120)
    assert process.exitcode == 0
    return (folder / "final.safetensors").read_bytes()


def steps_told(folder: Path) -> int:
    """The last whole line of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return json.loads(whole[-1])["step"] if whole else 0


def kill_somewhere(process, folder: Path, after_step: int, rng: random.Random) -> None:
    """SIGKILL a little after the run has told of step `after_step`: in a step, in a save, between them."""
    deadline = time.monotonic() + 60
    while steps_told(folder) < after_step and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(rng.random() * 0.03)
    process.kill()
    process.join()


def losses_of(folder: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every step, to the last bit."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def killed_and_calm(kind: str, folder: Path, config: TrainConfig, kills: int, seed: int) -> str:
    """A run killed `kills` times against one never killed: every loss and the final weights. Gives what it said."""
    rng = random.Random(seed)
    calm = finish(kind, folder / "calm", config)
    run = folder / "run"
    done = 0
    while done < kills:
        share = (done + 0.2 + 0.7 * rng.random()) / kills
        process = start(kind, run, config)
        kill_somewhere(process, run, max(1, int(share * config.steps)), rng)
        assert process.exitcode == -9, "the run ended before it was killed: raise steps"
        done += 1
    assert finish(kind, run, config) == calm
    assert losses_of(run) == losses_of(folder / "calm")
    return run.with_suffix(".said").read_text()


@pytest.mark.parametrize("kind", ["pretrain", "sft", "lora", "dpo"])
def test_killed_is_never_killed(kind, tmp_path):
    config = tiny_config(steps=30, log_every=1, save_every=2, micro_batches=2)
    said = killed_and_calm(kind, tmp_path, config, kills=1, seed=1)
    assert said.count("goes on from step") >= 1, said


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({*RUNS} - {"full"}))
def test_killed_at_twenty_points_is_never_killed(kind, tmp_path):
    """Packed rows, two micro-batches to a step, a checkpoint every 3rd; in a step, in a save, between them."""
    config = tiny_config(steps=300, log_every=1, save_every=3, micro_batches=2)
    said = killed_and_calm(kind, tmp_path, config, kills=20, seed=len(kind))
    assert said.count("goes on from step") >= 19, said
