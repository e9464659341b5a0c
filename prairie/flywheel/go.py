"""Go on the wheel: self-play is the actor, the one Trainer the learner, a match the gate.

Each role leaves an artifact and goes on where it was cut off: games of self-play are kept in parts, training has its
checkpoints, a match its outcomes. Not here: the loop (`loop`), the test that decides (`gate`), the games.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prairie.data.loader import Loader
from prairie.data.positions import ARRAYS, PositionDataset
from prairie.errors import NotFoundError
from prairie.evals.sequential import paired_games, sequential_test
from prairie.flywheel.gate import LEAST_USERS, Probe, Verdict, judge_games
from prairie.flywheel.loop import Flywheel, Turned
from prairie.games.curve import Step, learning_curve
from prairie.games.duel import Dueled, duel
from prairie.games.features import TowerJudge
from prairie.games.kernels import FIGURES, PLANES
from prairie.games.mcts import SearchSettings
from prairie.games.selfplay import Health, Played, SelfPlay, joined, play
from prairie.games.sgf import read_sgf, write_sgf
from prairie.games.side_by_side import Watch, side_by_side
from prairie.models.tower import Tower, TowerConfig, load_tower, save_tower
from prairie.pipeline.context import Context, Handler, Work, code_revision
from prairie.pipeline.publishing import register
from prairie.recipe import GoLearning, GoMatch, GoPlay, GoTurns, NewTower
from prairie.store.artifacts import Artifact
from prairie.store.home import Home
from prairie.store.registry import Registry, Version
from prairie.train.config import TrainConfig
from prairie.train.objectives.policy_value import PolicyValue, PolicyValueConfig
from prairie.train.trainer import Trainer

PLAYING_CODE = ("games", "models/tower", "data/positions")
LEARNING_CODE = (*PLAYING_CODE, "train", "flywheel/go")
PART_GAMES = 160
"""Games of self-play that one thread plays and that are kept at a time, at most: what a kill costs."""
MATCH_PAIRS = 24
"""Pairs of games of a match that one thread plays, between two looks at the test."""


def self_play_of(keys: GoPlay, size: int) -> SelfPlay:
    """A recipe's `play` on boards of `size` lines."""
    return SelfPlay(
        size, visits=keys.visits, fast_visits=keys.fast_visits, full_share=keys.full_share, slots=keys.slots,
        komi_spread=keys.komi_spread, temperature=keys.temperature, opening_moves=keys.opening_moves,
        play_out=keys.play_out, decided=keys.decided,
        search=SearchSettings(gumbel=keys.gumbel, score_weight=keys.score_weight, score_reach=keys.score_reach),
    )  # fmt: skip


@dataclass
class GoActor:
    """The champion plays itself."""

    context: Context
    keys: GoPlay

    def act(self, champion: Version) -> Artifact:
        """Positions of new games, with their health. Raises DataError when the games have collapsed."""
        store, home = self.context.home.artifacts, self.context.home
        parent = store.get(champion.artifact_id)
        number = len(Registry(home).turns(champion.line)) + 1
        config = {
            **self.keys.model_dump(mode="json"), "line": champion.line, "turn": number,
            "mean_score": mean_score(self.context, champion.line), "seed": self.context.recipe.seed,
        }  # fmt: skip
        code = code_revision(PLAYING_CODE)
        identity = store.id_of("positions", config, [parent.id], code)
        found = store.find(identity)
        if found is None:
            figures: dict[str, Any] = {}
            title = f"games-{champion.line}-{number}"
            with (
                home.working(identity) as scratch,
                store.create("positions", title, config, [parent.id], code, figures=figures) as folder,
            ):
                figures.update(self._play(parent, config, folder, scratch))
            found = store.get(identity)
        health = found.figures["health"]
        self.context.runtime.progress.say(
            f"    {found.figures['rows']} rows of {health['games']} games: {health['mean_length']:.1f} moves, entropy "
            f"{health['entropy']:.2f}, Black {health['score_mean']:+.1f} ±{health['score_std']:.1f} and wins "
            f"{health['black_wins']:.0%}, {health['pass_share']:.0%} passes, {health['distinct']:.0%} distinct"
        )
        return found

    def _play(self, parent: Artifact, config: Mapping[str, Any], folder: Path, work: Path) -> dict[str, Any]:
        began, tower = time.process_time(), load_tower(parent.path)
        settings = self_play_of(self.keys, board_of(tower))
        lock = threading.Lock()

        def part(number: int, games: int) -> Callable[[Watch], Played]:
            """One part of the games; its seed is its number's."""
            path = work / f"part-{number:04d}"
            seed = int(np.random.default_rng([config["seed"], config["turn"], number]).integers(2**31))
            judge = TowerJudge(tower, device=self.context.runtime.device, seed=seed)

            def played(watch: Watch) -> Played:
                def over(count: int) -> None:
                    watch.go_on()
                    with lock:
                        bar.update(count)

                if not path.is_dir():
                    _keep(play(judge, settings, games=games, mean_score=config["mean_score"], seed=seed, on_game=over),
                          path)  # fmt: skip
                return _kept(path)

            return played

        with self.context.runtime.progress.bar("self-play", self.keys.games, "game") as bar:
            jobs = [part(number, games) for number, games in enumerate(parts_of(self.keys.games))]
            parts = list(side_by_side(jobs, self.context.runtime.threads))
        played = joined(parts)
        health = Health.of(played)
        health.check(settings.size)
        assert played.rows is not None
        played.rows.save(folder)
        (folder / "games.sgf").write_text("".join(write_sgf(game) for game in played.games), encoding="utf-8")
        return {
            "rows": len(played.rows), "kind": "positions", "health": health.__dict__, "score_mean": health.score_mean,
            "simulations": played.simulations, "cpu_s": round(time.process_time() - began, 2),
        }  # fmt: skip


