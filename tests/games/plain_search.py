"""The search of `prairie.games.mcts` for one game, written plainly: objects, recursion, the plain rules."""

import math

import numpy as np

from prairie.games.go import BLACK, WHITE
from prairie.games.mcts import halving


class Node:
    def __init__(self, position):
        self.position, self.children, self.prior = position, {}, {}
        self.count, self.total, self.waiting = 0, 0.0, 0

    @property
    def mean(self):
        return (self.total + self.waiting) / (self.count + self.waiting)

    @property
    def tried(self):
        return self.count + self.waiting


class PlainSearch:
    """`judge(position) -> (logits (M,), value, lead)`; `noise` replaces the root's policy once it is known."""

    def __init__(self, position, komi, judge, settings, pass_from=0, play_out=False):
        self.root, self.komi, self.judge, self.settings = Node(position), komi, judge, settings
        self.pass_from, self.play_out, self.root_prior, self.forced, self.gumbel = pass_from, play_out, {}, 0.0, None

    def step(self, leaves=1, considered=-1):
        waiting = []
        for _ in range(leaves):
            path = self.walk(considered)
            leaf = path[-1]
            if leaf.position.over:
                self.back_up(path, self.outcome(leaf.position))
            elif leaf.waiting:
                break
            else:
                waiting.append(path)
                for node in path:
                    node.waiting += 1
        for path in waiting:
            leaf = path[-1]
            logits, value, lead = self.judge(leaf.position)
            for node in path:
                node.waiting -= 1
            leaf.prior = self.softmax(leaf.position, logits)
            if leaf is self.root:
                self.root_prior = dict(leaf.prior)
            weight = self.settings.score_weight
            reach = self.settings.score_reach * leaf.position.size
            self.back_up(path, (1 - weight) * value + weight * math.tanh(lead / reach))

    def walk(self, considered):
        path = [self.root]
        while path[-1].count and not path[-1].position.over:
            node = path[-1]
            halved = node is self.root and considered >= 0
            move = self.by_halving(considered) if halved else self.by_puct(node)
            if move not in node.children:
                node.children[move] = Node(node.position.after(move))
            path.append(node.children[move])
        return path

    def by_puct(self, node):
        settings, at_root = self.settings, node is self.root
        prior = self.root_prior if at_root else node.prior
        visits = sum(child.tried for child in node.children.values())
        explored = sum(prior[move] for move in sorted(node.children))
        reduction = settings.root_first_play if at_root else settings.first_play
        first_play = node.total / node.count - reduction * math.sqrt(explored)
        best, best_score = None, -math.inf
        for move in sorted(prior):
            child = node.children.get(move)
            value, count = (-child.mean, child.tried) if child else (first_play, 0)
            if child and at_root and self.forced and count < math.sqrt(self.forced * prior[move] * visits):
                return move
            score = value + settings.c_puct * math.sqrt(visits + 0.01) * prior[move] / (1 + count)
            if score > best_score:
                best, best_score = move, score
        return best

    def by_halving(self, considered):
        most = max((child.count for child in self.root.children.values()), default=0)
        best, best_score = None, -math.inf
        for move in sorted(self.root.prior):
            child = self.root.children.get(move)
            value = (1 - child.mean) / 2 if child else 0.0
            score = self.gumbel[move] + (self.settings.c_visit + most) * self.settings.c_scale * value
            if (child.count if child else 0) == considered and score > best_score:
                best, best_score = move, score
        return best

    def search(self, visits, leaves=1):
        while self.root.count < visits:
            considered = -1
            if self.gumbel is not None and self.root.count:
                moves = min(self.settings.gumbel, len(self.root.prior))
                considered = halving(moves, visits - 1)[self.root.count - 1]
            self.step(min(leaves, visits - self.root.count), considered)

    def visits(self):
        found = np.zeros(self.root.position.pass_move + 1, np.int64)
        for move, child in self.root.children.items():
            found[move] = child.count
        return found

    def softmax(self, position, logits):
        legal = position.legal_moves()
        if self.play_out:
            legal = [move for move in legal[:-1] if not position.own_eye(move)] or legal[-1:]
        elif len(position.moves) < self.pass_from and len(legal) > 1:
            legal = legal[:-1]
        highest = max(logits[move] for move in legal)
        weights = {move: math.exp(float(logits[move] - highest)) for move in legal}
        total = sum(weights.values())
        return {move: float(np.float32(weight / total)) for move, weight in weights.items()}

    def outcome(self, position):
        score = position.score(self.komi) * (1 if position.to_move == BLACK else -1)
        weight, reach = self.settings.score_weight, self.settings.score_reach * position.size
        return (1 - weight) * ((score > 0) - (score < 0)) + weight * math.tanh(score / reach)

    @staticmethod
    def back_up(path, value):
        for node in reversed(path):
            node.count += 1
            node.total += value
            value = -value


assert WHITE == 2
