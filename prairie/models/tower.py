"""One residual convolutional net: a trunk for any picture, and the heads that Go needs.

Pre-activation blocks (arXiv 1603.05027) without batch statistics: a block begins as the identity (its last convolution
is zero, arXiv 1901.09321) and what is left of a norm is a scale and a shift for each channel, so that a net trained
with batch norm loads by folding. Some blocks pool the whole board into a bias (arXiv 1902.10565). Boards smaller
than the array are masked: plane 0 says which points exist, and nothing flows from those that do not.

Legend: B boards, C channels, H x W points, G figures of the whole board, M = H * W + 1 moves (the last is the pass).
Not here: what the planes mean (`prairie.games.features`), training, search.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from prairie.errors import ModelError
from prairie.models.weights import MANIFEST, WEIGHTS, not_written, read_json, read_manifest, weights_hash, write_json

SHAPE = "tower.json"

BOARD_SCALE = 14.0
"""The width around which the pooled figures of a board are centred; KataGo's constant, so that its nets load."""


@dataclass(frozen=True)
class TowerConfig:
    """The shape of a tower. Raises ModelError for one that cannot be built."""

    planes: int
    figures: int
    """Numbers that describe the whole board, such as komi."""
    blocks: tuple[str, ...]
    """`plain` or `pooled`, from the stem up."""
    width: int
    pooled: int = 16
    """Channels of a pooled block that are pooled; the rest stay where they are."""
    stem: int = 3
    """Side of the first convolution."""
    policy_width: int = 16
    value_width: int = 16
    value_hidden: int = 32
    outcomes: int = 2
    """win, loss, and for nets from elsewhere: no result"""
    scores: int = 1
    """The first is the expected lead in points, divided by `SCORE_SCALE`."""
    boards: tuple[int, ...] = ()
    """The sizes that the net was trained on; empty = any."""

    def __post_init__(self) -> None:
        wrong = [kind for kind in self.blocks if kind not in ("plain", "pooled")]
        if wrong or not self.blocks or self.stem % 2 == 0 or self.pooled >= self.width:
            raise ModelError(
                "a tower cannot have this shape", got=f"blocks {self.blocks}, stem {self.stem}, pooled {self.pooled}",
                wanted="blocks `plain` or `pooled`, an odd stem, fewer pooled channels than width",
            )  # fmt: skip

    @classmethod
    def small(cls, planes: int, figures: int, blocks: int, width: int, boards: tuple[int, ...] = ()) -> TowerConfig:
        """`blocks` of `width` channels, every second one pooled, the rest derived; in eights, a CPU's vectors."""
        kinds = tuple("pooled" if k % 2 else "plain" for k in range(blocks))
        head = max(8, width // 2)
        pooled = max(8, width // 32 * 8) if width > 8 else 4
        return cls(
            planes, figures, kinds, width, pooled=pooled, policy_width=head, value_width=head, value_hidden=width,
            boards=boards,
        )  # fmt: skip

    def flops_per_token(self, context: int = 1) -> float:
        """Forward and backward of one position on the largest board that the net is for (`multiply_adds` counts)."""
        return 6.0 * multiply_adds(self, max(self.boards, default=19) ** 2)


SCORE_SCALE = 20.0


class Judged(NamedTuple):
    """What a tower says of boards, always for the player to move."""

    policy_BM: Tensor
    """Logits of the moves, the pass last; points outside a board are at -1e4 or less."""
    outcome_BO: Tensor
    """Logits of win, loss (and no result)."""
    score_BS: Tensor
    owner_BHW: Tensor
    """-1 the opponent's .. +1 own, before tanh."""

    @property
    def value_B(self) -> Tensor:
        """Probability of a win minus that of a loss."""
        outcome = self.outcome_BO.softmax(-1)
        return outcome[:, 0] - outcome[:, 1]

    @property
    def lead_B(self) -> Tensor:
        """Expected points ahead."""
        return self.score_BS[:, 0] * SCORE_SCALE


class Channels(nn.Module):
    """A scale and a shift for each channel, then ReLU; nothing outside the board."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCHW: Tensor, board: Board) -> Tensor:
        out = torch.relu(torch.addcmul(self.shift[:, None, None], x_BCHW, self.scale[:, None, None]))
        return out if board.mask_B1HW is None else out * board.mask_B1HW


class Board(NamedTuple):
    """Which points of an array are on the board; `mask` is None when all are."""

    mask_B1HW: Tensor | None
    points_B1: Tensor
    """float: how many."""

    @classmethod
    def of(cls, on_board_B1HW: Tensor) -> Board:
        full = bool((on_board_B1HW == 1).all())
        return cls(None if full else on_board_B1HW, on_board_B1HW.sum(dim=(2, 3)))

    def pooled(self, x_BCHW: Tensor) -> Tensor:
        """(B, 3C): mean, mean scaled by the width of the board, maximum; what is outside counts nowhere."""
        mean = x_BCHW.sum(dim=(2, 3)) / self.points_B1
        outside = x_BCHW if self.mask_B1HW is None else x_BCHW + (self.mask_B1HW - 1)
        return torch.cat([mean, mean * self._width(), outside.amax(dim=(2, 3))], dim=1)

    def pooled_for_value(self, x_BCHW: Tensor) -> Tensor:
        """(B, 3C): mean, and the mean scaled by the width of the board and by its square."""
        mean, width = x_BCHW.sum(dim=(2, 3)) / self.points_B1, self._width()
        return torch.cat([mean, mean * width, mean * (width * width - 0.1)], dim=1)

    def _width(self) -> Tensor:
        return (self.points_B1.sqrt() - BOARD_SCALE) / 10.0


class Block(nn.Module):
    """x + conv(channels(conv(channels(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.first = Channels(width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.between, self.last = Channels(width), nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x_BCHW: Tensor, board: Board) -> Tensor:
        inner = self.first(self.before(x_BCHW, board))
        return x_BCHW + self.last(self.between(inner, board))


class PooledBlock(nn.Module):
    """A block in which some channels are pooled over the board and become a bias of the others (arXiv 1902.10565)."""

    def __init__(self, width: int, pooled: int) -> None:
        super().__init__()
        self.before, self.first = Channels(width), nn.Conv2d(width, width - pooled, 3, padding=1, bias=False)
        self.pool, self.pool_channels = nn.Conv2d(width, pooled, 3, padding=1, bias=False), Channels(pooled)
        self.pool_to_bias = nn.Linear(3 * pooled, width - pooled, bias=False)
        self.between = Channels(width - pooled)
        self.last = nn.Conv2d(width - pooled, width, 3, padding=1, bias=False)

    def forward(self, x_BCHW: Tensor, board: Board) -> Tensor:
        stayed, pool = _both(self.first, self.pool, self.before(x_BCHW, board))
        pooled = board.pooled(self.pool_channels(pool, board))
        inner = stayed + self.pool_to_bias(pooled)[:, :, None, None]
        return x_BCHW + self.last(self.between(inner, board))


def _both(one: nn.Conv2d, other: nn.Conv2d, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Two convolutions of one input as one, which takes little more time than one of them."""
    weight = torch.cat([one.weight, other.weight])
    both = F.conv2d(x_BCHW, weight, padding=one.padding)
    return both[:, : one.out_channels], both[:, one.out_channels :]


def _to_one(conv: nn.Conv2d, x_BCHW: Tensor) -> Tensor:
    """(B, H, W): a 1x1 convolution to one channel as a product, five times faster than torch's convolution."""
    return x_BCHW.permute(0, 2, 3, 1) @ conv.weight.view(-1)


class PolicyHead(nn.Module):
    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.points, self.whole = nn.Conv2d(width, head, 1, bias=False), nn.Conv2d(width, head, 1, bias=False)
        self.whole_channels, self.whole_to_bias = Channels(head), nn.Linear(3 * head, head, bias=False)
        self.channels, self.move = Channels(head), nn.Conv2d(head, 1, 1, bias=False)
        self.pass_move = nn.Linear(3 * head, 1, bias=False)

    def forward(self, x_BCHW: Tensor, board: Board) -> Tensor:
        points, whole = _both(self.points, self.whole, x_BCHW)
        pooled = board.pooled(self.whole_channels(whole, board))
        move = _to_one(self.move, self.channels(points + self.whole_to_bias(pooled)[:, :, None, None], board))
        if board.mask_B1HW is not None:
            move = move - (1 - board.mask_B1HW[:, 0]) * 1e5
        return torch.cat([move.flatten(1), self.pass_move(pooled)], dim=1)


class ValueHead(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        head, hidden = config.value_width, config.value_hidden
        self.conv, self.channels = nn.Conv2d(config.width, head, 1, bias=False), Channels(head)
        self.hidden = nn.Linear(3 * head, hidden)
        self.outcome, self.score = nn.Linear(hidden, config.outcomes), nn.Linear(hidden, config.scores)
        self.owner = nn.Conv2d(head, 1, 1, bias=False)

    def forward(self, x_BCHW: Tensor, board: Board) -> tuple[Tensor, Tensor, Tensor]:
        active = self.channels(self.conv(x_BCHW), board)
        hidden = torch.relu(self.hidden(board.pooled_for_value(active)))
        return self.outcome(hidden), self.score(hidden), _to_one(self.owner, active)


class Tower(nn.Module):
    """planes (B, C, H, W) with plane 0 the points that exist, figures (B, G) -> `Judged`."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.stem = nn.Conv2d(config.planes, width, config.stem, padding=config.stem // 2, bias=False)
        self.figures = nn.Linear(config.figures, width)
        self.blocks = nn.ModuleList(
            Block(width) if kind == "plain" else PooledBlock(width, config.pooled) for kind in config.blocks
        )
        self.trunk_channels = Channels(width)
        self.policy, self.value = PolicyHead(width, config.policy_width), ValueHead(config)

    def trunk(self, planes_BCHW: Tensor, figures_BG: Tensor, board: Board) -> Tensor:
        """What the heads look at: (B, width, H, W)."""
        x_BCHW = self.stem(planes_BCHW) + self.figures(figures_BG)[:, :, None, None]
        for block in self.blocks:
            x_BCHW = block(x_BCHW, board)
        return self.trunk_channels(x_BCHW, board)

    def forward(self, planes_BCHW: Tensor, figures_BG: Tensor) -> Judged:
        board = Board.of(planes_BCHW[:, :1])
        x_BCHW = self.trunk(planes_BCHW, figures_BG, board)
        return Judged(self.policy(x_BCHW, board), *self.value(x_BCHW, board))

    def init_weights(self, seed: int) -> Tower:
        """He's start (arXiv 1502.01852), a block's first convolution smaller the deeper the tower, its last one zero;
        the heads begin near zero, so that the first policy is almost uniform."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim < 2:
                    continue
                std = math.sqrt(2.0 / parameter[0].numel())
                if name.endswith("last.weight"):
                    std = 0.0
                elif name.startswith("blocks."):
                    std /= math.sqrt(len(self.blocks))
                elif name in ("policy.move.weight", "policy.pass_move.weight", "value.outcome.weight",
                              "value.score.weight", "value.owner.weight"):  # fmt: skip
                    std *= 0.1
                parameter.normal_(0.0, std, generator=generator) if std else parameter.zero_()
            for module in self.modules():
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
        return self

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def multiply_adds(config: TowerConfig, points: int) -> int:
    """Of one forward pass of one board, convolutions of the trunk alone: what bounds self-play."""
    per_point = config.stem**2 * config.planes * config.width
    for kind in config.blocks:
        inner = config.width - (config.pooled if kind == "pooled" else 0)
        per_point += 9 * config.width * (config.width + inner)
    return points * per_point


def save_tower(tower: Tower, folder: Path, **manifest: Any) -> str:
    """`model.safetensors`, `tower.json` (the shape) and `prairie.json`; returns the weights' hash. ModelError when they
    cannot be written, StorageFullError on a full disk."""
    state = {name: value.detach().cpu().contiguous() for name, value in tower.state_dict().items()}
    found = weights_hash(state)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SHAPE, asdict(tower.config))
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / MANIFEST, {"kind": "tower", **manifest, "weights_hash": found})
    except (OSError, SafetensorError) as error:
        raise not_written(ModelError, f"the tower cannot be written to {folder}", error) from error
    return found


def load_tower(folder: Path) -> Tower:
    """The tower that `save_tower` wrote, ready to judge. Raises ModelError for files that are missing or damaged."""
    raw = read_json(folder / SHAPE)
    try:
        tower = Tower(TowerConfig(**{**raw, "blocks": tuple(raw["blocks"]), "boards": tuple(raw["boards"])}))
    except (KeyError, TypeError) as error:
        raise ModelError(f"{folder / SHAPE} is not the shape of a tower", got=str(error)) from None
    try:
        given = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS} is missing or damaged", got=error) from error
    mine = {name: tuple(value.shape) for name, value in tower.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in given.items()}
    if mine != theirs:
        name = min(name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name))
        raise ModelError(
            f"the weights in {folder} do not fit its {SHAPE}", got=f"{name} {theirs.get(name, 'missing')}",
            wanted=mine.get(name, "no such weight"),
        )  # fmt: skip
    claimed, found = read_manifest(folder).get("weights_hash"), weights_hash(given)
    if claimed is not None and claimed != found:
        raise ModelError(
            f"the weights in {folder} are not those its {MANIFEST} names", got=found[:12], wanted=str(claimed)[:12],
            mend="restore the folder from where it was made",
        )  # fmt: skip
    tower.load_state_dict(given)
    return tower.eval()
