"""The chat actor's wheel: people talk and vote, their votes become a dataset, a candidate learns, people judge it.

The same roles serve simulated users (who are sent over HTTP) and real ones (whose votes lie in the store already).
Not here: the turn itself (`loop`), the rules for votes (`curate`), the statistics (`gate`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, cast

from prairie.data.loader import TokenDataset
from prairie.data.personal import FindNames
from prairie.data.records import Chat, Message, Preference
from prairie.data.sources import write_records
from prairie.engine.language_model import LanguageModel
from prairie.errors import DataError
from prairie.evals.harness import Evaluation
from prairie.evals.judge import Opinion, length_controlled
from prairie.evals.sequential import POWER, WANTED
from prairie.evals.statistics import Interval
from prairie.flywheel.curate import Curated, curate, gold_of, is_held_out
from prairie.flywheel.gate import Comparison, Verdict, as_judged, judge, required_sample_size, vote_test
from prairie.flywheel.health import ChatHealth
from prairie.flywheel.probes import Ask, Probe, probes, sycophancy_probe
from prairie.flywheel.replay import replayed
from prairie.flywheel.users import Compared, SimulatedUser, TalkReport, compare, people, talk
from prairie.models.lora import AdapterRows
from prairie.pipeline.context import Context, code_revision
from prairie.pipeline.data_stages import train_records
from prairie.pipeline.held_out import score_suite, suite
from prairie.pipeline.model_stages import base_of, learn, load_language_model, open_start
from prairie.pipeline.publishing import register
from prairie.recipe import GateRules, Users, VoteLearning
from prairie.store.artifacts import Artifact
from prairie.store.feedback import Vote
from prairie.store.registry import Registry, Version
from prairie.tasks.catalog import items
from prairie.tasks.task import Item, Style
from prairie.train.objectives.dpo import reference_logprobs

LEARNING_CODE = (
    "data", "models", "ops", "train", "flywheel/chat", "flywheel/curate", "pipeline/model_stages", "pipeline/held_out",
)  # fmt: skip
DATASET_CODE = ("data/clean", "data/personal", "data/personal_names", "flywheel/curate")
LEAST_ROWS = 8
CROWD = 12
"""Simulated people who talk at the same time: enough to fill the engine's batches."""
T = TypeVar("T")
VoteObjective = Literal["dpo", "kto"]
TEACHES: Mapping[VoteObjective, tuple[str, str]] = {
    "dpo": ("preferences", "a choice, an edit, or a thumb up and one down on the same question"),
    "kto": ("judged answers", "a thumb up or down, or a rating"),
}
"""What an objective learns from, and which votes give it."""
JUDGES_AT_ONCE = 2 * CROWD
"""Simulated people who judge between two looks at the verdict."""
JUDGES_OF_JUDGES = 12
"""Of them, how many compare the champion with itself."""


@dataclass
class ChatActor:
    """Gathers what people said of a line since its last turn."""

    context: Context
    line: str
    meet: Callable[[Version], TalkReport] | None = None
    """Sends users to the champion; None when real people have talked already."""
    report: TalkReport | None = None
    gold: Sequence[Preference] = ()
    """Preferences that are known to be right, by which people are trusted."""
    objective: VoteObjective = "dpo"
    """What the learner takes: preferences (dpo), or answers that people liked or not (kto)."""
    names: FindNames | None = None
    """What finds names of people, to mask them as other personal data is."""

    def act(self, champion: Version) -> Artifact:
        """The dataset of the votes that no earlier turn has used up. Raises DataError when they teach too little, or a
        collapse."""
        if self.meet is not None:
            self.report = self.meet(champion)
            if self.report.failed or self.report.lost_votes:
                say = self.context.runtime.progress.say
                say(f"{self.report.failed} of {self.report.requests} requests failed: {self.report.errors[:1]}")
        used = learned_events(self.context, self.line)
        teaching = [
            vote
            for vote in self.context.home.feedback.votes(line=self.line, purpose="chat")
            if vote.event.id not in used and not is_held_out(vote.event.user or "")
        ]
        return dataset(self.context, self.line, teaching, self.gold, self.objective, self.names)


