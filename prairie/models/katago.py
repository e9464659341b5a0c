"""A published KataGo net (`.bin.gz`, model version 8, arXiv 1902.10565) as one of our towers.

The file is text that names layers, with the numbers of each after `@BIN@`. Norms are folded into a scale and a shift.
Of its 22 planes ours are those in PLANES and of its 19 figures those in FIGURES: what tells Japanese rules, encores,
ladders and pass-alive regions apart is always zero for us and is left out; what is always the same under our rules
(positional superko, area scoring, no suicide, no tax) goes into the bias. Without its ladder planes the net plays
weaker than it can. Not here: KataGo's search.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prairie.errors import ModelError
from prairie.models.tower import Tower, TowerConfig

PLANES = (0, 1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 13)
"""On the board; own, the other's; chains of 1, 2, 3 liberties; banned by ko; the last five moves."""
FIGURES = (0, 1, 2, 3, 4, 5, 18)
"""Was the n-th last move a pass; komi for the player to move / 20; where komi stands between two draws."""
SUPERKO = {6: 1.0, 7: 0.5}
PASS_ENDS = 14
"""A pass would end the game: under our rules the same as figure 0."""


def load_katago(path: Path) -> Tower:
    """Raises ModelError for a file that is not such a net."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise ModelError(f"{path} cannot be read as a KataGo net", got=error, wanted="a .bin.gz") from None
    try:
        return _Reader(data).tower()
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is no KataGo net of version 8", got=error) from None


class _Reader:
    """Reads the layers in the order in which the file has them, into the names of our tower."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.state: dict[str, Tensor] = {}

    def tower(self) -> Tower:
        self._word()
        if (version := self._int()) != 8:
            raise ValueError(f"version {version}")
        if (planes := self._int(), figures := self._int()) != (22, 19):
            raise ValueError(f"{planes} planes and {figures} figures")
        self._word()
        blocks, width, _, regular, _, pooled = (self._int() for _ in range(6))
        if regular + pooled != width:
            raise ValueError(f"{regular} + {pooled} channels in blocks of {width}")
        stem = self._conv("stem")
        self.state["stem.weight"] = stem[:, PLANES].contiguous()
        self._figures()
        kinds = tuple(self._block(f"blocks.{k}") for k in range(blocks))
        self._norm("trunk_channels")
        self._policy()
        self._value()
        s = self.state
        tower = Tower(TowerConfig(
            len(PLANES), len(FIGURES), kinds, width, pooled, stem.shape[-1], len(s["policy.channels.scale"]),
            len(s["value.channels.scale"]), len(s["value.hidden.bias"]), len(s["value.outcome.bias"]),
            len(s["value.score.bias"]),
        ))  # fmt: skip
        tower.load_state_dict(s)
        return tower.eval()

    def _figures(self) -> None:
        weight = self._matrix("figures")
        weight[:, 0] += weight[:, PASS_ENDS]
        self.state["figures.weight"] = weight[:, FIGURES].contiguous()
        self.state["figures.bias"] = sum((weight[:, k] * v for k, v in SUPERKO.items()), torch.zeros(len(weight)))

    def _block(self, name: str) -> str:
        kind = self._word()
        if kind not in ("ordinary_block", "gpool_block"):
            raise ValueError(f"a block of kind {kind!r}")
        self._word()
        self._norm(f"{name}.before")
        self._conv(f"{name}.first")
        if kind == "gpool_block":
            self._conv(f"{name}.pool")
            self._norm(f"{name}.pool_channels")
            self._matrix(f"{name}.pool_to_bias")
        self._norm(f"{name}.between")
        self._conv(f"{name}.last")
        return "pooled" if kind == "gpool_block" else "plain"

    def _policy(self) -> None:
        self._word()
        self._conv("policy.points")
        self._conv("policy.whole")
        self._norm("policy.whole_channels")
        self._matrix("policy.whole_to_bias")
        self._norm("policy.channels")
        self._conv("policy.move")
        self._matrix("policy.pass_move")

    def _value(self) -> None:
        self._word()
        self._conv("value.conv")
        self._norm("value.channels")
        for name in ("value.hidden", "value.outcome", "value.score"):
            self._matrix(name)
            self._bias(name)
            if name == "value.hidden":
                self._activation()
        self._conv("value.owner")

    def _conv(self, name: str) -> Tensor:
        self._word()
        high, wide, into, out, down, across = (self._int() for _ in range(6))
        if (down, across) != (1, 1):
            raise ValueError(f"a dilated convolution {name}")
        weight = self._floats(high * wide * into * out).reshape(high, wide, into, out)
        self.state[f"{name}.weight"] = torch.from_numpy(weight.transpose(3, 2, 0, 1).copy())
        return self.state[f"{name}.weight"]

    def _norm(self, name: str) -> None:
        """mean, variance and what follows them, as y = x * scale + shift; then the activation, which is always ReLU."""
        self._word()
        channels, epsilon = self._int(), float(self._word())
        has_scale, has_shift = self._int(), self._int()
        mean, variance = self._floats(channels), self._floats(channels)
        scale = self._floats(channels) if has_scale else np.ones(channels, np.float32)
        shift = self._floats(channels) if has_shift else np.zeros(channels, np.float32)
        scale = scale / np.sqrt(variance + epsilon)
        self.state[f"{name}.scale"] = torch.from_numpy(scale)
        self.state[f"{name}.shift"] = torch.from_numpy(shift - mean * scale)
        self._activation()

    def _matrix(self, name: str) -> Tensor:
        self._word()
        into, out = self._int(), self._int()
        self.state[f"{name}.weight"] = torch.from_numpy(self._floats(into * out).reshape(into, out).T.copy())
        return self.state[f"{name}.weight"]

    def _bias(self, name: str) -> None:
        self._word()
        self.state[f"{name}.bias"] = torch.from_numpy(self._floats(self._int()))

    def _activation(self) -> None:
        self._word()

    def _word(self) -> str:
        while self.data[self.at : self.at + 1].isspace():
            self.at += 1
        end = self.at
        while end < len(self.data) and not self.data[end : end + 1].isspace():
            end += 1
        word = self.data[self.at : end].decode("ascii")
        self.at = end
        return word

    def _int(self) -> int:
        return int(self._word())

    def _floats(self, count: int) -> np.ndarray:
        mark = self.data.find(b"@BIN@", self.at)
        if mark < 0 or self.data[self.at : mark].strip():
            raise ValueError(f"no numbers at byte {self.at}")
        start = mark + 5
        found = np.frombuffer(self.data, "<f4", count, start).astype(np.float32)
        self.at = start + 4 * count
        return found
