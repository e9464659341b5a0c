"""The page on data is a program: its blocks run from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from prairie.data.sources import _PARSERS, SUFFIXES

FIGURES = ("rows", "tokens", "supervised_tokens", "longest_row", "truncated_rows", "refused_rows", "refused")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len(blocks) >= 6
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)


def test_the_page_names_every_format_file_type_and_figure() -> None:
    page = PAGE.read_text("utf-8")
    for word in (*_PARSERS, *{suffix.rsplit(".", 1)[-1] for suffix in SUFFIXES}, *FIGURES):
        assert word in page, word