def learned_events(context: Context, line: str) -> set[str]:
    """Ids of the votes that earlier turns of a line have used up: learned from, or found to teach nothing better. Those
    of a turn whose verdict about the votes stayed undecided come again, with what was said since."""
    used = (turn for turn in Registry(context.home).turns(line) if turn.decided)
    found = (context.home.artifacts.find(turn.dataset) for turn in used if turn.dataset)
    return {event for artifact in found if artifact for event in artifact.events}


def dataset(
    context: Context,
    line: str,
    votes: Sequence[Vote],
    gold: Sequence[Preference] = (),
    objective: VoteObjective = "dpo",
    names: FindNames | None = None,
) -> Artifact:
    """An immutable artifact of preferences, or of judged answers (`objective` kto), that names every event it holds.
    One person's votes stand together, in the order in which they came: who was quicker than whom decides nothing."""
    votes = sorted(votes, key=lambda vote: vote.event.user or "")
    curated = curate(votes, gold=gold_of(gold), names=names)
    rows, events, liked, disliked = _taught(curated, objective)
    if len(rows) < LEAST_ROWS or not liked or not disliked:
        raise DataError(
            f"the votes on `{line}` teach too little",
            got=f"{len(rows)} {TEACHES[objective][0]} from {len(votes)} votes"
            + (f", {len(liked)} of them liked" if objective == "kto" else ""),
            wanted=f"at least {LEAST_ROWS}" + (", liked and disliked ones" if objective == "kto" else ""),
            mend=f"let people vote more: {TEACHES[objective][1]}",
        )
    health = ChatHealth.of(liked, disliked)
    health.check()
    store, code = context.home.artifacts, code_revision(DATASET_CODE)
    config: dict[str, Any] = {"line": line, "events": events}
    if objective != "dpo":
        config["objective"] = objective
    if names is not None:
        config["names"] = True
    if gold:
        config["gold"] = [preference.to_json() for preference in gold]
    found = store.find(store.id_of("votes", config, [], code))
    if found is not None:
        return found
    figures = {
        "rows": len(rows),
        "votes": len(votes),
        "users": len({row.tags["user"] for row in rows}),
        "dropped": dict(curated.dropped),
        "masked": dict(curated.masked),
        "kind": "judged" if objective == "kto" else "preference",
        "health": health.to_json(),
    }
    with store.create("votes", f"votes-{line}", config, [], code, figures=figures, events=events) as folder:
        write_records(folder / "train.jsonl", rows)
    return store.get(store.id_of("votes", config, [], code))


def _taught(
    curated: Curated, objective: VoteObjective
) -> tuple[Sequence[Preference | Chat], list[str], list[str], list[str]]:
    """What an objective learns from, the events behind it, and the texts of answers liked and not liked."""
    if objective == "kto":
        judged = curated.labelled
        liked, disliked = ([a.messages[-1].content for a in judged if a.label is said] for said in (True, False))
        return judged, curated.labelled_events, liked, disliked
    pairs = curated.pairs
    return (
        pairs, curated.events, [pair.chosen[-1].content for pair in pairs], [p.rejected[-1].content for p in pairs],
    )  # fmt: skip


@dataclass
class ChatLearner:
    """DPO or KTO from the champion (an adapter goes on learning, a full model gets one)."""

    context: Context
    config: VoteLearning
    title: str = "turn"
    figures: dict[str, Any] = field(default_factory=dict)

    def learn(self, champion: Version, records: Artifact) -> Version:
        parent = self.context.home.artifacts.get(champion.artifact_id)
        earlier = replayed(self.context, self.config, parent, records)
        candidate = make_candidate(self.context, self.config, parent, records, self.title, earlier)
        self.figures = candidate.figures
        return register(Registry(self.context.home), champion.line, candidate, self.context)


