"""What each economy of the Go line is worth: Elo at equal processor time, with and without it.

Every variant begins from the same fresh net and gets the same CPU-seconds of self-play and training, measured in its
own process time, by the pieces that the wheel uses (`selfplay.play`, the one Trainer); nothing is judged on the way.
Then each plays the whole recipe's net from random openings with colours exchanged. A ratio below 1 says that leaving
the economy out costs strength: it is the variant's win rate over one half.

    python -m benchmarks.go_ablations [--quick] [--case "no ownership"] [--json]
"""

from __future__ import annotations

import io
import tempfile
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Case, Found, peak_rss_mb, run
from prairie.data.loader import Loader
from prairie.data.positions import PositionDataset
from prairie.evals.statistics import wilson
from prairie.games.curve import elo_of
from prairie.games.duel import duel
from prairie.games.features import TowerJudge
from prairie.games.kernels import FIGURES, PLANES
from prairie.games.mcts import SearchSettings
from prairie.games.selfplay import SelfPlay, play
from prairie.models.tower import Tower, TowerConfig
from prairie.runtime import Progress, Runtime
from prairie.train.config import TrainConfig
from prairie.train.objectives.policy_value import PolicyValue, PolicyValueConfig
from prairie.train.trainer import Trainer

SIZE, BATCH, PASSES, WINDOW, ROUND_GAMES, SEED = 5, 128, 4, 8, 192, 5
KOMI, PAIRS, VISITS = 0.5, 100, 12
PLAY, OWNER = SelfPlay(SIZE, slots=96), PolicyValueConfig().owner


@dataclass(frozen=True)
class Variant:
    """go5's recipe with one thing changed."""

    play: SelfPlay = PLAY
    owner: float = OWNER
    pooled: bool = True
    turned: bool = True
    """Boards are shown to the net in a drawn symmetry, in self-play and in training."""


WHOLE = Variant()
# 28 visits on every move are what 64 on 30% and 12 on the rest cost.
LEFT_OUT = {
    "no playout cap": replace(WHOLE, play=replace(PLAY, visits=28, full_share=1.0)),
    "no ownership": replace(WHOLE, owner=0.0),
    "no pooling": replace(WHOLE, pooled=False),
    "no symmetries": replace(WHOLE, turned=False),
    "gumbel": replace(WHOLE, play=replace(PLAY, visits=28, full_share=1.0, search=SearchSettings(gumbel=8))),
}


class Unturned(PositionDataset):
    """Positions as they were played, never reflected."""

    def batch(self, rows: Any, epoch: int = 0) -> Any:
        index = list(rows)
        picked = {name: torch.from_numpy(values[index]) for name, values in self.arrays.items()}
        whole = super().batch(rows, epoch)
        return whole.__class__(
            picked["planes"].float(), picked["figures"], picked["policy"], picked["outcome"], picked["lead"],
            picked["owner"].float(), whole.rows, whole.epoch,
        )  # fmt: skip


@cache
def trained(variant: Variant, cpu_s: float) -> Tower:
    """A net after so many CPU-seconds of self-play and training."""
    torch.set_num_threads(1)
    shape = TowerConfig.small(PLANES, FIGURES, 4, 32, (SIZE,))
    if not variant.pooled:
        shape = replace(shape, blocks=("plain",) * 4)
    tower = Tower(shape).init_weights(SEED)
    play(TowerJudge(tower), SelfPlay(SIZE, slots=4), games=4, mean_score=0, seed=1)  # compiles
    quiet = Runtime(threads=1, seed=SEED, progress=Progress(io.StringIO(), quiet=True))
    window: list[PositionDataset] = []
    began, number, mean_score = time.process_time(), 0, 0.0
    while time.process_time() - began < cpu_s:
        judge = TowerJudge(tower.eval(), seed=number if variant.turned else None)
        played = play(judge, variant.play, games=ROUND_GAMES, mean_score=mean_score, seed=SEED * 1000 + number)
        mean_score, number = float(played.scores.mean()), number + 1
        assert played.rows is not None
        window = [*window[-(WINDOW - 1) :], played.rows]
        arrays = {name: np.concatenate([r.arrays[name] for r in window]) for name in window[0].arrays}
        dataset = PositionDataset(arrays) if variant.turned else Unturned(arrays)
        steps = max(1, PASSES * len(played.rows) // BATCH)
        config = TrainConfig(
            steps=steps, tokens_per_batch=BATCH, lr=2e-3, weight_decay=0.03, schedule="constant",
            warmup_steps=max(1, steps // 20), betas=(0.9, 0.98), seed=SEED + number,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            Trainer(
                tower, PolicyValue(PolicyValueConfig(owner=variant.owner)),
                Loader(dataset, tokens_per_batch=BATCH, seed=SEED + number), config, runtime=quiet, folder=Path(folder),
                title="learn",
            ).fit()  # fmt: skip
    return tower.eval()


def against_whole(variant: Variant) -> Any:
    def measure(quick: bool) -> Found:
        cpu_s = 40.0 if quick else 240.0
        judges = [TowerJudge(trained(one, cpu_s), seed=None) for one in (variant, WHOLE)]
        found = duel(
            judges[0], judges[1], size=SIZE, pairs=24 if quick else PAIRS, visits=VISITS, komi=KOMI, opening_moves=3,
            seed=SEED,
        )  # fmt: skip
        share = sum(found.outcomes) / len(found.outcomes)
        interval = wilson(sum(found.outcomes), len(found.outcomes))
        return {
            "rate": share, "rss_mb": peak_rss_mb(), "games": len(found.outcomes), "elo": round(elo_of(share)),
            "elo_low": round(elo_of(interval.low)), "elo_high": round(elo_of(interval.high)), "cpu_s": cpu_s,
        }  # fmt: skip

    return measure


def even(quick: bool) -> Found:
    """The whole recipe against itself, by definition."""
    return {"rate": 0.5, "rss_mb": peak_rss_mb()}


if __name__ == "__main__":
    run("go_ablations", [
        Case(name, "the whole recipe", "share of games won", against_whole(variant), even)
        for name, variant in LEFT_OUT.items()
    ])  # fmt: skip
