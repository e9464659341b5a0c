"""Kernels that are kept on disk are stale as soon as anything changes that was compiled into them."""

from __future__ import annotations

import ast
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
