"""Whether a model fits into this machine's memory, asked before it is read.

Not here: reading a model, who is in memory and how long (`models`).
"""

from __future__ import annotations

import gc
from pathlib import Path

from prairie.errors import ModelError


class DoesNotFit(ModelError):
    """The weights are larger than the memory that is free."""

    http_status = 503
    code = "out_of_memory"


def check_fits(folder: Path) -> None:
    """Raises DoesNotFit if the weight files of a model folder are larger than the free memory."""
    weights, free = sum(file.stat().st_size for file in folder.glob("*.safetensors")), free_bytes()
    if free is not None and weights > free:
        raise DoesNotFit(
            f"{folder.name} does not fit into memory", got=f"{weights / 2**20:,.0f} MiB of weights",
            wanted=f"at most {free / 2**20:,.0f} MiB, which are free", mend="end other programs or serve less",
        )  # fmt: skip


def settle() -> None:
    """All that is in memory now stays for as long as the server: the collector need not walk through it again. Walking
    through the libraries alone stops every thread for a tenth of a second."""
    gc.collect()
    gc.freeze()


def free_bytes() -> int | None:
    """What programs may still take, by the kernel and by this process's control group; None where it is not told."""
    known = [value for value in (_available(), _left_in_group()) if value is not None]
    return min(known, default=None)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _left_in_group() -> int | None:
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        # Files that were read lately count as used, and are given up when memory is short.
        cached = next(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text(encoding="ascii").splitlines()
            if line.startswith("file ")
        )
    except (OSError, ValueError, StopIteration):
        return None
    return limit - used + cached
