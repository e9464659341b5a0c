"""How a benchmark measures: each side in a process of its own, by turns, medians, one JSON object at the end.

    {"benchmark", "machine", "revision", "rows": [{"case", "ours", "peer_name", "peer", "unit", "ratio",
     "ours_rss_mb", "peer_rss_mb", "repeats", "others_cpu"}]}

`ratio` above 1 means that ours is better. `others_cpu` is the share of the machine that other processes took meanwhile:
above 0.1 a row is noisy.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def side(module: str, which: str, case: str, quick: bool) -> dict[str, Any]:
    """Runs `python -m MODULE --side WHICH --case CASE` and reads the object it prints."""
    command = [sys.executable, "-m", module, "--side", which, "--case", case] + (["--quick"] if quick else [])
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"missing": (done.stderr.strip().splitlines() or ["no reason given"])[-1]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def compare(module: str, case: str, peer_name: str, unit: str, quick: bool, repeats: int = 3) -> dict[str, Any]:
    """One row: both sides by turns, `repeats` times each, medians. A peer that is missing is named as missing."""
    ours, peers, others = [], [], []
    for _ in range(1 if quick else repeats):
        for found, which in ((ours, "ours"), (peers, "peer")):
            before = _cpu()
            found.append(side(module, which, case, quick))
            others.append(_others(before))
    row: dict[str, Any] = {"case": case, "peer_name": peer_name, "unit": unit, "repeats": len(ours)}
    missing = next((one["missing"] for one in (*ours, *peers) if "missing" in one), None)
    if missing:
        return {**row, "ours": None, "peer": None, "ratio": None, "missing": missing}
    mine, theirs = (statistics.median(one["rate"] for one in found) for found in (ours, peers))
    return {
        **row,
        "ours": round(mine, 1),
        "peer": round(theirs, 1),
        "ratio": round(mine / theirs, 3),
        "ours_rss_mb": round(max(one["rss_mb"] for one in ours)),
        "peer_rss_mb": round(max(one["rss_mb"] for one in peers)),
        "others_cpu": round(max(others), 3),
    }


def report(benchmark: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    """Prints the object, or a line a row."""
    found = {"benchmark": benchmark, "machine": machine(), "revision": revision(), "rows": rows}
    if as_json:
        print(json.dumps(found))
        return
    for row in rows:
        print(f"{benchmark} {row['case']}: ours {row['ours']} {row['unit']}, {row['peer_name']} {row['peer']}, "
              f"ratio {row['ratio']}, others_cpu {row.get('others_cpu')}")  # fmt: skip


def timed(step: Callable[[], int], seconds: float) -> dict[str, Any]:
    """Units a second of `step` (which returns how many units it did), after two steps of warming up."""
    step()
    step()
    rates = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(rates) < 3:
        began = time.perf_counter()
        units = step()
        rates.append(units / (time.perf_counter() - began))
    rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rate": statistics.median(rates), "steps": len(rates), "rss_mb": rss_mb}


def machine() -> str:
    """Processor, cores, memory, Python and torch, in one line."""
    import torch

    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
    cores = os.cpu_count()
    return f"{name}, {cores} cores, {memory} GiB, Python {platform.python_version()}, torch {torch.__version__}"


def revision() -> str:
    """The commit that was measured."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _cpu() -> tuple[float, float, float]:
    with open("/proc/stat", encoding="utf-8") as stream:
        fields = [int(field) for field in stream.readline().split()[1:9]]
    own = os.times()
    ticks = (own.user + own.system + own.children_user + own.children_system) * os.sysconf("SC_CLK_TCK")
    return sum(fields) - fields[3] - fields[4], sum(fields), ticks


def _others(before: tuple[float, float, float]) -> float:
    busy, total, own = (now - then for then, now in zip(before, _cpu(), strict=True))
    return max(0.0, (busy - own) / max(1.0, total))
