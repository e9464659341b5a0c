"""What a net sees of a board, and what a net says of it.

Twelve planes and seven figures, always for the player to move; `kernels.PLANES` and `kernels.FIGURES` list them. They
are those of KataGo's that our rules use. Not here: the net's layers (`prairie.models.tower`).
"""

from __future__ import annotations

import numpy as np
import torch

from prairie.errors import ModelError
from prairie.games.go import Boards, neighbours, symmetries, zobrist
from prairie.games.kernels import FIGURES, PLANES, encode_boards
from prairie.games.mcts import Floats, Opinion
from prairie.models.tower import Judged, Tower


def encode(boards: Boards, komi: np.ndarray) -> tuple[Floats, Floats]:
    """Planes (B, PLANES, size, size) and figures (B, FIGURES) of B boards; `komi` (B,)."""
    size = boards.size
    planes = np.empty((len(boards), PLANES, size * size), np.float32)
    figures = np.empty((len(boards), FIGURES), np.float32)
    encode_boards(
        boards.stones, boards.to_move, boards.key, boards.past, boards.length, boards.captured, boards.recent,
        np.asarray(komi, np.float64), size, neighbours(size), zobrist(size), planes, figures,
    )  # fmt: skip
    return planes.reshape(-1, PLANES, size, size), figures


class TowerJudge:
    """A tower as the judge of a search: each batch of boards is looked at in one of the 8 symmetries, drawn from `seed`
    (None: as it is). Raises ModelError for a board that the net was not made for."""

    def __init__(self, tower: Tower, *, device: str = "cpu", seed: int | None = 0) -> None:
        if (tower.config.planes, tower.config.figures) != (PLANES, FIGURES):
            raise ModelError(
                "this net does not see a board as we show it",
                got=f"{tower.config.planes} planes and {tower.config.figures} figures",
                wanted=f"{PLANES} and {FIGURES}",
            )
        # The layout in which convolutions of few channels are a third faster on a CPU.
        self.tower: Tower = tower.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.device = device
        self.random = None if seed is None else np.random.default_rng(seed)

    def check(self, size: int) -> None:
        """Raises ModelError if the net was trained on other sizes than this one."""
        boards = self.tower.config.boards
        if boards and size not in boards:
            raise ModelError(
                "the net was not made for this board", got=f"{size} lines", wanted=", ".join(map(str, boards)),
            )  # fmt: skip

    def __call__(self, planes: Floats, figures: Floats) -> Opinion:
        size = planes.shape[-1]
        turn = 0 if self.random is None else int(self.random.integers(8))
        order = symmetries(size)[turn]
        flat = planes.reshape(*planes.shape[:2], -1)
        turned = flat[:, :, order[:-1]] if turn else flat
        judged = self.judged(turned.reshape(planes.shape), figures)
        logits = np.empty((len(planes), size * size + 1), np.float32)
        logits[:, order] = judged.policy_BM.cpu().numpy()
        return Opinion(logits, judged.value_B.cpu().numpy(), judged.lead_B.cpu().numpy())

    @torch.inference_mode()
    def judged(self, planes: Floats, figures: Floats) -> Judged:
        """The net's whole answer, with ownership."""
        return self.tower(
            torch.from_numpy(planes).to(self.device).contiguous(memory_format=torch.channels_last),
            torch.from_numpy(figures).to(self.device),
        )
