"""Small worlds with a known truth for the wheel to turn in: a tiny model, and people who talk to it in this process.

The wheel is the real one: votes lie in the store, `curate` makes them a dataset, `ChatLearner` trains on it, `ChatGate`
judges. Only the people are simulated, and they are asked here instead of over HTTP: answers come from the same engine,
and what is on the disk is what a server would have written.
"""

from __future__ import annotations

import io
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prairie.data.records import Message
from prairie.evals.statistics import Interval
from prairie.flywheel.chat import (
    JUDGES_AT_ONCE,
    JUDGES_OF_JUDGES,
    ChatActor,
    ChatGate,
    ChatLearner,
    judged_vote,
    rules_for,
)
from prairie.flywheel.curate import is_held_out
from prairie.flywheel.gate import Comparison, vote_test
from prairie.flywheel.loop import Flywheel, Turned
from prairie.flywheel.reward_judge import train_reward_judge
from prairie.flywheel.users import Compared, SimulatedUser, TalkReport, people, win_rate_true
from prairie.pipeline.context import Context
from prairie.pipeline.handlers import HANDLERS
from prairie.pipeline.held_out import suite
from prairie.pipeline.model_stages import load_language_model
from prairie.pipeline.run import run
from prairie.recipe import GateRules, VoteLearning, resolve_recipe
from prairie.runtime import Progress, Runtime
from prairie.store.feedback import FeedbackEvent, Response
from prairie.store.home import Home
from prairie.store.registry import Version
from prairie.tasks.catalog import items
from prairie.tasks.task import Item

LINE = "tiny"
TASKS = ["docs"]
MAX_TOKENS = 40
TEMPERATURE = 0.8
LEARN = VoteLearning(
    epochs=2, tokens_per_batch=1024, max_tokens=128, lr=3e-3, beta=0.1, weight_decay=0.0, sft_weight=1.0,
    adapter={"rank": 4, "alpha": 8.0},  # type: ignore[arg-type]
)  # fmt: skip
GATE = GateRules(users=200, prompts=8, items=100, temperature=TEMPERATURE)

FIRST = {
    "name": "world",
    "about": "A tiny assistant that seldom words its answers as people like them.",
    "seed": 5,
    "stages": {
        "warm": {"kind": "prepare", "source": "tasks", "tasks": TASKS, "rows": 5000, "wordings": ["warm"]},
        "any": {"kind": "prepare", "source": "tasks", "tasks": TASKS, "rows": 3000},
        "tokenizer": {"kind": "tokenizer", "data": ["warm", "any"], "vocab_size": 1024},
        "first": {
            "kind": "train", "objective": "causal_lm", "data": ["warm", "any"], "tokenizer": "tokenizer",
            "shape": {"depth": 2, "dim": 64, "context": 256}, "epochs": 1, "tokens_per_batch": 2048, "max_tokens": 128,
            "optimizer": "muon", "lr": 4e-3, "schedule": "linear",
        },
        "publish": {"kind": "publish", "line": LINE, "model": "first"},
    },
}  # fmt: skip