def make_candidate(
    context: Context,
    config: VoteLearning,
    parent: Artifact,
    records: Artifact,
    title: str,
    earlier: Artifact | None = None,
) -> Artifact:
    """What `parent` becomes by learning from `records`, going over `earlier` rows again: the artifact that is there, or
    a new one."""
    home, store = context.home, context.home.artifacts
    keys = {**config.model_dump(mode="json"), "seed": context.recipe.seed}
    inputs, code = [a.id for a in (parent, records, earlier) if a is not None], code_revision(LEARNING_CODE)
    identity = store.id_of("candidate", keys, inputs, code)
    if store.find(identity) is None:
        figures: dict[str, Any] = {}
        with (
            home.working(identity) as scratch,
            store.create("candidate", title, keys, inputs, code, figures=figures) as folder,
        ):
            figures.update(learn_candidate(context, config, parent, records, folder, scratch, title, earlier))
    return store.get(identity)


def learn_candidate(
    context: Context,
    config: VoteLearning,
    parent: Artifact,
    records: Artifact,
    folder: Path,
    scratch: Path,
    title: str,
    earlier: Artifact | None = None,
) -> dict[str, Any]:
    """The work of `make_candidate`: fills `folder`, returns the figures."""
    start, rows = open_start(parent), train_records(records.path)
    figures = learn(
        config, config.objective, rows, start, base_of(parent), folder, scratch, context.runtime, title,
        kept=context.home.references, tracked=context.home.root / "tracking",
        earlier=train_records(earlier.path) if earlier is not None else (),
    )  # fmt: skip
    return {**figures, "replayed": earlier.figures["rows"] if earlier is not None else 0}


@dataclass
class ChatGate:
    """Held-out people compare candidate and champion blindly; the frozen suite and the probes must hold too."""

    context: Context
    rules: GateRules
    tasks: list[str]
    vote: Callable[[Version, Version], Compared] | None = None
    """A blind comparison of (candidate, champion) by people; None when nobody can be asked: then the votes of people
    who do not teach, cast before, are the judges."""
    max_tokens: int = 48
    units: str = "people"
    """What is independent in the votes: people, or the questions that one judge was asked."""
    judge_accuracy: Interval | None = None
    """How often a model that judges agrees with people it does not know, where that was measured."""

    def judge(self, candidate: Version, champion: Version) -> Verdict:
        store, runtime = self.context.home.artifacts, self.context.runtime
        planned = _planned(self.rules, self.judge_accuracy)
        runtime.progress.say(
            f"{planned} {self.units} are planned: within so many a candidate that truly wins {WANTED:.0%} is called"
            f" better in at least {POWER:.0%} of turns"
        )
        new = load_language_model(store.get(candidate.artifact_id), runtime)
        old = load_language_model(store.get(champion.artifact_id), runtime)
        compared = self.vote(candidate, champion) if self.vote is not None else None
        comparisons = (
            compared.comparisons if compared is not None else held_out_votes(self.context, champion.line, new, old)
        )
        itself = self.vote(champion, champion).shown_first if self.vote is not None else ()
        before, after = self._suites(new, old)
        said = compared or Compared([], [], before.items, after.answers, before.answers, TalkReport())
        at_equal_length = [_at_equal_length(said)] if self.units == "questions" and said.comparisons else []
        contradicted = sycophancy_probe(before.items, before.answers, after.answers, self._asks(old), self._asks(new))
        return judge(
            comparisons,
            suite_before=before.tasks,
            suite_after=after.tasks,
            probes=[
                *probes(*self._independent(said)), contradicted, *at_equal_length,
            ],
            margin=self.rules.margin,
            planned=planned,
            against_itself=itself,
            units=self.units,
            judge_accuracy=self.judge_accuracy,
        )  # fmt: skip

    def _independent(self, said: Compared) -> tuple[list[str], list[str], list[str]]:
        """Questions and both answers, for the probes, whose margins are those of independent answers: each question
        once where one judge was asked it again and again."""
        places = {item.id if self.units == "questions" else n: n for n, item in enumerate(said.items)}.values()
        old, new = ([answers[n] for n in places] for answers in (said.answers_b, said.answers_a))
        return [said.items[n].prompt for n in places], old, new

    def _asks(self, model: LanguageModel) -> Ask:
        """Greedy answers to conversations."""
        return lambda talks: [c.text for c in model.generate(talks, temperature=0.0, max_tokens=self.max_tokens)]

    def _suites(self, new: LanguageModel, old: LanguageModel) -> tuple[Evaluation, Evaluation]:
        asked = suite(self.tasks, self.rules.items)
        return score_suite(old, asked, self.max_tokens), score_suite(new, asked, self.max_tokens)


