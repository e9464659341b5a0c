"""Self-play: simulations a CPU-second, ours against OpenSpiel's AlphaZero actor with a net of the same shape.

The peer is OpenSpiel's `MCTSBot` with a net as evaluator, as its Python AlphaZero actor runs it: one game, one leaf at
a time, evaluations cached. The net is the same tower in the same torch; a move gets as many simulations as ours gets on
average. `rules` compares the rules alone: random games, legal moves asked before each move.

    python -m benchmarks.selfplay [--quick] [--case 5x5] [--json]
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Case, Found, forget_peak, peak_rss_mb, run
from prairie.games.features import TowerJudge
from prairie.games.go import Boards
from prairie.games.kernels import FIGURES, PLANES
from prairie.games.selfplay import SelfPlay, play
from prairie.models.tower import Tower, TowerConfig, multiply_adds

NETS = {5: (4, 32), 7: (6, 48), 9: (5, 48)}
"""Size -> blocks, width: those of the recipes."""
VISITS, FAST, SHARE = 64, 12, 0.3


def net(size: int) -> Tower:
    blocks, width = NETS[size]
    return Tower(TowerConfig.small(PLANES, FIGURES, blocks, width, (size,))).init_weights(0).eval()


def ours(size: int) -> Any:
    def measure(quick: bool) -> Found:
        torch.set_num_threads(1)
        tower = net(size)
        judge, spent = TowerJudge(tower), [0.0]

        def timed(planes: Any, figures: Any) -> Any:
            began = time.process_time()
            opinion = judge(planes, figures)
            spent[0] += time.process_time() - began
            return opinion

        settings = SelfPlay(size, visits=VISITS, fast_visits=FAST, full_share=SHARE)
        play(judge, SelfPlay(size, slots=4), games=4, mean_score=0, seed=1)  # compiles, warms up
        forget_peak()
        games = (32 if quick else 192) * 25 // size**2
        began = time.process_time()
        played = play(timed, settings, games=max(games, 16), mean_score=0, seed=0)
        cpu_s = time.process_time() - began
        evaluations = played.simulations / spent[0]
        return {
            "rate": played.simulations / cpu_s, "rss_mb": peak_rss_mb(),
            "games_per_cpu_minute": round(60 * len(played.games) / cpu_s, 1),
            "share_of_net": round(spent[0] / cpu_s, 3),
            "net_gflops": round(2 * multiply_adds(tower.config, size**2) * evaluations / 1e9, 1),
        }  # fmt: skip

    return measure


def peer(size: int) -> Any:
    def measure(quick: bool) -> Found:
        import pyspiel
        from open_spiel.python.algorithms import mcts

        torch.set_num_threads(1)
        tower = net(size).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        game = pyspiel.load_game(f"go(board_size={size},komi=0.5)")
        budget = round(SHARE * VISITS + (1 - SHARE) * FAST)

        class Net(mcts.Evaluator):
            """As OpenSpiel's AlphaZeroEvaluator: a value for each player and a prior, from one cached pass."""

            def __init__(self) -> None:
                self.cache: dict[bytes, tuple[float, np.ndarray]] = {}

            def _judge(self, state: Any) -> tuple[float, np.ndarray]:
                seen = np.asarray(state.observation_tensor(), np.float32)
                key = seen.tobytes()
                if key not in self.cache:
                    planes = torch.zeros(1, PLANES, size, size)
                    planes[0, 0] = 1
                    planes[0, 1:4] = torch.from_numpy(seen.reshape(-1, size, size)[:3])
                    with torch.inference_mode():
                        judged = tower(planes, torch.zeros(1, FIGURES))
                    self.cache[key] = float(judged.value_B), judged.policy_BM[0].softmax(-1).numpy()
                return self.cache[key]

            def evaluate(self, state: Any) -> list[float]:
                value, _ = self._judge(state)
                return [value, -value]

            def prior(self, state: Any) -> list[tuple[int, float]]:
                _, policy = self._judge(state)
                return [(action, float(policy[action])) for action in state.legal_actions()]

        bot = mcts.MCTSBot(
            game, 1.1, budget, Net(), solve=False, dirichlet_noise=(0.25, 0.5),
            random_state=np.random.RandomState(0), child_selection_fn=mcts.SearchNode.puct_value,
        )  # fmt: skip
        forget_peak()
        moves, until = 0, 3.0 if quick else 20.0
        chance, began = np.random.default_rng(0), time.process_time()
        while time.process_time() - began < until:
            state = game.new_initial_state()
            while not state.is_terminal() and time.process_time() - began < until:
                root = bot.mcts_search(state)
                counts = np.array([child.explore_count for child in root.children], np.float64)
                chosen = chance.choice(len(counts), p=counts / counts.sum())
                state.apply_action(root.children[chosen].action)
                moves += 1
        return {"rate": moves * budget / (time.process_time() - began), "rss_mb": peak_rss_mb(), "moves": moves}

    return measure


def our_rules(quick: bool) -> Found:
    """Random 9x9 games, 64 boards at once."""
    chance, points, moves = np.random.default_rng(0), 81, 0
    forget_peak()
    boards = Boards.empty(9, 64, 400)
    boards.play(np.argmax(boards.legal() == 1, axis=1))  # compiles
    began, until = time.process_time(), 1.0 if quick else 5.0
    while time.process_time() - began < until:
        legal = boards.legal() == 1
        legal[:, points] = ~legal[:, :points].any(axis=1)
        boards.play(np.argmax(legal * chance.random(legal.shape, np.float32), axis=1))
        moves += len(boards)
        over = np.flatnonzero((boards.passes >= 2) | (boards.length > 240))
        boards.reset(over)
    return {"rate": moves / (time.process_time() - began), "rss_mb": peak_rss_mb()}


def their_rules(quick: bool) -> Found:
    import pyspiel

    game, chance, moves = pyspiel.load_game("go(board_size=9,komi=0.5)"), np.random.default_rng(0), 0
    forget_peak()
    began, until = time.process_time(), 1.0 if quick else 5.0
    while time.process_time() - began < until:
        state, length = game.new_initial_state(), 0
        while not state.is_terminal() and length < 240:
            legal = state.legal_actions()
            state.apply_action(legal[int(chance.random() * max(1, len(legal) - 1))])
            length += 1
        moves += length
    return {"rate": moves / (time.process_time() - began), "rss_mb": peak_rss_mb()}


if __name__ == "__main__":
    run("selfplay", [
        *(Case(f"{size}x{size}", "OpenSpiel MCTSBot", "simulations/CPU-s", ours(size), peer(size)) for size in NETS),
        Case("rules 9x9", "OpenSpiel", "moves/CPU-s", our_rules, their_rules),
    ])  # fmt: skip