class World:
    """A home whose line people talk to; `adversarial` of them, teachers and judges alike, vote against their taste."""

    def __init__(self, root: Path, seed: int, adversarial: float = 0.0) -> None:
        self.home = Home(root)
        self.seed, self.adversarial = seed, adversarial
        quiet = Progress(io.StringIO(), quiet=True)
        self.context = Context(resolve_recipe(FIRST), self.home, Runtime.detect(seed=5, progress=quiet))
        run(self.context, HANDLERS)  # makes the first model, or finds it
        first = self.home.registry.champion(LINE)
        assert first is not None
        self.first = first

    def copy(self, root: Path, seed: int, adversarial: float = 0.0) -> World:
        """The same first model in a home of its own."""
        self.home.close()
        shutil.copytree(self.home.root, root)
        return World(root, seed, adversarial)

    def turn(self, number: int, teachers: int, each: int, judges: int = 0) -> Turned:
        """One turn of the real wheel. `judges`: so many people who do not teach vote too, beforehand, and a reward
        model that is trained on their votes judges in place of people. Raises DataError when it judges no better than
        chance."""
        actor = ChatActor(self.context, LINE, self._meet(number, teachers, each))
        gate = ChatGate(self.context, GATE, TASKS, self._vote(number), MAX_TOKENS)
        if judges:
            champion = self.home.registry.champion(LINE)
            assert champion is not None
            self._meet(number, judges, each, teaching=False)(champion)
            judge = train_reward_judge(self.context, LINE)
            rules = rules_for(GATE, judge.accuracy)
            vote = judged_vote(self.context, judge, rules, TASKS, MAX_TOKENS, judge.accuracy)
            gate = ChatGate(self.context, rules, TASKS, vote, MAX_TOKENS, "questions", judge.accuracy)
        return Flywheel(LINE, self.home.registry, actor, ChatLearner(self.context, LEARN), gate).turn()

    def true_win_rate(self) -> Interval:
        """How often a noiseless person takes the champion's answer over the first model's, as they are served."""
        champion = self.home.registry.champion(LINE)
        assert champion is not None
        if champion == self.first:
            return Interval(0.5, 0.5, 0.5, 0)
        asked = suite(TASKS, 100) * 4
        new, old = (self._answers(version, asked, seed) for version, seed in ((champion, 1), (self.first, 100_001)))
        return win_rate_true(new, old, asked)

    def _meet(self, number: int, count: int, each: int, teaching: bool = True) -> Callable[[Version], TalkReport]:
        """People ask the champion, get two answers each time, and choose; their votes are on the disk afterwards."""

        def meet(champion: Version) -> TalkReport:
            crowd = self._crowd(count, f"turn{number}-user", teaching=teaching)
            questions = items(TASKS, "train", 200, self.seed * 100 + number, distinct=False)
            questions = list({item.id: item for item in questions}.values())
            asked = [(user, item) for user in crowd for item in user.asks(questions, each, f"{self.seed}/{number}")]
            twice = [item for _, item in asked for _ in range(2)]
            texts = self._answers(champion, twice, self.seed * 1_000_000 + number * 10_000)
            talks, report = [], TalkReport(requests=len(asked))
            for place, (user, item) in enumerate(asked):
                rng = random.Random(f"{self.seed}/{number}/{user.name}/{item.id}")
                id = f"{number}-{place}" if teaching else f"{number}-judges-{place}"
                answers = [
                    Response(
                        f"{id}:{side}", LINE, (Message("user", item.prompt),), line=LINE, text=texts[2 * place + side],
                        version_id=champion.artifact_id, user=user.name, status="done", finish_reason="stop",
                    )
                    for side in range(2)
                ]  # fmt: skip
                vote = user.likes(item, answers[0].text or "", answers[1].text or "", rng)
                better, worse = answers if vote >= 0.5 else answers[::-1]
                value: dict[str, Any] = {"over": [worse.id], **({"tie": True} if vote == 0.5 else {})}
                talks += [(worse, []), (better, [(id, FeedbackEvent(better.id, "choice", value, user=user.name))])]
            report.votes = self.home.feedback.take_over(talks)["events"]
            return report

        return meet

    def _vote(self, number: int) -> Callable[[Version, Version], Compared]:
        """Other people compare two versions blindly, until the verdict about their votes is certain."""

        def vote(candidate: Version, champion: Version) -> Compared:
            itself = candidate.name == champion.name
            crowd = self._crowd(GATE.users, f"turn{number}-judge", teaching=False)
            crowd = crowd[:JUDGES_OF_JUDGES] if itself else crowd
            questions = items(TASKS, "held_out", 100, self.seed)
            found: list[Compared] = []
            for first in range(0, len(crowd), JUDGES_AT_ONCE):
                some = crowd[first : first + JUDGES_AT_ONCE]
                asked = [(user, item) for user in some for item in user.asks(questions, GATE.prompts, number)]
                found.append(self._compared(candidate, champion, asked, f"{number}/{first}"))
                said = [comparison for each in found for comparison in each.comparisons]
                if not itself and vote_test(said).decision != "undecided":
                    break
            return Compared.joined(found)

        return vote

    def _compared(self, new: Version, old: Version, asked: list[tuple[SimulatedUser, Item]], salt: str) -> Compared:
        questions, rng = [item for _, item in asked], random.Random(f"{self.seed}/{salt}")
        a, b = (self._answers(version, questions, rng.randrange(2**31)) for version in (new, old))
        comparisons, shown_first = [], []
        for (user, item), text, other in zip(asked, a, b, strict=True):
            a_first = rng.random() < 0.5
            vote = user.likes(item, *((text, other) if a_first else (other, text)), rng)
            comparisons.append(Comparison(user.name, item.id, vote if a_first else 1 - vote))
            shown_first.append(Comparison(user.name, item.id, vote))
        return Compared(comparisons, shown_first, questions, a, b, TalkReport(requests=2 * len(asked)))

    def _answers(self, version: Version, asked: Sequence[Item], seed: int) -> list[str]:
        """As they are served: sampled, each question with a seed of its own."""
        model = load_language_model(self.home.artifacts.get(version.artifact_id), self.context.runtime)
        talks = [[Message("user", item.prompt)] for item in asked]
        return [c.text for c in model.generate(talks, temperature=TEMPERATURE, max_tokens=MAX_TOKENS, seed=seed)]

    def _crowd(self, count: int, prefix: str, *, teaching: bool) -> list[SimulatedUser]:
        """Teachers or judges, by the hash of their names; some of them vote against their own taste."""
        pool = people(count * 6, self.seed, noise=0.1, prefix=prefix)
        chosen = [user for user in pool if is_held_out(user.name) != teaching][:count]
        bad = set(random.Random(f"{prefix}/{self.seed}").sample(range(count), round(count * self.adversarial)))
        return [
            SimulatedUser(user.name, user.taste, user.languages, user.noise, "adversarial" if n in bad else "honest")
            for n, user in enumerate(chosen)
        ]