@dataclass
class GoLearner:
    """Trains the champion on the positions of the last turns, metered: so many passes per new row and no more."""

    context: Context
    keys: GoLearning
    title: str = "turn"

    def learn(self, champion: Version, records: Artifact) -> Version:
        store, home = self.context.home.artifacts, self.context.home
        turns = Registry(home).turns(champion.line)
        tried = [turn.candidate for turn in turns if turn.candidate]
        newest = tried[-1] if tried and self.keys.begin == "newest" else champion.artifact_id
        parent = store.get(newest)
        earlier = [turn.dataset for turn in turns if turn.dataset]
        before = earlier[-(self.keys.window - 1) :] if self.keys.window > 1 else []
        window = [*(store.get(id) for id in before), records]
        inputs = [parent.id, *(artifact.id for artifact in window)]
        config = {**self.keys.model_dump(mode="json"), "seed": self.context.recipe.seed}
        code = code_revision(LEARNING_CODE)
        identity = store.id_of("candidate", config, inputs, code)
        if store.find(identity) is None:
            figures: dict[str, Any] = {}
            with (
                home.working(identity) as scratch,
                store.create("candidate", self.title, config, inputs, code, figures=figures) as folder,
            ):
                figures.update(self._train(parent, window, records, folder, scratch))
        return register(Registry(home), champion.line, store.get(identity), self.context)

    def _train(
        self, parent: Artifact, window: list[Artifact], records: Artifact, folder: Path, work: Path
    ) -> dict[str, Any]:
        began, tower, keys = time.process_time(), load_tower(parent.path), self.keys
        # The layout in which a CPU takes 18% more steps.
        tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        dataset = PositionDataset.load([artifact.path for artifact in window])
        steps = max(1, math.ceil(keys.passes * int(records.figures["rows"]) / keys.batch))
        config = TrainConfig(
            steps=steps, tokens_per_batch=keys.batch, lr=keys.lr, weight_decay=keys.weight_decay,
            schedule=keys.schedule, warmup_steps=min(steps, max(1, steps // 20)), betas=(0.9, 0.98),
            seed=self.context.recipe.seed,
        )  # fmt: skip
        loader = Loader(dataset, tokens_per_batch=keys.batch, seed=self.context.recipe.seed)
        objective = PolicyValue(PolicyValueConfig(owner=keys.owner))
        trainer = Trainer(
            tower, objective, loader, config, runtime=self.context.runtime, folder=work, title="learn"
        )  # fmt: skip
        figures = trainer.fit()
        save_tower(tower.eval(), folder)
        (folder / "metrics.jsonl").write_bytes((work / "metrics.jsonl").read_bytes())
        return {
            **figures, "window_rows": len(dataset), "new_rows": records.figures["rows"],
            "cpu_s": round(time.process_time() - began, 2),
        }  # fmt: skip


@dataclass
class GoGate:
    """A match of candidate and champion at a fair komi, stopped as soon as the test has decided."""

    context: Context
    rules: GoMatch

    def judge(self, candidate: Version, champion: Version) -> Verdict:
        store, home, rules = self.context.home.artifacts, self.context.home, self.rules
        towers = [load_tower(store.get(version.artifact_id).path) for version in (candidate, champion)]
        size = board_of(towers[0])
        komi = round(mean_score(self.context, champion.line)) + 0.5
        keys = f"{rules.model_dump_json()}{komi}{self.context.recipe.seed}"
        name = f"match-{candidate.artifact_id}-{champion.artifact_id}"
        path = home.work(name) / "outcomes.json"
        played = _outcomes(path, keys)
        done = len(played["outcomes"])

        def games_from(start: int) -> Callable[[Watch], Dueled]:
            """Some pairs of the match; where they begin is their seed."""
            judges = [TowerJudge(tower, device=self.context.runtime.device, seed=None) for tower in towers]
            pairs = min(MATCH_PAIRS, (rules.games - start + 1) // 2)
            return lambda watch: duel(
                judges[0], judges[1], size=size, pairs=pairs, visits=rules.visits, komi=komi,
                opening_moves=rules.opening_moves, seed=self.context.recipe.seed * 100_003 + start, on_step=watch.go_on,
            )  # fmt: skip

        jobs = [games_from(start) for start in range(done, rules.games, 2 * MATCH_PAIRS)]
        with (
            self.context.runtime.progress.bar("match", rules.games, "game", start=done) as bar,
            closing(side_by_side(jobs, self.context.runtime.threads)) as found,
        ):
            while len(played["outcomes"]) < rules.games and _undecided(played["outcomes"], rules.wanted):
                some = next(found)
                played["outcomes"] += some.outcomes
                played["lengths"] += some.lengths
                _write(path, {"keys": keys, **played})
                bar.update(len(some.outcomes))
        length = float(np.mean(played["lengths"])) / size**2
        verdict = judge_games(
            played["outcomes"], probes=[Probe("moves a point", length, 0.3, 3.0)], wanted=rules.wanted,
            rules={**rules.model_dump(), "komi": komi},
        )  # fmt: skip
        home.clear_work(name)
        return verdict


def parts_of(games: int) -> list[int]:
    """How many games each part has: alike, so that no thread waits long for another; not a matter of the machine."""
    count = math.ceil(games / PART_GAMES)
    return [(games + k) // count for k in range(count)]


def board_of(tower: Tower) -> int:
    """The board that a line's net is for."""
    return tower.config.boards[0]


def mean_score(context: Context, line: str) -> float:
    """Black's mean score in the games of the line's last turn; 0 before the first."""
    datasets = [turn.dataset for turn in Registry(context.home).turns(line) if turn.dataset]
    return float(context.home.artifacts.get(datasets[-1]).figures["score_mean"]) if datasets else 0.0


def wheel(context: Context, line: str, play: GoPlay, learn: GoLearning, match: GoMatch) -> Flywheel:
    """The loop of a Go line."""
    registry = Registry(context.home)
    return Flywheel(
        line, registry, GoActor(context, play), GoLearner(context, learn, f"turn-{line}"), GoGate(context, match)
    )


def stage_of(home: Home, line: str) -> dict[str, Any]:
    """How the line was turned last, as one turn of a `selfplay` stage, and its seed. Raises NotFoundError when it never
    was turned."""
    turns = [turn for turn in Registry(home).turns(line) if turn.dataset and turn.candidate]
    if not turns:
        raise NotFoundError(f"line `{line}` has not been turned yet", mend="prairie run its recipe first")
    store = home.artifacts
    played = store.get(str(turns[-1].dataset)).manifest["config"]
    learned = store.get(str(turns[-1].candidate)).manifest["config"]
    rules = {key: value for key, value in turns[-1].verdict["rules"].items() if key in GoMatch.model_fields}
    return {
        "kind": "selfplay", "line": line, "start": "-", "turns": 1,
        "play": {key: played[key] for key in GoPlay.model_fields if key in played},
        "learn": {key: learned[key] for key in GoLearning.model_fields if key in learned},
        "match": rules,
        "seed": played["seed"],
    }  # fmt: skip


def tower(work: Work) -> dict[str, Any]:
    """The `tower` stage: a net for boards of one size, which knows nothing or what it learned on another size."""
    config: NewTower = work.config
    if config.start is None:
        shape = TowerConfig.small(PLANES, FIGURES, config.blocks, config.width, (config.size,))
        net = Tower(shape).init_weights(work.context.recipe.seed)
    else:
        learned = load_tower(work.model(config.start).path)
        net = Tower(replace(learned.config, boards=(config.size,)))
        net.load_state_dict(learned.state_dict())
    save_tower(net, work.folder)
    return {"parameters": net.parameter_count(), "size": config.size}


def selfplay(work: Work) -> dict[str, Any]:
    """The `selfplay` stage: so many turns of a line's wheel. A turn that was made before a kill is not made again."""
    config: GoTurns = work.config
    context = work.context
    turning = wheel(context, config.line, config.play, config.learn, config.match)
    turns: list[Turned] = []
    for number in range(1, config.turns + 1):
        context.runtime.progress.say(f"  turn {number} of {config.turns}")
        turns.append(turning.turn(key=f"{work.identity}-{number}"))
        context.runtime.progress.say("    " + summary(turns[-1]))
    told = [_told(context, turned) for turned in turns]
    curve = [point.to_json() for point in learning_curve(
        Step(float(row["play_s"]) + float(row["learn_s"]), turned.verdict.win_rate, turned.verdict.passed)
        for row, turned in zip(told, turns, strict=True)
    )]  # fmt: skip
    promoted = sum(turned.verdict.passed for turned in turns)
    return {
        "summary": f"{promoted} of {len(turns)} candidates promoted, {turns[-1].winner.name} is champion",
        "champion_artifact": turns[-1].winner.artifact_id, "turns": told, "curve": curve,
        "rows": sum(int(turned.records.figures["rows"]) for turned in turns), "promoted": promoted,
    }  # fmt: skip


def summary(turned: Turned) -> str:
    """One line about a turn."""
    verdict = turned.verdict
    outcome = f"{turned.candidate.name} promoted" if verdict.passed else f"refused, {turned.champion.name} stays"
    return f"{outcome}: wins {verdict.win_rate:.1%} [{verdict.low:.1%}, {verdict.high:.1%}] of {verdict.n} games"


def _told(context: Context, turned: Turned) -> dict[str, Any]:
    candidate = context.home.artifacts.get(turned.candidate.artifact_id)
    return {
        **turned.to_json(), "health": turned.records.figures["health"], "rows": turned.records.figures["rows"],
        "play_s": turned.records.figures["cpu_s"], "learn_s": candidate.figures["cpu_s"],
        "loss": candidate.figures.get("loss_last"), "verdict_text": turned.verdict.text(),
    }  # fmt: skip


def _undecided(outcomes: list[float], wanted: float) -> bool:
    test = sequential_test(paired_games(outcomes), wanted=wanted, least=LEAST_USERS)
    return test.decision == "undecided"


def _outcomes(path: Path, keys: str) -> dict[str, Any]:
    """What an interrupted match came to, if it was played by the same rules."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    same = found.get("keys") == keys
    return {"outcomes": found["outcomes"] if same else [], "lengths": found["lengths"] if same else []}


def _write(path: Path, value: Mapping[str, Any]) -> None:
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(value), encoding="utf-8")
    draft.replace(path)


def _keep(part: Played, path: Path) -> None:
    """A part of self-play, whole or not at all."""
    draft = path.with_suffix(".draft")
    draft.mkdir(parents=True, exist_ok=True)
    if part.rows is not None:
        part.rows.save(draft)
    (draft / "games.sgf").write_text("".join(write_sgf(game) for game in part.games), encoding="utf-8")
    np.save(draft / "scores.npy", part.scores)
    np.save(draft / "entropies.npy", part.entropies)
    (draft / "simulations").write_text(str(part.simulations))
    draft.rename(path)


def _kept(path: Path) -> Played:
    rows = PositionDataset.load([path]) if all((path / f"{name}.npy").is_file() for name in ARRAYS) else None
    return Played(
        rows, read_sgf((path / "games.sgf").read_bytes()), np.load(path / "scores.npy"),
        np.load(path / "entropies.npy"), int((path / "simulations").read_text()),
    )  # fmt: skip


HANDLERS: Mapping[str, Handler] = {
    "tower": Handler(tower, ("models/tower",)),
    "selfplay": Handler(selfplay, LEARNING_CODE),
}
