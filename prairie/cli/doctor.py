"""`prairie doctor`: what this machine has, and what will be fast on it."""

from __future__ import annotations

import os
import platform
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from prairie.cli.options import HomeOption, JsonOption, ThreadsOption, emit

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")


def doctor(
    threads: ThreadsOption = None,
    port: Annotated[int, typer.Option(help="The port that a server would take.")] = 8000,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look at this machine: what it has, what will be fast."""
    found = examine(home, threads, port)
    emit(found, as_json, lambda: "\n".join(f"{name:<22} {_shown(value)}" for name, value in found.items()))


def examine(home: Path | None, threads: int | None, port: int) -> dict[str, Any]:
    """Facts and short measurements (about two seconds in all)."""
    import torch

    from prairie.errors import BusyError
    from prairie.pipeline.publishing import check_port
    from prairie.runtime import BFLOAT16_GAIN, Runtime, gemm_flops, usable_cores
    from prairie.store.home import default_home
    from prairie.train.memory import machine_memory_mb

    runtime = Runtime.detect(threads=threads)
    float32, bfloat16 = (gemm_flops(dtype, seconds=0.4) / 1e9 for dtype in ("float32", "bfloat16"))
    root = home or default_home()
    try:
        check_port("127.0.0.1", port)
        free = True
    except BusyError:
        free = False
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": runtime.device,
        "cores": usable_cores(),
        "threads": runtime.threads,
        "load": round(os.getloadavg()[0], 2),
        "memory_mb": machine_memory_mb(),
        "instructions": _instructions(),
        "matmul_float32_gflops": round(float32, 1),
        "matmul_bfloat16_gflops": round(bfloat16, 1),
        "read_gb_per_s": round(read_bandwidth(), 1),
        "fast_dtype": "bfloat16" if bfloat16 > BFLOAT16_GAIN * float32 else "float32",
        "home": str(root),
        "disk_free_gb": round(shutil.disk_usage(_existing(root)).free / 1e9, 1),
        f"port_{port}_free": free,
    }


def read_bandwidth(megabytes: int = 256, seconds: float = 0.4) -> float:
    """GB/s of summing an array that no cache holds."""
    import torch

    data = torch.ones(megabytes * 2**20 // 4)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - began)
    return megabytes * 2**20 / best / 1e9


def _instructions() -> str:
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return "unknown"
    return " ".join(flag for flag in FLAGS if flag in words) or "none of note"


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _shown(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
