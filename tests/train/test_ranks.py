"""Two processes that share a training: they make the run of one, also through kills and stops."""

import multiprocessing
import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_kill import losses_of, steps_told
from tiny_runs import RUNS, quiet_runtime, run_to_the_end, tiny_config

from prairie.errors import TrainingError
from prairie.train.checkpoint import Checkpoints
from prairie.train.ranks import Ranks

pytestmark = pytest.mark.long

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "torch.distributed", "tiny_runs"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(kind: str, folder: Path, config, ranks: int = 2):
    """The processes of one training, started."""
    port = free_port()
    processes = [
        PROCESSES.Process(target=run_to_the_end, args=(kind, folder, config, None, rank, ranks, port))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def ended(processes) -> list[int]:
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def wait_for(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while steps_told(folder) < step and time.monotonic() < deadline:
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("kind", "shard"),
    [
        ("lora_dpo", False),
        pytest.param("sft", False, marks=pytest.mark.slow),
        pytest.param("sft", True, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_train_as_one_does_and_survive_a_kill(kind, shard, tmp_path):
    """Also with dropout: what a micro-batch draws is its own. The first rank alone writes."""
    config = tiny_config(steps=24, log_every=1, save_every=3, micro_batches=3, shard=shard)
    run_to_the_end(kind, tmp_path / "one", replace(config, shard=False))
    assert ended(together(kind, tmp_path / "two", config)) == [0, 0]
    one, two = (load_file(tmp_path / name / "final.safetensors") for name in ("one", "two"))
    start = {name: p.detach() for name, p in RUNS[kind](tmp_path / "start", config).parameters.items()}
    for name, weight in one.items():
        assert float((two[name] - weight).norm() / (weight - start[name]).norm()) < 1e-3, name
    for mine, theirs in zip(losses_of(tmp_path / "one"), losses_of(tmp_path / "two"), strict=True):
        assert theirs == pytest.approx(mine, rel=5e-3)  # Adam makes more of what rounding leaves
    other = load_file(tmp_path / "two" / "final-rank1.safetensors")
    assert all((other[name] == two[name]).all() for name in two), "the ranks end with the same bits"
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 24, "only the first rank tells"
    # Killed in the middle, both; and again, only one of them, which the other notices.
    processes = together(kind, tmp_path / "run", config)
    wait_for(tmp_path / "run", 7)
    for process in processes:
        process.kill()
    assert ended(processes) == [-9, -9]
    processes = together(kind, tmp_path / "run", config)
    wait_for(tmp_path / "run", 15)
    processes[1].kill()
    assert ended(processes) == [1, -9]
    assert ended(together(kind, tmp_path / "run", config)) == [0, 0]
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "two")
    again = load_file(tmp_path / "run" / "final.safetensors")
    assert all((again[name] == two[name]).all() for name in two)


def test_a_signal_to_one_rank_stops_all_after_the_step(tmp_path):
    config = tiny_config(steps=4000, log_every=1, save_every=0, micro_batches=2)
    processes = together("sft", tmp_path / "run", config)
    wait_for(tmp_path / "run", 5)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert ended(processes) == [0, 0]
    (step,) = Checkpoints(tmp_path / "run" / "checkpoints").steps()
    assert 5 <= step < 4000 and steps_told(tmp_path / "run") == step


def test_one_process_is_a_rank_alone():
    alone = Ranks()
    assert alone.leads and alone.total([1.0, 2.0]) == [1.0, 2.0] and alone.first_says(lambda: {"a": 1}) == {"a": 1}
    alone.require_same("anything", "thing")


def test_a_rank_that_knows_nobody_says_so(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TrainingError, match="start the processes with torchrun"):
        Ranks.join(quiet_runtime(rank=1, world_size=2))