def held_out_votes(context: Context, line: str, new: LanguageModel, old: LanguageModel) -> list[Comparison]:
    """What people who do not teach preferred, as a judge: the candidate wins a pair when it makes the preferred answer
    more likely, against the other one, than the champion does."""
    votes = [v for v in context.home.feedback.votes(line=line) if is_held_out(v.event.user or "")]
    pairs = curate(votes).pairs
    if not pairs:
        return []
    dataset = TokenDataset.from_preferences(pairs, old.template, old.engine.max_context, on_long="truncate")
    margins = [
        (found[0::2] - found[1::2]).tolist()
        for model in (new, old)
        for found in [reference_logprobs(model.model, dataset, [AdapterRows(model.lora)] if model.lora else [])]
    ]
    kept = [pair for row, pair in enumerate(pairs) if row not in _refused(dataset)]
    return [
        Comparison(str(pair.tags["user"]), f"{row}", 1.0 if a > b else 0.0 if a < b else 0.5)
        for row, (pair, a, b) in enumerate(zip(kept, *margins, strict=True))
    ]


def simulated_talk(
    context: Context, url: str, line: str, users: Users, tasks: list[str], turn: str, key: str = ""
) -> Callable[[Version], TalkReport]:
    """Users who will talk to the served line, each time the same ones for the same turn; `key` names the work that
    sends them: done again it doubles no vote, other work gets votes of its own."""

    def meet(champion: Version) -> TalkReport:
        crowd = _crowd(users.count, context.recipe.seed, users, f"{turn}-user", teaching=True)
        questions = _questions(tasks, crowd, users.prompts, context.recipe.seed, turn)
        with context.runtime.progress.bar(f"{turn} talk", len(crowd) * users.prompts, "question") as bar:
            return talk(
                url, crowd, questions, line, seed=context.recipe.seed, each=users.prompts, turn=turn, key=key,
                concurrency=CROWD, on_done=lambda done, total: bar.update(),
            )  # fmt: skip

    return meet


def simulated_vote(
    context: Context, url: str, users: Users, rules: GateRules, tasks: list[str], turn: str, key: str = ""
) -> Callable[[Version, Version], Compared]:
    """Other users, on questions of the held-out split, who compare two versions blindly: some of them after the others,
    until the verdict about their votes is certain or all `rules.users` have been asked. When both are the same version,
    which measures the judges and not the models, a few of them."""

    def vote(candidate: Version, champion: Version) -> Compared:
        itself = candidate.name == champion.name
        crowd = _crowd(rules.users, context.recipe.seed + 1, users, f"{turn}-judge", teaching=False)
        crowd = crowd[:JUDGES_OF_JUDGES] if itself else crowd
        questions = items(tasks, "held_out", max(rules.prompts * 2, 20), context.recipe.seed)
        with context.runtime.progress.bar(f"{turn} gate", len(crowd) * rules.prompts, "comparison") as bar:

            def asked(some: list[SimulatedUser]) -> Compared:
                return compare(
                    url, some, questions, candidate.name, champion.name,
                    seed=context.recipe.seed, each=rules.prompts, turn=turn, key=key, temperature=rules.temperature,
                    concurrency=CROWD, on_done=lambda done, total: bar.update(),
                )  # fmt: skip

            return _until_certain(asked, crowd, itself)

    return vote


def _until_certain(ask: Callable[[list[T]], Compared], whom: list[T], itself: bool, wanted: float = WANTED) -> Compared:
    """Asks some after the others until the verdict is certain; a version against itself (`itself`) asks them all."""
    found: list[Compared] = []
    for first in range(0, len(whom), JUDGES_AT_ONCE):
        found.append(ask(whom[first : first + JUDGES_AT_ONCE]))
        said = [comparison for some in found for comparison in some.comparisons]
        if not itself and vote_test(said, wanted=wanted).decision != "undecided":
            break
    return Compared.joined(found)


class Judging(Protocol):
    """A model that judges: behind a URL (`prairie.evals.judge`), or a reward model (`reward_judge`)."""

    def opinions(self, pairs: Sequence[tuple[str, str, str]]) -> list[Opinion]:
        """Of (question, first answer, second answer)."""


