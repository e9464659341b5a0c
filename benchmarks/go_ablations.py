"""What each economy of the Go line is worth: Elo at equal processor time, with and without it.

Every variant begins from the same fresh net and gets the same CPU-seconds of self-play and training, by the pieces that
the wheel uses (`selfplay.play`, the one Trainer); nothing is judged on the way. They take turns, one round of games
each, so that a machine with other work slows all alike. Then each plays the whole recipe's net from random openings
with colours exchanged. An Elo below 0 says that leaving the economy out costs strength. The interval is that of the
match: two trainings of one variant differ by more (`again` is the whole recipe with another seed).

    python -m benchmarks.go_ablations [--quick] [--case "no ownership"] [--cpu-s 120] [--json]
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import machine, revision
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
KOMI, PAIRS, VISITS = 0.5, 200, 12
PLAY, OWNER = SelfPlay(SIZE, slots=96), PolicyValueConfig().owner


@dataclass(frozen=True)
class Variant:
    """PUCT with a playout cap, as go5 was before it took the best of these, with one thing changed."""

    play: SelfPlay = PLAY
    owner: float = OWNER
    pooled: bool = True
    turned: bool = True
    """Boards are shown to the net in a drawn symmetry, in self-play and in training."""
    seed: int = SEED


WHOLE = Variant()
# 28 visits on every move are what 64 on 30% and 12 on the rest cost.
LEFT_OUT = {
    "again": replace(WHOLE, seed=SEED + 1),
    "no playout cap": replace(WHOLE, play=replace(PLAY, visits=28, full_share=1.0)),
    "no ownership": replace(WHOLE, owner=0.0),
    "no pooling": replace(WHOLE, pooled=False),
    "no symmetries": replace(WHOLE, turned=False),
    "gumbel": replace(WHOLE, play=replace(PLAY, visits=28, full_share=1.0, search=SearchSettings(gumbel=8))),
    "gumbel, 12 visits": replace(WHOLE, play=replace(PLAY, visits=12, full_share=1.0, search=SearchSettings(gumbel=8))),
    "played out": replace(WHOLE, play=replace(PLAY, play_out=True)),
    "played out, decided": replace(WHOLE, play=replace(PLAY, play_out=True, decided=0.75)),
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


@dataclass
class Training:
    """A variant on its way; `cpu_s` is what it has used."""

    variant: Variant
    tower: Tower
    cpu_s: float = 0.0
    games: int = 0
    rows: int = 0
    rounds: int = 0
    mean_score: float = 0.0
    window: list[PositionDataset] = field(default_factory=list)

    @classmethod
    def begin(cls, variant: Variant) -> Training:
        shape = TowerConfig.small(PLANES, FIGURES, 4, 32, (SIZE,))
        if not variant.pooled:
            shape = replace(shape, blocks=("plain",) * 4)
        return cls(variant, Tower(shape).init_weights(variant.seed))

    def round(self) -> None:
        """Games of the present net, then so many training passes for each new row."""
        began, variant = time.process_time(), self.variant
        judge = TowerJudge(self.tower.eval(), seed=self.rounds if variant.turned else None)
        seed = variant.seed * 1000 + self.rounds
        played = play(judge, variant.play, games=ROUND_GAMES, mean_score=self.mean_score, seed=seed)
        assert played.rows is not None
        self.mean_score = float(played.scores.mean())
        self.window = [*self.window[-(WINDOW - 1) :], played.rows]
        arrays = {name: np.concatenate([r.arrays[name] for r in self.window]) for name in played.rows.arrays}
        self._learn(PositionDataset(arrays) if variant.turned else Unturned(arrays), len(played.rows), seed)
        self.rounds, self.games, self.rows = self.rounds + 1, self.games + ROUND_GAMES, self.rows + len(played.rows)
        self.cpu_s += time.process_time() - began

    def _learn(self, dataset: PositionDataset, new_rows: int, seed: int) -> None:
        steps = max(1, PASSES * new_rows // BATCH)
        config = TrainConfig(
            steps=steps, tokens_per_batch=BATCH, lr=2e-3, weight_decay=0.03, schedule="constant",
            warmup_steps=max(1, steps // 20), betas=(0.9, 0.98), seed=seed,
        )  # fmt: skip
        quiet = Runtime(threads=1, seed=seed, progress=Progress(io.StringIO(), quiet=True))
        objective = PolicyValue(PolicyValueConfig(owner=self.variant.owner))
        with tempfile.TemporaryDirectory() as folder:
            loader = Loader(dataset, tokens_per_batch=BATCH, seed=seed)
            Trainer(self.tower, objective, loader, config, runtime=quiet, folder=Path(folder), title="learn").fit()


def against_whole(name: str, training: Training, whole: Training) -> dict[str, Any]:
    """One row: what the variant's net came to in a match with the whole recipe's."""
    judges = [TowerJudge(one.tower.eval(), seed=None) for one in (training, whole)]
    found = duel(*judges, size=SIZE, pairs=PAIRS, visits=VISITS, komi=KOMI, opening_moves=3, seed=SEED)
    games = len(found.outcomes)
    share, interval = sum(found.outcomes) / games, wilson(sum(found.outcomes), games)
    return {
        "case": name, "share": round(share, 3), "elo": round(elo_of(share)), "elo_low": round(elo_of(interval.low)),
        "elo_high": round(elo_of(interval.high)), "match_games": games, "cpu_s": round(training.cpu_s, 1),
        "games": training.games, "rows": training.rows, "whole_cpu_s": round(whole.cpu_s, 1),
        "whole_games": whole.games, "whole_rows": whole.rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.go_ablations")
    parser.add_argument("--quick", action="store_true", help="20 CPU-seconds each")
    parser.add_argument("--case", choices=list(LEFT_OUT), action="append", help="only this one; may be given again")
    parser.add_argument("--cpu-s", type=float, default=120.0, help="CPU-seconds of each training")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args()
    torch.set_num_threads(1)
    budget = 20.0 if args.quick else args.cpu_s
    play(TowerJudge(Training.begin(WHOLE).tower), SelfPlay(SIZE, slots=4), games=4, mean_score=0, seed=1)  # compiles
    whole = Training.begin(WHOLE)
    others = {name: Training.begin(LEFT_OUT[name]) for name in args.case or LEFT_OUT}
    while under_way := [one for one in (whole, *others.values()) if one.cpu_s < budget]:
        for one in under_way:
            one.round()
        print(f"whole: {whole.cpu_s:.0f} of {budget:.0f} CPU-s, {whole.games} games", file=sys.stderr)
    rows = [against_whole(name, training, whole) for name, training in others.items()]
    if args.json:
        print(json.dumps({
            "benchmark": "go_ablations", "machine": machine(), "revision": revision(), "rows": rows
        }))  # fmt: skip
        return
    for row in rows:
        print(f"{row['case']}: {row['elo']:+d} Elo [{row['elo_low']:+d}, {row['elo_high']:+d}], {row['games']} games")


if __name__ == "__main__":
    main()
