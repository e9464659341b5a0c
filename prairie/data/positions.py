"""Positions of games as rows: what a net sees of each, and what it shall say. Resumable like rows of tokens.

A row is one position; a batch of R rows is R positions, each turned or reflected by one of the 8 symmetries of a square
board, which depends on the row and the epoch alone, so that a step means the same however it is split.

Legend: R rows, C planes, H x W points (H = W), G figures, M = H * W + 1 moves. Knows no game: planes are planes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prairie.errors import DataError

if TYPE_CHECKING:
    import torch

ARRAYS = {
    "planes": np.uint8, "figures": np.float32, "policy": np.float32, "outcome": np.float32, "lead": np.float32,
    "owner": np.int8,
}  # fmt: skip
"""planes (R, C, H, W) of 0 and 1; figures (R, G); policy (R, M) sums to 1; outcome (R,) +1 won .. -1 lost, lead (R,) in
points and owner (R, H, W) +1 own .. -1, all for the player to move."""


@dataclass(frozen=True, slots=True)
class PositionBatch:
    """R positions as tensors; the same names as in ARRAYS."""

    planes_RCHW: torch.Tensor
    figures_RG: torch.Tensor
    policy_RM: torch.Tensor
    outcome_R: torch.Tensor
    lead_R: torch.Tensor
    owner_RHW: torch.Tensor
    rows: list[int]
    epoch: int = 0

    @property
    def size(self) -> int:
        return len(self.rows)

    @property
    def supervised(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        return [1] * len(self.rows)

    def described(self) -> list[dict[str, Any]]:
        """Each row, JSON-able, for a report of what went wrong."""
        return [
            {"figures": f.tolist(), "policy": p.tolist(), "outcome": float(o), "lead": float(lead)}
            for f, p, o, lead in zip(self.figures_RG, self.policy_RM, self.outcome_R, self.lead_R, strict=True)
        ]


class PositionDataset:
    """Rows in arrays. Raises DataError for arrays that do not belong together."""

    group = 1

    def __init__(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        rows = len(arrays["outcome"]) if "outcome" in arrays else 0
        lengths = {name: len(arrays[name]) if name in arrays else None for name in ARRAYS}
        if rows == 0 or set(lengths.values()) != {rows}:
            raise DataError(
                "these positions do not belong together", got=f"rows {lengths}", wanted="one number above 0"
            )
        side = arrays["planes"].shape[-1]
        if arrays["policy"].shape[1] != side * side + 1 or arrays["owner"].shape[1:] != (side, side):
            raise DataError(
                "the arrays of positions are of different boards",
                got=f"planes of {side} lines, {arrays['policy'].shape[1]} moves, owners {arrays['owner'].shape[1:]}",
                wanted=f"{side * side + 1} moves",
            )
        self.arrays = {name: np.ascontiguousarray(arrays[name], dtype) for name, dtype in ARRAYS.items()}
        self.offsets = np.arange(rows + 1, dtype=np.int64)
        digest = hashlib.sha256()
        for name in ARRAYS:
            digest.update(f"{name}{self.arrays[name].shape}".encode())
            digest.update(self.arrays[name].data)
        self.fingerprint = digest.hexdigest()

    @property
    def side(self) -> int:
        """Lines of the board."""
        return int(self.arrays["planes"].shape[-1])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def batch(self, rows: Sequence[int], epoch: int = 0) -> PositionBatch:
        """These rows, each in the symmetry that its number and the epoch give."""
        import torch

        index = np.asarray(rows, np.int64)
        # Knuth's multiplicative hash: neighbours get unlike symmetries, and each epoch shows a row in another one.
        turns = ((index * 2654435761 >> 7) + epoch) % 8
        picked = {name: values[index] for name, values in self.arrays.items()}
        side = self.side
        moves = picked["policy"][:, :-1].reshape(-1, side, side)
        for k in range(1, 8):
            which = turns == k
            for values in (picked["planes"], picked["owner"], moves):
                values[which] = turned(values[which], k)
        policy = np.concatenate([moves.reshape(len(index), -1), picked["policy"][:, -1:]], axis=1)
        return PositionBatch(
            torch.from_numpy(picked["planes"].astype(np.float32)), torch.from_numpy(picked["figures"]),
            torch.from_numpy(policy), torch.from_numpy(picked["outcome"]), torch.from_numpy(picked["lead"]),
            torch.from_numpy(picked["owner"].astype(np.float32)), index.tolist(), epoch,
        )  # fmt: skip

    def save(self, folder: Path) -> None:
        """One `.npy` file an array, and `positions.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ARRAYS:
            np.save(folder / f"{name}.npy", self.arrays[name], allow_pickle=False)
        about = {"rows": len(self), "side": self.side, "fingerprint": self.fingerprint}
        (folder / "positions.json").write_text(json.dumps(about, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, folders: Sequence[Path]) -> PositionDataset:
        """What `save` wrote in one or more folders, one after the other. Raises DataError."""
        parts: list[dict[str, npt.NDArray[Any]]] = []
        for folder in folders:
            try:
                parts.append({name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in ARRAYS})
            except (OSError, ValueError) as error:
                raise DataError(f"{folder} holds no positions", got=str(error)) from None
        if len({part["planes"].shape[1:] for part in parts}) != 1:
            raise DataError("positions of different boards do not go together", got=[p["planes"].shape for p in parts])
        return cls({name: np.concatenate([part[name] for part in parts]) for name in ARRAYS})


def turned(values: npt.NDArray[Any], k: int) -> npt.NDArray[Any]:
    """Boards (..., H, W) in symmetry k: k % 4 quarter turns, from 4 on reflected first."""
    return np.rot90(values.swapaxes(-1, -2) if k >= 4 else values, k % 4, axes=(-2, -1))