def judged_vote(
    context: Context,
    judge: Judging,
    rules: GateRules,
    tasks: list[str],
    max_tokens: int = 48,
    accuracy: Interval | None = None,
) -> Callable[[Version, Version], Compared]:
    """A model judges instead of people: held-out questions, each of them one unit, answered by both versions as they
    are served, until the verdict is certain or `rules.users` questions have been asked, or all that the tasks have. It
    compares as many pairs of answers to each as a person would compare questions (`rules.prompts`), so that the number
    planned for people is the number of questions. `accuracy`: how often the judge agrees with people it does not know,
    where that was measured (see `gate.as_judged`)."""

    def vote(candidate: Version, champion: Version) -> Compared:
        itself = candidate.name == champion.name
        drawn = items(tasks, "held_out", -(-4 * rules.users // len(tasks)), context.recipe.seed, distinct=False)
        asked = list({item.id: item for item in drawn}.values())[: rules.users]
        asked = asked[:JUDGES_AT_ONCE] if itself else asked
        store = context.home.artifacts
        new, old = (load_language_model(store.get(v.artifact_id), context.runtime) for v in (candidate, champion))
        seeds = itertools.count(context.recipe.seed, JUDGES_AT_ONCE * rules.prompts)

        def answered(some: list[Item]) -> Compared:
            seed = next(seeds)
            some = [item for item in some for _ in range(rules.prompts)]
            talks = [[Message("user", item.prompt)] for item in some]
            a, b = (
                [c.text for c in model.generate(
                    talks, temperature=rules.temperature, max_tokens=max_tokens, seed=seed + side
                )]
                for model, side in ((new, 0), (old, 10**6))
            )  # fmt: skip
            opinions = judge.opinions([(i.prompt, x, y) for i, x, y in zip(some, a, b, strict=True)])
            said = [(item.id, f"{item.id}/{n}", o) for n, (item, o) in enumerate(zip(some, opinions, strict=True))]
            return Compared(
                [Comparison(question, pair, o.outcome) for question, pair, o in said],
                [Comparison(question, pair, o.shown_first) for question, pair, o in said],
                some, a, b, TalkReport(),
            )  # fmt: skip

        return _until_certain(answered, asked, itself, as_judged(WANTED, accuracy))

    return vote


def rules_for(rules: GateRules, accuracy: Interval) -> GateRules:
    """Rules under which a judge that is right so often is asked as many questions as it takes, if there are so many."""
    return rules.model_copy(update={"users": max(rules.users, _planned(rules, accuracy))})


def _planned(rules: GateRules, accuracy: Interval | None) -> int:
    return required_sample_size(as_judged(WANTED, accuracy), votes_per_user=rules.prompts)


def _at_equal_length(said: Compared) -> Probe:
    """A judge who likes length is not believed: the candidate must also win as it would at equal length."""
    lengths = [(len(a), len(b)) for a, b in zip(said.answers_a, said.answers_b, strict=True)]
    won = length_controlled([comparison.outcome for comparison in said.comparisons], lengths)
    return Probe("win rate at equal length", won, 0.5, 1.0)


def _crowd(count: int, seed: int, users: Users, prefix: str, *, teaching: bool) -> list[SimulatedUser]:
    """People of one kind: those whose names make them teachers, or those whose names make them judges."""
    pool = people(
        count * 6, seed, preference=cast(Style, users.preference), noise=users.noise, poisoned=users.poisoned,
        prefix=prefix,
    )  # fmt: skip
    chosen = [user for user in pool if is_held_out(user.name) != teaching]
    return chosen[:count]


def _questions(tasks: list[str], crowd: Sequence[SimulatedUser], each: int, seed: int, turn: str) -> list[Item]:
    """Training questions, so that what the suite asks stays unseen."""
    drawn = items(tasks, "train", max(40, each * 4), seed + sum(map(ord, turn)), distinct=False)
    return list({item.id: item for item in drawn}.values())


def _refused(dataset: TokenDataset) -> set[int]:
    return {int(fault["row"]) for fault in cast(Sequence[Mapping[str, Any]], dataset.figures["refused"])}
