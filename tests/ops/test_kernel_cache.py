"""Kernels that are kept on disk are stale as soon as anything changes that was compiled into them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import prairie.ops
from prairie.ops import kernel_cache

ROOM = Path(prairie.ops.__file__).parent
KEPT = {
    path.stem: path for path in ROOM.glob("*.py") if "revision(" in path.read_text() and path.stem != "kernel_cache"
}


def imported(name: str) -> set[str]:
    """Files of the room that a file is made of, itself among them."""
    found = {name}
    for node in ast.walk(ast.parse((ROOM / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prairie.ops."):
            found |= imported(node.module.rsplit(".", 1)[1]) if not node.module.endswith("kernel_cache") else set()
    return found


@pytest.mark.parametrize("name", sorted(KEPT))
def test_a_kernel_closes_over_all_that_it_is_made_of(name):
    calls = [
        {constant.value for constant in node.args}
        for node in ast.walk(ast.parse(KEPT[name].read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "revision"
    ]
    assert calls and max(calls, key=len) == imported(name)


def test_a_changed_file_is_another_revision(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_cache, "__file__", str(tmp_path / "kernel_cache.py"))
    found = set()
    for one, other in (("a", "b"), ("a", "c"), ("d", "b")):
        (tmp_path / "one.py").write_text(one)
        (tmp_path / "other.py").write_text(other)
        found.add(kernel_cache.revision("one", "other"))
    assert len(found) == 3 and min(found) >= 0, "kernels ask whether it is below 0, which it never is"


def helpers(name: str) -> list[tuple[str, dict[str, object]]]:
    """Functions of a file that are compiled into kernels, and how."""
    found = []
    for node in ast.walk(ast.parse((ROOM / f"{name}.py").read_text())):
        for call in getattr(node, "decorator_list", ()):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "njit":
                how = {word.arg: getattr(word.value, "value", word.value) for word in call.keywords if word.arg}
                if "cache" not in how:
                    found.append((getattr(node, "name", ""), how))
    return found


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOM.glob("*.py") if "@njit(" in path.read_text()))
def test_arithmetic_that_may_be_regrouped_is_compiled_nowhere_but_in_its_kernel(name):
    """A copy of its own is grouped in its own way, and the process that compiles it would use that one."""
    for function, how in helpers(name):
        assert "fastmath" not in how or how.get("forceinline") is True or how.get("inline") == "always", function


STEP = """
import hashlib
from naive import adapter, engine, prompts, request
one = engine(compiles=True, threads=1)
one.compile()
one.add_adapter("one", adapter(1))
asked = [request(f"r{i}", ids, "one" if i % 3 == 0 else None, max_tokens=9, logprobs=2, ignore_eos=True)
         for i, ids in enumerate(prompts())]
answers = [(answer.token_ids, answer.logprobs) for answer in one.generate(asked)]
print(hashlib.sha256(repr(answers).encode()).hexdigest())
"""
TRAINING = """
import hashlib, torch
from prairie.ops import attention, threads
from prairie.ops.elementwise import rms_norm, swiglu
attention.COMPILED_WORK = threads.COMPILED_NUMBERS = 0
torch.set_num_threads(1)
torch.manual_seed(0)
packed = attention.PackedDocuments([300, 17, 129])
qkv = [torch.randn(446, heads, 32, requires_grad=True) for heads in (4, 2, 2)]
x, weight = torch.randn(4000, 96, requires_grad=True), torch.randn(96, requires_grad=True)
out = [packed(0, *qkv), rms_norm(x, weight, 1e-6), swiglu(x)]
sum((one * torch.randn_like(one)).sum() for one in out).backward()
found = [one.detach() for one in out] + [one.grad for one in (*qkv, x, weight)]
print(hashlib.sha256(b"".join(one.numpy().tobytes() for one in found)).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", [STEP, TRAINING], ids=["step", "training"])
def test_the_process_that_compiles_has_the_bits_of_those_after_it(script, tmp_path):
    rooms = [str(Path(prairie.ops.__file__).parents[2]), str(Path(__file__).parents[1] / "engine")]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(rooms)

    def bits() -> str:
        ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[-2000:]
        return ran.stdout.split()[-1]

    assert bits() == bits()
    assert any(tmp_path.rglob("*.nbc")), "kernels were kept"
