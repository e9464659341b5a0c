"""Real processes, really killed: SIGKILL at random moments, and the final weights have the bits of a calm run."""

import json
import multiprocessing
import random
import time
from pathlib import Path

import pytest
from tiny_runs import run_to_the_end, tiny_config

from prairie.train.trainer import TrainConfig

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


def killed_and_calm(kind: str, folder: Path, config: TrainConfig, kills: int, seed: int) -> tuple[bytes, bytes, str]:
    """Final weights of a run killed `kills` times and of one never killed, and what the first one said."""
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
    return finish(kind, run, config), calm, run.with_suffix(".said").read_text()


@pytest.mark.parametrize("kind", ["full", "lora_dpo"])
def test_killed_twice_is_never_killed(kind, tmp_path):
    config = tiny_config(steps=40, log_every=1, save_every=2, micro_batches=1)
    run, calm, said = killed_and_calm(kind, tmp_path, config, kills=2, seed=1)
    assert run == calm
    assert said.count("goes on from step") >= 1, said


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora_dpo"])
@pytest.mark.parametrize("save_every", [1, 7])
def test_killed_a_dozen_times_is_never_killed(kind, save_every, tmp_path):
    config = tiny_config(steps=200, log_every=1, save_every=save_every)
    run, calm, _ = killed_and_calm(kind, tmp_path, config, kills=12, seed=save_every)
    assert run == calm
