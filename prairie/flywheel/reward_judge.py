"""A reward model as a judge: trained apart, on the votes of people who never teach a candidate.

It learns what some of the held-out people (`curate.is_held_out`) preferred and is tried on the others, on whom its
accuracy is measured; a judge that is not above chance with confidence is refused. It reads one answer at a time, so no
order can sway it. What it says of two answers stands for these people as far as its accuracy goes; where it errs at
random it draws win rates towards one half, which promotes nobody.
Not here: asking for the answers that it compares (`chat.judged_vote`), the verdict (`gate`), the loss
(`prairie.train.objectives.reward`; InstructGPT, arXiv 2203.02155).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prairie.data.loader import TokenDataset
from prairie.data.records import Message, Preference
from prairie.data.sources import write_records
from prairie.errors import DataError
from prairie.evals.judge import Opinion
from prairie.evals.statistics import Interval, clustered_interval
from prairie.flywheel.curate import curate, is_held_out
from prairie.pipeline.context import Context, code_revision
from prairie.pipeline.model_stages import Start, base_of, learn, open_start
from prairie.recipe import Learning
from prairie.store.artifacts import Artifact
from prairie.train.objective import every_batch, judging, row_scores

LEARN = Learning(epochs=3, tokens_per_batch=2048, lr=1e-3, weight_decay=0.0, max_tokens=512, on_long="truncate")
TRIED_SHARE = 1 / 3
"""Of the held-out people, on whom the judge is tried and from whom it does not learn."""
LEAST_PAIRS = 32
CODE = ("data", "models", "ops", "train", "flywheel/curate", "flywheel/reward_judge", "pipeline/model_stages")


@dataclass(frozen=True)
class RewardJudge:
    """A trained judge. `opinions` is that of `prairie.evals.judge.Judge`."""

    artifact: Artifact
    accuracy: Interval
    """Of people that it did not learn from: how often it prefers what they did; its units are people."""
    start: Start

    def opinions(self, pairs: Sequence[tuple[str, str, str]]) -> list[Opinion]:
        """Of (question, first answer, second answer); silence loses against words. `shown_first` is the outcome: of
        two answers of one model that must be a half on average."""
        spoken = [(q, a, b) for q, a, b in pairs if a.strip() and b.strip() and a != b]
        found = iter(_outcomes(self.start, [_pair(*three) for three in spoken]) if spoken else [])
        said = [
            next(found) if a.strip() and b.strip() and a != b else (bool(a.strip()) - bool(b.strip()) + 1) / 2
            for _, a, b in pairs
        ]
        return [Opinion(outcome, outcome) for outcome in said]


def _pair(question: str, first: str, second: str) -> Preference:
    return Preference(
        (Message("user", question),), (Message("assistant", first),), (Message("assistant", second),), "judged"
    )


def train_reward_judge(context: Context, line: str) -> RewardJudge:
    """The judge of a line as it is today: the one that was made of these votes, or a new one. Raises DataError when the
    votes are too few, or when what it learnt is not better than chance."""
    home = context.home
    votes = [v for v in home.feedback.votes(line=line, purpose="chat") if is_held_out(v.event.user or "")]
    teaching, tried = (
        [vote for vote in votes if is_held_out(f"tried {vote.event.user}", TRIED_SHARE) == on_trial]
        for on_trial in (False, True)
    )
    pairs, asked = curate(teaching).pairs, curate(tried).pairs
    if min(len(pairs), 2 * len(asked)) < LEAST_PAIRS:
        raise DataError(
            f"the people who judge `{line}` have voted too little to train a judge",
            got=f"{len(pairs)} preferences to learn from, {len(asked)} to try it on",
            wanted=f"at least {LEAST_PAIRS} and {LEAST_PAIRS // 2}", mend="judge by people: leave `--judge` out",
        )  # fmt: skip
    champion = home.registry.champion(line)
    assert champion is not None
    base = home.artifacts.get(champion.base_artifact_id or champion.artifact_id)
    artifact = _trained(context, line, base, pairs, asked)
    accuracy = Interval(**artifact.figures["accuracy_on_others"])
    if accuracy.low <= 0.5:
        raise DataError(
            f"the reward model of `{line}` does not judge better than chance",
            got=f"right on {accuracy.value:.0%} [{accuracy.low:.0%}, {accuracy.high:.0%}] of the preferences of"
            f" {accuracy.n} people it did not learn from",
            wanted="an interval above 50%", mend="judge by people: leave `--judge` out, or let more people vote",
        )  # fmt: skip
    return RewardJudge(artifact, accuracy, open_start(artifact))


def _trained(
    context: Context, line: str, base: Artifact, pairs: Sequence[Preference], asked: Sequence[Preference]
) -> Artifact:
    """The artifact of a judge; its figures hold the accuracy on `asked`."""
    home, store = context.home, context.home.artifacts
    events = list(dict.fromkeys(event for pair in pairs for event in pair.tags["events"]))
    tried = list(dict.fromkeys(event for pair in asked for event in pair.tags["events"]))
    config: dict[str, Any] = {
        "line": line, "events": events, "tried_on": tried, "seed": context.recipe.seed,
        **LEARN.model_dump(mode="json"),
    }  # fmt: skip
    code = code_revision(CODE)
    id = store.id_of("judge", config, [base.id], code)
    if (found := store.find(id)) is not None:
        return found
    figures: dict[str, Any] = {}
    with (
        home.working(id) as scratch,
        store.create("judge", f"judge-{line}", config, [base.id], code, figures=figures, events=events) as folder,
    ):
        start = open_start(base)
        figures.update(learn(
            LEARN, "reward", pairs, start, base_of(base), folder, scratch, context.runtime, f"judge-{line}",
            kept=home.references,
        ))  # fmt: skip
        right = _outcomes(start, asked)
        accuracy = clustered_interval(right, [str(pair.tags["user"]) for pair in asked])
        figures["accuracy_on_others"] = accuracy.to_json()
        write_records(folder / "tried.jsonl", asked)
        (folder / "accuracy.json").write_text(json.dumps(accuracy.to_json()) + "\n", encoding="utf-8")
    return store.get(id)


def _outcomes(start: Start, pairs: Sequence[Preference]) -> list[float]:
    """Of each pair: 1 the first answer scores higher, 0 the second, 1/2 neither."""
    assert start.template is not None
    dataset = TokenDataset.from_preferences(pairs, start.template, start.model.config.max_context, on_long="truncate")
    dataset.check_refused(0.0)
    scores_R = torch.zeros(len(dataset.offsets) - 1)
    with judging(start.model, start.adapters):
        for batch in every_batch(dataset, 8192):
            scores_R[batch.rows] = row_scores(start.model, batch, start.adapters)[:, 0].cpu()
    return [float(value) for value in (torch.sign(scores_R[0::2] - scores_R[1::2]) + 1) / 2]
