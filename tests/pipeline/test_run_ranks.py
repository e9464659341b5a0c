"""One recipe in two processes, as torchrun starts them: what one process makes, made together."""

import multiprocessing
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_recipes import data_stages, learning, write_jsonl, write_recipe

from prairie.cli.main import main
from prairie.store.home import Home

pytestmark = pytest.mark.long

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["tiny_recipes", "prairie.cli.run", "prairie.flywheel.stages", "prairie.pipeline.report", "torch.distributed.fsdp"]
)


def recipe_of(folder: Path, steps: int = 8) -> Path:
    """A new model, its weights sharded, and an adapter on it; a step is one micro-batch."""
    stages = {
        **data_stages(folder),
        "base": learning(
            steps, data="chats", tokenizer="tokenizer", shape={"depth": 2, "dim": 32, "context": 128}, shard=True,
            evaluation={"every": 3, "keep_best": True}, lr=1e-3,
        ),
        "adapter": learning(steps, objective="dpo", data="pairs", start="base", adapter={"rank": 2}, lr=1e-3),
        "scores": {"kind": "evaluate", "models": ["adapter"], "preferences": ["pairs"], "reference": "base"},
    }  # fmt: skip
    return write_recipe(folder / "tiny.yaml", {"name": "tiny", "seed": 5, "stages": stages})


def one_of_them(recipe: Path, home: Path, rank: int, ranks: int, port: int, words: tuple[str, ...]) -> None:
    """`prairie run` in a process that has been told what torchrun tells."""
    told = {
        "RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in told.items()}
    sys.stdout = open(home.with_suffix(f".out{rank}"), "w")  # noqa: SIM115
    sys.stderr = open(home.with_suffix(f".said{rank}"), "w")  # noqa: SIM115
    sys.argv = ["prairie", "run", str(recipe), "--home", str(home), "--threads", "1", *words]
    main(sys.argv[1:])


def started(recipe: Path, home: Path, ranks: int = 2, *words: str) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        PROCESSES.Process(target=one_of_them, args=(recipe, home, rank, ranks, port, words)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def ended(processes: list[Any], home: Path) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    for process in processes:
        process.join(150)
    return [
        (process.exitcode, *(home.with_suffix(f".{what}{rank}").read_text() for what in ("out", "said")))
        for rank, process in enumerate(processes)
    ]


def weights_of(home: Path, name: str):
    with Home(home) as opened:
        (artifact,) = [a for a in opened.artifacts.list() if a.name == name]
        opened.artifacts.verify(artifact.id)
        (path,) = artifact.path.glob("*.safetensors")
        return artifact, load_file(path)


@pytest.mark.slow
def test_two_processes_make_what_one_makes(tmp_path):
    recipe = recipe_of(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    told = ended(started(recipe, one, 1), one)
    assert told[0][0] == 0, told
    told = ended(started(recipe, two), two)
    assert [code for code, *_ in told] == [0, 0], told
    assert told[0][1] and told[1][1:] == ("", ""), "only the first process tells"
    for name in ("base", "adapter"):
        (mine, weights), (theirs, others) = weights_of(one, name), weights_of(two, name)
        assert mine.id == theirs.id and weights.keys() == others.keys()
        assert (theirs.figures["processes"], mine.figures.get("processes")) == (2, None)
        assert theirs.figures["loss_last"] == pytest.approx(mine.figures["loss_last"], rel=1e-5)
        assert (
            theirs.figures["tokens"] == mine.figures["tokens"]
            and theirs.figures["best_step" if name == "base" else "steps"]
        )
        for key, weight in weights.items():
            assert float((others[key] - weight).abs().max()) < 1e-4, key
    assert list((two / "work").iterdir()) == [] and list((two / "tmp").iterdir()) == []
    # Again: all is there, for both of them.
    told = ended(started(recipe, two, 2, "--json"), two)
    assert [code for code, *_ in told] == [0, 0] and told[0][1].count('"reused": true') == 6 and told[1][1] == "", told


@pytest.mark.slow
def test_a_stop_and_a_kill_of_one_end_both_and_one_process_goes_on(tmp_path):
    recipe, home = recipe_of(tmp_path, steps=3000), tmp_path / "home"

    def told() -> int:
        return sum(path.read_bytes().count(b"\n") for path in home.glob("work/*/metrics.jsonl"))

    def some_steps_of(processes: list[Any]) -> list[Any]:
        before, deadline = told(), time.monotonic() + 100
        while told() < before + 2 and time.monotonic() < deadline and processes[0].is_alive():
            time.sleep(0.01)
        return processes

    processes = some_steps_of(started(recipe, home))
    os.kill(processes[1].pid, signal.SIGTERM)
    said = ended(processes, home)
    assert [code for code, *_ in said] == [0, 0], said
    assert "go on with: torchrun --nproc-per-node 2 -m prairie run" in said[0][2] and said[1][2] == ""
    processes = some_steps_of(started(recipe, home))
    processes[0].kill()
    said = ended(processes, home)
    assert said[0][0] == -9 and said[1][0] == 1
    assert said[1][2].startswith("error: rank 1 has lost the others") and said[1][2].count("\n") == 1, said[1]
    # One process goes on with what two have begun, its weights unsharded.
    (process,) = some_steps_of(started(recipe, home, 1, "base.shard=false"))
    process.terminate()
    ((code, _, said_last),) = ended([process], home)
    assert code == 0 and "base: goes on from step" in said_last, said_last


def test_what_fails_in_the_first_process_is_said_by_both(tmp_path):
    recipe = recipe_of(tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b"}] * 5)
    told = ended(started(recipe, tmp_path / "home"), tmp_path / "home")
    assert [code for code, *_ in told] == [1, 1], told
    assert "error: " in told[0][2] and "rank" not in told[0][2]
    assert told[1][2].startswith("error: rank 1 ends, as rank 0 has failed: got ") and told[1][2].count("\n") == 1, told


@pytest.mark.slow
def test_processes_that_the_command_starts_stop_with_it_and_go_on(tmp_path):
    recipe, home = recipe_of(tmp_path, steps=40), tmp_path / "home"
    words = ["run", str(recipe), "--home", str(home), "--threads", "1", "--processes", "2"]
    process = subprocess.Popen([sys.executable, "-m", "prairie", *words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not any(path.stat().st_size for path in home.glob("work/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 0, said
    command = shlex.split(said.rpartition("go on with: ")[2].strip())
    assert command == ["prairie", *words], said
    again = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=200)
    assert again.returncode == 0 and "base: goes on from step" in again.stderr, again.stderr
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b"}] * 5)
    broken = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=200)
    assert broken.returncode == 1 and "Traceback" not in broken.stderr, broken.stderr
