"""Stages for a supervised start of a Go line: games of others become positions, a net learns to play as they did.

Not here: what of a game can be learnt (`prairie.games.recorded`), the turns that follow (`go`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from prairie.data.loader import Loader
from prairie.data.positions import PositionDataset
from prairie.errors import DataError, PrairieError
from prairie.flywheel.go import LEARNING_CODE, board_of
from prairie.games.go import Position
from prairie.games.match import Engine
from prairie.games.recorded import engine_games, rows_of
from prairie.games.sgf import GameRecord, read_sgf, write_sgf
from prairie.models.tower import load_tower, save_tower
from prairie.pipeline.context import Handler, Work, file_fingerprint
from prairie.recipe import GoGames, Imitate
from prairie.train.config import TrainConfig
from prairie.train.objectives.policy_value import PolicyValue
from prairie.train.trainer import Trainer


def games(work: Work) -> dict[str, Any]:
    """The `games` stage: records from a file, a folder or a zip of SGF, or of an engine that plays itself."""
    config: GoGames = work.config
    unread = 0
    if config.engine:
        with (
            work.context.runtime.progress.bar(work.name, config.games, "game") as bar,
            Engine(config.engine) as engine,
        ):
            found: list[tuple[GameRecord, Position | None]] = list(
                engine_games(
                    engine, config.size, config.games, komi=config.komi, opening_moves=config.opening_moves,
                    seed=work.context.recipe.seed, on_game=bar.update,
                )
            )  # fmt: skip
    else:
        found, unread = _records(Path(str(config.path)).expanduser())
    rows, left_out = rows_of(found, config.size)
    rows.save(work.folder)
    (work.folder / "games.sgf").write_text("".join(write_sgf(game) for game, _ in found), encoding="utf-8")
    refused = dict(left_out) | ({"no readable SGF": unread} if unread else {})
    return {"rows": len(rows), "kind": "positions", "games": len(found) - sum(left_out.values()), "left_out": refused}


def imitate(work: Work) -> dict[str, Any]:
    """The `imitate` stage: the net of stage `start` trained on the positions of recorded games."""
    config: Imitate = work.config
    tower = load_tower(work.model(config.start).path)
    dataset = PositionDataset.load([work.inputs[name].product.path for name in config.games])
    if dataset.side != board_of(tower):
        raise DataError("the games are on another board than the net's", got=dataset.side, wanted=board_of(tower))
    steps = max(1, math.ceil(config.epochs * len(dataset) / config.batch))
    runtime, seed = work.context.runtime, work.context.recipe.seed
    train = TrainConfig(
        steps=steps, tokens_per_batch=config.batch, lr=config.lr, weight_decay=config.weight_decay, schedule="cosine",
        warmup_steps=min(steps, max(1, steps // 20)), betas=(0.9, 0.98), seed=seed,
    )  # fmt: skip
    loader = Loader(dataset, tokens_per_batch=config.batch, seed=seed)
    trainer = Trainer(tower, PolicyValue(), loader, train, runtime=runtime, folder=work.scratch, title=work.name)
    figures = trainer.fit()
    save_tower(tower.eval(), work.folder)
    (work.folder / "metrics.jsonl").write_bytes((work.scratch / "metrics.jsonl").read_bytes())
    return {**figures, "rows": len(dataset)}


def _records(path: Path) -> tuple[list[tuple[GameRecord, Position | None]], int]:
    """Every game below `path`, and how many files could not be read. Raises DataError when there is none."""
    found: list[tuple[GameRecord, Position | None]] = []
    unread = 0
    for text in _texts(path):
        try:
            found += [(game, None) for game in read_sgf(text)]
        except PrairieError:
            unread += 1
    if not found:
        raise DataError(f"{path} holds no game that can be read", got=f"{unread} files that are no SGF")
    return found, unread


def _texts(path: Path) -> list[bytes]:
    try:
        if path.suffix == ".zip":
            with ZipFile(path) as archive:
                return [archive.read(name) for name in sorted(archive.namelist()) if name.endswith(".sgf")]
        files = sorted(path.rglob("*.sgf")) if path.is_dir() else [path]
        return [file.read_bytes() for file in files]
    except (OSError, BadZipFile) as error:
        raise DataError(f"{path} cannot be read", got=error, wanted="an SGF file, a folder or a zip of them") from None


def _outside(config: GoGames) -> list[str]:
    """Fingerprints of the files that the games come from."""
    if config.path is None:
        return []
    path = Path(config.path).expanduser()
    return [file_fingerprint(file) for file in (sorted(path.rglob("*.sgf")) if path.is_dir() else [path])]


HANDLERS: Mapping[str, Handler] = {
    "games": Handler(games, ("games", "flywheel/recorded"), outside=_outside),
    "imitate": Handler(imitate, (*LEARNING_CODE, "flywheel/recorded")),
}
