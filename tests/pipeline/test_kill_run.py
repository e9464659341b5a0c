"""`prairie run`, really killed at random moments and called again: every product has the bits of a calm run."""

import multiprocessing
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_recipes import contents, prairie_run, training_recipe, write_recipe

pytestmark = pytest.mark.long

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["tiny_recipes", "prairie.cli.run", "prairie.flywheel.stages", "prairie.pipeline.report"]
)


def start(recipe: Path, home: Path):
    process = PROCESSES.Process(target=prairie_run, args=(recipe, home))
    process.start()
    return process


def finish(recipe: Path, home: Path) -> dict:
    process = start(recipe, home)
    process.join(200)
    assert process.exitcode == 0, home.with_suffix(".said").read_text()
    return contents(home)


def progress(home: Path, steps: int) -> float:
    """Products that stand, plus the share of steps that the one in work has told of."""
    made = len(list((home / "artifacts").glob("*"))) if home.exists() else 0
    told = [path.read_bytes().count(b"\n") for path in home.glob("work/*/metrics.jsonl")]
    return made + min(0.99, max(told, default=0) / (steps + 1))


def kill_at(process, home: Path, point: float, steps: int, rng: random.Random) -> None:
    deadline = time.monotonic() + 120
    while progress(home, steps) < point and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.003)
    time.sleep(rng.random() * 0.04)
    process.kill()
    process.join()


def killed_and_calm(folder: Path, kills: int, steps: int, seed: int) -> tuple[dict, dict, str]:
    recipe = write_recipe(folder / "tiny.yaml", training_recipe(folder, steps))
    rng = random.Random(seed)
    home = folder / "killed"
    for number in range(kills):
        process = start(recipe, home)
        stage = 3 + 4 * number // kills  # of the four that train
        kill_at(process, home, stage + 0.3 + 0.4 * rng.random(), steps, rng)
        assert process.exitcode == -9, "the run ended before it was killed"
    killed = finish(recipe, home)
    assert list((home / "tmp").iterdir()) == [] and list((home / "work").iterdir()) == []
    return killed, finish(recipe, folder / "calm"), home.with_suffix(".said").read_text()


@pytest.mark.slow
def test_a_run_killed_three_times_is_never_killed(tmp_path):
    killed, calm, said = killed_and_calm(tmp_path, kills=3, steps=12, seed=1)
    assert killed == calm and len(calm) == 7
    assert {"model.safetensors", "adapter_model.safetensors"} <= {name for files in calm.values() for name in files}
    assert "goes on from step" in said, said


@pytest.mark.slow
def test_a_run_killed_ten_times_is_never_killed(tmp_path):
    killed, calm, said = killed_and_calm(tmp_path, kills=10, steps=30, seed=2)
    assert killed == calm and len(calm) == 7
    assert said.count("goes on from step") >= 2, said


def test_a_run_that_is_asked_to_stop_says_the_command_that_goes_on(tmp_path):
    """SIGTERM: the step is finished and saved, exit 0; the command that it printed makes what a calm run makes."""
    recipe = write_recipe(tmp_path / "tiny.yaml", training_recipe(tmp_path, 30))
    words = ["run", str(recipe), "--home", str(tmp_path / "stopped"), "--threads", "1", "--no-serve"]
    process = subprocess.Popen([sys.executable, "-m", "prairie", *words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while progress(tmp_path / "stopped", 3) < 3.2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0, said
    command = said.rpartition("go on with: ")[2].strip()
    assert shlex.split(command) == ["prairie", *words], said
    again = subprocess.run([sys.executable, "-m", *shlex.split(command)], capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert contents(tmp_path / "stopped") == finish(recipe, tmp_path / "calm")
