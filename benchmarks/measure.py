"""How a benchmark measures: each side in a process of its own, by turns, medians, one JSON object at the end.

    {"benchmark", "machine", "revision", "rows": [{"case", "ours", "peer_name", "peer", "unit", "ratio",
     "ours_rss_mb", "peer_rss_mb", "repeats", "others_cpu"}]}

`ratio` above 1 means that ours is better, also where the unit is seconds. Memory is the largest resident set of the
process while it was measured, libraries included. `others_cpu` is the share of the machine that other processes took
meanwhile: above 0.1 a row is noisy. What else a side tells (padding, loss, spread) stands under `about`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Found = dict[str, Any]
"""What one side measured once: `rate` in the case's unit, `rss_mb`, and whatever else it tells."""


@dataclass(frozen=True)
class Case:
    """One row: two sides that do the same work. Each is called in a process of its own, with `quick`."""

    name: str
    peer_name: str
    unit: str
    ours: Callable[[bool], Found]
    peer: Callable[[bool], Found]
    lower_is_better: bool = False
    required: float | None = None
    """The ratio that was promised; None where nothing was."""


def run(benchmark: str, cases: Sequence[Case], repeats: int = 3) -> None:
    """The command line of a benchmark: `[--quick] [--case CASE] [--repeats N] [--json]`.

    `--quick` is one repeat of little work: a direction, not a claim.
    """
    named = {case.name: case for case in cases}
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{benchmark}")
    parser.add_argument("--quick", action="store_true", help="one repeat, little work")
    parser.add_argument("--case", choices=list(named), action="append", help="only this one; may be given again")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--side", choices=["ours", "peer"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    chosen = [named[name] for name in args.case or named]
    if args.side:
        print(json.dumps(getattr(chosen[0], args.side)(args.quick)))
        return
    rows = [_row(f"benchmarks.{benchmark}", case, args.quick, args.repeats) for case in chosen]
    _report(benchmark, rows, args.json)


def timed(step: Callable[[], int], seconds: float) -> Found:
    """Units a second of `step` (which returns how many units it did), after two steps of warming up."""
    step()
    step()
    forget_peak()
    rates = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(rates) < 3:
        began = time.perf_counter()
        units = step()
        rates.append(units / (time.perf_counter() - began))
    return {"rate": statistics.median(rates), "steps": len(rates), "rss_mb": peak_rss_mb()}


def forget_peak() -> None:
    """The measured part begins: the high-water mark of memory starts anew from what is resident now."""
    with suppress(OSError):  # the mark then is that of the whole process, which is never less
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_mb() -> float:
    """The largest resident set since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


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


def _row(module: str, case: Case, quick: bool, repeats: int) -> dict[str, Any]:
    """Both sides by turns, medians. A side that fails, or a peer that is missing, is named as missing."""
    found: dict[str, list[Found]] = {"ours": [], "peer": []}
    others = []
    for _ in range(1 if quick else repeats):
        for which, results in found.items():
            before = _cpu()
            results.append(_side(module, which, case.name, quick))
            others.append(_others(before))
    row: dict[str, Any] = {"case": case.name, "peer_name": case.peer_name, "unit": case.unit}
    row["repeats"] = len(found["ours"])
    missing = [f"{which}: {one['missing']}" for which, ones in found.items() for one in ones if "missing" in one]
    if missing:
        return {**row, "ours": None, "peer": None, "ratio": None, "missing": missing[0]}
    mine, theirs = (statistics.median(one["rate"] for one in ones) for ones in found.values())
    about = {which: {k: v for k, v in ones[-1].items() if k not in ("rate", "rss_mb")} for which, ones in found.items()}
    about["rates"] = {which: [_short(one["rate"]) for one in ones] for which, ones in found.items()}
    return {
        **row,
        "ours": _short(mine),
        "peer": _short(theirs),
        "ratio": round(theirs / mine if case.lower_is_better else mine / theirs, 3),
        **({} if case.required is None else {"required": case.required}),
        "ours_rss_mb": round(max(one["rss_mb"] for one in found["ours"])),
        "peer_rss_mb": round(max(one["rss_mb"] for one in found["peer"])),
        "others_cpu": round(max(others), 3),
        "about": about,
    }


def _side(module: str, which: str, case: str, quick: bool) -> Found:
    """Runs `python -m MODULE --side WHICH --case CASE` and reads the object it prints."""
    command = [sys.executable, "-m", module, "--side", which, "--case", case] + (["--quick"] if quick else [])
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env={**offline, **os.environ})
    if done.returncode:
        return {"missing": (done.stderr.strip().splitlines() or ["no reason given"])[-1]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _report(benchmark: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    """Prints the object, or a line a row."""
    if as_json:
        print(json.dumps({"benchmark": benchmark, "machine": machine(), "revision": revision(), "rows": rows}))
        return
    for row in rows:
        print(f"{benchmark} {row['case']}: " + (
            f"missing, {row['missing']}" if "missing" in row else
            f"ours {row['ours']} {row['unit']}, {row['peer_name']} {row['peer']}, ratio {row['ratio']}, "
            f"memory {row['ours_rss_mb']} / {row['peer_rss_mb']} MB, others_cpu {row['others_cpu']}"
        ))  # fmt: skip


def _short(value: float) -> float:
    """Four digits that mean something."""
    return float(f"{value:.4g}")


def _cpu() -> tuple[float, float, float]:
    with open("/proc/stat", encoding="utf-8") as stream:
        fields = [int(field) for field in stream.readline().split()[1:9]]
    own = os.times()
    ticks = (own.user + own.system + own.children_user + own.children_system) * os.sysconf("SC_CLK_TCK")
    return sum(fields) - fields[3] - fields[4], sum(fields), ticks


def _others(before: tuple[float, float, float]) -> float:
    busy, total, own = (now - then for then, now in zip(before, _cpu(), strict=True))
    return max(0.0, (busy - own) / max(1.0, total))
